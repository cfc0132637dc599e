//! Watchers that clients ask for their events.
//!
//! Such a watcher lives until it is removed, or until nobody has asked for so long that its client
//! must have gone: each costs kernel watches and a queue, and a client that crashed never comes back
//! for it.

use std::{
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{task::AbortHandle, time::Instant};

use super::{Hub, Told, WatchOptions, Watcher};
use crate::{
    fs::{FsError, PathError, actor::Actor},
    sys::random,
};

/// The watchers that clients poll.
pub const MAX_POLLED_WATCHERS: usize = 1024;
/// How long a watcher is kept that nobody polls.
pub const DEFAULT_WATCHER_EXPIRY: Duration = Duration::from_secs(3600);

/// One of them.
#[derive(Debug)]
pub(super) struct Polled {
    watcher: Arc<Watcher>,
    used: Instant,
    expiry: AbortHandle,
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.expiry.abort();
    }
}

impl Hub {
    /// Watches a directory on behalf of `actor` for a client who will ask for the events; returns the watcher's id.
    ///
    /// # Errors
    /// As [`Self::watch`], and [`FsError::TooManyWatchers`].
    pub async fn create_polled(
        self: &Arc<Self>,
        path: &Path,
        actor: &Actor,
        options: WatchOptions,
    ) -> Result<String, FsError> {
        let full = || FsError::TooManyWatchers(MAX_POLLED_WATCHERS);
        if self.polled.lock().len() >= MAX_POLLED_WATCHERS {
            return Err(full());
        }
        let id = new_id()?;
        let watcher = Arc::new(self.watch(path, actor, options).await?);
        let mut polled = self.polled.lock();
        if polled.len() >= MAX_POLLED_WATCHERS {
            return Err(full());
        }
        let expiry = tokio::spawn(expire(Arc::downgrade(self), id.clone())).abort_handle();
        polled.insert(id.clone(), Polled { watcher, used: Instant::now(), expiry });
        Ok(id)
    }

    /// Takes the events of a polled watcher: all that happened before this call, and perhaps some
    /// of what happens during it; and whether the watcher has cursors. `from` goes back to a cursor,
    /// which is the id and a position.
    ///
    /// # Errors
    /// [`FsError::WatcherNotFound`], [`FsError::BadCursor`] and [`FsError::Blocking`].
    pub async fn take_events(
        &self,
        id: &str,
        from: Option<&str>,
    ) -> Result<(Vec<Told>, bool), FsError> {
        let watcher = self.use_polled(id)?;
        if let Some(cursor) = from {
            let bad = || FsError::BadCursor(cursor.to_owned());
            let (watch, position) = cursor.split_once('.').ok_or_else(bad)?;
            if watch != id || !watcher.queue.has_cursors() {
                return Err(bad());
            }
            watcher.queue.seek(position.parse().map_err(|_| bad())?);
        }
        let told = watcher.take().await?;
        // A large tree can have taken its time.
        let _ = self.use_polled(id);
        Ok((told, watcher.queue.has_cursors()))
    }

    fn use_polled(&self, id: &str) -> Result<Arc<Watcher>, FsError> {
        let mut polled = self.polled.lock();
        let watcher = polled.get_mut(id).ok_or_else(|| FsError::WatcherNotFound(id.to_owned()))?;
        watcher.used = Instant::now();
        Ok(Arc::clone(&watcher.watcher))
    }

    /// Ends a polled watcher.
    ///
    /// # Errors
    /// [`FsError::WatcherNotFound`].
    pub fn remove_polled(&self, id: &str) -> Result<(), FsError> {
        let removed = self.polled.lock().remove(id);
        removed.map(drop).ok_or_else(|| FsError::WatcherNotFound(id.to_owned()))
    }

    /// When a watcher expires; none when it has gone, now at the latest.
    fn expires_at(&self, id: &str) -> Option<Instant> {
        let mut polled = self.polled.lock();
        let at = polled.get(id)?.used + self.retention.polled;
        if at > Instant::now() {
            return Some(at);
        }
        let expired = polled.remove(id);
        drop(polled);
        tracing::info!(id, "a watcher that nobody asks has expired");
        drop(expired);
        None
    }
}

/// Sleeps until a watcher can have expired: once in that time, however often it is polled.
async fn expire(hub: Weak<Hub>, id: String) {
    while let Some(at) = hub.upgrade().and_then(|hub| hub.expires_at(&id)) {
        tokio::time::sleep_until(at).await;
    }
}

/// `w` and 20 characters that nobody can guess.
fn new_id() -> Result<String, FsError> {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = [0_u8; 20];
    random::fill(&mut random).map_err(|error| {
        let source = Path::new("getrandom(2) and /dev/urandom");
        FsError::WatchStart(PathError::io("read", source, &error).to_string())
    })?;
    let letters = random.iter().filter_map(|byte| LETTERS.get(usize::from(*byte) % LETTERS.len()));
    Ok(std::iter::once('w').chain(letters.map(|letter| char::from(*letter))).collect())
}
