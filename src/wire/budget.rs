//! How much of all requests together may wait in memory.
//!
//! One message may be large, and there may be many connections; the product of the two limits is
//! more than a sandbox has. Every request therefore takes what it buffers from one budget. A
//! request that finds it used up fails at once and can be tried again: waiting would let half-sent
//! messages hold each other up for ever.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tonic::Status;

/// The budget of one server; clones share it.
#[derive(Debug, Clone)]
pub struct Budget {
    left: Arc<AtomicUsize>,
    limit: usize,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(limit: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(limit)), limit }
    }

    /// A share of it, empty at first.
    pub fn share(&self) -> Share {
        Share { budget: self.clone(), held: 0 }
    }
}

/// What one request holds of the budget; given back on drop.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    held: usize,
}

impl Share {
    /// Holds exactly so many bytes from now on.
    ///
    /// # Errors
    /// `resource_exhausted` when they are not there; what is held stays.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Status> {
        let left = &self.budget.left;
        if bytes <= self.held {
            left.fetch_add(self.held - bytes, Ordering::AcqRel);
        } else {
            let more = bytes - self.held;
            let take = |left: usize| left.checked_sub(more);
            left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).map_err(|_| {
                Status::resource_exhausted(format!(
                    "requests that are under way hold all of {} bytes; try again later",
                    self.budget.limit
                ))
            })?;
        }
        self.held = bytes;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.held, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_come_back_and_the_budget_is_never_exceeded() {
        let budget = Budget::new(10);
        let (mut one, mut two) = (budget.share(), budget.share());
        one.hold(7).unwrap();
        assert_eq!(two.hold(4).unwrap_err().code(), tonic::Code::ResourceExhausted);
        two.hold(3).unwrap();
        one.hold(2).unwrap();
        two.hold(8).unwrap();
        drop(two);
        one.hold(10).unwrap();
        drop(one);
        budget.share().hold(10).unwrap();
    }
}
