//! A bound on what jobs hold besides their threads (memory, descriptors), which jobs on a mount that
//! does not answer cannot use up.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError},
    time::sleep,
};

use super::{
    job::{self, Job},
    mount,
};

/// How often whoever waits for a slot looks whether the jobs that hold one hang.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(100);

/// So many times their number may be held by jobs that hang, before further ones wait for these.
pub const MAX_HUNG_FACTOR: usize = 4;

/// The slots.
#[derive(Debug)]
pub struct JobSlots {
    limit: usize,
    permits: Arc<Semaphore>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    held: Mutex<Vec<Weak<Held>>>,
    /// JobSlots whose permit was given to others.
    hung: AtomicUsize,
}

/// One slot; free again when it is dropped.
#[derive(Debug, Clone)]
pub struct JobSlot(Arc<Held>);

#[derive(Debug)]
struct Held {
    /// None once it was given to others.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    /// The job that uses it.
    job: Mutex<Option<Weak<Job>>>,
    shared: Arc<Shared>,
}

impl JobSlots {
    /// So many.
    pub fn new(limit: usize) -> Self {
        Self { limit, permits: Arc::new(Semaphore::new(limit)), shared: Arc::default() }
    }

    /// Waits for a slot.
    pub async fn acquire(&self) -> JobSlot {
        let mut acquire = std::pin::pin!(Arc::clone(&self.permits).acquire_owned());
        loop {
            tokio::select! {
                biased;
                permit = &mut acquire => match permit {
                    Ok(permit) => return self.slot(permit),
                    // The semaphore is never closed.
                    Err(_) => std::future::pending().await,
                },
                () = sleep(RECLAIM_INTERVAL) => self.reclaim(),
            }
        }
    }

    /// A slot, if one is free.
    pub fn try_acquire(&self) -> Option<JobSlot> {
        for reclaimed in [false, true] {
            match Arc::clone(&self.permits).try_acquire_owned() {
                Ok(permit) => return Some(self.slot(permit)),
                Err(TryAcquireError::NoPermits) if !reclaimed => self.reclaim(),
                Err(_) => {}
            }
        }
        None
    }

    fn slot(&self, permit: OwnedSemaphorePermit) -> JobSlot {
        let permit = Mutex::new(Some(permit));
        let held =
            Arc::new(Held { permit, job: Mutex::default(), shared: Arc::clone(&self.shared) });
        self.shared.held.lock().push(Arc::downgrade(&held));
        JobSlot(held)
    }

    /// Gives the permits of jobs that hang to others.
    fn reclaim(&self) {
        let held: Vec<_> = self.shared.held.lock().iter().filter_map(Weak::upgrade).collect();
        for held in held {
            if self.shared.hung.load(Ordering::Relaxed) >= self.limit * MAX_HUNG_FACTOR {
                return;
            }
            let job = held.job.lock().as_ref().and_then(Weak::upgrade);
            if job.is_some_and(|job| mount::is_suspect(&job))
                && let Some(permit) = held.permit.lock().take()
            {
                self.shared.hung.fetch_add(1, Ordering::Relaxed);
                drop(permit);
            }
        }
    }
}

impl JobSlot {
    /// Says that the job on this thread uses the slot.
    pub fn use_here(&self) {
        *self.0.job.lock() = job::current().map(|job| Arc::downgrade(&job));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.permit.lock().is_none() {
            self.shared.hung.fetch_sub(1, Ordering::Relaxed);
        }
        // This one cannot be upgraded any more.
        self.shared.held.lock().retain(|held| held.strong_count() > 0);
    }
}
