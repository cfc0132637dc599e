//! One search: what its two threads share.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Instant,
};

use nix::{errno::Errno, fcntl::OFlag};
use parking_lot::{Condvar, Mutex};

use super::{
    Found, Match, Query, SearchError, Skip, Summary, Truncation,
    content::{search_file, searcher},
    walk::walk,
};
use crate::{
    blocking::{Busy, MountBusy, MountId, Pool, leave_mount, stand_on_again, stand_on_path},
    fs::{
        FsError, PathError,
        actor::{Actor, Rights},
        entry::{Entry, EntryKind, Named, Owners},
        path,
        resolve::Walk,
    },
    guest::users::Users,
    slots::Slot,
    to_client::{self, FromThread, ToClient},
};

/// The matches that wait for the client; the search waits with them.
pub const MAX_WAITING_MATCHES: usize = 64;
/// The files that wait for the second thread; beyond it the first one searches them.
pub const MAX_QUEUED_FILES: usize = 64;

/// What a match takes besides its path and line.
const MATCH_BYTES: usize = 64;

/// A file to be searched: its name in a directory that is held open.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) dir: Arc<OwnedFd>,
    pub(super) name: OsString,
    pub(super) rel: PathBuf,
}

/// A running search.
pub struct Search {
    pub(super) query: Query,
    /// As it is shown.
    root: PathBuf,
    /// The path of the directory that it is, or that it lies in, without links.
    real: PathBuf,
    /// The root is a file.
    is_file: bool,
    users: Arc<Users>,
    /// With whose rights the tree is read.
    pub(super) rights: Rights,
    deadline: Instant,
    out: ToClient<Found>,
    matches: AtomicU64,
    searched: AtomicU64,
    bytes_read: AtomicU64,
    bytes_returned: AtomicU64,
    skipped: [AtomicU64; Skip::ALL.len()],
    /// 0, or one more than the place in [`TRUNCATIONS`].
    truncated: AtomicU8,
    /// The mount that has ended the search.
    failed: Mutex<Option<MountBusy>>,
    work: Mutex<Work>,
    news: Condvar,
}

const TRUNCATIONS: [Truncation; 4] =
    [Truncation::Matches, Truncation::BytesRead, Truncation::BytesReturned, Truncation::Timeout];

/// What is between the walker and its helper.
#[derive(Default)]
struct Work {
    files: VecDeque<Candidate>,
    /// The helper searches a file.
    helping: bool,
    /// There will be no more.
    walked: bool,
}

/// Where a search begins.
enum Start {
    Dir(OwnedFd),
    File(Candidate),
}

impl fmt::Debug for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Search").field("root", &self.root).finish_non_exhaustive()
    }
}

/// Starts a search on a pool's threads, on behalf of `actor`; what it finds comes out of the channel, last a summary. It
/// stops when the channel is dropped. `slot` is held while it runs.
///
/// # Errors
/// [`SearchError`]. A search that breaks down later ends without a summary.
pub async fn start(
    query: Query,
    path: PathBuf,
    actor: Actor,
    users: Arc<Users>,
    files: &Arc<Pool>,
    slot: Arc<Slot>,
) -> Result<FromThread<Found>, SearchError> {
    let at = path.clone();
    let begin = files.run(move || {
        stand_on_path(&at).map_err(FsError::from)?;
        Ok::<_, SearchError>((open_root(&at, &actor)?, MountId::current()))
    });
    let ((begin, real, rights), mount) = begin.await.map_err(FsError::from)??;
    let (out, found) = to_client::channel(MAX_WAITING_MATCHES, Arc::clone(&slot));
    let search = Arc::new(Search {
        deadline: Instant::now() + query.timeout,
        query,
        root: path::clean(&path),
        real,
        is_file: matches!(begin, Start::File(_)),
        users,
        rights,
        out,
        matches: AtomicU64::new(0),
        searched: AtomicU64::new(0),
        bytes_read: AtomicU64::new(0),
        bytes_returned: AtomicU64::new(0),
        skipped: Default::default(),
        truncated: AtomicU8::new(0),
        failed: Mutex::default(),
        work: Mutex::default(),
        news: Condvar::new(),
    });
    if search.query.matcher.is_some() && !search.is_file {
        let (helped, files) = (Arc::clone(&search), Arc::clone(files));
        // Without a second thread the first one does everything.
        tokio::spawn(async move {
            let helping = Arc::clone(&helped);
            if let Err(Busy::Mount(busy)) = files.run(move || helping.help()).await {
                helped.fail(busy);
                // The walker does not wait for it.
                helped.work.lock().helping = false;
                helped.news.notify_all();
            }
        });
    }
    let files = Arc::clone(files);
    tokio::spawn(async move {
        let walking = Arc::clone(&search);
        let done = files.run_next_step(move || {
            slot.use_here();
            if let Err(busy) = stand_on_again(mount) {
                walking.fail(busy);
            }
            walking.run(begin);
        });
        match done.await {
            Ok(()) => {}
            Err(Busy::Mount(busy)) => {
                search.fail(busy.clone());
                let _ = search.out.send(Found::Failed(busy)).await;
            }
            Err(error) => tracing::error!(%error, "a search has ended without its end"),
        }
    });
    Ok(found)
}

fn open_root(at: &Path, actor: &Actor) -> Result<(Start, PathBuf, Rights), SearchError> {
    let failed = |errno| match errno {
        Errno::ENOENT => SearchError::NotFound(PathError::new("open", at, errno)),
        _ => SearchError::Open(PathError::new("open", at, errno)),
    };
    let place = Walk::new(actor).to(at).map_err(|error| match error.busy.clone() {
        Some(busy) => SearchError::from(FsError::from(busy)),
        None => failed(error.errno),
    })?;
    let rights = place.rights().clone();
    let found = place.found().ok_or_else(|| failed(Errno::ENOENT))?;
    if found.is_dir() {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
        let (dir, ..) = place.open(flags).map_err(failed)?;
        return Ok((Start::Dir(dir.into()), place.real().to_owned(), rights));
    }
    if !found.is_file() {
        return Err(SearchError::Special(at.to_owned()));
    }
    let dir = place.dir().try_clone_to_owned();
    let dir = dir.map_err(|error| failed(crate::fs::errno::of(&error)))?;
    let name = place.name().to_owned();
    let file = Candidate { dir: Arc::new(dir), rel: PathBuf::from(&name), name };
    let real = place.real().parent().unwrap_or_else(|| Path::new("/")).to_owned();
    Ok((Start::File(file), real, rights))
}

impl Search {
    fn run(&self, start: Start) {
        // However it ends, the helper must not wait for more.
        let _walked = Walked(self);
        match start {
            Start::Dir(fd) => walk(self, fd),
            Start::File(file) if self.query.excludes(&file.rel, false) => {}
            Start::File(file) if !self.query.includes(&file.rel, false) => {}
            Start::File(file) if self.query.matcher.is_none() => {
                self.found_name(&file.dir, &file.name, &file.rel, EntryKind::File);
            }
            Start::File(file) => self.search_one(&file),
        }
        let mut work = self.work.lock();
        work.walked = true;
        self.news.notify_all();
        loop {
            if let Some(file) = work.files.pop_front() {
                drop(work);
                self.search_one(&file);
                work = self.work.lock();
            } else if work.helping {
                self.news.wait(&mut work);
            } else {
                break;
            }
        }
        drop(work);
        let last = match self.failed.lock().clone() {
            Some(busy) => Found::Failed(busy),
            None => Found::Summary(self.summary()),
        };
        self.send(last);
    }

    /// Searches files that the walker has found, beside it.
    fn help(&self) {
        let Some(matcher) = &self.query.matcher else {
            return;
        };
        let mut searcher = searcher(&self.query.options);
        let mut work = self.work.lock();
        loop {
            let Some(file) = work.files.pop_front() else {
                if work.walked {
                    return;
                }
                self.news.wait(&mut work);
                continue;
            };
            work.helping = true;
            drop(work);
            let helping = Helping(self);
            search_file(self, &mut searcher, matcher, &file);
            drop(helping);
            work = self.work.lock();
        }
    }

    fn search_one(&self, file: &Candidate) {
        if let Some(matcher) = &self.query.matcher
            && !self.is_over()
        {
            search_file(self, &mut searcher(&self.query.options), matcher, file);
        }
    }

    /// Whether to stop.
    pub(super) fn is_over(&self) -> bool {
        if self.truncated.load(Ordering::Relaxed) == 0 && Instant::now() >= self.deadline {
            self.truncate(Truncation::Timeout);
        }
        self.truncated.load(Ordering::Relaxed) != 0 || self.out.is_closed()
    }

    fn truncate(&self, by: Truncation) {
        let at = TRUNCATIONS.iter().position(|one| *one == by).and_then(|at| u8::try_from(at).ok());
        let value = at.map_or(1, |at| at + 1);
        // What was first is told.
        let _ = self.truncated.compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(super) fn skip(&self, reason: Skip, count: u64) {
        let at = Skip::ALL.iter().position(|one| *one == reason);
        if let Some(skipped) = at.and_then(|at| self.skipped.get(at)) {
            skipped.fetch_add(count, Ordering::Relaxed);
        }
    }

    pub(super) fn searched(&self, count: u64) {
        self.searched.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn read_bytes(&self, count: usize) {
        let before = self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        if before + count as u64 >= self.query.options.max_bytes_read {
            self.truncate(Truncation::BytesRead);
        }
    }

    /// A name that matches.
    pub(super) fn found_name(&self, dir: &OwnedFd, name: &OsStr, rel: &Path, kind: EntryKind) {
        self.searched(1);
        let entry = self.entry(dir.as_fd(), name, rel);
        self.tell(Match { path: self.shown(rel), kind, line: None, entry });
    }

    /// A file that may have matches in it.
    pub(super) fn found_file(&self, file: Candidate) {
        let mut work = self.work.lock();
        if work.files.len() < MAX_QUEUED_FILES {
            work.files.push_back(file);
            self.news.notify_all();
            return;
        }
        drop(work);
        self.search_one(&file);
    }

    /// Tells a match; whether to go on.
    pub(super) fn tell(&self, found: Match) -> bool {
        if self.is_over() {
            return false;
        }
        let options = &self.query.options;
        let line = found.line.as_ref();
        if !line.is_some_and(|line| line.context) {
            let before = self.matches.fetch_add(1, Ordering::Relaxed);
            if before >= options.max_matches.into() {
                self.matches.fetch_sub(1, Ordering::Relaxed);
                self.truncate(Truncation::Matches);
                return false;
            }
        }
        let bytes = (found.path.len() + line.map_or(0, |line| line.bytes.len())) as u64;
        let before = self.bytes_returned.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > options.max_bytes_returned {
            if !line.is_some_and(|line| line.context) {
                self.matches.fetch_sub(1, Ordering::Relaxed);
            }
            self.truncate(Truncation::BytesReturned);
            return false;
        }
        self.send(Found::Match(found))
    }

    /// Sends to the client; whether it is there.
    fn send(&self, found: Found) -> bool {
        let bytes = MATCH_BYTES + found.bytes();
        let Err(found) = self.out.try_send(found, bytes) else { return true };
        // A slow client does not make a mount one that hangs.
        let mount = MountId::current();
        leave_mount();
        let sent = self.out.send_slowly(found, bytes).is_ok();
        if let Err(busy) = stand_on_again(mount) {
            self.fail(busy);
        }
        sent
    }

    /// Ends the search: a mount in the tree does not answer.
    pub(super) fn fail(&self, busy: MountBusy) {
        self.failed.lock().get_or_insert(busy);
        self.truncate(Truncation::Timeout);
    }

    /// A path as the client sees it.
    pub(super) fn shown(&self, rel: &Path) -> String {
        let path = if self.is_file { self.root.clone() } else { self.root.join(rel) };
        path.to_string_lossy().into_owned()
    }

    /// The entry, if it was asked for, read through the directory that is held open.
    pub(super) fn entry(
        &self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        rel: &Path,
    ) -> Option<Box<Entry>> {
        if !self.query.options.include_entry {
            return None;
        }
        let above = rel.parent().unwrap_or_else(|| Path::new(""));
        let real = if self.is_file { self.real.clone() } else { self.real.join(above) };
        let shown = if self.is_file { self.root.clone() } else { self.root.join(rel) };
        let named = Named::open(dir, &real, name, &self.rights).ok()?;
        Some(Box::new(named.entry(&shown, &mut Owners::new(&self.users))))
    }

    fn summary(&self) -> Summary {
        let skipped = Skip::ALL.into_iter().zip(&self.skipped);
        let skipped = skipped.map(|(reason, count)| (reason, count.load(Ordering::Relaxed)));
        let truncated = usize::from(self.truncated.load(Ordering::Relaxed));
        Summary {
            matches: self.matches.load(Ordering::Relaxed),
            searched: self.searched.load(Ordering::Relaxed),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            skipped: skipped.filter(|(_, count)| *count > 0).collect(),
            truncated: truncated.checked_sub(1).and_then(|at| TRUNCATIONS.get(at).copied()),
        }
    }
}

/// Lets the helper go.
struct Walked<'a>(&'a Search);

impl Drop for Walked<'_> {
    fn drop(&mut self) {
        self.0.work.lock().walked = true;
        self.0.news.notify_all();
    }
}

/// Says that the helper is done with a file, even if it broke down over it.
struct Helping<'a>(&'a Search);

impl Drop for Helping<'_> {
    fn drop(&mut self) {
        self.0.work.lock().helping = false;
        self.0.news.notify_all();
    }
}
