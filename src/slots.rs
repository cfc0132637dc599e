//! A bounded number of transfers at a time, where one that drips makes room for one that waits.
//!
//! A transfer takes as long as its client wants. With a plain semaphore, as many clients as there are
//! permits, each sending a byte now and then, keep everybody else out. So a [`Slot`] knows how fast its
//! transfer goes. When no slot is free, a newcomer evicts the slowest transfer, if that is slower than
//! [`MIN_RATE`] and has had [`MIN_AGE`] to show otherwise, and waits for its place. Nothing is evicted
//! while there is a free slot: a slow client that is in nobody's way goes on.
//!
//! Archives, extractions and searches ([`Slots::wait`]) work by themselves for a long time before they
//! give or take a byte. Of their time only that counts in which they wait for their client.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout, timeout_at},
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
    /// How much of its time that counts a transfer has before it is evicted.
    min_age: Duration,
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
    clock: Clock,
    /// When the window began, in time that counts.
    since: Duration,
    bytes: u64,
    before: Option<u64>,
    /// When bytes came last, in time that counts.
    last: Duration,
}

/// Which time of a transfer counts.
#[derive(Debug)]
enum Clock {
    /// All time, since then.
    Always(Instant),
    /// That in which it waits for its client.
    Waits {
        /// What has passed.
        sum: Duration,
        /// The threads that wait now, and since when there is one.
        waiters: usize,
        since: Instant,
    },
}

impl Clock {
    /// The time that counts.
    fn at(&self, now: Instant) -> Duration {
        match *self {
            Self::Always(begun) => now.saturating_duration_since(begun),
            Self::Waits { sum, waiters: 0, .. } => sum,
            Self::Waits { sum, since, .. } => sum + now.saturating_duration_since(since),
        }
    }
}

impl Transfer {
    /// Bytes per second; `None` as long as that cannot be said.
    fn rate(&self, now: Instant, min_age: Duration) -> Option<u64> {
        let pace = self.pace.lock();
        let counted = pace.clock.at(now);
        let elapsed = counted.saturating_sub(pace.since);
        match pace.before {
            // However much came at once before.
            _ if counted.saturating_sub(pace.last) >= min_age.max(WINDOW) => Some(0),
            // A stall makes the running window longer, and the rate smaller.
            _ if elapsed >= min_age => Some(rate(pace.bytes, elapsed)),
            before => before,
        }
    }

    fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
        self.told.notify_waiters();
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
        Self::with_pieces(slots, 0)
    }

    /// So many slots for transfers that show their progress in pieces of that size: they have the time
    /// for one at [`MIN_RATE`].
    pub fn with_pieces(slots: usize, piece: u64) -> Arc<Self> {
        let min_age = MIN_AGE.max(Duration::from_secs(piece / MIN_RATE));
        Arc::new(Self { permits: JobSlots::new(slots), transfers: Mutex::default(), min_age })
    }

    /// A slot; where none is free, that of a transfer which drips. `None` when all transfers are fast, or
    /// the evicted ones did not end in [`MAX_WAIT`].
    pub async fn take(self: &Arc<Self>) -> Option<Slot> {
        if let Some(permit) = self.permits.try_acquire() {
            return Some(self.slot(permit, Clock::Always(Instant::now())));
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
            permit = timeout_at(deadline, acquired) => {
                Some(self.slot(permit.ok()?, Clock::Always(Instant::now())))
            }
            () = evicting => None,
        }
    }

    /// A slot for work that waits for its client only now and then ([`Slot::wait_for_client`]). Where none
    /// is free, that of one whose client drips; waits as long as all work.
    pub async fn wait(self: &Arc<Self>) -> Arc<Slot> {
        let clock = || Clock::Waits { sum: Duration::ZERO, waiters: 0, since: Instant::now() };
        if let Some(permit) = self.permits.try_acquire() {
            return Arc::new(self.slot(permit, clock()));
        }
        let mut acquired = pin!(self.permits.acquire());
        loop {
            // One for one, unless it takes too long to end.
            let pause = if self.evict_slowest(Instant::now()) { MAX_WAIT } else { PAUSE };
            if let Ok(permit) = timeout(pause, acquired.as_mut()).await {
                return Arc::new(self.slot(permit, clock()));
            }
        }
    }

    fn slot(self: &Arc<Self>, permit: JobSlot, clock: Clock) -> Slot {
        let now = Instant::now();
        let transfer = Arc::new(Transfer {
            begun: now,
            pace: Mutex::new(Pace {
                clock,
                since: Duration::ZERO,
                bytes: 0,
                before: None,
                last: Duration::ZERO,
            }),
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
        let slow = |rate: Option<u64>| rate.is_none_or(|rate| rate < MIN_RATE);
        transfers.iter().any(|transfer| slow(transfer.rate(now, self.min_age)))
    }

    /// Evicts the slowest transfer that may be evicted; false when there is none.
    fn evict_slowest(&self, now: Instant) -> bool {
        let transfers = self.transfers.lock();
        let slow = transfers.iter().filter_map(|transfer| {
            let old = transfer.pace.lock().clock.at(now) >= self.min_age;
            let evicted = transfer.evicted.load(Ordering::Acquire);
            let rate = transfer.rate(now, self.min_age);
            let rate = rate.filter(|rate| *rate < MIN_RATE && old && !evicted)?;
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

    /// Notes that so many bytes came, or went.
    pub fn progress(&self, bytes: usize) {
        let mut pace = self.transfer.pace.lock();
        let counted = pace.clock.at(Instant::now());
        let elapsed = counted.saturating_sub(pace.since);
        pace.bytes += bytes as u64;
        pace.last = counted;
        if elapsed >= WINDOW {
            pace.before = Some(rate(pace.bytes, elapsed));
            (pace.since, pace.bytes) = (counted, 0);
        }
    }

    /// Blocks this thread until `wanted`, for which the client is needed, has come; `None` when the
    /// transfer is evicted meanwhile.
    pub fn wait_for_client<T>(&self, wanted: impl Future<Output = T>) -> Option<T> {
        let _waits = Waits::begin(&self.transfer);
        block_on(async {
            tokio::select! {
                biased;
                () = self.evicted() => None,
                got = wanted => Some(got),
            }
        })
    }

    /// What tells of the eviction when the slot is gone already.
    pub fn eviction(&self) -> Eviction {
        Eviction(Arc::clone(&self.transfer))
    }

    /// Completes when this transfer has to end to make room.
    pub async fn evicted(&self) {
        loop {
            let mut told = pin!(self.transfer.told.notified());
            // From now on it is not missed.
            told.as_mut().enable();
            if self.is_evicted() {
                return;
            }
            told.await;
        }
    }

    /// Whether this transfer had to end to make room.
    pub fn is_evicted(&self) -> bool {
        self.transfer.evicted.load(Ordering::Acquire)
    }
}

/// Whether a transfer was evicted.
#[derive(Debug)]
pub struct Eviction(Arc<Transfer>);

impl Eviction {
    /// Whether it had to end to make room.
    pub fn happened(&self) -> bool {
        self.0.evicted.load(Ordering::Acquire)
    }
}

/// A thread that waits for the client.
struct Waits<'a>(&'a Transfer);

impl<'a> Waits<'a> {
    fn begin(transfer: &'a Transfer) -> Self {
        if let Clock::Waits { waiters, since, .. } = &mut transfer.pace.lock().clock {
            if *waiters == 0 {
                *since = Instant::now();
            }
            *waiters += 1;
        }
        Self(transfer)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        if let Clock::Waits { sum, waiters, since } = &mut self.0.pace.lock().clock {
            *waiters = waiters.saturating_sub(1);
            if *waiters == 0 {
                *sum += now.saturating_duration_since(*since);
            }
        }
    }
}

/// Polls a future on a thread that may block.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
        thread::park();
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
    async fn a_burst_does_not_count_for_ever() {
        let slots = Slots::new(1);
        let slot = slots.take().await.unwrap();
        slot.progress(1 << 30);
        sleep(MIN_AGE).await;
        assert!(!slots.evict_slowest(Instant::now()));
        sleep(WINDOW).await;
        assert!(slots.evict_slowest(Instant::now()));
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

    #[tokio::test]
    async fn only_the_time_in_which_a_client_is_waited_for_counts() {
        let slots = Slots::new(1);
        let slot = slots.wait().await;
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert!(!slots.evict_slowest(later(1000)), "it works");
        let waits = Waits::begin(&slot.transfer);
        assert!(!slots.evict_slowest(Instant::now()));
        drop(waits);
        assert!(!slots.evict_slowest(later(1000)), "it has hardly waited");
        let eviction = slot.eviction();
        let (_sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let thread = thread::spawn(move || slot.wait_for_client(receiver));
        let _next = timeout(Duration::from_secs(60), slots.wait()).await.unwrap();
        assert!(thread.join().unwrap().is_none());
        assert!(eviction.happened());
    }
}
