//! Whether a process tree does anything between two looks at it.

use std::{collections::HashMap, time::Duration};

use crate::sys::procfs::Stat;

/// The processes of a tree that are looked at; the control group counts the others too.
const MAX_LOOKED_AT: usize = 1024;
/// A tree works when it uses more than this share of one processor: an idle server's timers use less.
const MIN_SHARE: u32 = 100;
/// The same for /proc, in clock ticks of 10 ms: a single one can be the remainder of many idle seconds.
const MIN_TICKS: u64 = 2;

/// What a tree has done until now.
#[derive(Debug, Clone, Default)]
pub(super) struct Activity {
    /// The processor time of all that was ever in the control group, if there is one.
    cpu: Option<Duration>,
    /// Clock ticks of each process, with those of the children that it has waited for.
    ticks: HashMap<i32, u64>,
    /// Whether one of them runs, waits for a processor, or waits for a disk.
    runnable: bool,
}

impl Activity {
    /// Blocks for a moment: reads it for these processes.
    pub(super) fn of(pids: &[u32], cpu: Option<Duration>) -> Self {
        let pids = pids.iter().filter_map(|pid| i32::try_from(*pid).ok());
        let mut activity = Self { cpu, ..Self::default() };
        for stat in pids.take(MAX_LOOKED_AT).filter_map(Stat::of) {
            activity.runnable |= matches!(stat.state, b'R' | b'D');
            let ticks = stat.user_ticks.saturating_add(stat.system_ticks);
            activity.ticks.insert(stat.pid, ticks);
        }
        activity
    }

    /// Whether the tree has worked since `earlier`, which is so long ago, or is about to.
    pub(super) fn is_busy_since(&self, earlier: &Self, elapsed: Duration) -> bool {
        if self.runnable {
            return true;
        }
        if let (Some(now), Some(then)) = (self.cpu, earlier.cpu) {
            return now.saturating_sub(then) >= elapsed / MIN_SHARE;
        }
        let used = |(pid, ticks): (&i32, &u64)| {
            ticks.saturating_sub(earlier.ticks.get(pid).copied().unwrap_or_default())
        };
        self.ticks.iter().map(used).fold(0, u64::saturating_add) >= MIN_TICKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(of: &[(i32, u64)]) -> Activity {
        Activity { ticks: of.iter().copied().collect(), ..Activity::default() }
    }

    #[test]
    fn work_is_told_from_idling() {
        let second = Duration::from_secs(1);
        let before = ticks(&[(1, 100), (2, 50)]);
        assert!(!ticks(&[(1, 100), (2, 51)]).is_busy_since(&before, second));
        assert!(ticks(&[(1, 101), (2, 51)]).is_busy_since(&before, second));
        assert!(ticks(&[(1, 100), (3, 2)]).is_busy_since(&before, second));
        assert!(!ticks(&[(1, 100)]).is_busy_since(&before, second));
        let runs = Activity { runnable: true, ..before.clone() };
        assert!(runs.is_busy_since(&before, second));
        let group =
            |ms| Activity { cpu: Some(Duration::from_millis(ms)), ..ticks(&[(1, ms * 1000)]) };
        assert!(!group(1005).is_busy_since(&group(1000), second));
        assert!(group(1010).is_busy_since(&group(1000), second));
    }
}
