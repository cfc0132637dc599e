//! Walking a tree by directories that are held open.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    dir::{Dir, OwningIter, Type},
    errno::Errno,
    fcntl::AtFlags,
    sys::{
        stat::{SFlag, fstat, fstatat},
        statfs::fstatfs,
    },
};

use super::{
    Skip,
    rules::{Rules, leave_out},
    run::{Candidate, Search},
};
use crate::{
    blocking::{progress, stand_on, stand_on_child},
    fs::entry::EntryKind,
};

/// The levels below the root that are searched. Each holds two descriptors while it is.
pub const MAX_DEPTH: usize = 256;

/// The file systems in which the kernel shows itself: statfs(2) types of proc, sysfs, cgroup,
/// cgroup2, devpts, debugfs, tracefs, securityfs, configfs, bpf, pstore, efivarfs, selinuxfs,
/// binfmt_misc, mqueue, fusectl and nsfs. Their files have no end, or wait, or act when they are read.
const VIRTUAL: [i128; 17] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x1cd1,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0xcafe_4a11,
    0x6165_676c,
    0xde5e_81e4,
    0xf97c_ff8c,
    0x4249_4e4d,
    0x1980_0202,
    0x6573_5543,
    0x6e73_6673,
];

/// A directory on the way down.
struct Level {
    fd: Arc<OwnedFd>,
    entries: OwningIter,
    rel: PathBuf,
    device: u64,
    rules: Option<Rules>,
}

impl Level {
    fn open(search: &Search, fd: OwnedFd, rel: PathBuf, device: u64) -> Result<Self, Errno> {
        // Its position is shared, but nothing else reads through the first one.
        let reading = fd.try_clone().map_err(|error| crate::fs::errno::of(&error))?;
        let rules = search.query.options.gitignore.then(|| {
            let (rules, unusable) = Rules::read(&search.rights, &fd, &rel);
            search.skip(Skip::IgnoreFile, unusable);
            rules
        });
        let entries = Dir::from_fd(reading)?.into_iter();
        Ok(Self { fd: Arc::new(fd), entries, rel, device, rules })
    }
}

/// Walks the tree below a directory and hands what it finds to the search.
pub(super) fn walk(search: &Search, root: OwnedFd) {
    let device = fstat(root.as_fd()).map(|stat| stat.st_dev);
    let top = device.and_then(|device| Level::open(search, root, PathBuf::new(), device));
    let mut levels = match top {
        Ok(level) => vec![level],
        Err(errno) => return search.skip(reason(errno), 1),
    };
    while let Some(level) = levels.last_mut() {
        if search.is_over() {
            return;
        }
        let entry = match level.entries.next() {
            Some(Ok(entry)) => entry,
            Some(Err(errno)) => {
                search.skip(reason(errno), 1);
                levels.pop();
                continue;
            }
            None => {
                levels.pop();
                // Back from a mount, perhaps.
                if let Some(above) = levels.last()
                    && let Err(busy) = stand_on(above.fd.as_fd())
                {
                    return search.fail(busy);
                }
                continue;
            }
        };
        progress();
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        if let Some(below) = look_at(search, &levels, name, entry.file_type()) {
            levels.push(below);
        }
    }
}

/// Deals with one name; returns the directory to go down into.
fn look_at(search: &Search, levels: &[Level], name: &OsStr, kind: Option<Type>) -> Option<Level> {
    let level = levels.last()?;
    let options = &search.query.options;
    if !options.hidden && name.as_bytes().first() == Some(&b'.') {
        return None;
    }
    // Without a type it has just gone.
    let kind = kind.or_else(|| search.rights.perform(|| type_of(&level.fd, name))?)?;
    let is_dir = kind == Type::Directory;
    let rel = level.rel.join(name);
    if search.query.excludes(&rel, is_dir)
        || (options.gitignore && name == ".git")
        || (options.gitignore
            && leave_out(levels.iter().filter_map(|level| level.rules.as_ref()), &rel, is_dir))
    {
        return None;
    }
    let included = search.query.includes(&rel, is_dir);
    let by_name = search.query.matcher.is_none();
    if included && by_name {
        let kind = match kind {
            Type::File => EntryKind::File,
            Type::Directory => EntryKind::Directory,
            _ => EntryKind::Other,
        };
        search.found_name(&level.fd, name, &rel, kind);
    } else if included && kind == Type::File {
        let dir = Arc::clone(&level.fd);
        search.found_file(Candidate { dir, name: name.to_owned(), rel: rel.clone() });
    } else if included && !is_dir && kind != Type::Symlink {
        search.skip(Skip::Special, 1);
    }
    if is_dir { descend(search, levels.len(), level, name, rel) } else { None }
}

fn descend(
    search: &Search,
    depth: usize,
    above: &Level,
    name: &OsStr,
    rel: PathBuf,
) -> Option<Level> {
    let asked = usize::try_from(search.query.options.max_depth).unwrap_or(usize::MAX);
    if asked != 0 && depth >= asked {
        return None;
    }
    if depth >= MAX_DEPTH {
        search.skip(Skip::TooDeep, 1);
        return None;
    }
    if let Err(busy) = stand_on_child(above.fd.as_fd(), name) {
        search.fail(busy);
        return None;
    }
    let opened = search
        .rights
        .enter(&above.fd, name)
        .and_then(|(fd, stat)| Level::open(search, fd, rel, stat.st_dev));
    match opened {
        Ok(level) if level.device != above.device && is_virtual(&level.fd) => {
            search.skip(Skip::Virtual, 1);
            None
        }
        Ok(level) => Some(level),
        // Gone, or replaced by something else.
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => None,
        Err(errno) => {
            search.skip(reason(errno), 1);
            None
        }
    }
}

fn is_virtual(fd: &OwnedFd) -> bool {
    fstatfs(fd).is_ok_and(|stat| VIRTUAL.contains(&i128::from(stat.filesystem_type().0)))
}

/// For file systems that do not tell it while listing.
fn type_of(dir: &OwnedFd, name: &OsStr) -> Option<Type> {
    let stat = fstatat(dir, Path::new(name), AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    Some(match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG => Type::File,
        SFlag::S_IFDIR => Type::Directory,
        SFlag::S_IFLNK => Type::Symlink,
        _ => Type::Fifo,
    })
}

/// Why something that failed was skipped.
pub(super) fn reason(errno: Errno) -> Skip {
    match errno {
        Errno::EACCES | Errno::EPERM => Skip::Permission,
        _ => Skip::Error,
    }
}
