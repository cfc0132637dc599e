//! Conditional requests (RFC 9110, 13): whether a client has the file already, or wants another.

use std::time::SystemTime;

use http::{HeaderMap, HeaderName, header};

/// What the conditions of a request make of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The file is sent.
    Send,
    /// 304.
    NotModified,
    /// 412.
    Failed,
}

/// What a file is known by.
#[derive(Debug, Clone)]
pub(super) struct Validators {
    /// The entity tag, with its quotes.
    pub(super) tag: String,
    /// The time of the last change of the content; none where HTTP cannot express it
    /// ([`expressible`]), and conditions on dates do not apply (RFC 9110, 13.1.3 and 13.1.4).
    pub(super) modified: Option<SystemTime>,
}

/// The last second that a date of HTTP can express: the end of the year 9999.
const LAST_SECOND: u64 = 253_402_300_799;

/// A time that a date of HTTP can express: from 1970 to 9999. Disks hold others (archives, wrong
/// clocks, FUSE servers), and the formatter panics on them.
pub(super) fn expressible(time: SystemTime) -> Option<SystemTime> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    (since.as_secs() <= LAST_SECOND).then_some(time)
}

/// Checks `If-Match`, `If-Unmodified-Since`, `If-None-Match` and `If-Modified-Since`, in the order
/// of RFC 9110, 13.2.2.
pub(super) fn check(headers: &HeaderMap, file: &Validators) -> Outcome {
    if let Some(tags) = list(headers, &header::IF_MATCH) {
        if !matches(&tags, &file.tag, false) {
            return Outcome::Failed;
        }
    } else if let Some(time) = date(headers, &header::IF_UNMODIFIED_SINCE)
        && let Some(modified) = file.modified
        && seconds(modified) > seconds(time)
    {
        return Outcome::Failed;
    }
    if let Some(tags) = list(headers, &header::IF_NONE_MATCH) {
        if matches(&tags, &file.tag, true) {
            return Outcome::NotModified;
        }
    } else if let Some(time) = date(headers, &header::IF_MODIFIED_SINCE)
        && let Some(modified) = file.modified
        && seconds(modified) <= seconds(time)
    {
        return Outcome::NotModified;
    }
    Outcome::Send
}

/// Whether the range of a request counts: without `If-Range`, or with one that the file meets.
pub(super) fn range_counts(headers: &HeaderMap, file: &Validators) -> bool {
    let Some(value) = headers.get(header::IF_RANGE) else {
        return true;
    };
    let text = value.to_str().unwrap_or_default().trim();
    if text.starts_with('"') || text.starts_with("W/") {
        return matches(text, &file.tag, false);
    }
    let time = httpdate::parse_http_date(text);
    time.is_ok_and(|time| file.modified.is_some_and(|own| seconds(time) == seconds(own)))
}

/// All lines of a header as one list.
fn list(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.contains_key(name).then(|| {
        let lines = headers.get_all(name).iter().map(|value| value.to_str().unwrap_or_default());
        lines.collect::<Vec<_>>().join(",")
    })
}

/// Whether a list of entity tags holds `tag`, which is a strong one. A weak one matches only where
/// that is enough.
fn matches(list: &str, tag: &str, weakly: bool) -> bool {
    let mut rest = list.trim_matches([' ', '\t', ',']);
    while !rest.is_empty() {
        if rest.starts_with('*') {
            return true;
        }
        let (weak, text) = match rest.strip_prefix("W/") {
            Some(text) => (true, text),
            None => (false, rest),
        };
        let Some(length) = text.strip_prefix('"').and_then(|text| text.find('"')) else {
            return false;
        };
        let (found, behind) = text.split_at(length + 2);
        if found == tag && (weakly || !weak) {
            return true;
        }
        rest = behind.trim_matches([' ', '\t', ',']);
    }
    false
}

fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok()
}

/// HTTP knows whole seconds only.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn conditions_in_their_order() {
        let modified = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 7);
        let file = Validators { tag: "\"a\"".into(), modified: Some(modified) };
        let (earlier, same) = ("Sun, 09 Sep 2001 01:46:39 GMT", "Sun, 09 Sep 2001 01:46:40 GMT");
        let (fails, unmodified) = (Outcome::Failed, Outcome::NotModified);
        for (pairs, expected) in [
            (&[][..], Outcome::Send),
            (&[(header::IF_MATCH, "\"a\"")], Outcome::Send),
            (&[(header::IF_MATCH, "*")], Outcome::Send),
            (&[(header::IF_MATCH, "\"b\", \"a\"")], Outcome::Send),
            (&[(header::IF_MATCH, "\"b\""), (header::IF_MATCH, "\"a\"")], Outcome::Send),
            (&[(header::IF_MATCH, "W/\"a\"")], fails),
            (&[(header::IF_MATCH, "a")], fails),
            (&[(header::IF_NONE_MATCH, "\"b\", W/\"a\"")], unmodified),
            (&[(header::IF_NONE_MATCH, "*")], unmodified),
            (&[(header::IF_NONE_MATCH, "\"a")], Outcome::Send),
            (&[(header::IF_MODIFIED_SINCE, same)], unmodified),
            (&[(header::IF_MODIFIED_SINCE, earlier)], Outcome::Send),
            (&[(header::IF_MODIFIED_SINCE, "yesterday")], Outcome::Send),
            (&[(header::IF_UNMODIFIED_SINCE, same)], Outcome::Send),
            (&[(header::IF_UNMODIFIED_SINCE, earlier)], fails),
            (&[(header::IF_NONE_MATCH, "\"b\""), (header::IF_MODIFIED_SINCE, same)], Outcome::Send),
            (&[(header::IF_MATCH, "\"a\""), (header::IF_UNMODIFIED_SINCE, earlier)], Outcome::Send),
        ] {
            assert_eq!(check(&headers(pairs), &file), expected, "{pairs:?}");
        }
        for (value, counts) in
            [("\"a\"", true), ("W/\"a\"", false), ("\"b\"", false), (same, true), (earlier, false)]
        {
            let headers = headers(&[(header::IF_RANGE, value)]);
            assert_eq!(range_counts(&headers, &file), counts, "{value}");
        }
        assert!(range_counts(&HeaderMap::new(), &file));
        // Without a date only the tag counts.
        let undated = Validators { modified: None, ..file };
        for (pairs, expected) in [
            (&[(header::IF_MODIFIED_SINCE, same)], Outcome::Send),
            (&[(header::IF_UNMODIFIED_SINCE, earlier)], Outcome::Send),
            (&[(header::IF_NONE_MATCH, "\"a\"")], unmodified),
        ] {
            assert_eq!(check(&headers(pairs), &undated), expected, "{pairs:?}");
        }
        assert!(!range_counts(&headers(&[(header::IF_RANGE, same)]), &undated));
    }

    #[test]
    fn only_times_that_http_can_express_are_formatted() {
        let epoch = SystemTime::UNIX_EPOCH;
        let last = epoch + Duration::new(LAST_SECOND, 999_999_999);
        for time in [epoch, last] {
            httpdate::fmt_http_date(expressible(time).unwrap());
        }
        for time in [epoch - Duration::from_nanos(1), last + Duration::from_nanos(1)] {
            assert_eq!(expressible(time), None);
        }
    }
}
