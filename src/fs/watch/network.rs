//! Directories on network file systems, where the kernel tells nothing of what others change.
//!
//! They are looked at every two seconds, by one job at a time on the pool for files, and compared
//! with what was there before. (The crate `notify` has a poller too; its licence is not among those
//! that this program allows itself, and what it remembers has no bound.)

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
};

use super::{
    Rescan, RescanReason, WatchEvent, WatchKind, WatchOptions, below, known::MAX_KNOWN_NAMES,
    place::Root, queue::Queue, shown,
};
use crate::{
    blocking::{Pool, stand_on_path},
    fs::{FsError, actor::Actor, entry},
    guest::users::Users,
};

/// How often they are looked at.
pub const NETWORK_INTERVAL: Duration = Duration::from_secs(2);
/// The names that one watcher on a network file system knows. What is beyond it is not told, which
/// is declared to those who asked for rescans to be.
pub const MAX_NETWORK_NAMES: usize = 131_072;
/// The watchers on network file systems at a time.
pub const MAX_NETWORK_WATCHERS: usize = 16;
const _: () = assert!(MAX_NETWORK_NAMES <= MAX_KNOWN_NAMES);

/// One such watch.
#[derive(Debug)]
pub(super) struct Poller {
    path: PathBuf,
    actor: Actor,
    options: WatchOptions,
    users: Arc<Users>,
    queue: Arc<Queue>,
    /// None when the root is gone.
    known: Mutex<Option<Seen>>,
}

/// Looks again and again until it is dropped.
#[derive(Debug)]
pub(super) struct Polling {
    poller: Arc<Poller>,
    task: AbortHandle,
    /// One of [`MAX_NETWORK_WATCHERS`].
    _slot: OwnedSemaphorePermit,
}

impl Drop for Polling {
    fn drop(&mut self) {
        self.task.abort();
        self.poller.queue.close();
    }
}

/// What was there.
#[derive(Debug, Default)]
struct Seen {
    names: BTreeMap<PathBuf, Stamp>,
    /// There was more.
    cut: bool,
}

/// By what a change is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    is_dir: bool,
    inode: u64,
    content: (u64, i64, i64),
    attributes: (u32, u32, u32, i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            is_dir: meta.is_dir(),
            inode: meta.ino(),
            content: (meta.size(), meta.mtime(), meta.mtime_nsec()),
            attributes: (meta.mode(), meta.uid(), meta.gid(), meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Poller {
    /// Looks for the first time.
    pub(super) async fn start(
        (path, actor): (PathBuf, Actor),
        options: WatchOptions,
        users: Arc<Users>,
        queue: Arc<Queue>,
        files: &Arc<Pool>,
        slots: &Arc<Semaphore>,
    ) -> Result<Polling, FsError> {
        let slot = Arc::clone(slots).try_acquire_owned();
        let slot = slot.map_err(|_| FsError::TooManyNetworkWatchers(MAX_NETWORK_WATCHERS))?;
        let known = Mutex::new(Some(Seen::default()));
        let poller = Arc::new(Self { path, actor, options, users, queue, known });
        let first = Arc::clone(&poller);
        files
            .run(move || {
                stand_on_path(&first.path)?;
                let seen = first.see();
                *first.known.lock() = seen;
                Ok::<_, FsError>(())
            })
            .await??;
        let task = tokio::spawn(follow(Arc::downgrade(&poller), Arc::clone(files))).abort_handle();
        Ok(Polling { poller, task, _slot: slot })
    }

    /// Tells what differs from what was there when it was last looked at.
    fn look(&self) {
        // While it does not answer there is nothing to tell; later the difference is told.
        if stand_on_path(&self.path).is_err() {
            return;
        }
        let mut known = self.known.lock();
        let Some(old) = known.as_ref() else {
            return;
        };
        let Some(new) = self.see() else {
            self.push(WatchKind::Remove, Path::new(""));
            *known = None;
            return;
        };
        for (rel, was) in &old.names {
            let now = new.names.get(rel);
            if now.is_none_or(|now| now.is_dir != was.is_dir) {
                self.push(WatchKind::Remove, rel);
            }
        }
        for (rel, now) in &new.names {
            match old.names.get(rel) {
                Some(was) if was.is_dir == now.is_dir => self.tell_change(rel, was, now),
                _ => {
                    self.push(WatchKind::Create, rel);
                    if !now.is_dir && now.content.0 > 0 {
                        self.push(WatchKind::Write, rel);
                    }
                }
            }
        }
        if new.cut && !old.cut {
            self.queue.miss(Rescan { reason: RescanReason::WatchLimit, complete: false });
        }
        *known = Some(new);
    }

    fn tell_change(&self, rel: &Path, was: &Stamp, now: &Stamp) {
        if now.is_dir {
            // Its times change with what is in it.
            if (was.attributes.0, was.attributes.1, was.attributes.2)
                != (now.attributes.0, now.attributes.1, now.attributes.2)
            {
                self.push(WatchKind::Chmod, rel);
            }
        } else if (was.inode, was.content) != (now.inode, now.content) {
            self.push(WatchKind::Write, rel);
        } else if was.attributes != now.attributes {
            self.push(WatchKind::Chmod, rel);
        }
    }

    fn push(&self, kind: WatchKind, rel: &Path) {
        self.queue.push(rel, self.event(rel, kind));
    }

    fn event(&self, rel: &Path, kind: WatchKind) -> WatchEvent {
        let leaves = matches!(kind, WatchKind::Remove | WatchKind::Rename);
        let entry = if self.options.include_entry && !leaves {
            entry::stat(&self.at(rel), &self.actor, &self.users).ok().map(Box::new)
        } else {
            None
        };
        WatchEvent { name: shown(rel), kind, entry }
    }

    fn at(&self, rel: &Path) -> PathBuf {
        below(&self.path, rel)
    }

    /// What is there; none when the root is no directory any more.
    fn see(&self) -> Option<Seen> {
        let resolved = Root::resolve(&self.path, &self.actor).ok()?;
        let root = resolved.open(Path::new("")).ok()?;
        let root = root.look(|at| fs::metadata(at).ok())?.filter(Metadata::is_dir)?;
        let mut seen = Seen::default();
        seen.names.insert(PathBuf::new(), Stamp::of(&root));
        let mut todo = vec![PathBuf::new()];
        while let Some(dir) = todo.pop() {
            let Ok(place) = resolved.open(&dir) else {
                continue;
            };
            let room = MAX_NETWORK_NAMES - seen.names.len();
            for (name, meta) in place.look(|at| entries_in(at, room + 1)).unwrap_or_default() {
                if seen.names.len() >= MAX_NETWORK_NAMES {
                    seen.cut = true;
                    return Some(seen);
                }
                let rel = dir.join(name);
                if meta.is_dir() && self.options.recursive {
                    todo.push(rel.clone());
                }
                seen.names.insert(rel, Stamp::of(&meta));
            }
        }
        Some(seen)
    }
}

/// Up to `limit` names in a directory, with what each is.
fn entries_in(dir: &Path, limit: usize) -> Vec<(OsString, Metadata)> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let entries = entries.filter_map(Result::ok);
    entries
        .filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?)))
        .take(limit)
        .collect()
}

impl Polling {
    /// Looks now.
    pub(super) async fn flush(&self, files: &Pool) -> Result<(), FsError> {
        let poller = Arc::clone(&self.poller);
        files
            .run(move || {
                poller.look();
                poller.refill();
            })
            .await?;
        Ok(())
    }

    /// Turns merged changes into events.
    pub(super) async fn refill(&self, files: &Pool) {
        let poller = Arc::clone(&self.poller);
        // Refused for lack of threads, it is asked for again with the next news.
        let _ = files.run_next_step(move || poller.refill()).await;
    }
}

impl Poller {
    fn refill(&self) {
        let _known = self.known.lock();
        self.queue.refill(|rel, kind| self.event(rel, kind));
    }
}

async fn follow(poller: Weak<Poller>, files: Arc<Pool>) {
    loop {
        tokio::time::sleep(NETWORK_INTERVAL).await;
        let Some(poller) = poller.upgrade() else {
            return;
        };
        // Refused while too much waits: the next look tells the same.
        let _ = files.run(move || poller.look()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::queue::Item, *};

    fn told(poller: &Poller) -> Vec<(WatchKind, String)> {
        poller.look();
        let told = poller.queue.take_all().0;
        let events = told.into_iter().filter_map(|told| match told.item {
            Item::Event(event) => Some((event.kind, event.name)),
            Item::Rescan(_) => None,
        });
        events.collect()
    }

    #[test]
    fn what_differs_is_told() {
        use WatchKind::{Chmod, Create, Remove, Write};
        let tmp = tempfile::tempdir_in(".").unwrap();
        let root = tmp.path().join("root");
        fs::create_dir_all(root.join("d/deep")).unwrap();
        fs::write(root.join("d/f"), "x").unwrap();
        let options = WatchOptions { recursive: true, ..WatchOptions::default() };
        let poller = Poller {
            path: root.clone(),
            actor: super::super::tests::actor(),
            options,
            users: Arc::new(Users::system()),
            queue: Arc::new(Queue::new(options)),
            known: Mutex::default(),
        };
        *poller.known.lock() = poller.see();
        let named = |wanted: &[(WatchKind, &str)]| {
            wanted.iter().map(|(kind, name)| (*kind, (*name).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(told(&poller), []);
        fs::write(root.join("d/f"), "more").unwrap();
        fs::write(root.join("d/deep/new"), "x").unwrap();
        fs::create_dir(root.join("e")).unwrap();
        let wanted = [(Create, "d/deep/new"), (Write, "d/deep/new"), (Write, "d/f"), (Create, "e")];
        assert_eq!(told(&poller), named(&wanted));
        let mut permissions = fs::metadata(root.join("d/f")).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(root.join("d/f"), permissions).unwrap();
        assert_eq!(told(&poller), named(&[(Chmod, "d/f")]));
        fs::remove_dir_all(root.join("d/deep")).unwrap();
        fs::rename(root.join("e"), root.join("d/e")).unwrap();
        let wanted = [(Remove, "d/deep"), (Remove, "d/deep/new"), (Remove, "e"), (Create, "d/e")];
        assert_eq!(told(&poller), named(&wanted));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(told(&poller), named(&[(Remove, ".")]));
        fs::create_dir(&root).unwrap();
        assert_eq!(told(&poller), []);
    }
}
