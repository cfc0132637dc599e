//! What HTTP demands of every request, whatever it asks for.
//!
//! | rule | else |
//! |---|---|
//! | `Expect` is `100-continue`, once, or absent (RFC 9110, section 10.1.1) | 417 |
//! | an HTTP/1.1 request has a `Host`, and no two different ones (RFC 9112, section 3.2) | 400 |
//! | each `%` in the path and the query stands before two hexadecimal digits | 400 |

use http::{HeaderMap, Request, Response, StatusCode, Uri, Version, header, request::Parts};

use super::{Body, error};
use crate::quote;

const CONTINUE: &[u8] = b"100-continue";

/// The answer to a request that breaks a rule; `None` for one that keeps them all.
pub(super) fn check<B>(request: &Request<B>) -> Option<Response<Body>> {
    if let Some(expectation) = unknown_expectation(request.headers()) {
        let text = format!("expect: unknown expectation '{}'", quote::text(&expectation));
        return Some(error::rest(StatusCode::EXPECTATION_FAILED, &text));
    }
    let bad = |text: &str| Some(error::rest(StatusCode::BAD_REQUEST, text));
    if request.version() == Version::HTTP_11 {
        let mut hosts = request.headers().get_all(header::HOST).iter();
        match hosts.next() {
            None => return bad("missing required Host header"),
            Some(first) if hosts.any(|other| other != first) => {
                return bad("too many Host headers");
            }
            Some(_) => {}
        }
    }
    if let Some(escape) = bad_escape(request.uri()) {
        return bad(&format!("invalid URL escape \"{escape}\""));
    }
    None
}

/// Whether the client may wait for 100, or for the refusal of its expectation, before it sends the body.
pub(super) fn waits_for_continue(parts: &Parts) -> bool {
    let mut expected = parts.headers.get_all(header::EXPECT).iter();
    parts.version > Version::HTTP_10
        && expected.any(|value| !value.as_bytes().trim_ascii().is_empty())
}

/// What is expected, unless that is nothing or 100-continue, once. hyper sends 100 in that case only, and a
/// client would wait for it.
fn unknown_expectation(headers: &HeaderMap) -> Option<String> {
    let values: Vec<&[u8]> =
        headers.get_all(header::EXPECT).iter().map(|value| value.as_bytes().trim_ascii()).collect();
    let known = match values.as_slice() {
        [one] => one.is_empty() || one.eq_ignore_ascii_case(CONTINUE),
        several => several.iter().all(|value| value.is_empty()),
    };
    (!known).then(|| String::from_utf8_lossy(&values.join(&b", "[..])).into_owned())
}

/// The first `%` that no two hexadecimal digits follow, with what follows it.
fn bad_escape(uri: &Uri) -> Option<String> {
    let parts = [uri.path(), uri.query().unwrap_or_default()];
    parts.iter().find_map(|part| {
        let bytes = part.as_bytes();
        let mut escapes = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'%');
        let (at, _) = escapes.find(|(at, _)| {
            let digits = bytes.get(at + 1..at + 3);
            !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
        })?;
        let shown = bytes.get(at..bytes.len().min(at + 3)).unwrap_or_default();
        Some(String::from_utf8_lossy(shown).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_two_digits() {
        for (uri, wanted) in [
            ("/a%20b?x=%C3%a9", None),
            ("/", None),
            ("/a%zz", Some("%zz")),
            ("/a%4", Some("%4")),
            ("/a?b=%", Some("%")),
            ("/a?b=%41%4g1", Some("%4g")),
        ] {
            assert_eq!(bad_escape(&uri.parse().unwrap()).as_deref(), wanted, "{uri}");
        }
    }

    #[test]
    fn expectations_are_known_whatever_their_case() {
        let expect = |value: &str| {
            HeaderMap::from_iter([(header::EXPECT, http::HeaderValue::from_str(value).unwrap())])
        };
        for known in ["100-continue", "100-Continue", " 100-continue ", ""] {
            assert_eq!(unknown_expectation(&expect(known)), None, "{known}");
        }
        for unknown in ["100-continue, x=1", "100-continue,", "x", "100-continue, 100-continue"] {
            assert_eq!(unknown_expectation(&expect(unknown)).as_deref(), Some(unknown));
        }
        let mut twice = expect("100-continue");
        twice.append(header::EXPECT, http::HeaderValue::from_static(""));
        assert_eq!(unknown_expectation(&twice).as_deref(), Some("100-continue, "));
    }
}
