//! Removing a whole tree.
//!
//! Not `std::fs::remove_dir_all`: it recurses, with an open directory and a stack frame for each
//! level, so that a user's tree of many thousand levels could overflow the stack of a daemon.
//! Here the number of open levels is fixed: what lies deeper is moved to the top and removed from
//! there. As in std, nothing is ever reached through a symbolic link, because each step is
//! relative to a directory that is held open.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, renameat},
    sys::stat::{FileStat, Mode, fstat, stat},
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{
    FsError, PathError,
    actor::Actor,
    path::{base_name, dir_of, without_trailing_slashes},
    resolve::{Found, Place, Walk},
};
use crate::{
    blocking,
    sys::{mounts, path_fd::proc_path, procfs},
};

/// The directories that one removal holds open.
pub const MAX_OPEN_LEVELS: usize = 64;
/// The names that one removal holds of each open directory.
pub const NAMES_AT_ONCE: usize = 1024;
/// What the name of a deep directory begins with while it waits at the top of the tree.
const MOVED_UP: &str = ".envd-remove-";

/// Removes a file, a link or a whole directory; what does not exist is as good as removed.
///
/// # Errors
/// [`FsError::RemoveRoot`], [`FsError::RemoveMount`], or [`FsError::Remove`] with the first call that failed.
pub fn remove(path: &Path, actor: &Actor) -> Result<(), FsError> {
    let target = without_trailing_slashes(path);
    let failed = |errno| FsError::Remove(PathError::new("open", &dir_of(target), errno));
    let place = match Walk::new(actor).no_follow().to(target) {
        Ok(place) => place,
        Err(error) if error.errno == Errno::ENOENT && error.busy.is_none() => return Ok(()),
        Err(error) => return Err(error.or_busy(|error| failed(error.errno))),
    };
    let Some(found) = place.found() else { return Ok(()) };
    let is_root =
        |root: FileStat| (root.st_dev, root.st_ino) == (found.stat.st_dev, found.stat.st_ino);
    if stat("/").is_ok_and(is_root) {
        return Err(FsError::RemoveRoot(path.to_owned()));
    }
    // `x/.` and `x/..` cannot be removed, and nothing inside them shall be before that is found.
    if place.is_nameless() || matches!(base_name(target).as_bytes(), b"." | b"..") {
        return Err(FsError::Remove(PathError::new("RemoveAll", path, Errno::EINVAL)));
    }
    // Before anything in it is gone.
    if is_mount(&place, found) {
        return Err(FsError::RemoveMount(path.to_owned()));
    }
    if let Some(mount) = mount_inside(found) {
        return Err(FsError::Remove(PathError::new("unlinkat", &mount, Errno::EBUSY)));
    }
    let around = dir_of(target);
    let dir = place.dir().try_clone_to_owned();
    let dir = dir.map_err(|error| failed(super::errno::of(&error)))?;
    place
        .rights()
        .act(|| Ok::<_, Errno>(remove_at(dir, &around, place.name())))
        .map_err(failed)?
        .map_err(FsError::Remove)
}

/// Whether something is mounted at the place. What cannot be told is left to the kernel.
pub(super) fn is_mount(place: &Place, found: &Found) -> bool {
    match mounts::is_mount_root(&found.fd) {
        Ok(Some(is)) => is,
        // Not told of a mount within one file system.
        _ => found.is_dir() && fstat(place.dir()).is_ok_and(|dir| dir.st_dev != found.stat.st_dev),
    }
}

/// A mount point inside a directory that is to be removed, by the kernel's table of mounts. A mount that
/// the table does not have yet is found on the way down (see [`enter`]).
pub(super) fn mount_inside(found: &Found) -> Option<PathBuf> {
    if !found.is_dir() {
        return None;
    }
    let mount = match mounts::mount_id(found.fd.as_fd()) {
        Ok(mount) => mount,
        Err(_) => procfs::mount_id(found.fd.as_fd())?,
    };
    let dir = fs::read_link(proc_path(&found.fd)).ok()?;
    blocking::mount_inside(&dir, mount)
}

/// A directory on the way down: open, with names that are still to be removed from it.
struct Level {
    fd: OwnedFd,
    name: OsString,
    names: Vec<OsString>,
}

/// Removes `name`, a tree perhaps, in the directory `parent`, which is called `path`, with the rights of
/// the thread.
///
/// # Errors
/// The first call that failed.
fn remove_at(parent: OwnedFd, path: &Path, name: &OsStr) -> Result<(), PathError> {
    // The first level is the directory around, of which only one name is removed.
    remove_levels(
        vec![Level { fd: parent, name: OsString::new(), names: vec![name.to_owned()] }],
        path,
    )
}

/// Removes what is in the directory `dir`, and then the empty directory `name` of `parent`, which is
/// called `path`: whatever has the name by then, nothing else loses its content.
pub(super) fn empty_and_remove(
    parent: OwnedFd,
    path: &Path,
    name: &OsStr,
    dir: OwnedFd,
) -> Result<(), PathError> {
    let around = Level { fd: parent, name: OsString::new(), names: Vec::new() };
    let inside = Level { fd: dir, name: name.to_owned(), names: Vec::new() };
    remove_levels(vec![around, inside], path)
}

fn remove_levels(mut levels: Vec<Level>, path: &Path) -> Result<(), PathError> {
    let mut moved_up = 0_u64;
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else {
            return Ok(());
        };
        let Some(name) = level.names.pop() else {
            if depth == 1 {
                return Ok(());
            }
            match read_names(&level.fd) {
                Ok(names) => level.names = names,
                Err(e) => return Err(failed("open", path, &levels, None, e)),
            }
            if levels.last().is_some_and(|level| level.names.is_empty())
                && let Some(empty) = levels.pop()
                && let Some(above) = levels.last()
            {
                vanished_is_fine(unlinkat(
                    &above.fd,
                    empty.name.as_os_str(),
                    UnlinkatFlags::RemoveDir,
                ))
                .map_err(|e| failed("unlinkat", path, &levels, Some(&empty.name), e))?;
            }
            continue;
        };
        match unlinkat(&level.fd, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => continue,
            // The kernel says EISDIR; POSIX would have it EPERM.
            Err(Errno::EISDIR | Errno::EPERM) => {}
            Err(e) => return Err(failed("unlinkat", path, &levels, Some(&name), e)),
        }
        if depth > MAX_OPEN_LEVELS {
            move_up(&levels, &name, &mut moved_up)
                .map_err(|e| failed("renameat", path, &levels, Some(&name), e))?;
            continue;
        }
        match enter(&level.fd, &name) {
            Ok(fd) => levels.push(Level { fd, name, names: Vec::new() }),
            Err(Errno::ENOENT) => {}
            // It was no directory after all: its removal was refused.
            Err(Errno::ENOTDIR) => {
                return Err(failed("unlinkat", path, &levels, Some(&name), Errno::EPERM));
            }
            Err(e) => return Err(failed("openat", path, &levels, Some(&name), e)),
        }
    }
}

/// Opens a directory to remove what is in it, but none that is a mount: `EBUSY`, as for the mount
/// itself, and before it is emptied.
fn enter(dir: &OwnedFd, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS;
    match openat2(dir, name, OpenHow::new().flags(flags).resolve(resolve)) {
        Err(Errno::EXDEV) => Err(Errno::EBUSY),
        // As openat(2) says it.
        Err(Errno::ELOOP) => Err(Errno::ENOTDIR),
        Err(Errno::ENOSYS | Errno::EPERM | Errno::EAGAIN) => {
            let fd = openat(dir, name, flags, Mode::empty())?;
            match mounts::are_on_two_mounts(dir.as_fd(), fd.as_fd()) {
                Ok(false) => Ok(fd),
                Ok(true) => Err(Errno::EBUSY),
                Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
            }
        }
        other => other,
    }
}

/// Moves a directory of the deepest level into the uppermost directory that is being removed.
fn move_up(levels: &[Level], name: &OsStr, counter: &mut u64) -> nix::Result<()> {
    let (Some(top), Some(deepest)) = (levels.get(1), levels.last()) else {
        return Err(Errno::EINVAL);
    };
    loop {
        *counter += 1;
        let new = format!("{MOVED_UP}{counter}");
        match renameat(&deepest.fd, name, &top.fd, new.as_str()) {
            // A file or directory of that name is there.
            Err(Errno::ENOTDIR | Errno::ENOTEMPTY | Errno::EEXIST) => {}
            other => return vanished_is_fine(other),
        }
    }
}

fn vanished_is_fine(result: nix::Result<()>) -> nix::Result<()> {
    if result == Err(Errno::ENOENT) { Ok(()) } else { result }
}

fn read_names(dir: &OwnedFd) -> nix::Result<Vec<OsString>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let read = || {
        // Opened anew, to begin at its beginning.
        let mut dir = Dir::openat(dir, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let name = entry?.file_name().to_bytes().to_vec();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(OsString::from_vec(name));
            }
            if names.len() >= NAMES_AT_ONCE {
                break;
            }
        }
        Ok(names)
    };
    match read() {
        // Somebody else removed the directory.
        Err(Errno::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

fn failed(
    op: &'static str,
    path: &Path,
    levels: &[Level],
    name: Option<&OsStr>,
    errno: Errno,
) -> PathError {
    let mut at: PathBuf = path.to_owned();
    at.extend(levels.iter().map(|level| level.name.as_os_str()).filter(|name| !name.is_empty()));
    at.extend(name);
    PathError { op, path: at, errno }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::{fcntl::open, unistd::mkdir};

    use super::{remove as remove_for, *};
    use crate::{
        fs::{Kind, actor::FileAccess},
        guest::users::User,
    };

    fn remove(path: &Path) -> Result<(), FsError> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
        remove_for(path, &Actor::new(&user, FileAccess::Compatible))
    }

    #[test]
    fn removes_files_links_and_trees() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        fs::create_dir_all(root.join("d/e/f")).unwrap();
        fs::create_dir(root.join("kept")).unwrap();
        fs::write(root.join("kept/file"), "").unwrap();
        symlink("../kept", root.join("d/link")).unwrap();
        symlink("kept", root.join("link")).unwrap();
        for i in 0..3000 {
            fs::write(root.join(format!("d/{i}")), "").unwrap();
        }
        remove(&root.join("d/")).unwrap();
        remove(&root.join("link/")).unwrap();
        remove(&root.join("missing/x")).unwrap();
        let left: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["kept"]);
        remove(&root.join("kept/file")).unwrap();
        assert!(!root.join("kept/file").exists());
    }

    #[test]
    fn refuses_the_root_and_dots_and_paths_below_files() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        fs::create_dir_all(root.join("d/e")).unwrap();
        fs::write(root.join("f"), "").unwrap();
        for path in ["/", "///", "/proc/..", "/.", "/proc/self/root/."] {
            let error = remove(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{path}: {error}");
        }
        let shown = root.display();
        for (path, wanted) in [
            ("d/.", format!("RemoveAll {shown}/d/.: invalid argument")),
            ("d/e/..", format!("RemoveAll {shown}/d/e/..: invalid argument")),
            ("f/x", format!("open {shown}/f: not a directory")),
        ] {
            let error = remove(&root.join(path)).unwrap_err().to_string();
            assert_eq!(error, format!("error removing file or directory: {wanted}"));
        }
        assert!(root.join("d/e").exists());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        fs::create_dir(tmp.path().join("top")).unwrap();
        let mut at = open(&tmp.path().join("top"), flags, Mode::empty()).unwrap();
        for _ in 0..3_000 {
            nix::sys::stat::mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            at = openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        drop(at);
        mkdir(&tmp.path().join("top/.envd-remove-1"), Mode::S_IRWXU).unwrap();
        remove(&tmp.path().join("top")).unwrap();
        assert!(!tmp.path().join("top").exists());
    }
}
