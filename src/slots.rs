//! A bounded number of transfers at a time, where one that drips makes room for one that waits.
//!
//! A transfer takes as long as its client wants. With a plain semaphore, as many clients as there are
//! permits, each sending a byte now and then, keep everybody else out. So a [`Slot`] knows how fast its
//! transfer goes. When no slot is free, a newcomer evicts the slowest transfer, if that is slower than
//! [`MIN_RATE`] and has had [`MIN_AGE`] to show otherwise, and waits for its place. Nothing is evicted
//! while there is a free slot: a slow client that is in nobody's way goes on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout_at},
};

use crate::blocking::{JobSlot, JobSlots};

/// A transfer below this many bytes per second may be evicted.
pub const MIN_RATE: u64 = 16 << 10;
/// How long a transfer has been under way at least before it is evicted.
pub const MIN_AGE: Duration = Duration::from_secs(2);
/// The time over which the rate of a transfer is measured.
const WINDOW: Duration = Duration::from_secs(4);
/// How long a newcomer waits for a slot while there are transfers that may be evicted.
pub const MAX_WAIT: Duration = Duration::from_secs(5);
/// The pause between two tries to evict one.
const PAUSE: Duration = Duration::from_millis(100);

/// The slots of one kind of transfer.
#[derive(Debug)]
pub struct Slots {
    permits: JobSlots,
    transfers: Mutex<Vec<Arc<Transfer>>>,
}

/// What is known of one transfer.
#[derive(Debug)]
struct Transfer {
    begun: Instant,
    pace: Mutex<Pace>,
    evicted: AtomicBool,
    /// Signalled when it is evicted.
    told: Notify,
}

/// How fast a transfer goes: in the window that runs, and in the one before.
#[derive(Debug)]
struct Pace {
    since: Instant,
    bytes: u64,
    before: Option<u64>,
}

impl Transfer {
    /// Bytes per second; `None` as long as that cannot be said.
    fn rate(&self, now: Instant) -> Option<u64> {
        let pace = self.pace.lock();
        let elapsed = now.duration_since(pace.since);
        match pace.before {
            // A stall makes the running window longer, and the rate smaller.
            _ if elapsed >= MIN_AGE => Some(rate(pace.bytes, elapsed)),
            before => before,
        }
    }

    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.told.notify_one();
    }
}

fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1000) / millis
}

/// The place of one transfer, until it is dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    transfer: Arc<Transfer>,
    permit: JobSlot,
}

impl Slots {
    /// So many slots.
    pub fn new(slots: usize) -> Arc<Self> {
        Arc::new(Self { permits: JobSlots::new(slots), transfers: Mutex::default() })
    }

    /// A slot; where none is free, that of a transfer which drips. `None` when all transfers are fast, or
    /// the evicted ones did not end in [`MAX_WAIT`].
    pub async fn take(self: &Arc<Self>) -> Option<Slot> {
        if let Some(permit) = self.permits.try_acquire() {
            return Some(self.slot(permit));
        }
        let deadline = Instant::now() + MAX_WAIT;
        let acquired = self.permits.acquire();
        let evicting = async {
            while self.may_become_slow() {
                if self.evict_slowest(Instant::now()) {
                    // One for one: the next newcomer evicts its own.
                    std::future::pending::<()>().await;
                }
                sleep(PAUSE).await;
            }
        };
        tokio::select! {
            biased;
            permit = timeout_at(deadline, acquired) => Some(self.slot(permit.ok()?)),
            () = evicting => None,
        }
    }

    fn slot(self: &Arc<Self>, permit: JobSlot) -> Slot {
        let now = Instant::now();
        let transfer = Arc::new(Transfer {
            begun: now,
            pace: Mutex::new(Pace { since: now, bytes: 0, before: None }),
            evicted: AtomicBool::new(false),
            told: Notify::new(),
        });
        self.transfers.lock().push(Arc::clone(&transfer));
        Slot { slots: Arc::clone(self), transfer, permit }
    }

    /// Whether waiting makes sense: some transfer is slow, or too young to tell.
    fn may_become_slow(&self) -> bool {
        let now = Instant::now();
        let transfers = self.transfers.lock();
        transfers.iter().any(|transfer| transfer.rate(now).is_none_or(|rate| rate < MIN_RATE))
    }

    /// Evicts the slowest transfer that may be evicted; false when there is none.
    fn evict_slowest(&self, now: Instant) -> bool {
        let transfers = self.transfers.lock();
        let slow = transfers.iter().filter_map(|transfer| {
            let old = now.duration_since(transfer.begun) >= MIN_AGE;
            let evicted = transfer.evicted.load(Ordering::Acquire);
            let rate = transfer.rate(now).filter(|rate| *rate < MIN_RATE && old && !evicted)?;
            Some((rate, transfer))
        });
        let slowest = slow.min_by_key(|(rate, transfer)| (*rate, transfer.begun));
        slowest.inspect(|(_, transfer)| transfer.evict()).is_some()
    }
}

impl Slot {
    /// Says that the job on this thread uses the slot: while that hangs on a mount that does not
    /// answer, another transfer may have its place.
    pub fn use_here(&self) {
        self.permit.use_here();
    }

    /// Notes that so many bytes came.
    pub fn progress(&self, bytes: usize) {
        let now = Instant::now();
        let mut pace = self.transfer.pace.lock();
        let elapsed = now.duration_since(pace.since);
        pace.bytes += bytes as u64;
        if elapsed >= WINDOW {
            *pace = Pace { since: now, bytes: 0, before: Some(rate(pace.bytes, elapsed)) };
        }
    }

    /// Completes when this transfer has to end to make room.
    pub async fn evicted(&self) {
        while !self.is_evicted() {
            self.transfer.told.notified().await;
        }
    }

    /// Whether this transfer had to end to make room.
    pub fn is_evicted(&self) -> bool {
        self.transfer.evicted.load(Ordering::Acquire)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.transfers.lock().retain(|other| !Arc::ptr_eq(other, &self.transfer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_slowest_makes_room_and_the_fast_stay() {
        let slots = Slots::new(3);
        let held = [slots.take().await, slots.take().await, slots.take().await].map(Option::unwrap);
        let fast = |slot: &Slot| slot.progress(usize::try_from(MIN_RATE).unwrap() * 2);
        for _ in 0..10 {
            sleep(Duration::from_secs(1)).await;
            fast(&held[0]);
            held[1].progress(1);
            held[2].progress(2);
        }
        let [first, second, third] = held;
        let (newcomer, ()) = tokio::join!(slots.take(), async {
            second.evicted().await;
            drop(second);
        });
        let newcomer = newcomer.unwrap();
        assert!(!first.is_evicted() && !third.is_evicted() && !newcomer.is_evicted());
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_that_was_fast_and_stalls_is_slow() {
        let slots = Slots::new(1);
        let slot = slots.take().await.unwrap();
        slot.progress(1 << 30);
        sleep(WINDOW).await;
        slot.progress(1 << 20);
        assert!(!slots.evict_slowest(Instant::now()));
        sleep(MIN_AGE).await;
        assert!(slots.evict_slowest(Instant::now()));
        assert!(!slots.evict_slowest(Instant::now()), "once");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_evicted_while_all_are_fast() {
        let slots = Slots::new(1);
        let slot = slots.take().await.unwrap();
        sleep(WINDOW).await;
        slot.progress(1 << 30);
        assert!(slots.take().await.is_none());
        assert!(!slot.is_evicted());
    }

    #[tokio::test(start_paused = true)]
    async fn an_evicted_transfer_that_hangs_in_the_kernel_is_waited_for_no_longer_than_that() {
        let slots = Slots::new(1);
        let slot = slots.take().await.unwrap();
        sleep(MIN_AGE).await;
        assert!(slots.take().await.is_none());
        assert!(slot.is_evicted());
    }
}
