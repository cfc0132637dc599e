//! Directories: make, move, list, remove.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nix::errno::Errno;

use super::{
    FsError, PathError, RenameError,
    beneath::is_name,
    entry::{Entry, EntryKind, Owners, stat, stat_at},
    errno,
    path::{self, WalkError},
};
use crate::guest::users::{User, Users};

pub use super::remove::{MAX_OPEN_LEVELS, NAMES_AT_ONCE, remove};

/// The longest listing. It is held in memory and sent as one message.
pub const MAX_LIST_ENTRIES: usize = 1_000_000;

/// Makes a directory, and those above it that are missing, for `user`.
///
/// # Errors
/// [`FsError::DirectoryExists`], [`FsError::ExistsAsFile`], or the call that failed.
pub fn make_dir(path: &Path, user: &User, users: &Users) -> Result<Entry, FsError> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Err(FsError::DirectoryExists(path.to_owned())),
        Ok(_) => return Err(FsError::ExistsAsFile(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FsError::FileInfo(PathError::io("stat", path, &error))),
    }
    path::ensure_dirs(path, (user.uid, user.gid))?;
    stat(path, users)
}

/// Renames a file, link or directory, making the directories above the destination for `user`.
/// An existing file is replaced, an existing directory is not.
///
/// # Errors
/// [`FsError::SourceNotFound`], in which case nothing was made, or the call that failed.
pub fn move_entry(src: &Path, dst: &Path, user: &User, users: &Users) -> Result<Entry, FsError> {
    let failed = |errno| {
        let error = RenameError { from: src.to_owned(), to: dst.to_owned(), errno };
        match errno {
            Errno::ENOENT => FsError::SourceNotFound(error),
            _ => FsError::Rename(error),
        }
    };
    let source = fs::symlink_metadata(src).map_err(|error| failed(errno::of(&error)))?;
    path::ensure_dirs(&path::dir_of(dst), (user.uid, user.gid))?;
    // rename(2) replaces an empty directory; Go, and so upstream, does not.
    if let Ok(there) = fs::symlink_metadata(dst)
        && there.is_dir()
        && (src == dst || (there.dev(), there.ino()) != (source.dev(), source.ino()))
    {
        return Err(failed(Errno::EEXIST));
    }
    fs::rename(src, dst).map_err(|error| failed(errno::of(&error)))?;
    stat(dst, users)
}

/// Everything down to `depth` levels below `path` (0 counts as 1): depth first, each directory
/// before its content, names sorted by their bytes. Links are listed and not followed, except
/// `path` itself. What vanishes meanwhile is left out.
///
/// # Errors
/// [`FsError::PathNotFound`], [`FsError::NotADirectory`], [`FsError::SymlinkLoop`],
/// [`FsError::TooManyEntries`], [`FsError::ListingAbandoned`] once `stop` is set, or the call that
/// failed.
pub fn list(
    path: &Path,
    depth: u32,
    users: &Users,
    stop: &AtomicBool,
) -> Result<Vec<Entry>, FsError> {
    Ok(list_page(path, depth, users, stop, &Page::all())?.0)
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
    users: &Users,
    stop: &AtomicBool,
    page: &Page,
) -> Result<(Vec<Entry>, String), FsError> {
    let limit = page.names;
    let check = || match stop.load(Ordering::Relaxed) {
        true => Err(FsError::ListingAbandoned(path.to_owned())),
        false => Ok(()),
    };
    let root = resolve_root(path)?;
    let shown_root = path::clean(path);
    let depth = usize::try_from(depth.max(1)).unwrap_or(usize::MAX);
    let too_many = || FsError::TooManyEntries { path: path.to_owned(), limit };
    let unreadable = |dir: &Path, error: &io::Error| FsError::ReadDirectory {
        root: root.clone(),
        error: PathError::io("open", dir, error),
    };

    let mut owners = Owners::new(users);
    let mut entries = Vec::new();
    // The names read so far, listed or still to list: what bounds the memory.
    let first = names(&root, limit).map_err(|error| unreadable(&root, &error))?;
    let mut read = first.len();
    if read > limit {
        return Err(too_many());
    }
    // The directories that are being listed, each inside the one before it.
    let mut open = vec![(PathBuf::new(), first.into_iter())];
    // Of the page before, the levels that are still to be gone down.
    let mut after = page.after.iter();
    let mut resume = after.next();
    let mut last = PathBuf::new();
    while let Some((dir, rest)) = open.last_mut() {
        check()?;
        let Some(name) = rest.next() else {
            open.pop();
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
        let relative = dir.join(name);
        let at = root.join(&relative);
        let entry = match stat_at(&at, &shown_root.join(&relative), &mut owners) {
            Ok(entry) => entry,
            Err(FsError::FileNotFound(_)) => {
                resume = None;
                continue;
            }
            Err(error) => return Err(error),
        };
        let enter = entry.kind == EntryKind::Directory && !entry.is_symlink && open.len() < depth;
        if !listed {
            entries.push(entry);
            last.clone_from(&relative);
        }
        if enter {
            match names(&at, limit - read) {
                Ok(found) => {
                    read += found.len();
                    if read > limit {
                        return Err(too_many());
                    }
                    open.push((relative, found.into_iter()));
                }
                // ESRCH: a process that ended, in /proc.
                Err(error)
                    if matches!(
                        errno::of(&error),
                        Errno::ENOENT | Errno::ENOTDIR | Errno::ESRCH
                    ) =>
                {
                    resume = None;
                }
                Err(error) => return Err(unreadable(&at, &error)),
            }
        }
        if !enter {
            resume = None;
        }
    }
    Ok((entries, String::new()))
}

fn resolve_root(path: &Path) -> Result<PathBuf, FsError> {
    let root = path::eval_symlinks(path).map_err(|error| match error {
        WalkError::TooManyLinks => FsError::SymlinkLoop(path.to_owned()),
        WalkError::Path(error) if error.errno == Errno::ENOENT => FsError::PathNotFound(error),
        WalkError::Path(error) => FsError::ResolveSymlink(error),
    })?;
    match fs::metadata(&root) {
        Ok(meta) if meta.is_dir() => Ok(root),
        Ok(_) => Err(FsError::NotADirectory(root)),
        Err(error) => Err(FsError::PathNotFound(PathError::io("stat", &root, &error))),
    }
}

/// The sorted names in a directory; no more than one above `limit`.
fn names(dir: &Path, limit: usize) -> io::Result<Vec<OsString>> {
    let found = fs::read_dir(dir)?.take(limit.saturating_add(1));
    let mut names =
        found.map(|entry| entry.map(|e| e.file_name())).collect::<Result<Vec<_>, _>>()?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        os::unix::{ffi::OsStrExt, fs::symlink},
    };

    use super::*;
    use crate::fs::Kind;

    static GO_ON: AtomicBool = AtomicBool::new(false);

    fn user() -> User {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] }
    }

    fn listed(path: &Path, depth: u32) -> Vec<String> {
        let entries = list(path, depth, &Users::system(), &GO_ON).unwrap();
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
            list_page(tmp.path(), 1, &Users::system(), &GO_ON, &page)
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
            let whole = list(tmp.path(), depth, &Users::system(), &GO_ON).unwrap();
            for size in 1..14 {
                let (mut token, mut all) = (String::new(), Vec::new());
                loop {
                    let page = Page::new(size, &token).unwrap();
                    let (entries, next) =
                        list_page(tmp.path(), depth, &Users::system(), &GO_ON, &page).unwrap();
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
        let (entries, _) = list_page(tmp.path(), 9, &Users::system(), &GO_ON, &page).unwrap();
        assert_eq!(entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["y", "b.x"]);
        for token in ["%", &URL_SAFE_NO_PAD.encode("../x"), &URL_SAFE_NO_PAD.encode("a//b")] {
            assert!(matches!(Page::new(1, token), Err(FsError::PageToken)));
        }
        Page::new(1_000_001, "").unwrap_err();
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
                .map(|_| list(tmp.path(), 3, &Users::system(), &GO_ON).map(|e| e.len()))
                .collect();
            stop.store(true, Ordering::Relaxed);
            for result in results {
                result.unwrap();
            }
        });
        list(Path::new("/proc"), 2, &Users::system(), &GO_ON).unwrap();
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
            let error = list(&root.join(path), 1, &Users::system(), &GO_ON).unwrap_err();
            assert_eq!(error.to_string(), wanted);
        }
    }

    #[test]
    fn a_listing_that_nobody_wants_ends() {
        let tmp = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(true);
        let error = list(tmp.path(), 1, &Users::system(), &stop).unwrap_err();
        assert!(matches!(error, FsError::ListingAbandoned(_)), "{error}");
        stop.store(false, Ordering::Relaxed);
        list(tmp.path(), 1, &Users::system(), &stop).unwrap();
    }

    #[test]
    fn makes_directories_once() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("a/b");
        let made = make_dir(&dir, &user(), &Users::system()).unwrap();
        assert_eq!((made.kind, made.permissions.as_str()), (EntryKind::Directory, "drwxr-xr-x"));
        let error = make_dir(&dir, &user(), &Users::system()).unwrap_err();
        assert_eq!(error.kind(), Kind::AlreadyExists);
        assert_eq!(error.to_string(), format!("directory already exists: {}", dir.display()));
        fs::write(dir.join("f"), "").unwrap();
        let error = make_dir(&dir.join("f"), &user(), &Users::system()).unwrap_err();
        assert!(error.to_string().starts_with("path already exists but it is not a directory: "));
        let error = make_dir(&dir.join("f/x"), &user(), &Users::system()).unwrap_err();
        assert!(error.to_string().starts_with("error getting file info: stat "), "{error}");
    }

    #[test]
    fn moves_and_leaves_nothing_behind_when_there_is_nothing_to_move() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        let to = |src: &str, dst: &str| {
            move_entry(&root.join(src), &root.join(dst), &user(), &Users::system())
        };
        fs::write(root.join("a"), "1").unwrap();
        assert_eq!(to("a", "new/b").unwrap().name, "b");
        fs::write(root.join("a"), "2").unwrap();
        to("a", "new/b").unwrap();
        assert_eq!(fs::read(root.join("new/b")).unwrap(), b"2");

        let error = to("a", "other/b").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        let (a, b) = (root.join("a"), root.join("other/b"));
        assert_eq!(
            error.to_string(),
            format!(
                "source file not found: rename {} {}: no such file or directory",
                a.display(),
                b.display()
            )
        );
        assert!(!root.join("other").exists());

        fs::create_dir(root.join("empty")).unwrap();
        let error = to("new", "empty").unwrap_err().to_string();
        assert!(error.starts_with("error renaming: rename ") && error.ends_with(": file exists"));
    }
}
