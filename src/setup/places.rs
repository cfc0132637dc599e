//! How many requests there may be at a time.

use tokio::sync::{Semaphore, SemaphorePermit};

/// Places for requests, and more of them for callers from outside the machine: those inside cannot keep
/// out the host.
#[derive(Debug)]
pub(super) struct Places {
    all: Semaphore,
    inner: Semaphore,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct PlaceOf<'a> {
    _all: SemaphorePermit<'a>,
    _inner: Option<SemaphorePermit<'a>>,
}

impl Places {
    pub(super) fn new(inner: usize, kept: usize) -> Self {
        Self { all: Semaphore::new(inner + kept), inner: Semaphore::new(inner) }
    }

    pub(super) fn take(&self, inner: bool) -> Option<PlaceOf<'_>> {
        let inner = match inner {
            true => Some(self.inner.try_acquire().ok()?),
            false => None,
        };
        Some(PlaceOf { _all: self.all.try_acquire().ok()?, _inner: inner })
    }
}
