//! How much of all requests together may wait in memory.
//!
//! One message may be large, and there may be many connections; the product of the two limits is
//! more than a sandbox has. Every request therefore takes what it buffers from one budget. A
//! request that finds it used up fails at once and can be tried again: waiting would let half-sent
//! messages hold each other up for ever.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tonic::Status;

/// What a request may hold without touching the large part of the budget. Nearly all requests stay
/// below it, those that end a process above all: large ones must never keep them out.
pub const SMALL_BYTES: usize = 64 << 10;

/// The part of the budget, one in so many, that is kept for what is small.
const SMALL_PART: usize = 8;

/// How often at most a budget that is used up asks for more.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// What is asked to free something when a budget is used up.
#[derive(Default)]
pub struct Shortage {
    relief: OnceLock<Box<dyn Fn() + Send + Sync>>,
    last: Mutex<Option<Instant>>,
}

impl fmt::Debug for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shortage").finish_non_exhaustive()
    }
}

impl Shortage {
    /// Has `relief` called from now on; the first one stays.
    pub fn set(&self, relief: impl Fn() + Send + Sync + 'static) {
        let _ = self.relief.set(Box::new(relief));
    }

    fn relieve(&self) {
        let Some(relief) = self.relief.get() else { return };
        let now = Instant::now();
        let mut last = self.last.lock();
        if last.is_none_or(|last| now.saturating_duration_since(last) >= SHORTAGE_PAUSE) {
            *last = Some(now);
            drop(last);
            relief();
        }
    }
}

/// The budget of one server; clones share it.
#[derive(Debug, Clone)]
pub struct Budget {
    small: Arc<AtomicUsize>,
    large: Arc<AtomicUsize>,
    limit: usize,
    /// Up to which size a share is small; 0 where there is no part for those.
    small_bytes: usize,
    shortage: Arc<Shortage>,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(limit: usize) -> Self {
        let small = limit / SMALL_PART;
        Self {
            small: Arc::new(AtomicUsize::new(small)),
            large: Arc::new(AtomicUsize::new(limit - small)),
            limit,
            small_bytes: SMALL_BYTES,
            shortage: Arc::default(),
        }
    }

    /// A budget of so many bytes, none of which are kept for what is small.
    pub fn undivided(limit: usize) -> Self {
        let (small, large) = (Arc::default(), Arc::new(AtomicUsize::new(limit)));
        Self { small, large, limit, small_bytes: 0, shortage: Arc::default() }
    }

    /// The same budget, which asks `shortage` when it is used up.
    pub fn relieved_by(self, shortage: &Arc<Shortage>) -> Self {
        Self { shortage: Arc::clone(shortage), ..self }
    }

    /// A share of it, empty at first.
    pub fn share(&self) -> Share {
        Share { budget: self.clone(), held: 0 }
    }

    fn part(&self, bytes: usize) -> &AtomicUsize {
        if bytes <= self.small_bytes { &self.small } else { &self.large }
    }

    fn give_back(&self, bytes: usize) {
        self.part(bytes).fetch_add(bytes, Ordering::AcqRel);
    }
}

/// What one request holds of the budget; given back on drop.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    held: usize,
}

impl Share {
    /// What is held now.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Holds exactly so many bytes from now on.
    ///
    /// # Errors
    /// `resource_exhausted` when they are not there; what is held stays.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Status> {
        let from = self.budget.part(bytes);
        // What is held in the same part counts towards what is wanted.
        let credit = if std::ptr::eq(from, self.budget.part(self.held)) { self.held } else { 0 };
        let take = |left: usize| (left + credit).checked_sub(bytes);
        from.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).map_err(|_| {
            self.budget.shortage.relieve();
            Status::resource_exhausted(format!(
                "requests that are under way hold all of {} bytes; try again later",
                self.budget.limit
            ))
        })?;
        if credit == 0 {
            self.budget.give_back(self.held);
        }
        self.held = bytes;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.give_back(self.held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 64 * SMALL_BYTES;

    #[test]
    fn large_requests_never_keep_small_ones_out() {
        let budget = Budget::new(LIMIT);
        let mut large = Vec::new();
        let refused = loop {
            let mut share = budget.share();
            match share.hold(7 * SMALL_BYTES) {
                Ok(()) => large.push(share),
                Err(status) => break status,
            }
        };
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert_eq!(large.len(), 8);
        budget.share().hold(SMALL_BYTES).unwrap();
        large.pop();
        budget.share().hold(7 * SMALL_BYTES).unwrap();
    }

    proptest! {
        #[test]
        fn whatever_is_held_comes_back(
            steps in prop::collection::vec((0_usize..8, 0..LIMIT / 4), 0..100),
        ) {
            let budget = Budget::new(LIMIT);
            let mut shares: Vec<_> = (0..8).map(|_| budget.share()).collect();
            for (index, bytes) in steps {
                if let Some(share) = shares.get_mut(index) {
                    let _ = share.hold(bytes);
                    let held: usize = shares.iter().map(|share| share.held).sum();
                    prop_assert!(held <= LIMIT);
                }
            }
            drop(shares);
            prop_assert_eq!(budget.small.load(Ordering::Acquire), LIMIT / SMALL_PART);
            prop_assert_eq!(budget.large.load(Ordering::Acquire), LIMIT - LIMIT / SMALL_PART);
        }
    }
}
