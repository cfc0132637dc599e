//! Which coding a download is sent in: upstream's reading of `Accept-Encoding`.

use http::{HeaderMap, header};

/// What a client accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// gzip is what it would like best.
    pub gzip: bool,
    /// It may be sent uncompressed.
    pub identity: bool,
}

/// No coding that this daemon can send is accepted. The text is upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]")]
pub struct NoneAcceptable;

/// Reads the first `Accept-Encoding` line. Without one the file goes out as it is.
///
/// # Errors
/// [`NoneAcceptable`].
pub fn accepted(headers: &HeaderMap) -> Result<Accepted, NoneAcceptable> {
    match headers.get(header::ACCEPT_ENCODING).map(|value| value.to_str().unwrap_or_default()) {
        Some(text) => parse(text),
        None => Ok(Accepted { gzip: false, identity: true }),
    }
}

/// Reads the text of an `Accept-Encoding` header: codings by falling weight, those of equal weight
/// in the client's order. A weight that is no number counts as 1.
///
/// # Errors
/// [`NoneAcceptable`].
pub fn parse(text: &str) -> Result<Accepted, NoneAcceptable> {
    let mut codings: Vec<(String, f32)> = Vec::new();
    for element in text.split(',') {
        let mut parts = element.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default().to_ascii_lowercase();
        if name.is_empty() {
            continue;
        }
        let weight =
            parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let weight = weight.map_or(1.0, |text| text.trim().parse::<f32>().unwrap_or(1.0));
        codings.push((name, if weight.is_finite() { weight } else { 1.0 }));
    }
    let refused = |wanted: &str| codings.iter().any(|(name, q)| name == wanted && *q <= 0.0);
    let wanted = |wanted: &str| codings.iter().any(|(name, q)| name == wanted && *q > 0.0);
    let identity = !(refused("identity") || (refused("*") && !wanted("identity")));
    codings.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    for (name, _) in codings.iter().filter(|(_, q)| *q > 0.0) {
        match name.as_str() {
            "identity" => return Ok(Accepted { gzip: false, identity }),
            "*" => return Ok(Accepted { gzip: !identity, identity }),
            "gzip" => return Ok(Accepted { gzip: true, identity }),
            _ => {}
        }
    }
    match identity {
        true => Ok(Accepted { gzip: false, identity }),
        false => Err(NoneAcceptable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_upstreams() {
        for (text, gzip, identity) in [
            ("", false, true),
            ("gzip", true, true),
            ("GZip", true, true),
            ("gzip, deflate, br", true, true),
            ("br, zstd", false, true),
            ("gzip;q=0.5, identity", false, true),
            ("identity, gzip", false, true),
            ("gzip;q=0", false, true),
            ("*", false, true),
            ("*;q=0.1, gzip;q=0.2", true, true),
            ("identity;q=0, *", true, false),
            ("identity;q=0, gzip", true, false),
            ("*;q=0, gzip", true, false),
            ("*;q=0, identity;q=0.1", false, true),
            ("gzip;q=what", true, true),
            ("gzip ; q=0.3 , identity ; q=0.2", true, true),
        ] {
            assert_eq!(parse(text), Ok(Accepted { gzip, identity }), "{text:?}");
        }
        for text in ["identity;q=0", "*;q=0", "br, *;q=0", "identity;q=0, gzip;q=0"] {
            assert_eq!(parse(text), Err(NoneAcceptable), "{text:?}");
        }
    }
}
