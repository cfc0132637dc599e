//! A directory that work below it never leaves, whatever is renamed or linked meanwhile.
//!
//! Names are resolved by openat2(2) with `RESOLVE_BENEATH`: the kernel refuses `..`, absolute links
//! and links that lead out, at the moment in which it opens. Links that stay inside are followed.
//! Kernels before 5.6, and filters that hide the call, get a walk over descriptors that follows no
//! link at all and takes no `..`: stricter, and as safe.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
    unistd::{Gid, Uid, fchownat},
};

/// How often a resolution is begun again that a rename elsewhere in the system has disturbed.
const MAX_TRIES: usize = 64;

/// Set for good once the kernel has said that it has no openat2.
static WITHOUT_OPENAT2: AtomicBool = AtomicBool::new(false);

/// The directory.
#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
    walk: bool,
}

impl Root {
    /// Takes the directory at `path`, links followed.
    pub(super) fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty())?;
        Ok(Self { fd, walk: false })
    }

    /// Opens what is at `relative`. A path that leads out is `EXDEV`.
    pub(super) fn open_at(
        &self,
        relative: &Path,
        flags: OFlag,
        mode: Mode,
    ) -> nix::Result<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC;
        if relative.as_os_str().is_empty() {
            return openat(&self.fd, ".", flags, mode);
        }
        if self.walk || WITHOUT_OPENAT2.load(Ordering::Relaxed) {
            return self.walk_to(relative, flags, mode);
        }
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        for _ in 0..MAX_TRIES {
            // It refuses a mode where nothing can be created.
            let mode = if flags.contains(OFlag::O_CREAT) { mode } else { Mode::empty() };
            let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
            match openat2(&self.fd, relative, how) {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // Of a filter, perhaps.
                Err(Errno::EPERM) => return self.walk_to(relative, flags, mode),
                Err(Errno::ENOSYS) => {
                    WITHOUT_OPENAT2.store(true, Ordering::Relaxed);
                    return self.walk_to(relative, flags, mode);
                }
                other => return other,
            }
        }
        self.walk_to(relative, flags, mode)
    }

    fn walk_to(&self, relative: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
        let mut names = Vec::new();
        for component in relative.components() {
            match component {
                Component::Normal(name) => names.push(name),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(Errno::EXDEV);
                }
            }
        }
        let Some(last) = names.pop() else {
            return openat(&self.fd, ".", flags, mode);
        };
        let step = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        for name in names {
            let from = at.as_ref().unwrap_or(&self.fd);
            at = Some(openat(from, name, step, Mode::empty())?);
        }
        openat(at.as_ref().unwrap_or(&self.fd), last, flags | OFlag::O_NOFOLLOW, mode)
    }

    /// Opens the directory that holds `relative`, made where it is missing, and gives the last name.
    /// `made` is told each new directory. `EINVAL` for a path without a name.
    pub(super) fn parent_of<'a>(
        &self,
        relative: &'a Path,
        mut made: impl FnMut(&OwnedFd, &OsStr) -> nix::Result<()>,
    ) -> nix::Result<(OwnedFd, &'a OsStr)> {
        let name = match relative.components().next_back() {
            Some(Component::Normal(name)) => name,
            Some(Component::ParentDir) => return Err(Errno::EXDEV),
            _ => return Err(Errno::EINVAL),
        };
        let above = relative.parent().unwrap_or_else(|| Path::new(""));
        Ok((self.make_dirs(above, &mut made)?, name))
    }

    /// Opens the directory `relative`, made where it is missing, with those above it.
    pub(super) fn make_dirs(
        &self,
        relative: &Path,
        made: &mut impl FnMut(&OwnedFd, &OsStr) -> nix::Result<()>,
    ) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        // The common case in one call.
        match self.open_at(relative, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {}
            other => return other,
        }
        let mut at = self.open_at(Path::new(""), flags, Mode::empty())?;
        let mut so_far = std::path::PathBuf::new();
        for component in relative.components() {
            so_far.push(component);
            let next = match self.open_at(&so_far, flags, Mode::empty()) {
                Err(Errno::ENOENT) => {
                    let Component::Normal(name) = component else {
                        return Err(Errno::ENOENT);
                    };
                    match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) => made(&at, name)?,
                        // Somebody else was faster, or it is a link to nowhere.
                        Err(Errno::EEXIST) => {}
                        Err(error) => return Err(error),
                    }
                    self.open_at(&so_far, flags, Mode::empty())?
                }
                other => other?,
            };
            at = next;
        }
        Ok(at)
    }

    #[cfg(test)]
    fn without_openat2(mut self) -> Self {
        self.walk = true;
        self
    }
}

/// Gives what was just made in a directory to its owner; without root it is so already. Whoever may
/// rename there could put a file of root's under the name: what is of another `kind` is `ESTALE`.
pub(super) fn own(
    dir: &impl AsFd,
    name: &OsStr,
    kind: SFlag,
    owner: (u32, u32),
) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(dir, name, flags, Mode::empty())?;
    if fstat(&made)?.st_mode & SFlag::S_IFMT.bits() != kind.bits() {
        return Err(Errno::ESTALE);
    }
    let (uid, gid) = (Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
    match fchownat(&made, "", uid, gid, AtFlags::AT_EMPTY_PATH) {
        Err(Errno::EPERM) if !nix::unistd::geteuid().is_root() => Ok(()),
        other => other,
    }
}

/// Whether a name is one name, and none that means another directory.
pub(super) fn is_name(name: &OsStr) -> bool {
    !matches!(name.as_bytes(), b"" | b"." | b"..") && !name.as_bytes().contains(&b'/')
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Read,
        os::unix::fs::symlink,
    };

    use super::*;

    fn read(root: &Root, path: &str) -> nix::Result<String> {
        let fd = root.open_at(Path::new(path), OFlag::O_RDONLY, Mode::empty())?;
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).map_err(|e| super::super::errno::of(&e))?;
        Ok(text)
    }

    #[test]
    fn nothing_leads_out_and_what_stays_inside_is_followed() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("root/a/b")).unwrap();
        fs::write(tmp.path().join("secret"), "secret").unwrap();
        fs::write(tmp.path().join("root/a/b/f"), "inside").unwrap();
        let at = |name: &str| tmp.path().join("root").join(name);
        symlink("a/b", at("link")).unwrap();
        symlink("../secret", at("up")).unwrap();
        symlink(tmp.path(), at("absolute")).unwrap();
        symlink("..", at("a/dots")).unwrap();

        let root = Root::open(&at("")).unwrap();
        assert_eq!(read(&root, "a/b/f").unwrap(), "inside");
        assert_eq!(read(&root, "link/f").unwrap(), "inside");
        for path in ["../secret", "up", "absolute/secret", "/etc/passwd", "a/dots/../secret"] {
            assert_eq!(read(&root, path).unwrap_err(), Errno::EXDEV, "{path}");
        }
        let root = root.without_openat2();
        assert_eq!(read(&root, "a/./b/f").unwrap(), "inside");
        for path in ["../secret", "up", "absolute/secret", "/etc/passwd", "link/f", "a/dots/a"] {
            read(&root, path).unwrap_err();
        }
    }

    #[test]
    fn directories_are_made_inside_only() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("root")).unwrap();
        symlink("..", tmp.path().join("root/out")).unwrap();
        let root = Root::open(&tmp.path().join("root")).unwrap();
        for root in [root, Root::open(&tmp.path().join("root")).unwrap().without_openat2()] {
            let mut made = Vec::new();
            let (_, name) = root
                .parent_of(Path::new("x/y/z"), |_, name| {
                    made.push(name.to_owned());
                    Ok(())
                })
                .unwrap();
            assert_eq!((name, made), (OsStr::new("z"), vec!["x".into(), "y".into()]));
            root.parent_of(Path::new("out/x/y"), |_, _| Ok(())).unwrap_err();
            root.parent_of(Path::new("x/../../y"), |_, _| Ok(())).unwrap_err();
            assert_eq!(root.parent_of(Path::new(""), |_, _| Ok(())).unwrap_err(), Errno::EINVAL);
            fs::remove_dir_all(tmp.path().join("root/x")).unwrap();
        }
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }

    /// Lesson of CVEs without end: checked, then swapped for a link, then used.
    #[test]
    fn an_attacker_who_renames_meanwhile_gets_nobody_out() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        fs::create_dir_all(at("root/d/e")).unwrap();
        fs::create_dir_all(at("outside/e")).unwrap();
        fs::write(at("root/d/e/f"), "inside").unwrap();
        fs::write(at("outside/e/f"), "secret").unwrap();
        symlink(at("outside"), at("root/l")).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let swap = |a: &str, b: &str| {
                    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
                    let flags = RenameFlags::RENAME_EXCHANGE;
                    let _ = renameat2(AT_FDCWD, &at(a), AT_FDCWD, &at(b), flags);
                };
                while !stop.load(Ordering::Relaxed) {
                    swap("root/d", "root/l");
                }
            });
            let roots = [
                Root::open(&at("root")).unwrap(),
                Root::open(&at("root")).unwrap().without_openat2(),
            ];
            let mut inside = 0;
            for _ in 0..20_000 {
                for root in &roots {
                    if let Ok(text) = read(root, "d/e/f") {
                        assert_eq!(text, "inside");
                        inside += 1;
                    }
                    let _ = root.parent_of(Path::new("d/new/x"), |_, _| Ok(()));
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(inside > 0);
        });
        assert!(!at("outside/new").exists());
    }
}
