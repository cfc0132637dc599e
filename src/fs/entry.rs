//! What is told about one file: `lstat`, names of its owners, where a link leads, metadata.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    dir::Type,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
};

use super::{
    FsError, PathError,
    actor::{Actor, FileAccess, Rights, RightsRefused},
    metadata, path,
    resolve::{Found, Place, Walk, is_others},
};
use crate::{
    blocking::{self, MountBusy},
    guest::users::{User, Users},
};

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

/// Describes the file at `path`; a link at its end is described itself.
///
/// # Errors
/// [`FsError::FileNotFound`] or [`FsError::FileInfo`].
pub fn stat(path: &Path, actor: &Actor, users: &Users) -> Result<Entry, FsError> {
    let place = Walk::new(actor).no_follow().to(path);
    let place = place.map_err(|error| error.or_busy(|error| lstat_failed(path, error.errno)))?;
    stat_place(&place, path, &mut Owners::new(users))
}

/// As [`stat`], with the daemon's rights, for those who have no [`Actor`].
///
/// # Errors
/// As [`stat`].
pub fn stat_as_daemon(path: &Path, users: &Users) -> Result<Entry, FsError> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let user = User { name: String::new(), uid, gid, home: "/".into(), groups: vec![gid] };
    stat(path, &Actor::new(&user, FileAccess::Compatible), users)
}

/// Describes a file that is open, under the path `shown`. Its metadata is read with `rights`.
///
/// # Errors
/// [`FsError::FileInfo`].
pub fn of_file(
    file: &File,
    rights: &Rights,
    shown: &Path,
    users: &Users,
) -> Result<Entry, FsError> {
    let stat = fstat(file);
    let stat = stat.map_err(|errno| FsError::FileInfo(PathError::new("stat", shown, errno)))?;
    let metadata = match kind_of(&stat) {
        EntryKind::Other => BTreeMap::new(),
        _ => rights.perform(|| metadata::read_open(file)).unwrap_or_default(),
    };
    let itself = Behind { stat: Some(stat), target: None, metadata };
    Ok(entry_of(&stat, itself, shown, &mut Owners::new(users)))
}

/// Describes what a walk has found, under the path `shown`.
///
/// # Errors
/// As [`stat`].
pub(super) fn stat_place(
    place: &Place,
    shown: &Path,
    owners: &mut Owners<'_>,
) -> Result<Entry, FsError> {
    let Some(found) = place.found() else {
        return Err(lstat_failed(shown, Errno::ENOENT));
    };
    let behind = match found.is_link() {
        true => {
            let above = place.real().parent().unwrap_or_else(|| Path::new("/"));
            behind(place.dir(), above, place.name(), place.rights())
        }
        false => Behind::itself(found, place.rights()),
    };
    Ok(entry_of(&found.stat, behind, shown, owners))
}

/// Describes what has the name `name` now.
///
/// # Errors
/// As [`stat`].
pub(super) fn stat_name(place: &Place, shown: &Path, users: &Users) -> Result<Entry, FsError> {
    let above = place.real().parent().unwrap_or_else(|| Path::new("/"));
    let named = Named::open(place.dir(), above, place.name(), place.rights());
    let named = named.map_err(|error| error.of(shown))?;
    Ok(named.entry(shown, &mut Owners::new(users)))
}

/// One name of a directory, opened: the very object that is described and, if it is a directory, gone
/// into.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) found: Found,
    behind: Behind,
}

/// Why a name could not be described.
#[derive(Debug)]
pub(super) enum NameError {
    Errno(Errno),
    Busy(MountBusy),
}

impl From<Errno> for NameError {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<RightsRefused> for NameError {
    fn from(refused: RightsRefused) -> Self {
        Self::Errno(refused.into())
    }
}

impl NameError {
    /// The error of describing `path`.
    pub(super) fn of(self, path: &Path) -> FsError {
        match self {
            Self::Errno(errno) => lstat_failed(path, errno),
            Self::Busy(busy) => busy.into(),
        }
    }
}

impl Named {
    /// Opens the name in the directory `dir`, whose path without links is `real`, with the rights with
    /// which that directory was reached.
    pub(super) fn open(
        dir: BorrowedFd<'_>,
        real: &Path,
        name: &OsStr,
        rights: &Rights,
    ) -> Result<Self, NameError> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = rights.act(|| {
            let fd = openat(dir, name, flags, Mode::empty())?;
            blocking::stand_on(fd.as_fd()).map_err(NameError::Busy)?;
            let stat = fstat(&fd)?;
            Ok::<_, NameError>(Found { fd, stat })
        })?;
        if found.is_link() {
            let behind = behind(dir, real, name, rights);
            return Ok(Self { found, behind });
        }
        let actor = rights.actor();
        let of_others = !rights.switched()
            && actor.may_switch()
            && is_others(&dir, &found.stat, actor).unwrap_or(true);
        let behind = match of_others {
            true => Behind::itself(&found, &actor.own_rights()),
            false => Behind::itself(&found, rights),
        };
        Ok(Self { found, behind })
    }

    /// Describes it under the path `shown`.
    pub(super) fn entry(self, shown: &Path, owners: &mut Owners<'_>) -> Entry {
        entry_of(&self.found.stat, self.behind, shown, owners)
    }
}

/// Describes a regular file of the directory `dir` without opening it: nearly all entries of a listing
/// are such. None where it takes more: it has other names, or metadata, or is something else by now.
pub(super) fn plain_file(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    shown: &Path,
    rights: &Rights,
    owners: &mut Owners<'_>,
) -> Option<Entry> {
    let stat = rights.act(|| {
        let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let is_plain = kind_of(&stat) == EntryKind::File && stat.st_nlink == 1;
        match is_plain && metadata::is_surely_without(&dir, name) {
            true => Ok(stat),
            false => Err(Errno::EAGAIN),
        }
    });
    let stat = stat.ok()?;
    let behind = Behind { stat: Some(stat), ..Behind::default() };
    Some(entry_of(&stat, behind, shown, owners))
}

/// Describes what cannot be looked at by what its directory says that it is: without size, times, mode
/// and owner.
pub(super) fn unreadable(shown: &Path, kind: Option<Type>) -> Entry {
    let letter = match kind {
        Some(Type::File) => "-",
        Some(Type::Directory) => "d",
        Some(Type::Symlink) => "L",
        Some(Type::BlockDevice) => "D",
        Some(Type::CharacterDevice) => "Dc",
        Some(Type::Fifo) => "p",
        Some(Type::Socket) => "S",
        // Go's letter for what is none of these.
        None => "?",
    };
    let path = shown.to_string_lossy().into_owned();
    let is_symlink = kind == Some(Type::Symlink);
    Entry {
        name: path::base_name(shown).to_string_lossy().into_owned(),
        kind: match kind {
            Some(Type::File) => EntryKind::File,
            Some(Type::Directory) => EntryKind::Directory,
            _ => EntryKind::Other,
        },
        size: 0,
        mode: 0,
        permissions: format!("{letter}---------"),
        owner: String::new(),
        group: String::new(),
        modified: None,
        symlink_target: is_symlink.then(|| path.clone()),
        path,
        is_symlink,
        metadata: BTreeMap::new(),
    }
}

/// What a name leads to: of anything but a link, itself.
#[derive(Debug, Default)]
struct Behind {
    /// None for a link to nowhere.
    stat: Option<FileStat>,
    /// Of a link, where that is known.
    target: Option<PathBuf>,
    metadata: BTreeMap<String, String>,
}

impl Behind {
    fn itself(found: &Found, rights: &Rights) -> Self {
        let metadata = match kind_of(&found.stat) {
            // Nothing else can hold `user.` attributes.
            EntryKind::Other => BTreeMap::new(),
            EntryKind::File | EntryKind::Directory => {
                rights.perform(|| metadata::read_fd(&found.fd)).unwrap_or_default()
            }
        };
        Self { stat: Some(found.stat), target: None, metadata }
    }
}

/// What the link `name` in the directory `dir` leads to. Type, mode and target are told in any case;
/// where the user may not go there, nothing else is, and the target only as far as the user could find
/// it out.
fn behind(dir: BorrowedFd<'_>, real: &Path, name: &OsStr, rights: &Rights) -> Behind {
    let actor = rights.actor();
    let walk = Walk::new(actor).with_rights_of(rights).max_links(path::MAX_LINKS);
    let error = match walk.from(&dir, real, Path::new(name)) {
        Ok(place) => {
            let target = match place.is_magic() {
                true => readlinkat(place.dir(), place.name()).ok().map(PathBuf::from),
                false => Some(place.real().to_owned()),
            };
            return match place.found() {
                Some(found) => Behind {
                    target: target.filter(|target| target.is_absolute()),
                    ..Behind::itself(found, place.rights())
                },
                None => Behind::default(),
            };
        }
        Err(error) => error,
    };
    let refused = matches!(error.errno, Errno::EACCES | Errno::EPERM);
    if error.busy.is_some() || !refused || rights.switched() || !actor.may_switch() {
        return Behind::default();
    }
    let target = match error.at_end {
        true => Some(error.at),
        // The way on is not the user's to know: what the link says.
        false => readlinkat(dir, name).ok().map(|to| path::clean(&real.join(to))),
    };
    let place = walk.look_only().from(&dir, real, Path::new(name));
    let stat = place.ok().and_then(|place| place.found().map(|found| found.stat));
    Behind { stat, target, metadata: BTreeMap::new() }
}

fn lstat_failed(path: &Path, errno: Errno) -> FsError {
    let error = PathError::new("lstat", path, errno);
    match errno {
        Errno::ENOENT => FsError::FileNotFound(error),
        _ => FsError::FileInfo(error),
    }
}

fn entry_of(stat: &FileStat, behind: Behind, shown: &Path, owners: &mut Owners<'_>) -> Entry {
    let is_symlink = file_type(stat) == SFlag::S_IFLNK;
    Entry {
        name: path::base_name(shown).to_string_lossy().into_owned(),
        kind: behind.stat.as_ref().map_or(EntryKind::Other, kind_of),
        path: shown.to_string_lossy().into_owned(),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: behind.stat.map_or(0, |stat| stat.st_mode & 0o777),
        permissions: permissions(stat),
        owner: owners.user(stat.st_uid),
        group: owners.group(stat.st_gid),
        modified: modified(stat),
        symlink_target: is_symlink
            .then(|| behind.target.as_deref().unwrap_or(shown).to_string_lossy().into_owned()),
        is_symlink,
        metadata: behind.metadata,
    }
}

fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn kind_of(stat: &FileStat) -> EntryKind {
    match file_type(stat) {
        SFlag::S_IFREG => EntryKind::File,
        SFlag::S_IFDIR => EntryKind::Directory,
        _ => EntryKind::Other,
    }
}

fn modified(stat: &FileStat) -> Option<(i64, u32)> {
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or_default();
    ((stat.st_mtime, nanos) != (0, 0)).then_some((stat.st_mtime, nanos))
}

/// Go's `FileMode.String`: the letters of the set bits in the order `dalTLDpSugct?`, or `-`.
fn permissions(stat: &FileStat) -> String {
    let (mode, kind) = (stat.st_mode, file_type(stat));
    let letters = [
        (kind == SFlag::S_IFDIR, 'd'),
        (kind == SFlag::S_IFLNK, 'L'),
        (kind == SFlag::S_IFBLK || kind == SFlag::S_IFCHR, 'D'),
        (kind == SFlag::S_IFIFO, 'p'),
        (kind == SFlag::S_IFSOCK, 'S'),
        (mode & libc::S_ISUID != 0, 'u'),
        (mode & libc::S_ISGID != 0, 'g'),
        (kind == SFlag::S_IFCHR, 'c'),
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
        fs,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        time::{Duration, UNIX_EPOCH},
    };

    use super::*;

    fn entry(path: &Path) -> Entry {
        stat_as_daemon(path, &Users::system()).unwrap()
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
        let error = stat_as_daemon(Path::new("/no/where"), &users).unwrap_err();
        assert_eq!(error.to_string(), "file not found: lstat /no/where: no such file or directory");
        let error = stat_as_daemon(Path::new("/dev/null/x"), &users).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error getting file info: lstat /dev/null/x: not a directory"
        );
    }
}
