//! Whole files in.
//!
//! A client that goes away must not leave half a file, and must not have destroyed the old one:
//!
//! * A **new** file is created in place and written as the bytes come, because E2B's clients
//!   assert what a watcher sees of that: CREATE, CHMOD, WRITE. It is unlinked again when the
//!   upload is abandoned.
//! * An **existing** file is not touched before the whole body is here; the body waits in memory,
//!   and beyond [`MAX_BODY_IN_MEMORY`] in a file without a name. Then that becomes a file with the
//!   old one's mode and attributes and is renamed over it, so that whoever reads has the old content
//!   or the new, whole. Where that would not be the same thing, the body is copied into the old
//!   file: when it has other names (hard links), is a mount point, is being written by others too,
//!   or lies in a directory that a client watches, to whom E2B's daemon tells a WRITE. Whether there
//!   is room for it is looked at before anything is lost.
//!
//! Several uploads may write one file at a time. Their contents never mix: whoever finishes last
//! has their whole content there. [`Writers`] knows the files that are being written:
//!
//! * Content is replaced by one of them at a time.
//! * A new file is written in place by the one that created it, and by nobody else. When another
//!   finishes first, what has come so far is saved from the file, and its creator becomes one that
//!   replaces an existing file.
//! * A new file that none of them finished is unlinked by the last one that gives up.

use std::{
    collections::BTreeMap,
    fs::{File, Metadata},
    io::{self, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{stat::SFlag, statvfs::fstatvfs},
};
use parking_lot::Mutex;

use super::{
    FsError, PathError,
    actor::{Actor, Rights},
    errno, metadata, path,
    resolve::{Found, Place, Walk},
    staged,
};

mod body;
mod exchange;
mod writers;

pub use super::metadata::{set_metadata, validate_metadata};
pub use body::MAX_BODY_IN_MEMORY;
use body::{Body, append, copy_of};
pub use writers::Writers;
use writers::{Live, Membership};

/// How often a target is looked up again because others change it meanwhile.
const MAX_TRIES: usize = 256;

/// What is told of a file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteInfo {
    /// The last part of the path.
    pub name: String,
    /// The path.
    pub path: String,
    /// The metadata as the file system now has it.
    pub metadata: BTreeMap<String, String>,
}

/// How a file that exists is opened to be written.
const WRITING: OFlag = OFlag::O_WRONLY.union(OFlag::O_NONBLOCK);

/// A file that is being written. Dropped without [`Writer::finish`], it leaves everything as it
/// was, except for new directories.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Where the file is, links followed.
    place: Arc<Place>,
    /// With which the file was opened: the place's, or the user's own.
    rights: Rights,
    /// How many directories above it are new.
    made: usize,
    expected: Option<u64>,
    fsync: bool,
    file: Arc<File>,
    sink: Sink,
    /// Behind what it counts, so that it is dropped after it.
    _live: Live,
}

#[derive(Debug)]
enum Sink {
    /// A file that we created and write in place.
    New(Membership),
    /// A regular file that existed, and the body that waits for it.
    Existing(Membership, Body),
    /// A character device such as /dev/null, written at once.
    Device,
}

impl Writer {
    /// Starts to write the file at `path`, which may exist, for `actor`.
    ///
    /// # Errors
    /// [`FsError::EnsureDirectories`], [`FsError::WriteOfDirectory`], [`FsError::NotRegular`],
    /// [`FsError::NoInodes`], or the call that failed.
    pub fn create(writers: &Arc<Writers>, path: &Path, actor: &Actor) -> Result<Self, FsError> {
        let live = Live::new(writers);
        let mut made = 0;
        // Again when somebody was faster, or exchanged what was found for a link.
        for _ in 0..MAX_TRIES {
            let place = to_be_written(path, actor)?;
            made += place.made();
            let opened = match place.found() {
                None => create_file(writers, path, place)?,
                Some(_) => existing_file(writers, path, place)?,
            };
            let Some(Opened { place, file, sink, rights }) = opened else { continue };
            let writer = Self {
                path: path.to_owned(),
                place,
                rights,
                made,
                expected: None,
                fsync: false,
                file,
                sink,
                _live: live,
            };
            if matches!(writer.sink, Sink::New(_)) {
                writer.change_owner()?;
            }
            return Ok(writer);
        }
        Err(FsError::OpenForWriting(PathError::new("open", path, Errno::ELOOP)))
    }

    /// Tells how many bytes the client announced, for the message when they do not fit.
    pub fn expect_bytes(&mut self, bytes: u64) {
        self.expected = (bytes > 0).then_some(bytes);
    }

    /// Makes [`Self::finish`] wait until content and name are on the disk.
    pub fn fsync(&mut self) {
        self.fsync = true;
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] or [`FsError::WriteFile`]; the writer is then to be dropped.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        let written = match &mut self.sink {
            Sink::New(membership) => {
                // Against one who finishes meanwhile and saves what has been written.
                let mut shared = membership.shared.lock();
                match shared.saved.as_mut() {
                    Some(body) => append(body, bytes, &self.place),
                    None => (&*self.file).write_all(bytes),
                }
            }
            Sink::Device => (&*self.file).write_all(bytes),
            Sink::Existing(_, body) => append(body, bytes, &self.place),
        };
        written.map_err(|error| self.write_failed(&error))
    }

    /// Ends the body: the file has its content, its owner and its metadata.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] while an existing file is still intact, or the call that failed.
    pub fn finish(mut self, metadata: &BTreeMap<String, String>) -> Result<WriteInfo, FsError> {
        let shared = match &self.sink {
            Sink::New(membership) | Sink::Existing(membership, _) => {
                Some(Arc::clone(&membership.shared))
            }
            Sink::Device => None,
        };
        // One at a time, to the end: the content and the metadata of one upload.
        let mut shared = shared.as_deref().map(Mutex::lock);
        let body = match &mut self.sink {
            Sink::New(_) => shared.as_mut().and_then(|shared| shared.saved.take()),
            // Taken out, so that the body can be read while the file is written.
            Sink::Existing(_, body) => Some(std::mem::take(body)),
            Sink::Device => None,
        };
        if let Some(shared) = shared.as_mut()
            && body.is_some()
            && let Some(creator) = shared.creator.clone()
        {
            let saved = copy_of(&creator, &self.place);
            shared.saved = Some(saved.map_err(|error| self.write_failed(&error))?);
            shared.creator = None;
        }
        let body = self.follow(body)?;
        let replaced = match &body {
            Some(body) if shared.as_ref().is_some_and(|shared| shared.writers == 1) => {
                self.exchange(body, metadata)?
            }
            _ => false,
        };
        if !replaced {
            if let Some(body) = body {
                self.replace_content(body)?;
            }
            self.rights.act(|| metadata::replace(&self.file, &self.path, metadata))?;
            if self.fsync && !matches!(self.sink, Sink::Device) {
                self.file.sync_all().map_err(|error| self.write_failed(&error))?;
            }
        }
        if self.fsync && matches!(self.sink, Sink::New(_) | Sink::Existing(..)) {
            self.place.sync_names(self.made).map_err(|error| self.write_failed(&error))?;
        }
        if let Some(shared) = shared.as_mut() {
            shared.finished = true;
            shared.fresh = None;
            if matches!(self.sink, Sink::New(_)) {
                shared.creator = None;
            }
        }
        drop(shared);
        Ok(WriteInfo {
            name: path::base_name(&self.path).to_string_lossy().into_owned(),
            path: self.path.to_string_lossy().into_owned(),
            metadata: self.rights.perform(|| metadata::read_open(&self.file)).unwrap_or_default(),
        })
    }

    fn replace_content(&self, body: Body) -> Result<(), FsError> {
        let old = self.file.metadata().map_err(|error| self.write_failed(&error))?;
        let wanted = match &body {
            Body::Memory(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            Body::Disk(spool) => spool.metadata().map_err(|error| self.write_failed(&error))?.len(),
        };
        if room_for(&self.file, &old).is_some_and(|room| room < wanted) {
            return Err(FsError::NoSpace(self.expected));
        }
        self.prepare_in_place()?;
        // With the user's rights, if those opened the file: the kernel then takes set-uid bits away
        // that the user could not.
        let write = || -> io::Result<()> {
            let mut file = &*self.file;
            // Files of /proc and /sys are empty to the eye, and not all can be truncated.
            if old.len() > 0 {
                file.set_len(0)?;
            }
            // A creator's stands where it stopped to write in place.
            if file.stream_position().is_ok_and(|at| at > 0) {
                file.rewind()?;
            }
            match body {
                Body::Memory(bytes) => file.write_all(&bytes),
                Body::Disk(mut spool) => {
                    spool.rewind()?;
                    // copy_file_range: shared extents where the file system can.
                    io::copy(&mut spool, &mut file).map(|_| ())
                }
            }
        };
        self.rights.act(write).map_err(|error| self.write_failed(&error))
    }

    fn change_owner(&self) -> Result<(), FsError> {
        self.rights.act(|| staged::give_to_user(&self.file, &self.path, &self.rights))
    }

    fn write_failed(&self, error: &io::Error) -> FsError {
        match errno::of(error) {
            Errno::ENOSPC | Errno::EDQUOT => FsError::NoSpace(self.expected),
            errno => FsError::WriteFile(PathError::new("write", &self.path, errno)),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Nobody has to save what this one has written any more.
        if let Sink::New(membership) = &self.sink {
            let mut shared = membership.shared.lock();
            shared.creator = None;
            shared.saved = None;
        }
    }
}

/// Walks to the file that is to be written, and makes the missing directories above it.
fn to_be_written(path: &Path, actor: &Actor) -> Result<Place, FsError> {
    let place = Walk::new(actor).make_parents().to(path).map_err(|error| match error.at_last {
        true => error.or_busy(|error| open_failed(path, error.errno)),
        false => FsError::ensuring(error.of_making_directories()),
    })?;
    match place.is_nameless() || place.found().is_some_and(Found::is_dir) {
        true => Err(FsError::WriteOfDirectory(path.to_owned())),
        false => Ok(place),
    }
}

/// A file that was opened, and what is to be done with it.
struct Opened {
    place: Arc<Place>,
    file: Arc<File>,
    sink: Sink,
    rights: Rights,
}

/// Creates a file and joins its writers; none when somebody else has created it meanwhile.
fn create_file(
    writers: &Arc<Writers>,
    path: &Path,
    place: Place,
) -> Result<Option<Opened>, FsError> {
    let place = Arc::new(place);
    // Readable too: see `Shared::saved`.
    let file = match place.create_new(OFlag::O_RDWR, 0o666) {
        Ok(file) => file,
        Err(Errno::EEXIST | Errno::EISDIR | Errno::ELOOP) => return Ok(None),
        Err(errno) => return Err(open_failed(path, errno)),
    };
    let meta = file.metadata().map_err(|error| open_failed(path, errno::of(&error)))?;
    let membership = writers.join((meta.dev(), meta.ino()));
    let file = Arc::new(file);
    let mut shared = membership.shared.lock();
    // Another may have found it, and even finished, before we joined.
    let alone = shared.writers == 1 && file.metadata().is_ok_and(|meta| meta.len() == 0);
    if alone {
        shared.creator = Some(Arc::clone(&file));
    }
    if alone || !shared.finished {
        shared.fresh = Some(Arc::clone(&place));
    }
    drop(shared);
    let sink =
        if alone { Sink::New(membership) } else { Sink::Existing(membership, Body::default()) };
    let rights = place.rights().clone();
    Ok(Some(Opened { place, file, sink, rights }))
}

/// Opens a file that exists and joins its writers; none when it is another one by now.
fn existing_file(
    writers: &Arc<Writers>,
    path: &Path,
    place: Place,
) -> Result<Option<Opened>, FsError> {
    let device = place.found().is_some_and(|found| found.kind() == SFlag::S_IFCHR);
    if !place.found().is_some_and(Found::is_file) && !device {
        return Err(FsError::NotRegular(path.to_owned()));
    }
    // Opened now, not at the end: what forbids it (a running program, a read-only mount) is
    // told before the body is sent.
    let (file, now, rights) = match place.open(WRITING) {
        Ok(opened) => opened,
        Err(Errno::ENOENT | Errno::ELOOP) => return Ok(None),
        Err(errno) => return Err(open_failed(path, errno)),
    };
    let is_file = now.st_mode & libc::S_IFMT == libc::S_IFREG;
    if is_file == device {
        return Err(FsError::NotRegular(path.to_owned()));
    }
    let (place, file) = (Arc::new(place.without_found()), Arc::new(file));
    if device {
        return Ok(Some(Opened { place, file, sink: Sink::Device, rights }));
    }
    let key = (now.st_dev, now.st_ino);
    let membership = writers.join(key);
    // Looked at after joining: from now on it is not unlinked without us. Of a file that has no
    // link but is there all the same, the file system does not count them.
    let gone = {
        let _shared = membership.shared.lock();
        let meta = file.metadata().map_err(|error| open_failed(path, errno::of(&error)))?;
        let there = place.stat_now().is_ok_and(|stat| (stat.st_dev, stat.st_ino) == key);
        meta.nlink() == 0 && !there
    };
    let sink = Sink::Existing(membership, Body::default());
    Ok((!gone).then_some(Opened { place, file, sink, rights }))
}

fn open_failed(path: &Path, errno: Errno) -> FsError {
    let error = PathError::new("open", path, errno);
    match errno {
        Errno::EISDIR => FsError::WriteOfDirectory(path.to_owned()),
        Errno::ENOSPC | Errno::EDQUOT => FsError::NoInodes(error),
        _ => FsError::OpenForWriting(error),
    }
}

/// The bytes that the file can grow to, with its old content gone; none where that is unknown.
pub(super) fn room_for(file: &File, old: &Metadata) -> Option<u64> {
    let space = fstatvfs(file).ok().filter(|space| space.blocks() > 0)?;
    // The reserve of the file system is root's.
    let root = nix::unistd::geteuid().is_root();
    let blocks = if root { space.blocks_free() } else { space.blocks_available() };
    let own = old.blocks().saturating_mul(512);
    Some(blocks.saturating_mul(space.fragment_size()).saturating_add(own))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::{
        body::{spool, spool_unlinked},
        *,
    };
    use crate::fs::{read, resolve::own_actor};

    fn none() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn put(path: &Path, content: &[u8]) -> Result<WriteInfo, FsError> {
        let mut writer = Writer::create(&Writers::new(), path, &own_actor())?;
        content.chunks(300_000).try_for_each(|chunk| writer.write(chunk))?;
        writer.finish(&none())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn writes_new_files_and_into_existing_ones() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a/b/f");
        let info = put(&path, b"one").unwrap();
        assert_eq!((info.name.as_str(), info.path.as_str()), ("f", path.to_str().unwrap()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
        let before = fs::metadata(&path).unwrap();
        fs::hard_link(&path, tmp.path().join("hard")).unwrap();
        symlink("a/b/f", tmp.path().join("soft")).unwrap();

        let big: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
        for content in [&b"two"[..], &big, &big[..MAX_BODY_IN_MEMORY], b""] {
            put(&tmp.path().join("soft"), content).unwrap();
            assert!(fs::read(tmp.path().join("hard")).unwrap() == content);
        }
        let after = fs::metadata(&path).unwrap();
        assert_eq!((before.ino(), before.mode()), (after.ino(), after.mode()));
        assert_eq!(names(&tmp.path().join("a/b")), ["f"]);
    }

    #[test]
    fn an_abandoned_upload_leaves_no_half_file_and_the_old_one_whole() {
        let tmp = tempfile::tempdir().unwrap();
        let (new, old) = (tmp.path().join("new"), tmp.path().join("old"));
        fs::write(&old, "old").unwrap();
        for path in [&new, &old] {
            let mut writer = Writer::create(&Writers::new(), path, &own_actor()).unwrap();
            writer.write(&vec![1; 2 * MAX_BODY_IN_MEMORY]).unwrap();
        }
        assert_eq!(names(tmp.path()), ["old"]);
        assert_eq!(fs::read(&old).unwrap(), b"old");

        // Another file that took the place meanwhile stays.
        let writer = Writer::create(&Writers::new(), &new, &own_actor()).unwrap();
        fs::write(tmp.path().join("other"), "other").unwrap();
        fs::rename(tmp.path().join("other"), &new).unwrap();
        drop(writer);
        assert_eq!(fs::read(&new).unwrap(), b"other");
    }

    /// A creator that stalls, and another writer of the same file, of small and of long contents.
    fn two_writers(check: impl Fn(&Path, Writer, Writer, [Vec<u8>; 2])) {
        for length in [5000, 2 * MAX_BODY_IN_MEMORY] {
            let tmp = tempfile::tempdir().unwrap();
            let path = tmp.path().join("f");
            let writers = Writers::new();
            let contents = [vec![b'a'; 2 * length], vec![b'b'; length]];
            let mut first = Writer::create(&writers, &path, &own_actor()).unwrap();
            first.write(&contents[0][..length]).unwrap();
            let mut second = Writer::create(&writers, &path, &own_actor()).unwrap();
            second.write(&contents[1]).unwrap();
            assert_eq!(writers.live(), 2);
            check(&path, first, second, contents);
            assert_eq!(writers.live(), 0);
            assert!(writers.state.lock().files.is_empty());
        }
    }

    #[test]
    fn the_file_of_one_who_finished_stays_when_its_creator_gives_up() {
        two_writers(|path, first, second, [_, b]| {
            second.finish(&none()).unwrap();
            assert!(fs::read(path).unwrap() == b);
            drop(first);
            assert!(fs::read(path).unwrap() == b);
        });
        // And when the creator gives up before.
        two_writers(|path, first, second, [_, b]| {
            drop(first);
            second.finish(&none()).unwrap();
            assert!(fs::read(path).unwrap() == b);
        });
        // Without anybody who finishes nothing stays, whoever leaves first.
        two_writers(|path, first, second, _| {
            drop((first, second));
            assert!(!path.exists());
        });
        two_writers(|path, first, second, _| {
            drop((second, first));
            assert!(!path.exists());
        });
    }

    #[test]
    fn contents_of_two_writers_never_mix_and_the_last_one_stays() {
        two_writers(|path, mut first, second, [a, b]| {
            second.finish(&none()).unwrap();
            first.write(&a[b.len()..]).unwrap();
            assert!(fs::read(path).unwrap() == b);
            first.finish(&none()).unwrap();
            assert!(fs::read(path).unwrap() == a);
        });
        two_writers(|path, mut first, second, [a, b]| {
            first.write(&a[b.len()..]).unwrap();
            first.finish(&none()).unwrap();
            assert!(fs::read(path).unwrap() == a);
            second.finish(&none()).unwrap();
            assert!(fs::read(path).unwrap() == b);
        });
    }

    #[test]
    fn many_writers_at_once_leave_one_whole_content() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        let writers = Writers::new();
        for _ in 0..50 {
            std::thread::scope(|scope| {
                for id in 0..4_u8 {
                    let (path, writers) = (&path, &writers);
                    scope.spawn(move || {
                        let mut writer = Writer::create(writers, path, &own_actor()).unwrap();
                        (0..20).for_each(|_| writer.write(&[id; 1000]).unwrap());
                        if id > 0 {
                            writer.finish(&none()).unwrap();
                        }
                    });
                }
            });
            let content = fs::read(&path).unwrap();
            assert_eq!(content.len(), 20_000);
            assert!(content[0] > 0 && content.iter().all(|byte| *byte == content[0]));
            fs::remove_file(&path).unwrap();
        }
        assert!(writers.state.lock().files.is_empty());
    }

    #[test]
    fn a_link_to_nowhere_is_created_where_it_leads() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("d")).unwrap();
        symlink("d/two", tmp.path().join("one")).unwrap();
        symlink("three", tmp.path().join("d/two")).unwrap();
        symlink("loop", tmp.path().join("loop")).unwrap();
        put(&tmp.path().join("one"), b"x").unwrap();
        assert_eq!(fs::read(tmp.path().join("d/three")).unwrap(), b"x");
        let error = put(&tmp.path().join("loop"), b"").unwrap_err().to_string();
        assert!(error.ends_with("too many levels of symbolic links"), "{error}");
    }

    #[test]
    fn directories_fifos_and_devices() {
        let tmp = tempfile::tempdir().unwrap();
        let shown = tmp.path().display();
        let fifo = tmp.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let error = put(tmp.path(), b"").unwrap_err();
        assert_eq!(error.to_string(), format!("path is a directory: {shown}"));
        let slash = PathBuf::from(format!("{shown}/new/"));
        let error = put(&slash, b"").unwrap_err();
        assert_eq!(error.to_string(), format!("path is a directory: {shown}/new/"));
        assert!(slash.is_dir());
        let not_regular = format!("path '{shown}/fifo' is not a regular file");
        assert_eq!(put(&fifo, b"x").unwrap_err().to_string(), not_regular);
        assert_eq!(read::open(&fifo, &own_actor()).unwrap_err().to_string(), not_regular);
        put(Path::new("/dev/null"), b"x").unwrap();

        let error = put(&fifo.join("x"), b"").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("error ensuring directories: path is a file: {shown}/fifo")
        );
    }

    #[test]
    fn metadata_is_replaced_and_told() {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let path = tmp.path().join("f");
        let author = BTreeMap::from([("author".to_owned(), "me".to_owned())]);
        let told =
            Writer::create(&Writers::new(), &path, &own_actor()).unwrap().finish(&author).unwrap();
        assert_eq!(told.metadata, author);
        assert_eq!(put(&path, b"x").unwrap().metadata, none());
    }

    #[test]
    fn a_full_disk_is_told_with_the_announced_length() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            return;
        }
        let mut writer = Writer::create(&Writers::new(), full, &own_actor()).unwrap();
        let error = writer.write(b"x").unwrap_err();
        assert_eq!(error.to_string(), "not enough disk space available");
        writer.expect_bytes(7);
        let error = writer.write(b"x").unwrap_err();
        assert_eq!(
            error.to_string(),
            "attempted to write 7 bytes: not enough disk space available"
        );
        assert_eq!(error.kind(), super::super::Kind::NoSpace);
    }

    #[test]
    fn both_spools_have_no_name() {
        let tmp = tempfile::tempdir().unwrap();
        let place = Walk::new(&own_actor()).to(&tmp.path().join("f")).unwrap();
        let unlinked = spool_unlinked(place.dir(), place.rights());
        for mut spool in [spool(&place).unwrap(), unlinked.unwrap()] {
            spool.write_all(b"x").unwrap();
        }
        assert!(names(tmp.path()).is_empty());
    }
}
