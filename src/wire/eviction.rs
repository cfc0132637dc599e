//! Which connection is closed when there are too many: the one that has been idle for longest.
//!
//! Connections without a call stay open for [`super::IDLE_TIMEOUT`], more than ten minutes. Without an
//! eviction, whoever opens all connections that there may be locks newcomers out for as long. A connection
//! with a running call is evicted only where no idle one is left, and only if its client has taken nothing of
//! what is there for it for [`super::MIN_STALL`]: a client that pauses in a download or a stream stays as long
//! as there is room. Programs of the sandbox evict only connections of programs of the
//! sandbox; others evict those first.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    MIN_STALL, MIN_STALL_FOR_MEMORY,
    activity::{Activity, Why},
};

/// All connections that hold a place.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    activity: Arc<Activity>,
    inner: bool,
}

/// A connection's entry, until it is dropped.
#[derive(Debug)]
pub(super) struct Registered {
    connections: Arc<Connections>,
    activity: Arc<Activity>,
}

impl Connections {
    /// Enters a connection; `inner` says that its peer is a program of the sandbox.
    pub(super) fn register(self: &Arc<Self>, activity: &Arc<Activity>, inner: bool) -> Registered {
        let activity = Arc::clone(activity);
        self.0.lock().push(Entry { activity: Arc::clone(&activity), inner });
        Registered { connections: Arc::clone(self), activity }
    }

    /// Evicts a connection for a newcomer; false when there is none that may be.
    pub(super) fn evict_for(&self, inner: bool, why: Why) -> bool {
        self.evict(inner, Activity::evictable_since, why)
            || self.evict(inner, |activity, now| activity.stalled_since(now, MIN_STALL), why)
    }

    /// Evicts the connection whose client has taken nothing for longest, for what it holds in memory.
    pub(super) fn evict_stalled(&self) -> bool {
        let long = |activity: &Activity, now| activity.stalled_since(now, MIN_STALL_FOR_MEMORY);
        self.evict(false, long, Why::Resources)
    }

    fn evict(
        &self,
        inner: bool,
        since: impl Fn(&Activity, Instant) -> Option<Instant>,
        why: Why,
    ) -> bool {
        let now = Instant::now();
        let entries = self.0.lock();
        let evictable = entries
            .iter()
            .filter(|entry| entry.inner || !inner)
            .filter_map(|entry| Some(((!entry.inner, since(&entry.activity, now)?), entry)));
        let longest = evictable.min_by_key(|(key, _)| *key);
        longest.inspect(|(_, entry)| entry.activity.evict(why)).is_some()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut entries = self.connections.0.lock();
        let own = entries.iter().position(|entry| Arc::ptr_eq(&entry.activity, &self.activity));
        if let Some(own) = own {
            entries.swap_remove(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::wire::activity::Waiting;

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_first_and_nobody_with_a_call() {
        let connections = Arc::<Connections>::default();
        let mut held = Vec::new();
        for inner in [false, true, true, true] {
            let activity = Arc::new(Activity::new(Waiting::ForRequest));
            let registered = connections.register(&activity, inner);
            held.push((activity, registered));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let call = held[1].0.begin();
        let evicted = |number: usize| held[number].0.is_evicted();
        assert!(connections.evict_for(false, Why::Place));
        assert!(evicted(2), "an inner one first, and not the one with a call");
        assert!(connections.evict_for(true, Why::Place) && evicted(3));
        assert!(!connections.evict_for(true, Why::Place), "no inner one is left");
        assert!(connections.evict_for(false, Why::Place) && evicted(0));
        drop(call);
        assert!(connections.evict_for(true, Why::Place) && evicted(1));
        drop(held);
        assert!(connections.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_has_a_moment_for_its_first_bytes() {
        let connections = Arc::<Connections>::default();
        let activity = Arc::new(Activity::new(Waiting::ForHead));
        let _registered = connections.register(&activity, true);
        assert!(!connections.evict_for(true, Why::Place));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(connections.evict_for(true, Why::Place));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_client_makes_room_when_nobody_is_idle() {
        let connections = Arc::<Connections>::default();
        let activities = [(); 3].map(|()| Arc::new(Activity::new(Waiting::ForRequest)));
        let [idle, stalled, busy] = &activities;
        let _held = activities.each_ref().map(|activity| connections.register(activity, true));
        let _calls = [stalled.begin(), busy.begin()];
        stalled.set_stalled(true);
        tokio::time::sleep(MIN_STALL).await;
        assert!(!connections.evict_stalled(), "not for long enough");
        assert!(connections.evict_for(true, Why::Place) && idle.is_evicted());
        assert!(!stalled.is_evicted());
        stalled.set_stalled(false);
        assert!(!connections.evict_for(true, Why::Place), "it goes on");
        stalled.set_stalled(true);
        tokio::time::sleep(MIN_STALL).await;
        assert!(connections.evict_for(true, Why::Place));
        assert_eq!(stalled.eviction(), Some(Why::Place));
        assert!(!busy.is_evicted() && !connections.evict_stalled());
        busy.set_stalled(true);
        tokio::time::sleep(MIN_STALL_FOR_MEMORY).await;
        assert!(connections.evict_stalled());
        assert_eq!(busy.eviction(), Some(Why::Resources));
    }
}
