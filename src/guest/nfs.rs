//! Volumes of the host, mounted by NFS.
//!
//! mount(2) is called directly, with the options that upstream gives mount.nfs(8): the image needs
//! no helper programs, only a kernel with the NFS client. `nolock` comes on top: the host's proxy has
//! no lock manager, so locks are local to the sandbox, and no `rpc.statd` is needed.
//!
//! A server that does not answer can keep a thread in mount(2), and every lookup that enters a mount
//! of it. So what is mounted is looked up by [`table`], which never enters a mount, and [`ledger`]
//! remembers what is mounted where, so that a volume is not looked for again.

mod ledger;
mod table;

use std::{
    fs, io,
    net::{IpAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub use ledger::{Claim, Ledger};

/// The most volumes of one sandbox.
pub const MAX_VOLUMES: usize = 64;
/// The most bytes of a target or of a path, without the NUL at its end (PATH_MAX of the kernel).
pub const MAX_PATH_BYTES: usize = 4095;
/// What upstream mounts with, and `nolock`. `fg` among its options is for mount.nfs alone, and `sync`
/// is a flag.
const OPTIONS: &str = "hard,nolock,rsize=1048576,wsize=1048576,mountproto=tcp,mountport=2049,\
    proto=tcp,port=2049,vers=3,noacl,noac,lookupcache=none";

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
    /// A target or a path is longer than the kernel takes.
    #[error("the {0} of a volume has more than {MAX_PATH_BYTES} bytes")]
    TooLong(&'static str),
    /// Two volumes at one place.
    #[error("'{0}' is the path of two volumes")]
    Twice(String),
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

impl Volume {
    /// Checks the form of a volume.
    ///
    /// # Errors
    /// [`NfsError::Target`], [`NfsError::Path`], [`NfsError::TooLong`].
    pub fn new(target: String, path: String) -> Result<Self, NfsError> {
        for (field, text) in [("nfs_target", &target), ("path", &path)] {
            if text.len() > MAX_PATH_BYTES {
                return Err(NfsError::TooLong(field));
            }
        }
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

/// Volumes in groups that can be mounted in parallel: a volume whose path lies below that of another
/// is in the group of that one, and behind it.
pub fn groups(mut volumes: Vec<Volume>) -> Vec<Vec<Volume>> {
    // By components, so that what lies below a path directly follows it.
    volumes.sort_by(|a, b| a.path.cmp(&b.path));
    let mut groups: Vec<Vec<Volume>> = Vec::new();
    for volume in volumes {
        match groups.last_mut() {
            Some(group) if group.first().is_some_and(|top| volume.path.starts_with(&top.path)) => {
                group.push(volume);
            }
            _ => groups.push(vec![volume]),
        }
    }
    groups
}

/// Mounts what is not mounted yet in this life, one after the other, and says how many that were.
/// Blocks, for as long as the server lets the kernel wait.
///
/// # Errors
/// The first [`NfsError`]; the other volumes are tried all the same.
pub fn mount_all(claims: Vec<Claim>, life: &str) -> Result<usize, NfsError> {
    let (mut news, mut failed) = (0, None);
    for claim in claims {
        match claim.mount(life) {
            Ok(is_new) => news += usize::from(is_new),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(news), Err)
}

/// Mounts a volume, in place of what is mounted there; says where that is, behind all links.
fn remount(volume: &Volume) -> Result<PathBuf, NfsError> {
    let at = |what, source: io::Error| NfsError::Step {
        what,
        path: volume.path.display().to_string(),
        source,
    };
    let path = table::behind_links(&volume.path).map_err(|error| at("find", error))?;
    if table::is_mounted(&path) {
        let no_follow = MntFlags::UMOUNT_NOFOLLOW;
        if umount2(&path, MntFlags::MNT_FORCE | no_follow).is_err() {
            // It is in use: out of the way at once, gone when it is not used any more.
            umount2(&path, MntFlags::MNT_DETACH | no_follow)
                .map_err(|error| at("unmount", error.into()))?;
        }
    }
    fs::create_dir_all(&path).map_err(|error| at("make", error))?;
    let address = address(&volume.target).map_err(|error| at("find the server of", error))?;
    let options = options(address);
    mount(
        Some(volume.target.as_str()),
        &path,
        Some("nfs"),
        MsFlags::MS_SYNCHRONOUS,
        Some(options.as_str()),
    )
    .map_err(|error| at("mount", error.into()))?;
    Ok(path)
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
        assert!(OPTIONS.split(',').any(|option| option == "nolock"));
        assert!(!OPTIONS.contains(' '));
        let long = "x".repeat(MAX_PATH_BYTES);
        for (target, path) in
            [(format!("h:/{long}"), "/a".to_owned()), ("h:/x".to_owned(), format!("/{long}"))]
        {
            assert!(matches!(Volume::new(target, path), Err(NfsError::TooLong(_))));
        }
    }

    #[test]
    fn what_lies_below_another_is_mounted_after_it() {
        let volume = |path: &str| Volume::new("h:/x".to_owned(), path.to_owned()).unwrap();
        let found = groups(["/m/b", "/m/a/x/y", "/m/a", "/m/a-b", "/m/a/x"].map(volume).to_vec());
        let paths = |group: &Vec<Volume>| {
            group.iter().map(|volume| volume.path.display().to_string()).collect::<Vec<_>>()
        };
        let found: Vec<_> = found.iter().map(paths).collect();
        assert_eq!(found, [vec!["/m/a", "/m/a/x", "/m/a/x/y"], vec!["/m/a-b"], vec!["/m/b"]]);
    }
}
