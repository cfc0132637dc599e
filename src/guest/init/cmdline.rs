//! The kernel's command line: what the host asks of PID 1.
//!
//! Words that begin with `envd.` are ours, and `ro` and `rw` are read along. The kernel takes a
//! word with a dot for a module's parameter and passes it on to nobody, so they must be read here.

use std::{net::Ipv4Addr, path::PathBuf};

use nix::mount::MsFlags;

/// The longest name of a host, as `sethostname(2)` has it.
const MAX_HOSTNAME: usize = 64;
/// The longest name of an interface: `IFNAMSIZ` less its NUL.
const MAX_INTERFACE: usize = libc::IFNAMSIZ - 1;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Params {
    /// `envd.root=`: the device with the real root file system.
    pub(super) root: Option<PathBuf>,
    /// `envd.rootfstype=`: its type; by default each that the kernel knows is tried.
    pub(super) root_type: Option<String>,
    /// `envd.rootflags=`: its mount options.
    pub(super) root_flags: Option<String>,
    /// `ro`: mount it read-only. The last of `ro` and `rw` counts.
    pub(super) read_only: bool,
    /// `envd.init=`: what to execute on it; by default `/sbin/init`.
    pub(super) init: Option<PathBuf>,
    /// `envd.handover=`: the init that PID 1 becomes once the daemon runs.
    pub(super) handover: Option<PathBuf>,
    /// `envd.hostname=`.
    pub(super) hostname: Option<String>,
    /// `envd.ip=ADDRESS/PREFIX`.
    pub(super) address: Option<(Ipv4Addr, u8)>,
    /// `envd.gateway=`.
    pub(super) gateway: Option<Ipv4Addr>,
    /// `envd.dev=`: the interface that gets the address; by default the first that is no loopback.
    pub(super) interface: Option<String>,
}

/// A parameter that is ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value} on the kernel's command line is ignored: {why}")]
pub(super) struct BadParam {
    name: String,
    value: String,
    why: &'static str,
}

impl Params {
    /// Reads the command line, with what is wrong about it.
    pub(super) fn parse(line: &str) -> (Self, Vec<BadParam>) {
        let mut params = Self::default();
        let mut bad = Vec::new();
        for word in words(line) {
            match word.as_str() {
                "ro" => params.read_only = true,
                "rw" => params.read_only = false,
                _ => {}
            }
            let (name, value) = word.split_once('=').unwrap_or((&word, ""));
            if name.starts_with("envd.")
                && let Err(why) = params.set(name, value)
            {
                bad.push(BadParam { name: name.to_owned(), value: value.to_owned(), why });
            }
        }
        (params, bad)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        match name {
            "envd.root" => self.root = Some(absolute(value)?),
            "envd.rootfstype" => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
                if value.is_empty() || !value.bytes().all(plain) {
                    return Err("it is no type of file system");
                }
                self.root_type = Some(value.to_owned());
            }
            "envd.rootflags" => self.root_flags = Some(value.to_owned()),
            "envd.init" => self.init = Some(absolute(value)?),
            "envd.handover" => self.handover = Some(absolute(value)?),
            "envd.hostname" => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
                let fits = (1..=MAX_HOSTNAME).contains(&value.len());
                if !fits || value.starts_with('-') || !value.bytes().all(plain) {
                    return Err("it is no host name");
                }
                self.hostname = Some(value.to_owned());
            }
            "envd.ip" => {
                let why = "it is not of the form ADDRESS/PREFIX, such as 10.0.2.15/24";
                let (address, prefix) = value.split_once('/').ok_or(why)?;
                let prefix = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix));
                self.address = Some((address.parse().map_err(|_| why)?, prefix.ok_or(why)?));
            }
            "envd.gateway" => {
                self.gateway = Some(value.parse().map_err(|_| "it is no IPv4 address")?);
            }
            "envd.dev" => {
                let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
                let fits = (1..=MAX_INTERFACE).contains(&value.len());
                if !fits || !value.bytes().all(plain) {
                    return Err("it is no name of an interface");
                }
                self.interface = Some(value.to_owned());
            }
            _ => return Err("there is no such parameter"),
        }
        Ok(())
    }

    /// How to mount the root: flags, and the options that are the file system's own.
    pub(super) fn root_options(&self) -> (MsFlags, String) {
        let mut flags = MsFlags::empty();
        flags.set(MsFlags::MS_RDONLY, self.read_only);
        let mut own = Vec::new();
        for option in self.root_flags.as_deref().unwrap_or_default().split(',') {
            match option {
                "" | "defaults" => {}
                "ro" => flags.insert(MsFlags::MS_RDONLY),
                "rw" => flags.remove(MsFlags::MS_RDONLY),
                "nosuid" => flags.insert(MsFlags::MS_NOSUID),
                "nodev" => flags.insert(MsFlags::MS_NODEV),
                "noexec" => flags.insert(MsFlags::MS_NOEXEC),
                "sync" => flags.insert(MsFlags::MS_SYNCHRONOUS),
                "dirsync" => flags.insert(MsFlags::MS_DIRSYNC),
                "noatime" => flags.insert(MsFlags::MS_NOATIME),
                "nodiratime" => flags.insert(MsFlags::MS_NODIRATIME),
                "relatime" => flags.insert(MsFlags::MS_RELATIME),
                "strictatime" => flags.insert(MsFlags::MS_STRICTATIME),
                other => own.push(other),
            }
        }
        (flags, own.join(","))
    }
}

fn absolute(value: &str) -> Result<PathBuf, &'static str> {
    match value.starts_with('/') {
        true => Ok(PathBuf::from(value)),
        false => Err("it is no absolute path"),
    }
}

/// The words of a command line. Double quotes keep spaces in a word, as in the kernel; what comes
/// behind `--` is for init, and not read here.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in line.trim_end().chars().chain([' ']) {
        match character {
            '"' => quoted = !quoted,
            space if space.is_ascii_whitespace() && !quoted => {
                if word == "--" {
                    return words;
                }
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            other => word.push(other),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_can_be_asked_for() {
        let (params, bad) = Params::parse(
            "console=ttyS0 quiet envd.root=/dev/vda envd.rootfstype=ext4 rw ro \
             envd.rootflags=noatime,data=ordered,nodev envd.init=/sbin/envd-init \
             envd.handover=/lib/systemd/systemd envd.hostname=box-1 envd.ip=10.0.2.15/24 \
             envd.gateway=10.0.2.2 envd.dev=eth0 -- envd.hostname=late\n",
        );
        assert_eq!(bad, []);
        let (flags, own) = params.root_options();
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME | MsFlags::MS_NODEV);
        assert_eq!(own, "data=ordered");
        let expected = Params {
            root: Some("/dev/vda".into()),
            root_type: Some("ext4".into()),
            root_flags: Some("noatime,data=ordered,nodev".into()),
            read_only: true,
            init: Some("/sbin/envd-init".into()),
            handover: Some("/lib/systemd/systemd".into()),
            hostname: Some("box-1".into()),
            address: Some(([10, 0, 2, 15].into(), 24)),
            gateway: Some([10, 0, 2, 2].into()),
            interface: Some("eth0".into()),
        };
        assert_eq!(params, expected);
        assert_eq!(Params::parse("root=/dev/vda splash rw"), (Params::default(), vec![]));
    }

    #[test]
    fn bad_values_are_named_and_ignored() {
        for word in [
            "envd.root=vda",
            "envd.root",
            "envd.rootfstype=a/b",
            "envd.init=",
            "envd.handover=systemd",
            "envd.hostname=",
            "envd.hostname=-a",
            "envd.hostname=a_b",
            "envd.ip=10.0.2.15",
            "envd.ip=10.0.2.15/33",
            "envd.ip=10.0.2.15/0",
            "envd.ip=::1/64",
            "envd.gateway=10.0.2",
            "envd.dev=a/b",
            "envd.dev=sixteencharacter",
            "envd.unknown=1",
        ] {
            let (params, bad) = Params::parse(word);
            assert_eq!(params, Params::default(), "{word}");
            let [bad] = &bad[..] else { panic!("{word}: {bad:?}") };
            assert!(bad.to_string().starts_with(word), "{bad}");
        }
        let (params, bad) = Params::parse("envd.hostname=good envd.ip=bad");
        assert_eq!((params.hostname.as_deref(), bad.len()), (Some("good"), 1));
    }

    #[test]
    fn quotes_keep_a_word_together() {
        assert_eq!(words(" a  \"b c\" d=\"e f\"\n"), ["a", "b c", "d=e f"]);
        assert!(words("").is_empty());
        assert_eq!(words("a \"unclosed b"), ["a"], "an unclosed quote is no word");
    }
}
