//! Streams that can be taken up again where they broke off.
//!
//! A watch with cursors goes on for a while when its stream has ended, as watches of clients whose
//! connection broke. A later stream names the cursor of the last event that its client has, and gets
//! what came after it. The stream that had the watch before ends then, if it has not already: a
//! client knows that a connection is dead long before the daemon does.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{Hub, Told, WatchOptions, Watcher};
use crate::fs::{FsError, actor::Actor};

/// The watches with cursors, with a stream or without. Beyond it the one whose stream ended first is
/// given up.
pub const MAX_CURSOR_WATCHES: usize = 64;
/// How long such a watch is kept without a stream.
pub const DEFAULT_CURSOR_RETENTION: Duration = Duration::from_secs(300);

/// Another stream goes on from a cursor of this watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another stream has taken this watch over")]
pub struct TakenOver;

/// The watches with cursors.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    last: AtomicU64,
    watches: Mutex<HashMap<u64, Arc<Kept>>>,
}

/// One of them.
#[derive(Debug)]
struct Kept {
    watcher: Watcher,
    path: PathBuf,
    /// Of the user on whose behalf it is: what was told to one is not told to another.
    uid: u32,
    options: WatchOptions,
    /// Which stream has it, counted.
    turn: watch::Sender<u64>,
    /// Since when none has.
    alone_since: Mutex<Option<Instant>>,
}

/// What a stream follows.
#[derive(Debug)]
pub struct Follower(Following);

#[derive(Debug)]
enum Following {
    Plain(Watcher),
    Kept(Turn),
}

/// A stream's turn at a watch that may outlive it.
#[derive(Debug)]
struct Turn {
    hub: Arc<Hub>,
    id: u64,
    kept: Arc<Kept>,
    turn: u64,
    changes: watch::Receiver<u64>,
}

impl Follower {
    /// What is next. None only when the watching thread has failed.
    ///
    /// # Errors
    /// [`TakenOver`].
    pub async fn next(&mut self) -> Result<Option<Told>, TakenOver> {
        match &mut self.0 {
            Following::Plain(watcher) => Ok(watcher.next().await),
            Following::Kept(Turn { kept, turn, changes, .. }) => {
                // What the watcher gives is given to whoever has the turn.
                tokio::select! {
                    biased;
                    _ = changes.wait_for(|now| now != turn) => Err(TakenOver),
                    told = kept.watcher.next() => Ok(told),
                }
            }
        }
    }

    /// Where the stream begins, for watches with cursors.
    pub fn start(&self) -> Option<String> {
        match &self.0 {
            Following::Plain(_) => None,
            Following::Kept(turn) => self.cursor(turn.kept.watcher.queue.position()),
        }
    }

    /// The cursor of a position, for watches with cursors.
    pub fn cursor(&self, position: u64) -> Option<String> {
        match &self.0 {
            Following::Plain(_) => None,
            Following::Kept(turn) => Some(format!("{:016x}.{}.{position}", *DAEMON, turn.id)),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if *self.kept.turn.borrow() != self.turn {
            return;
        }
        *self.kept.alone_since.lock() = Some(Instant::now());
        let (hub, id, turn) = (Arc::downgrade(&self.hub), self.id, self.turn);
        let retention = self.hub.retention.cursors;
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            // The daemon ends.
            self.hub.cursors.watches.lock().remove(&id);
            return;
        };
        let mut changes = self.kept.turn.subscribe();
        runtime.spawn(async move {
            tokio::select! {
                biased;
                // Taken up again, or given up.
                _ = changes.wait_for(|now| *now != turn) => return,
                () = tokio::time::sleep(retention) => {}
            }
            if let Some(hub) = hub.upgrade() {
                let expired = hub.cursors.give_up(id, turn);
                drop(expired);
            }
        });
    }
}

impl Hub {
    /// Watches a directory on behalf of `actor` for a stream: anew, or going on from a cursor.
    ///
    /// # Errors
    /// As [`Self::watch`]; with cursors [`FsError::BadCursor`], [`FsError::OtherCursor`] and
    /// [`FsError::TooManyCursors`].
    pub async fn follow(
        self: &Arc<Self>,
        path: &Path,
        actor: &Actor,
        options: WatchOptions,
        from: Option<&str>,
    ) -> Result<Follower, FsError> {
        if !options.cursors {
            return Ok(Follower(Following::Plain(self.watch(path, actor, options).await?)));
        }
        if let Some(cursor) = from {
            let (daemon, id, position) =
                parse(cursor).ok_or_else(|| FsError::BadCursor(cursor.to_owned()))?;
            let kept = self.cursors.watches.lock().get(&id).filter(|_| daemon == *DAEMON).cloned();
            if let Some(kept) = kept {
                if (kept.path.as_path(), kept.uid, kept.options) != (path, actor.uid(), options) {
                    return Err(FsError::OtherCursor {
                        cursor: cursor.to_owned(),
                        path: kept.path.clone(),
                    });
                }
                if let Some(turn) = self.take_turn(id, kept, Some(position)) {
                    return Ok(turn);
                }
            }
        }
        let watcher = self.watch(path, actor, options).await?;
        if from.is_some() {
            // Nothing is known of what happened since.
            watcher.queue.seek(u64::MAX);
        }
        let id = self.cursors.last.fetch_add(1, Ordering::Relaxed);
        let (turn, _) = watch::channel(0);
        let kept = Arc::new(Kept {
            watcher,
            path: path.to_owned(),
            uid: actor.uid(),
            options,
            turn,
            alone_since: Mutex::default(),
        });
        let given_up = self.cursors.insert(id, &kept)?;
        drop(given_up);
        self.take_turn(id, kept, None).ok_or(FsError::TooManyCursors(MAX_CURSOR_WATCHES))
    }

    /// Takes a watch over; none when it was given up meanwhile.
    fn take_turn(
        self: &Arc<Self>,
        id: u64,
        kept: Arc<Kept>,
        position: Option<u64>,
    ) -> Option<Follower> {
        let watches = self.cursors.watches.lock();
        watches.get(&id)?;
        *kept.alone_since.lock() = None;
        kept.turn.send_modify(|turn| *turn += 1);
        if let Some(position) = position {
            kept.watcher.queue.seek(position);
        }
        drop(watches);
        let (turn, changes) = (*kept.turn.borrow(), kept.turn.subscribe());
        let hub = Arc::clone(self);
        Some(Follower(Following::Kept(Turn { hub, id, kept, turn, changes })))
    }
}

impl Cursors {
    /// Keeps a watch; returns the one that was given up for it.
    fn insert(&self, id: u64, kept: &Arc<Kept>) -> Result<Option<Arc<Kept>>, FsError> {
        let mut watches = self.watches.lock();
        let mut given_up = None;
        if watches.len() >= MAX_CURSOR_WATCHES {
            let alone =
                watches.iter().filter_map(|(id, kept)| Some(((*kept.alone_since.lock())?, *id)));
            let (_, oldest) = alone.min().ok_or(FsError::TooManyCursors(MAX_CURSOR_WATCHES))?;
            given_up = watches.remove(&oldest);
        }
        watches.insert(id, Arc::clone(kept));
        drop(watches);
        if let Some(kept) = &given_up {
            kept.turn.send_modify(|turn| *turn += 1);
        }
        Ok(given_up)
    }

    /// Gives a watch up that nobody has taken up since.
    fn give_up(&self, id: u64, turn: u64) -> Option<Arc<Kept>> {
        let mut watches = self.watches.lock();
        let alone = watches.get(&id).is_some_and(|kept| *kept.turn.borrow() == turn);
        if alone { watches.remove(&id) } else { None }
    }
}

/// What tells the cursors of this daemon from those of one before.
static DAEMON: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());

fn parse(cursor: &str) -> Option<(u64, u64, u64)> {
    let mut parts = cursor.split('.');
    let daemon = parts.next().filter(|part| part.len() == 16)?;
    let daemon = u64::from_str_radix(daemon, 16).ok()?;
    let (id, position) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((daemon, id, position))
}
