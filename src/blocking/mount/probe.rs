//! Probes: threads that ask a file system for what its server has to answer.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
};

use super::{ANSWERED, Probe, REGISTRY, id_of, mount_table, now};
use crate::sys::{fs_credentials, mounts};

const DIR: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC).union(OFlag::O_DIRECTORY);

/// What a probe asks for the attributes of.
pub(super) enum Target {
    Fd(OwnedFd),
    Path(PathBuf),
}

/// Starts the thread of a probe.
pub(super) fn start(id: u64, target: Target) -> io::Result<()> {
    let probe = std::thread::Builder::new().name("envd-probe".to_owned());
    probe.spawn(move || run(id, &target)).map(drop)
}

/// The life of a probe's thread. Whatever the file system says is an answer.
fn run(id: u64, target: &Target) {
    // A job that acts as a user may have started it, and a refusal to that user is no answer.
    let _ = fs_credentials::begin_thread();
    let _ = match target {
        Target::Fd(fd) => mounts::ask(fd.as_fd()),
        Target::Path(path) => open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .and_then(|fd| mounts::ask(fd.as_fd())),
    };
    // Elsewhere the kernel has the answer, or the name starts a mount (autofs).
    let may_look_up = mount_table::looks_names_up_elsewhere(id);
    let mut registry = REGISTRY.lock();
    let mut looks_up = false;
    if let Some(mount) = registry.mounts.get_mut(&id) {
        mount.probe = Probe::Answered { at: now() };
        looks_up = may_look_up && mount.lookup.is_none();
        if looks_up {
            mount.lookup = Some(now());
        }
    }
    registry.forget_if_unused(id);
    drop(registry);
    ANSWERED.notify_all();
    if !looks_up {
        return;
    }
    look_up(id, target);
    let mut registry = REGISTRY.lock();
    if let Some(mount) = registry.mounts.get_mut(&id) {
        mount.lookup = None;
    }
    registry.forget_if_unused(id);
    drop(registry);
    ANSWERED.notify_all();
}

/// Looks up a name that is not there, in the root of the mount: a call that changes a directory keeps
/// others out of it for as long as it takes, and that root is where fewest are.
fn look_up(id: u64, target: &Target) {
    let root = mount_table::point_of(id).and_then(|point| open(&point, DIR, Mode::empty()).ok());
    let root = root.filter(|root| id_of(root.as_fd()) == Some(id));
    let dir = match (&root, target) {
        (Some(root), _) => root.as_fd(),
        (None, Target::Fd(fd)) => fd.as_fd(),
        (None, Target::Path(_)) => return,
    };
    // Another name each time: the kernel remembers which are not there.
    let name = format!(".envd-probe-{:x}", now());
    let _ = openat(dir, name.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
}
