//! Where the daemon's control groups are: which directory is its to arrange, and what protects the
//! daemon there.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
    unistd::{AccessFlags, access},
};

use super::{CONTROLLERS, enable, files};
use crate::sys::procfs;

/// The daemon's own leaf. PID 1 uses the same name.
const DAEMON: &str = "envd";

/// What keeps the daemon alive and quick beside its commands: the figures of upstream's unit.
const PROTECTION: [(&str, &str); 4] = [
    ("memory.min", "52428800"),
    ("memory.low", "104857600"),
    ("cpu.weight", "1000"),
    ("io.weight", "default 10000"),
];

/// The marks that systemd puts on a control group that it leaves to a service.
const DELEGATED: [&str; 2] = ["user.delegate", "trusted.delegate"];

/// Finds the directory to work in, moves the daemon out of the way, hands the controllers down and
/// protects the daemon.
///
/// A group that systemd has delegated to the daemon comes first: everything else in its tree is
/// systemd's alone. Else it is the root, as upstream has it, where it can be written to; else the
/// group that the daemon was started in.
///
/// # Errors
/// Why there is none, for the caller of a limit.
pub(super) fn prepare(root: &Path) -> Result<PathBuf, String> {
    let shown = root.display();
    match statfs(root) {
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC => {}
        Ok(_) => return Err(format!("{shown} is no cgroup v2 file system")),
        Err(error) => return Err(format!("{shown} cannot be looked at: {error}")),
    }
    let own = own_group(root);
    // After a restart in place it is in its leaf already.
    let above = own.as_ref().map(|own| match (own.file_name(), own.parent()) {
        (Some(name), Some(parent)) if name == DAEMON && own != root => parent.to_owned(),
        _ => own.clone(),
    });
    let delegated = above.clone().filter(|above| above != root && is_delegated(above));
    let base = delegated
        .or_else(|| (is_writable(root) && is_ours(root)).then(|| root.to_owned()))
        .or_else(|| above.filter(|above| is_writable(above) && is_ours(above)))
        .ok_or_else(|| format!("neither {shown} nor the daemon's own group in it is writable"))?;

    let leaf = base.join(DAEMON);
    if own.as_ref() == Some(&base) {
        // The kernel hands no controllers down from a group that has processes itself.
        let moved = files::make(&leaf)
            .and_then(|()| files::write(&leaf, "cgroup.procs", &std::process::id().to_string()));
        if let Err(error) = moved {
            tracing::warn!(leaf = %leaf.display(), %error, "the daemon cannot be moved into its own control group");
        }
    }
    enable(&base, &CONTROLLERS);
    if own.is_some_and(|own| own == base || own == leaf) {
        for (file, value) in PROTECTION {
            if let Err(error) = files::write(&leaf, file, value) {
                tracing::debug!(file, %error, "not protected by this");
            }
        }
    }
    Ok(base)
}

/// The directory of the group that the daemon is in, if it is below `root`.
fn own_group(root: &Path) -> Option<PathBuf> {
    let path = procfs::unified_cgroup(&fs::read("/proc/self/cgroup").ok()?)?;
    let path = path.strip_prefix("/").ok()?;
    let dir = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(path) };
    // The path is that of the mount; another mount, or a part of one, may be called the root.
    let pid = std::process::id().to_string();
    let here = fs::read_to_string(dir.join("cgroup.procs")).ok()?;
    here.lines().any(|line| line == pid).then_some(dir)
}

fn is_delegated(dir: &Path) -> bool {
    DELEGATED.iter().any(|name| {
        xattr::get(dir, name).is_ok_and(|value| value.is_some_and(|value| value == b"1"))
    }) && is_writable(dir)
}

fn is_writable(dir: &Path) -> bool {
    [dir.to_owned(), dir.join("cgroup.procs"), dir.join("cgroup.subtree_control")]
        .iter()
        .all(|path| access(path, AccessFlags::W_OK).is_ok())
}

/// A container that sees the machine's root group must not rearrange it: processes from outside
/// our PID namespace show as 0 there.
fn is_ours(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.procs"))
        .is_ok_and(|pids| pids.lines().all(|pid| pid != "0"))
}
