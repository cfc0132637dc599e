//! Listing directories, whole or in pages.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    vec,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::{
        stat::{FileStat, Mode, fstat},
        statfs::PROC_SUPER_MAGIC,
    },
};

use super::{
    FsError, PathError,
    actor::{Actor, Rights},
    beneath::is_name,
    entry::{Entry, NameError, Named, Owners, plain_file, unreadable},
    path,
    resolve::{Step, Walk, WalkError},
};
use crate::{guest::users::Users, sys::path_fd};

/// The longest listing. It is held in memory and sent as one message.
pub const MAX_LIST_ENTRIES: usize = 1_000_000;
/// The directories that one listing holds open on the way down; others are opened again when the
/// listing comes back to them.
pub const MAX_OPEN_DIRS: usize = 64;

/// Lists everything down to `depth` levels below `path` (0 counts as 1): depth first, each directory
/// before its content, names sorted by their bytes. Links are listed and not followed, except
/// `path` itself. What vanishes meanwhile is left out. Of an entry that cannot be looked at (the root of
/// a mount whose server has died, a name in a directory without the right to search it) there is what
/// the directory says of it; what is in a directory that cannot be read is left out.
///
/// # Errors
/// [`FsError::PathNotFound`], [`FsError::NotADirectory`], [`FsError::SymlinkLoop`],
/// [`FsError::TooManyEntries`], [`FsError::ListingAbandoned`] once `stop` is set, or the call that
/// failed.
pub fn list(
    path: &Path,
    depth: u32,
    actor: &Actor,
    users: &Users,
    stop: &AtomicBool,
) -> Result<Vec<Entry>, FsError> {
    Ok(list_page(path, depth, actor, users, stop, &Page::all())?.0)
}

/// A part of a listing.
#[derive(Debug, Clone)]
pub struct Page {
    /// The most entries.
    size: usize,
    /// What was listed last, from the top: one name a level. Empty at the beginning.
    after: Vec<OsString>,
    /// The most names that are held, of all directories on the way down.
    names: usize,
}

impl Page {
    /// The whole listing.
    fn all() -> Self {
        Self { size: usize::MAX, after: Vec::new(), names: MAX_LIST_ENTRIES }
    }

    /// The first page of `size` entries, or that behind `token`, which the page before gave. A size
    /// of 0 means all that is left.
    ///
    /// # Errors
    /// [`FsError::PageToken`], and [`FsError::BadField`] for a size above [`MAX_LIST_ENTRIES`].
    pub fn new(size: u32, token: &str) -> Result<Self, FsError> {
        let size = match usize::try_from(size).unwrap_or(usize::MAX) {
            0 => usize::MAX,
            size if size > MAX_LIST_ENTRIES => {
                let why = format!("{size} is more than {MAX_LIST_ENTRIES}");
                return Err(FsError::BadField { field: "page_size", why });
            }
            size => size,
        };
        let mut after = Vec::new();
        if !token.is_empty() {
            let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| FsError::PageToken)?;
            for name in bytes.split(|byte| *byte == b'/') {
                let name = OsString::from_vec(name.to_vec());
                if !is_name(&name) || name.as_bytes().contains(&0) {
                    return Err(FsError::PageToken);
                }
                after.push(name);
            }
        }
        Ok(Self { size, after, ..Self::all() })
    }
}

/// One page of a listing, and the token of the next; none when this is the last.
///
/// # Errors
/// As [`list`].
pub fn list_page(
    path: &Path,
    depth: u32,
    actor: &Actor,
    users: &Users,
    stop: &AtomicBool,
    page: &Page,
) -> Result<(Vec<Entry>, String), FsError> {
    let check = || match stop.load(Ordering::Relaxed) {
        true => Err(FsError::ListingAbandoned(path.to_owned())),
        false => Ok(()),
    };
    let mut down = Descent::begin(path, page.names, actor)?;
    let shown_root = path::clean(path);
    let depth = usize::try_from(depth.max(1)).unwrap_or(usize::MAX);
    let mut owners = Owners::new(users);
    let mut entries = Vec::new();
    // Of the page before, the levels that are still to be gone down.
    let mut after = page.after.iter();
    let mut resume = after.next();
    let mut last = PathBuf::new();
    while !down.levels.is_empty() {
        check()?;
        let Some((name, kind)) = down.next_name() else {
            down.leave();
            resume = None;
            continue;
        };
        // Listed already; of what was listed last, what is in it is not.
        let listed = match resume {
            Some(last) if name < *last => continue,
            Some(last) if name == *last => {
                resume = after.next();
                true
            }
            _ => {
                resume = None;
                false
            }
        };
        if !listed && entries.len() >= page.size {
            let token = URL_SAFE_NO_PAD.encode(last.as_os_str().as_bytes());
            return Ok((entries, token));
        }
        if kind == Some(Type::File)
            && !listed
            && let Some((relative, entry)) = down.plain_file(&name, &shown_root, &mut owners)
        {
            entries.push(entry);
            last = relative;
            resume = None;
            continue;
        }
        let (relative, named) = match down.open(&name)? {
            Some((relative, Ok(named))) => (relative, named),
            Some((relative, Err(Unreadable))) => {
                if !listed {
                    entries.push(unreadable(&shown_root.join(&relative), kind));
                    last = relative;
                }
                resume = None;
                continue;
            }
            None => {
                resume = None;
                continue;
            }
        };
        let enter = named.found.is_dir() && down.levels.len() < depth;
        let directory = match enter {
            true => named.found.fd.try_clone().ok().map(|fd| (fd, named.found.stat)),
            false => None,
        };
        if !listed {
            entries.push(named.entry(&shown_root.join(&relative), &mut owners));
            last.clone_from(&relative);
        }
        let entered = match directory {
            Some((fd, stat)) => down.enter(fd, &stat, name, relative)?,
            None => false,
        };
        if !entered {
            resume = None;
        }
    }
    Ok((entries, String::new()))
}

/// A directory that is being listed.
struct Level {
    /// `O_PATH`; none while it is closed.
    fd: Option<OwnedFd>,
    /// Device and inode: what is opened again under its name has to be it.
    id: (u64, u64),
    name: OsString,
    relative: PathBuf,
    names: vec::IntoIter<(OsString, Kind)>,
}

/// What the directory says that a name is.
type Kind = Option<Type>;

/// A name that cannot be looked at.
#[derive(Debug)]
struct Unreadable;

/// A name with its path from the top, opened where that is possible.
type Opened = (PathBuf, Result<Named, Unreadable>);

/// Whether an error is about the daemon and not about what it looks at.
fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}

fn id_of(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// The directories on the way down, each inside the one before it, all reached with the same rights.
struct Descent<'a> {
    asked: &'a Path,
    /// Without links.
    root: PathBuf,
    rights: Rights,
    levels: Vec<Level>,
    /// The first level that is open, except that of the top, which always is.
    first_open: usize,
    /// The names read so far, listed or still to list: what bounds the memory.
    read: usize,
    limit: usize,
}

impl<'a> Descent<'a> {
    fn begin(asked: &'a Path, limit: usize, actor: &Actor) -> Result<Self, FsError> {
        let place = Walk::new(actor).max_links(path::MAX_LINKS).to(asked);
        let place = place.map_err(|error| resolve_failed(asked, error))?;
        let (root, rights) = (place.real().to_owned(), place.rights().clone());
        let Some(found) = place.into_found() else {
            let error = PathError::new("lstat", &root, Errno::ENOENT);
            return Err(FsError::PathNotFound(error));
        };
        if !found.is_dir() {
            return Err(FsError::NotADirectory(root));
        }
        let mut down =
            Self { asked, root, rights, levels: Vec::new(), first_open: 1, read: 0, limit };
        let names = match down.names_in(&found.fd) {
            Ok(names) => names,
            Err(errno) => return Err(down.unreadable(Path::new(""), errno)),
        };
        down.push(found.fd, &found.stat, OsString::new(), PathBuf::new(), names)?;
        Ok(down)
    }

    fn real(&self, relative: &Path) -> PathBuf {
        match relative.as_os_str().is_empty() {
            true => self.root.clone(),
            false => self.root.join(relative),
        }
    }

    fn unreadable(&self, relative: &Path, errno: Errno) -> FsError {
        let error = PathError::new("open", &self.real(relative), errno);
        FsError::ReadDirectory { root: self.root.clone(), error }
    }

    fn next_name(&mut self) -> Option<(OsString, Kind)> {
        self.levels.last_mut()?.names.next()
    }

    /// Describes a regular file of the last level; none where it has to be opened for that.
    fn plain_file(
        &self,
        name: &OsStr,
        shown_root: &Path,
        owners: &mut Owners<'_>,
    ) -> Option<(PathBuf, Entry)> {
        let level = self.levels.last()?;
        let relative = level.relative.join(name);
        if self.root.as_os_str().len() + 1 + relative.as_os_str().len() >= path::PATH_MAX {
            return None;
        }
        let dir = level.fd.as_ref()?.as_fd();
        let entry = plain_file(dir, name, &shown_root.join(&relative), &self.rights, owners)?;
        Some((relative, entry))
    }

    /// Opens a name of the last level, and gives its path from the top; none when it has vanished.
    fn open(&self, name: &OsStr) -> Result<Option<Opened>, FsError> {
        let Some(Level { fd: Some(fd), relative, .. }) = self.levels.last() else {
            return Ok(None);
        };
        let above = self.real(relative);
        let (relative, at) = (relative.join(name), above.join(name));
        // The depth is bounded by this, and so is what the paths take. No call could name what is below.
        if at.as_os_str().len() >= path::PATH_MAX {
            return Ok(None);
        }
        match Named::open(fd.as_fd(), &above, name, &self.rights) {
            Ok(named) => Ok(Some((relative, Ok(named)))),
            // ESRCH: a process that ended, in /proc.
            Err(NameError::Errno(Errno::ENOENT | Errno::ESRCH)) => Ok(None),
            Err(NameError::Errno(errno)) if !is_shortage(errno) => {
                tracing::debug!(path = %at.display(), %errno, "an entry of a listing cannot be read");
                Ok(Some((relative, Err(Unreadable))))
            }
            Err(error) => Err(error.of(&at)),
        }
    }

    /// Goes into a directory of the last level; false when it has vanished or cannot be read.
    fn enter(
        &mut self,
        fd: OwnedFd,
        stat: &FileStat,
        name: OsString,
        relative: PathBuf,
    ) -> Result<bool, FsError> {
        match self.names_in(&fd) {
            Ok(names) => self.push(fd, stat, name, relative, names).map(|()| true),
            Err(errno) if is_shortage(errno) => Err(self.unreadable(&relative, errno)),
            Err(errno) => {
                let path = self.real(&relative);
                tracing::debug!(path = %path.display(), %errno, "a directory of a listing cannot be read");
                Ok(false)
            }
        }
    }

    fn push(
        &mut self,
        fd: OwnedFd,
        stat: &FileStat,
        name: OsString,
        relative: PathBuf,
        names: Vec<(OsString, Kind)>,
    ) -> Result<(), FsError> {
        self.read += names.len();
        if self.read > self.limit {
            let path = self.asked.to_owned();
            return Err(FsError::TooManyEntries { path, limit: self.limit });
        }
        let (fd, names) = (Some(fd), names.into_iter());
        self.levels.push(Level { fd, id: id_of(stat), name, relative, names });
        // Beside the top.
        if self.levels.len() - self.first_open >= MAX_OPEN_DIRS
            && let Some(level) = self.levels.get_mut(self.first_open)
        {
            level.fd = None;
            self.first_open += 1;
        }
        Ok(())
    }

    /// Leaves the last level. Where the one above cannot be opened again, it is left too.
    fn leave(&mut self) {
        self.levels.pop();
        while self.levels.last().is_some_and(|level| level.fd.is_none()) {
            if self.reopen().is_ok() {
                break;
            }
            self.levels.pop();
        }
        self.first_open = self.first_open.min(self.levels.len().max(1));
    }

    /// Opens the last levels again, by their names from the top on.
    fn reopen(&mut self) -> nix::Result<()> {
        let first = self.levels.len().saturating_sub(MAX_OPEN_DIRS / 2).max(1);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let levels = &mut self.levels;
        self.rights.act(|| {
            let mut at: Option<OwnedFd> = None;
            for number in 1..levels.len() {
                let from: BorrowedFd<'_> = match &at {
                    Some(fd) => fd.as_fd(),
                    None => {
                        let above = levels.get(number - 1).and_then(|level| level.fd.as_ref());
                        above.ok_or(Errno::ENOENT)?.as_fd()
                    }
                };
                let Some(level) = levels.get(number) else { break };
                let fd = openat(from, level.name.as_os_str(), flags, Mode::empty())?;
                if id_of(&fstat(&fd)?) != level.id {
                    return Err(Errno::ENOENT);
                }
                if number >= first
                    && let Some(level) = levels.get_mut(number)
                {
                    level.fd = Some(fd.try_clone().map_err(|error| super::errno::of(&error))?);
                }
                at = Some(fd);
            }
            Ok(())
        })?;
        self.first_open = first;
        Ok(())
    }

    /// The sorted names in a directory; no more than one above the limit.
    fn names_in(&self, fd: &OwnedFd) -> nix::Result<Vec<(OsString, Kind)>> {
        let limit = (self.limit - self.read).saturating_add(1);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut names = self.rights.act(|| {
            // As in a walk: a mount may have led there.
            if self.rights.switched() && path_fd::fs_type(fd)? == PROC_SUPER_MAGIC {
                return Err(Errno::EACCES);
            }
            let mut dir = Dir::openat(fd, ".", flags, Mode::empty())?;
            let mut names = Vec::new();
            for entry in dir.iter() {
                let entry = entry?;
                let name = entry.file_name().to_bytes().to_vec();
                if !matches!(name.as_slice(), b"." | b"..") {
                    names.push((OsString::from_vec(name), entry.file_type()));
                }
                if names.len() >= limit {
                    break;
                }
            }
            Ok::<_, Errno>(names)
        })?;
        names.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(names)
    }
}

fn resolve_failed(asked: &Path, error: WalkError) -> FsError {
    error.or_busy(|error| {
        let told = PathError::new("lstat", &error.at, error.errno);
        match error.step {
            Step::TooManyLinks => FsError::SymlinkLoop(asked.to_owned()),
            _ if error.errno == Errno::ENOENT => FsError::PathNotFound(told),
            _ => FsError::ResolveSymlink(told),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;
    use crate::{
        fs::{Kind, actor::FileAccess, resolve::Found},
        guest::users::User,
    };

    static GO_ON: AtomicBool = AtomicBool::new(false);

    fn actor() -> Actor {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
        Actor::new(&user, FileAccess::Compatible)
    }

    fn listed(path: &Path, depth: u32) -> Vec<String> {
        let entries = list(path, depth, &actor(), &Users::system(), &GO_ON).unwrap();
        let prefix = format!("{}/", path::clean(path).display());
        entries.iter().map(|e| e.path.strip_prefix(&prefix).unwrap().to_owned()).collect()
    }

    #[test]
    fn lists_sorted_to_the_depth_and_through_no_link_but_the_first() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("root");
        fs::create_dir_all(root.join("b/c/d")).unwrap();
        for file in ["a", "b.x", "b/z", "b/c/y"] {
            fs::write(root.join(file), "").unwrap();
        }
        symlink("b", root.join("l")).unwrap();
        assert_eq!(listed(&root, 0), ["a", "b", "b.x", "l"]);
        assert_eq!(listed(&root, 2), ["a", "b", "b/c", "b/z", "b.x", "l"]);
        assert_eq!(listed(&root, 9), ["a", "b", "b/c", "b/c/d", "b/c/y", "b/z", "b.x", "l"]);
        let link = tmp.path().join("link");
        symlink("root", &link).unwrap();
        assert_eq!(listed(&link.join("./"), 1), ["a", "b", "b.x", "l"]);
    }

    #[test]
    fn lists_two_thousand_entries_and_names_that_are_not_utf_8() {
        let tmp = tempfile::tempdir().unwrap();
        for i in 0..2000 {
            fs::write(tmp.path().join(format!("{i:04}")), "").unwrap();
        }
        fs::write(tmp.path().join(OsStr::from_bytes(b"\xff")), "").unwrap();
        let names = listed(tmp.path(), 1);
        assert_eq!(names.len(), 2001);
        assert!(names.is_sorted());
        assert_eq!(names.last().unwrap(), "\u{fffd}");
        let at_most = |names| {
            let page = Page { names, ..Page::all() };
            list_page(tmp.path(), 1, &actor(), &Users::system(), &GO_ON, &page)
        };
        assert_eq!(at_most(2001).unwrap().0.len(), 2001);
        assert_eq!(at_most(2000).unwrap_err().kind(), Kind::ResourceExhausted);
    }

    #[test]
    fn pages_are_the_listing() {
        let tmp = tempfile::tempdir().unwrap();
        for dir in ["a/b/c", "a/x", "b", "d/e"] {
            fs::create_dir_all(tmp.path().join(dir)).unwrap();
        }
        for file in ["a/b.x", "a/b/y", "c", "d/e/f", "d/z"] {
            fs::write(tmp.path().join(file), "").unwrap();
        }
        fs::write(tmp.path().join(OsStr::from_bytes(b"d/\xff")), "").unwrap();
        for depth in 1..5 {
            let whole = list(tmp.path(), depth, &actor(), &Users::system(), &GO_ON).unwrap();
            for size in 1..14 {
                let (mut token, mut all) = (String::new(), Vec::new());
                loop {
                    let page = Page::new(size, &token).unwrap();
                    let (entries, next) =
                        list_page(tmp.path(), depth, &actor(), &Users::system(), &GO_ON, &page)
                            .unwrap();
                    assert!(entries.len() <= size as usize);
                    all.extend(entries);
                    token = next;
                    if token.is_empty() {
                        break;
                    }
                }
                assert_eq!(all, whole, "{depth} {size}");
            }
        }
        // What was listed last may be gone.
        let page = Page::new(2, &URL_SAFE_NO_PAD.encode("a/b/gone")).unwrap();
        let (entries, _) =
            list_page(tmp.path(), 9, &actor(), &Users::system(), &GO_ON, &page).unwrap();
        assert_eq!(entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["y", "b.x"]);
        for token in ["%", &URL_SAFE_NO_PAD.encode("../x"), &URL_SAFE_NO_PAD.encode("a//b")] {
            assert!(matches!(Page::new(1, token), Err(FsError::PageToken)));
        }
        Page::new(1_000_001, "").unwrap_err();
    }

    #[test]
    fn levels_that_were_closed_on_the_way_are_listed_to_their_end() {
        const LEVELS: usize = 3 * MAX_OPEN_DIRS + 7;
        let tmp = tempfile::tempdir().unwrap();
        let (mut dir, mut expected) = (tmp.path().to_owned(), Vec::new());
        let mut relative = PathBuf::new();
        for _ in 0..LEVELS {
            // One before the next level, and two behind it.
            for name in ["a", "x", "y"] {
                fs::write(dir.join(name), "").unwrap();
                expected.push(relative.join(name));
            }
            (dir, relative) = (dir.join("d"), relative.join("d"));
            fs::create_dir(&dir).unwrap();
            expected.push(relative.clone());
        }
        expected.sort();
        let listed = listed(tmp.path(), u32::MAX);
        assert_eq!(listed.iter().map(PathBuf::from).collect::<Vec<_>>(), expected);
        // Directories that are other ones by then are left, and nothing of those others is listed.
        let held = || fs::read_dir("/proc/self/fd").unwrap().count();
        let before = held();
        let mut down = Descent::begin(tmp.path(), MAX_LIST_ENTRIES, &actor()).unwrap();
        while down.levels.len() < LEVELS {
            let (name, _) = down.next_name().unwrap();
            let (relative, named) = down.open(&name).unwrap().unwrap();
            let named = named.unwrap();
            if named.found.is_dir() {
                let Found { fd, stat } = named.found;
                assert!(down.enter(fd, &stat, name, relative).unwrap());
            }
        }
        assert!(held() < before + MAX_OPEN_DIRS + 20);
        fs::rename(tmp.path().join("d/d/d"), tmp.path().join("away")).unwrap();
        fs::create_dir(tmp.path().join("d/d/d")).unwrap();
        while down.levels.len() > MAX_OPEN_DIRS {
            down.leave();
        }
        assert_eq!(down.levels.len(), 3);
        assert_eq!(down.next_name(), Some(("x".into(), Some(Type::File))));
        assert!(down.open(OsStr::new("x")).unwrap().is_some());
    }

    #[test]
    fn what_vanishes_is_left_out() {
        let tmp = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for i in 0..20 {
                        let _ = fs::create_dir_all(tmp.path().join(format!("{i}/x/y")));
                    }
                    for i in 0..20 {
                        let _ = fs::remove_dir_all(tmp.path().join(i.to_string()));
                    }
                }
            });
            let results: Vec<_> = (0..300)
                .map(|_| list(tmp.path(), 3, &actor(), &Users::system(), &GO_ON).map(|e| e.len()))
                .collect();
            stop.store(true, Ordering::Relaxed);
            for result in results {
                result.unwrap();
            }
        });
        list(Path::new("/proc"), 2, &actor(), &Users::system(), &GO_ON).unwrap();
    }

    #[test]
    fn list_errors_are_upstreams() {
        let tmp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(tmp.path()).unwrap();
        fs::write(root.join("f"), "").unwrap();
        symlink("o", root.join("o")).unwrap();
        let shown = root.display();
        let cases = [
            ("no/x", format!("path not found: lstat {shown}/no: no such file or directory")),
            ("f", format!("path is not a directory: {shown}/f")),
            ("o", format!("cyclic symlink or chain >255 links at \"{shown}/o\"")),
            ("f/x", format!("error resolving symlink: lstat {shown}/f: not a directory")),
        ];
        for (path, wanted) in cases {
            let error = list(&root.join(path), 1, &actor(), &Users::system(), &GO_ON).unwrap_err();
            assert_eq!(error.to_string(), wanted);
        }
    }

    #[test]
    fn a_listing_that_nobody_wants_ends() {
        let tmp = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(true);
        let error = list(tmp.path(), 1, &actor(), &Users::system(), &stop).unwrap_err();
        assert!(matches!(error, FsError::ListingAbandoned(_)), "{error}");
        stop.store(false, Ordering::Relaxed);
        list(tmp.path(), 1, &actor(), &Users::system(), &stop).unwrap();
    }
}
