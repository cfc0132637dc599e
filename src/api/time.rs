//! Times of the domain in protobuf's well-known types.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pbjson_types::{Duration as PbDuration, Timestamp};

/// A moment; one before 1970 is shown as 1970.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// A length of time.
pub(super) fn duration(time: Duration) -> PbDuration {
    PbDuration {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(time.subsec_nanos()).unwrap_or(0),
    }
}

/// A length of time that a client gives; `None` if it is negative.
pub(super) fn positive(time: &PbDuration) -> Option<Duration> {
    let (seconds, nanos) = (u64::try_from(time.seconds).ok()?, u32::try_from(time.nanos).ok()?);
    (nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))
}
