//! The host's name, the loopback, and one interface with one address.

use std::{fs, io, path::Path};

use super::{cmdline::Params, console::say};
use crate::sys::net::Control;

const LOOPBACK: &str = "lo";
const INTERFACES: &str = "/sys/class/net";

/// Sets up what was asked for; each failure is said.
pub(super) fn set_up(params: &Params) {
    if let Some(name) = &params.hostname
        && let Err(error) = nix::unistd::sethostname(name)
    {
        say!("setting the host name {name}: {error}");
    }
    let control = match Control::open() {
        Ok(control) => control,
        Err(error) => return say!("the network cannot be set up: {error}"),
    };
    if let Err(error) = control.bring_up(LOOPBACK) {
        say!("bringing up {LOOPBACK}: {error}");
    }
    if let Some((address, prefix)) = params.address {
        let Some(interface) = params.interface.clone().or_else(|| first(Path::new(INTERFACES)))
        else {
            return say!("there is no interface for the address {address}/{prefix}");
        };
        let set = control
            .set_address(&interface, address, prefix)
            .and_then(|()| control.bring_up(&interface));
        if let Err(error) = set {
            return say!("giving {interface} the address {address}/{prefix}: {error}");
        }
    }
    if let Some(gateway) = params.gateway {
        match control.set_gateway(gateway) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                say!("setting the gateway {gateway}: {error}");
            }
            _ => {}
        }
    }
}

/// The first interface that is no loopback, by name; one with a device before those that only
/// software makes, such as `dummy0`.
fn first(directory: &Path) -> Option<String> {
    let mut names: Vec<(bool, String)> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name != LOOPBACK)
        .map(|name| (!directory.join(&name).join("device").exists(), name))
        .collect();
    names.sort();
    names.into_iter().next().map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_interface_is_one_with_a_device() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(first(dir.path()), None);
        for name in ["lo", "dummy0", "eth1/device", "eth0/device"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        assert_eq!(first(dir.path()).as_deref(), Some("eth0"));
    }
}
