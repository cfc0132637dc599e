//! What is told about one file: `lstat`, names of its owners, where a link leads, metadata.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    sync::Arc,
};

use nix::errno::Errno;

use super::{FsError, PathError, metadata, path};
use crate::guest::users::Users;

/// What a client may do with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file, or a link to one.
    File,
    /// A directory, or a link to one.
    Directory,
    /// A device, FIFO, socket, or a link to one or to nowhere.
    Other,
}

/// One file, directory or link.
///
/// Names that are not UTF-8 show U+FFFD where they are not: the wire knows only UTF-8, and one
/// such name must not fail the listing of its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The last part of the path.
    pub name: String,
    /// Of a link: of what it leads to.
    pub kind: EntryKind,
    /// The path as it was asked for.
    pub path: String,
    /// In bytes; of a link, its own length.
    pub size: u64,
    /// Permission bits, without setuid, setgid and sticky; of a link, those of what it leads to.
    pub mode: u32,
    /// Go's `FileMode.String`, of the link itself: `drwxr-xr-x`, `Lrwxrwxrwx`.
    pub permissions: String,
    /// The user's name, or the number in decimal.
    pub owner: String,
    /// The group's name, or the number in decimal.
    pub group: String,
    /// Seconds and nanoseconds since 1970; none when it is exactly then.
    pub modified: Option<(i64, u32)>,
    /// Of a link only: the path it leads to in the end, or its own where that cannot be told.
    pub symlink_target: Option<String>,
    /// Whether it is a symbolic link.
    pub is_symlink: bool,
    /// What clients attached: see [`super::metadata`].
    pub metadata: BTreeMap<String, String>,
}

/// What is told about the file at `path`.
///
/// # Errors
/// [`FsError::FileNotFound`] or [`FsError::FileInfo`].
pub fn stat(path: &Path, users: &Users) -> Result<Entry, FsError> {
    stat_at(path, path, &mut Owners::new(users))
}

/// What is told about what `path` leads to, under that path: never of a link.
///
/// # Errors
/// As [`stat`].
pub fn stat_behind(path: &Path, users: &Users) -> Result<Entry, FsError> {
    let real = path::eval_symlinks(path).unwrap_or_else(|_| path.to_owned());
    stat_at(&real, path, &mut Owners::new(users))
}

/// The file at `at`, told as `shown`.
pub(super) fn stat_at(at: &Path, shown: &Path, owners: &mut Owners<'_>) -> Result<Entry, FsError> {
    let meta = fs::symlink_metadata(at).map_err(|error| {
        let error = PathError::io("lstat", at, &error);
        match error.errno {
            Errno::ENOENT => FsError::FileNotFound(error),
            _ => FsError::FileInfo(error),
        }
    })?;
    let is_symlink = meta.is_symlink();
    let target = is_symlink.then(|| path::eval_symlinks(at).ok()).flatten();
    // What the kind and the mode are told of; none for a link to nowhere.
    let behind = match &target {
        Some(target) => fs::symlink_metadata(target).ok(),
        None => (!is_symlink).then(|| meta.clone()),
    };
    let kind = behind.as_ref().map_or(EntryKind::Other, kind_of);
    let metadata = match kind {
        // Nothing else can hold `user.` attributes.
        EntryKind::Other => BTreeMap::new(),
        EntryKind::File | EntryKind::Directory => metadata::read(at),
    };
    Ok(Entry {
        name: path::base_name(shown).to_string_lossy().into_owned(),
        kind,
        path: shown.to_string_lossy().into_owned(),
        size: meta.len(),
        mode: behind.map_or(0, |meta| meta.mode() & 0o777),
        permissions: permissions(&meta),
        owner: owners.user(meta.uid()),
        group: owners.group(meta.gid()),
        modified: modified(&meta),
        symlink_target: is_symlink
            .then(|| target.as_deref().unwrap_or(at).to_string_lossy().into_owned()),
        is_symlink,
        metadata,
    })
}

fn kind_of(meta: &Metadata) -> EntryKind {
    if meta.is_file() {
        EntryKind::File
    } else if meta.is_dir() {
        EntryKind::Directory
    } else {
        EntryKind::Other
    }
}

fn modified(meta: &Metadata) -> Option<(i64, u32)> {
    let nanos = u32::try_from(meta.mtime_nsec()).unwrap_or_default();
    ((meta.mtime(), nanos) != (0, 0)).then_some((meta.mtime(), nanos))
}

/// Go's `FileMode.String`: the letters of the set bits in the order `dalTLDpSugct?`, or `-`.
fn permissions(meta: &Metadata) -> String {
    let (mode, kind) = (meta.mode(), meta.file_type());
    let letters = [
        (kind.is_dir(), 'd'),
        (kind.is_symlink(), 'L'),
        (kind.is_block_device() || kind.is_char_device(), 'D'),
        (kind.is_fifo(), 'p'),
        (kind.is_socket(), 'S'),
        (mode & libc::S_ISUID != 0, 'u'),
        (mode & libc::S_ISGID != 0, 'g'),
        (kind.is_char_device(), 'c'),
        (mode & libc::S_ISVTX != 0, 't'),
    ];
    let mut text: String =
        letters.iter().filter(|(set, _)| *set).map(|(_, letter)| letter).collect();
    if text.is_empty() {
        text.push('-');
    }
    let bits = "rwxrwxrwx".chars().enumerate();
    text.extend(bits.map(|(i, letter)| if mode & (0o400 >> i) != 0 { letter } else { '-' }));
    text
}

/// The names of user and group ids, each asked for once in a listing.
#[derive(Debug)]
pub(super) struct Owners<'a> {
    users: &'a Users,
    user_names: HashMap<u32, Arc<str>>,
    group_names: HashMap<u32, Arc<str>>,
}

impl<'a> Owners<'a> {
    pub(super) fn new(users: &'a Users) -> Self {
        Self { users, user_names: HashMap::new(), group_names: HashMap::new() }
    }

    fn user(&mut self, uid: u32) -> String {
        self.user_names.entry(uid).or_insert_with(|| self.users.user_name(uid)).to_string()
    }

    fn group(&mut self, gid: u32) -> String {
        self.group_names.entry(gid).or_insert_with(|| self.users.group_name(gid)).to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        time::{Duration, UNIX_EPOCH},
    };

    use super::*;

    fn entry(path: &Path) -> Entry {
        stat(path, &Users::system()).unwrap()
    }

    #[test]
    fn permissions_are_gos() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("f");
        fs::write(&file, "").unwrap();
        for (mode, wanted) in [
            (0o644, "-rw-r--r--"),
            (0o000, "----------"),
            (0o4755, "urwxr-xr-x"),
            (0o2755, "grwxr-xr-x"),
            (0o6711, "ugrwx--x--x"),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(entry(&file).permissions, wanted);
            assert_eq!(entry(&file).mode, mode & 0o777);
        }
        let dir = tmp.path().join("d");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(entry(&dir).permissions, "dtrwxrwxrwx");
        symlink("f", tmp.path().join("l")).unwrap();
        assert_eq!(entry(&tmp.path().join("l")).permissions, "Lrwxrwxrwx");
        let _socket = UnixListener::bind(tmp.path().join("s")).unwrap();
        assert!(entry(&tmp.path().join("s")).permissions.starts_with('S'));
        assert_eq!(entry(Path::new("/dev/null")).permissions, "Dcrw-rw-rw-");
        assert_eq!(entry(Path::new("/dev/null")).kind, EntryKind::Other);
    }

    #[test]
    fn a_link_tells_what_it_leads_to() {
        let tmp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(tmp.path()).unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("f"), "abc").unwrap();
        fs::set_permissions(root.join("f"), fs::Permissions::from_mode(0o640)).unwrap();
        for (link, to) in [("l1", "f"), ("l2", "l1"), ("ld", "d"), ("no", "nowhere"), ("o", "o")] {
            symlink(to, root.join(link)).unwrap();
        }
        let shown = |name: &str| root.join(name).display().to_string();

        let link = entry(&root.join("l2"));
        assert_eq!((link.kind, link.mode, link.size), (EntryKind::File, 0o640, 2));
        assert_eq!((link.name.as_str(), link.is_symlink), ("l2", true));
        assert_eq!(link.symlink_target, Some(shown("f")));
        assert_eq!(entry(&root.join("ld")).kind, EntryKind::Directory);
        for broken in ["no", "o"] {
            let link = entry(&root.join(broken));
            assert_eq!((link.kind, link.mode), (EntryKind::Other, 0));
            assert_eq!(link.symlink_target, Some(shown(broken)));
        }
        assert_eq!(entry(&root.join("f")).symlink_target, None);
    }

    #[test]
    fn tells_names_times_and_metadata() {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let path = tmp.path().join(OsStr::from_bytes(b"a\xffb"));
        let file = fs::File::create(&path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::new(5, 7)).unwrap();
        xattr::set(&path, "user.e2b.author", b"me").unwrap();
        let told = entry(&path);
        assert_eq!(told.name, "a\u{fffd}b");
        assert_eq!(told.modified, Some((5, 7)));
        assert_eq!(told.metadata.get("author").map(String::as_str), Some("me"));
        file.set_modified(UNIX_EPOCH).unwrap();
        assert_eq!(entry(&path).modified, None);
        assert_eq!(entry(Path::new("/")).name, "/");
    }

    #[test]
    fn errors_are_upstreams() {
        let users = Users::system();
        let error = stat(Path::new("/no/where"), &users).unwrap_err();
        assert_eq!(error.to_string(), "file not found: lstat /no/where: no such file or directory");
        let error = stat(Path::new("/dev/null/x"), &users).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error getting file info: lstat /dev/null/x: not a directory"
        );
    }
}
