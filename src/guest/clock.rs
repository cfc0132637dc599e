//! The clock of a guest that was asleep: only the host knows how late it is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_settime};

/// How far the guest may be behind the host: the time that a request takes (upstream's).
pub const MAX_BEHIND: Duration = Duration::from_millis(50);
/// How far it may be ahead.
pub const MAX_AHEAD: Duration = Duration::from_secs(5);

/// A moment: seconds and nanoseconds since 1970. The order is that of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// Whole seconds.
    pub seconds: i64,
    /// What comes on top, below 1,000,000,000.
    pub nanos: u32,
}

impl Moment {
    /// Now, by this machine's clock.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: since.subsec_nanos(),
        }
    }

    fn as_nanos(self) -> i128 {
        i128::from(self.seconds) * 1_000_000_000 + i128::from(self.nanos)
    }
}

/// Whether a clock that shows `guest` must be set when it is `host`.
pub fn is_wrong(guest: Moment, host: Moment) -> bool {
    let ahead = guest.as_nanos() - host.as_nanos();
    ahead < -i128_of(MAX_BEHIND) || ahead > i128_of(MAX_AHEAD)
}

fn i128_of(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

/// Sets the machine's clock if it is wrong; whether it was.
///
/// # Errors
/// EPERM without CAP_SYS_TIME, EINVAL for a time that the kernel does not take.
pub fn set(host: Moment) -> nix::Result<bool> {
    if !is_wrong(Moment::now(), host) {
        return Ok(false);
    }
    let time = nix::sys::time::TimeSpec::new(host.seconds, i64::from(host.nanos));
    clock_settime(ClockId::CLOCK_REALTIME, time)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_off_is_right() {
        let at = |seconds, nanos| Moment { seconds, nanos };
        let host = at(100, 50_000_000);
        for (guest, wrong) in [
            (host, false),
            (at(100, 0), false),
            (at(99, 999_999_999), true),
            (at(105, 50_000_000), false),
            (at(105, 50_000_001), true),
            (at(i64::MAX, 0), true),
            (at(i64::MIN, 0), true),
        ] {
            assert_eq!(is_wrong(guest, host), wrong, "{guest:?}");
        }
        assert!(!is_wrong(Moment::now(), Moment::now()));
    }
}
