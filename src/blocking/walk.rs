//! The way to a path, one name at a time, so that a mount on it is known before it is entered.
//!
//! This is about which mount a path leads to, not about who may go there: whoever then opens the
//! path resolves it again.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
};

use nix::{
    fcntl::{OFlag, open, openat, readlinkat},
    sys::stat::Mode,
};

use super::{
    mount::{MountBusy, MountId, stand_on, stand_on_also_again},
    mount_table,
};

/// The links that are followed, the kernel's number. What has more fails in the caller's own call.
const MAX_LINKS: usize = 40;

/// Whether there is a mount besides `/` that could stop answering: what a program, another machine or
/// a disk serves. Without one, nothing here costs anything.
pub fn can_mounts_hang() -> bool {
    mount_table::is_any_risky()
}

/// As [`can_mounts_hang`], of mounts that a program or another machine serves only.
pub fn can_servers_hang() -> bool {
    mount_table::is_any_served()
}

/// Declares the mount of everything on the way to an absolute path, links followed, and last that of
/// what is there ([`stand_on`]). Where the way ends early (nothing there, no rights) it ends too: the
/// caller's own call says why. It costs nothing while no mount but `/` could stop answering.
///
/// # Errors
/// [`MountBusy`] when the way leads through or to a mount that does not answer.
pub fn stand_on_path(path: &Path) -> Result<(), MountBusy> {
    if !mount_table::is_any_risky() {
        super::progress();
        return Ok(());
    }
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let root = || open("/", flags | OFlag::O_DIRECTORY, Mode::empty()).ok();
    let Some(mut at) = root() else {
        return Ok(());
    };
    stand_on(at.as_fd())?;
    let mut todo = names_backwards(path.as_os_str());
    let mut links = 0;
    while let Some(name) = todo.pop() {
        let Ok(next) = openat(&at, name.as_os_str(), flags | OFlag::O_NOFOLLOW, Mode::empty())
        else {
            return Ok(());
        };
        stand_on(next.as_fd())?;
        let Some(target) = target_of(&next) else {
            at = next;
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Ok(());
        }
        if target.as_bytes().first() == Some(&b'/') {
            let Some(root) = root() else {
                return Ok(());
            };
            at = root;
        }
        stand_on(at.as_fd())?;
        todo.append(&mut names_backwards(&target));
    }
    Ok(())
}

/// As [`stand_on_path`], for work between two paths.
///
/// # Errors
/// [`MountBusy`].
pub fn stand_on_paths(one: &Path, other: &Path) -> Result<(), MountBusy> {
    stand_on_path(one)?;
    stand_on_path_also(other)
}

/// As [`stand_on_path`], and still on the mounts that were declared before.
///
/// # Errors
/// [`MountBusy`].
pub fn stand_on_path_also(path: &Path) -> Result<(), MountBusy> {
    let before: Vec<_> = MountId::all().collect();
    stand_on_path(path)?;
    before.into_iter().try_for_each(stand_on_also_again)
}

/// Where a symbolic link leads; None for what is no link.
fn target_of(fd: &OwnedFd) -> Option<OsString> {
    readlinkat(fd, "").ok()
}

/// The names of a path, the last first. `.` and slashes do not count.
fn names_backwards(path: &OsStr) -> Vec<OsString> {
    let names = path.as_bytes().split(|byte| *byte == b'/');
    let names = names.filter(|name| !name.is_empty() && *name != b".");
    let mut names: Vec<_> = names.map(|name| OsString::from_vec(name.to_vec())).collect();
    names.reverse();
    names
}
