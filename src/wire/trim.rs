//! Returns memory to the kernel after it was used, where the C library does not by itself.
//!
//! There is no periodic timer: the end of a call or of a connection starts one that fires once. So while
//! nothing happens nothing runs, and what many calls have freed is returned in one go.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{blocking::Pool, sys::heap};

/// How long after the end of a call the memory is looked at.
const DELAY: Duration = Duration::from_secs(2);
/// How much more than at the start may stay resident, in pages of 4 KiB.
const SLACK_PAGES: usize = (4 << 20) / 4096;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Trimmer {
    armed: AtomicBool,
    /// Resident pages at the start; 0 as long as they are not known.
    start: AtomicUsize,
}

impl Trimmer {
    /// Notes that memory may have been freed; `pool` is where it is returned.
    pub(super) fn note(self: &Arc<Self>, pool: &Arc<Pool>) {
        if !heap::CAN_TRIM || self.armed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (trimmer, pool) = (Arc::clone(self), Arc::clone(pool));
        runtime.spawn(async move {
            tokio::time::sleep(DELAY).await;
            trimmer.armed.store(false, Ordering::Release);
            pool.run_later(move || trimmer.trim());
        });
    }

    /// Remembers what is resident now, to which it is to return.
    pub(super) fn started(&self) {
        self.start.store(resident_pages().unwrap_or(0), Ordering::Relaxed);
    }

    fn trim(&self) {
        let start = self.start.load(Ordering::Relaxed);
        if resident_pages().is_some_and(|pages| pages > start + SLACK_PAGES) {
            heap::trim();
        }
    }
}

/// The second figure of `/proc/self/statm` (proc(5)).
fn resident_pages() -> Option<usize> {
    let text = fs::read("/proc/self/statm").ok()?;
    std::str::from_utf8(&text).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}
