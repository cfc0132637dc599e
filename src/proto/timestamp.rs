//! `google.protobuf.Timestamp` with the JSON that the proto3 specification demands.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A point in time, in seconds and nanoseconds since 1970.
///
/// In JSON it is RFC 3339 text in UTC that ends in `Z` and has 0, 3, 6 or 9 fractional digits
/// (<https://protobuf.dev/programming-guides/json/>). The format has the years 1 to 9999 only: what
/// lies outside is written as the nearest time that it has. Disks do hold such times, and one file must
/// not fail the answer that it is in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z, negative before.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds within the second, 0 to 999,999,999, counting forward before 1970 as well.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// 0001-01-01T00:00:00Z.
const FIRST_SECOND: i64 = -62_135_596_800;
/// 9999-12-31T23:59:59Z.
const LAST_SECOND: i64 = 253_402_300_799;
const SECONDS_A_DAY: i64 = 86_400;
const NANOS_A_SECOND: i32 = 1_000_000_000;

impl Timestamp {
    /// The text of its JSON.
    fn to_rfc3339(self) -> String {
        let (seconds, nanos) = match self.seconds {
            seconds if seconds < FIRST_SECOND => (FIRST_SECOND, 0),
            seconds if seconds > LAST_SECOND => (LAST_SECOND, 999_999_999),
            seconds => (seconds, self.nanos.clamp(0, 999_999_999)),
        };
        let (year, month, day) = date(seconds.div_euclid(SECONDS_A_DAY));
        let second = seconds.rem_euclid(SECONDS_A_DAY);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let fraction = match nanos {
            0 => String::new(),
            nanos if nanos % 1_000_000 == 0 => format!(".{:03}", nanos / 1_000_000),
            nanos if nanos % 1000 == 0 => format!(".{:06}", nanos / 1000),
            nanos => format!(".{nanos:09}"),
        };
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
    }
}

/// Year, month and day of the Gregorian calendar, so many days after 1970-01-01.
///
/// Years begin in March here, so that the leap day is the last of its year; 400 of them are an era of
/// always the same length.
fn date(days: i64) -> (i64, i64, i64) {
    const DAYS_AN_ERA: i64 = 146_097;
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(DAYS_AN_ERA), days.rem_euclid(DAYS_AN_ERA));
    let year = (day - day / 1460 + day / 36_524 - day / (DAYS_AN_ERA - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = year + 400 * era;
    match month {
        0..=9 => (year, month + 3, day),
        _ => (year + 1, month - 9, day),
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_rfc3339())
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pbjson_types::Timestamp { seconds, nanos } = Deserialize::deserialize(deserializer)?;
        // A leap second, 23:59:60, is read as 23:59:59 and more than a second of nanoseconds.
        let timestamp = match nanos.checked_sub(NANOS_A_SECOND) {
            Some(nanos @ 0..) => Self { seconds: seconds.saturating_add(1), nanos },
            _ => Self { seconds, nanos },
        };
        match timestamp.seconds {
            FIRST_SECOND..=LAST_SECOND => Ok(timestamp),
            _ => Err(de::Error::custom("a timestamp outside of the years 1 to 9999")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(seconds: i64, nanos: i32) -> String {
        Timestamp { seconds, nanos }.to_rfc3339()
    }

    #[test]
    fn the_text_is_the_one_of_proto3_json() {
        for (seconds, nanos, expected) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (0, 1, "1970-01-01T00:00:00.000000001Z"),
            (1_700_000_000, 120_000_000, "2023-11-14T22:13:20.120Z"),
            (1_700_000_000, 123_456_000, "2023-11-14T22:13:20.123456Z"),
            (951_782_400, 0, "2000-02-29T00:00:00Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
            (-1, 500_000_000, "1969-12-31T23:59:59.500Z"),
            (FIRST_SECOND, 0, "0001-01-01T00:00:00Z"),
            (FIRST_SECOND - 1, 7, "0001-01-01T00:00:00Z"),
            (i64::MIN, i32::MIN, "0001-01-01T00:00:00Z"),
            (LAST_SECOND, 999_999_999, "9999-12-31T23:59:59.999999999Z"),
            (LAST_SECOND + 1, 0, "9999-12-31T23:59:59.999999999Z"),
            (i64::MAX, i32::MAX, "9999-12-31T23:59:59.999999999Z"),
            (0, -1, "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(text(seconds, nanos), expected, "{seconds} {nanos}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_not_read() {
        let read = |text: &str| serde_json::from_str::<Timestamp>(&format!("\"{text}\""));
        assert_eq!(
            read("2016-12-31T23:59:60.500Z").unwrap().to_rfc3339(),
            "2017-01-01T00:00:00.500Z"
        );
        assert_eq!(read("0001-01-01T01:00:00+01:00").unwrap().to_rfc3339(), "0001-01-01T00:00:00Z");
        for text in [
            "0000-12-31T23:59:59Z",
            "0001-01-01T00:59:59+01:00",
            "9999-12-31T23:59:59-01:00",
            "9999-12-31T23:59:60Z",
            "10000-01-01T00:00:00Z",
            "",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            seconds in FIRST_SECOND..=LAST_SECOND,
            nanos in 0..1_000_000_000_i32,
        ) {
            let timestamp = Timestamp { seconds, nanos };
            let json = serde_json::to_string(&timestamp).unwrap();
            prop_assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), timestamp, "{}", json);
        }
    }
}
