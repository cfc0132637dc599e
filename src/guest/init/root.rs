//! From an initramfs to the real root: wait for the device, mount it, move everything there, and
//! execute its init.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::{Component, Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    mount::{MsFlags, mount},
    sys::stat::Mode,
    unistd::{chdir, chroot},
};

use super::{cmdline::Params, console::say};
use crate::{guest::boot, sys::procfs};

/// How long the device may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks for it: there is no udev that would tell.
const PAUSE: Duration = Duration::from_millis(20);
/// Where the real root is mounted at first.
const NEW_ROOT: &str = "/newroot";
/// What is mounted already and moves along.
const MOVED: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];
const DEFAULT_INIT: &str = "/sbin/init";
/// The links of one path, as the kernel has it.
const MAX_LINKS: usize = 40;

/// What keeps PID 1 in the initramfs.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    /// The device did not appear.
    #[error("waiting for the device {0}: it has not appeared within {PATIENCE:?}")]
    Device(PathBuf),
    /// The device cannot be mounted.
    #[error("mounting {device} as {kind}: {source}")]
    Mount {
        /// The device.
        device: PathBuf,
        /// The type, or the types that were tried.
        kind: String,
        /// What the kernel said last.
        source: Errno,
    },
    /// There is no init on it.
    #[error("looking for {init} on the root file system: {source}")]
    Init {
        /// Its path there.
        init: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// It could not become the root.
    #[error("{step}: {source}")]
    Switch {
        /// What was attempted.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// Its init cannot be executed.
    #[error("executing {init}: {source}")]
    Exec {
        /// Its path.
        init: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Makes `device` the root and executes its init; returns only when that fails. `prepare` is
/// called when nothing but the execution is left to do.
pub(super) fn switch(
    device: &Path,
    params: &Params,
    kernel_us: u64,
    prepare: impl FnOnce(),
) -> RootError {
    let init = params.init.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_INIT));
    if let Err(error) = wait_for(device)
        .and_then(|()| mount_root(device, params))
        // Behind this point there is no way back, so it is checked before.
        .and_then(|()| check_init(&init))
        .and_then(|()| enter())
    {
        return error;
    }
    prepare();
    // The next stage, if it is envd again, must know when the first began.
    let source = Command::new(&init).env(boot::KERNEL_US, kernel_us.to_string()).exec();
    RootError::Exec { init, source }
}

fn wait_for(device: &Path) -> Result<(), RootError> {
    let start = Instant::now();
    while !device.exists() {
        if start.elapsed() >= PATIENCE {
            return Err(RootError::Device(device.to_owned()));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn mount_root(device: &Path, params: &Params) -> Result<(), RootError> {
    let kinds = match &params.root_type {
        Some(kind) => vec![kind.clone()],
        None => procfs::block_filesystems(&fs::read("/proc/filesystems").unwrap_or_default()),
    };
    let (flags, data) = params.root_options();
    // A mount on a directory that is missing fails, and says so.
    let _ = fs::create_dir_all(NEW_ROOT);
    let mut last = Errno::ENODEV;
    for kind in &kinds {
        let kind = Some(kind.as_str());
        match mount(Some(device), NEW_ROOT, kind, flags, Some(data.as_str())) {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    let kind = kinds.join(" or ");
    Err(RootError::Mount { device: device.to_owned(), kind, source: last })
}

/// Whether the new root has this init and it may be executed. Links are followed inside of the
/// new root, as they will be later: `/sbin/init` is one in most distributions.
fn check_init(init: &Path) -> Result<(), RootError> {
    let check = || -> io::Result<()> {
        let root = open(NEW_ROOT, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        match openat2(root, init, how) {
            Ok(file) => super::executable(&File::from(file).metadata()?),
            // Linux before 5.6. Nobody else changes anything at this time.
            Err(Errno::ENOSYS | Errno::EPERM) => {
                super::executable(&fs::symlink_metadata(resolve_in(Path::new(NEW_ROOT), init)?)?)
            }
            Err(error) => Err(error.into()),
        }
    };
    check().map_err(|source| RootError::Init { init: init.to_owned(), source })
}

/// Where a path leads inside of a root, as after a chroot(2) into it: also absolute links and `..` stay
/// inside.
fn resolve_in(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut at = PathBuf::new();
    let mut left: Vec<OsString> =
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let mut links = 0;
    while let Some(name) = left.pop() {
        match Path::new(&name).components().next() {
            Some(Component::Normal(_)) => {}
            Some(Component::RootDir) => {
                at.clear();
                continue;
            }
            Some(Component::ParentDir) => {
                at.pop();
                continue;
            }
            _ => continue,
        }
        let next = at.join(&name);
        match fs::read_link(root.join(&next)) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::ELOOP.into());
                }
                let parts = target.components().rev();
                left.extend(parts.map(|part| part.as_os_str().to_owned()));
            }
            // No link.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => at = next,
            Err(error) => return Err(error),
        }
    }
    Ok(root.join(at))
}

/// Moves the mounts and makes the new root the root.
fn enter() -> Result<(), RootError> {
    let mut moved = Vec::new();
    for from in MOVED {
        let to = format!("{NEW_ROOT}{from}");
        // Its init can mount what does not move.
        match move_mount(from, &to) {
            Ok(()) => moved.push((from, to)),
            Err(error) => say!("moving {from} to the new root: {error}"),
        }
    }
    let step = |step| move |source| RootError::Switch { step, source };
    let entered = chdir(NEW_ROOT)
        .map_err(step("entering the new root"))
        .and_then(|()| move_mount(".", "/").map_err(step("moving the new root to /")));
    if entered.is_err() {
        // Whoever looks at the failure needs them where they were.
        for (from, to) in moved.iter().rev() {
            let _ = move_mount(to, from);
        }
        let _ = chdir("/");
        return entered;
    }
    chroot(".").map_err(step("changing the root"))?;
    chdir("/").map_err(step("entering /"))
}

fn move_mount(from: &str, to: &str) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_inside_of_the_new_root() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        fs::create_dir_all(root.join("usr/lib/systemd")).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("usr/lib/systemd/systemd"), "").unwrap();
        for (target, link) in [
            ("usr/sbin", "sbin"),
            ("lib", "usr/sbin"),
            ("/usr/lib/systemd/systemd", "usr/lib/init"),
            ("../../../../usr/lib/../lib/init", "etc/init"),
            ("loop", "loop"),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let expected = root.join("usr/lib/systemd/systemd");
        for path in ["/sbin/init", "/etc/init", "sbin//./init", "/usr/lib/systemd/systemd"] {
            assert_eq!(resolve_in(root, Path::new(path)).unwrap(), expected, "{path}");
        }
        for path in ["/loop", "/none", "/sbin/none"] {
            resolve_in(root, Path::new(path)).unwrap_err();
        }
    }
}
