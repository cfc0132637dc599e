//! Volumes of the host, mounted by NFS.
//!
//! mount(2) is called directly, with the options that upstream gives mount.nfs(8): the image needs
//! no helper programs, only a kernel with the NFS client. What mount.nfs would do besides is to
//! start `rpc.statd` for locks; where the image runs none, programs that lock files on a volume get
//! ENOLCK.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::sys::procfs;

/// The most volumes of one sandbox.
pub const MAX_VOLUMES: usize = 64;
/// What upstream mounts with. `fg` among its options is for mount.nfs alone, and `sync` is a flag.
const OPTIONS: &str = "hard,rsize=1048576,wsize=1048576,mountproto=tcp,mountport=2049,proto=tcp,\
    port=2049,vers=3,noacl,noac,lookupcache=none";
const MOUNT_TABLE: &str = "/proc/self/mountinfo";

/// A volume to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// `HOST:/EXPORT`.
    pub target: String,
    /// Where it shall be.
    pub path: PathBuf,
}

/// Why a volume is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum NfsError {
    /// The target is not `HOST:/EXPORT`.
    #[error("'{0}' is no NFS target: write HOST:/EXPORT")]
    Target(String),
    /// The path is not absolute, or has `..` in it.
    #[error("'{0}' is no absolute path")]
    Path(String),
    /// Too many at once.
    #[error("{0} volumes: at most {MAX_VOLUMES} can be mounted")]
    TooMany(usize),
    /// A step failed.
    #[error("{what} '{path}': {source}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Which volumes are mounted for which life of the sandbox: a volume is mounted again when the
/// sandbox begins another.
#[derive(Debug, Default)]
pub struct Ledger(HashMap<PathBuf, String>);

impl Volume {
    /// Checks the form of a volume.
    ///
    /// # Errors
    /// [`NfsError::Target`], [`NfsError::Path`].
    pub fn new(target: String, path: String) -> Result<Self, NfsError> {
        if !matches!(split(&target), Some((host, export)) if !host.is_empty() && export.starts_with('/'))
            || target.contains([',', '\0'])
        {
            return Err(NfsError::Target(target));
        }
        let parsed = Path::new(&path);
        let goes_up = parsed.components().any(|part| part == std::path::Component::ParentDir);
        if !parsed.is_absolute() || goes_up || path.contains('\0') || parsed.parent().is_none() {
            return Err(NfsError::Path(path));
        }
        Ok(Self { target, path: parsed.components().collect() })
    }
}

/// Mounts what is not mounted yet in this life, and says how many that were. Blocks, for as long as
/// the server lets the kernel wait.
///
/// # Errors
/// The first [`NfsError`]; the other volumes are tried all the same.
pub fn mount_all(
    volumes: &[Volume],
    life: Option<&str>,
    ledger: &mut Ledger,
) -> Result<usize, NfsError> {
    let life = life.unwrap_or_default();
    let (mut news, mut failed) = (0, None);
    for volume in volumes {
        let known = ledger.0.get(&volume.path).is_some_and(|of| of == life);
        if known && is_mounted(&volume.path) {
            continue;
        }
        match remount(volume) {
            Ok(()) => {
                ledger.0.insert(volume.path.clone(), life.to_owned());
                news += 1;
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(news), Err)
}

fn remount(volume: &Volume) -> Result<(), NfsError> {
    let path = &volume.path;
    let at =
        |what, source: io::Error| NfsError::Step { what, path: path.display().to_string(), source };
    if is_mounted(path) && umount2(path, MntFlags::MNT_FORCE).is_err() {
        // It is in use: out of the way at once, gone when it is not used any more.
        umount2(path, MntFlags::MNT_DETACH).map_err(|error| at("unmount", error.into()))?;
    }
    fs::create_dir_all(path).map_err(|error| at("make", error))?;
    let address = address(&volume.target).map_err(|error| at("find the server of", error))?;
    let options = options(address);
    mount(
        Some(volume.target.as_str()),
        path,
        Some("nfs"),
        MsFlags::MS_SYNCHRONOUS,
        Some(options.as_str()),
    )
    .map_err(|error| at("mount", error.into()))
}

/// The kernel looks up no names: it is told the address.
fn options(address: IpAddr) -> String {
    format!("{OPTIONS},addr={address},mountaddr={address}")
}

fn address(target: &str) -> io::Result<IpAddr> {
    let none = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let (host, _) = split(target).ok_or_else(none)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.parse() {
        Ok(address) => Ok(address),
        Err(_) => Ok((host, 2049).to_socket_addrs()?.next().ok_or_else(none)?.ip()),
    }
}

/// Host and export; an IPv6 address stands in brackets.
fn split(target: &str) -> Option<(&str, &str)> {
    let colon = match target.starts_with('[') {
        true => target.find("]:")? + 1,
        false => target.find(':')?,
    };
    Some((target.get(..colon)?, target.get(colon + 1..)?))
}

/// Whether something is mounted exactly there (proc_pid_mountinfo(5): the fifth field).
fn is_mounted(path: &Path) -> bool {
    let table = fs::read(MOUNT_TABLE).unwrap_or_default();
    procfs::mountinfo(&table).any(|mount| mount.mount_point == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_paths() {
        for (target, path, good) in [
            ("host:/export", "/mnt/a", true),
            ("10.0.0.1:/", "/mnt/a", true),
            ("[fd00::1]:/x", "/mnt/a b", true),
            ("host", "/mnt", false),
            (":/x", "/mnt", false),
            ("host:x", "/mnt", false),
            ("host:/x,addr=1.1.1.1", "/mnt", false),
            ("host:/x", "mnt", false),
            ("host:/x", "/mnt/../etc", false),
            ("host:/x", "/", false),
            ("host:/x", "", false),
        ] {
            let volume = Volume::new(target.to_owned(), path.to_owned());
            assert_eq!(volume.is_ok(), good, "{target} {path}");
        }
        assert_eq!(address("[::1]:/x").unwrap(), "::1".parse::<IpAddr>().unwrap());
        assert!(
            options("10.0.0.1".parse().unwrap()).ends_with("none,addr=10.0.0.1,mountaddr=10.0.0.1")
        );
    }

    #[test]
    fn what_is_mounted() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(Path::new("/proc/self")));
    }
}
