//! The `Range` header, as Go's `ServeContent` reads it.

/// The most parts of one answer. A request for more gets the whole file, as RFC 9110 (14.2) allows
/// for ranges that only cost: each part is a read of its own.
pub const MAX_RANGES: usize = 64;

/// A part of a file; it lies inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its first byte.
    pub start: u64,
    /// Its bytes, at least one.
    pub length: u64,
}

impl Range {
    /// The value of `Content-Range`.
    pub fn content_range(self, size: u64) -> String {
        format!("bytes {}-{}/{size}", self.start, self.start + self.length - 1)
    }
}

/// Why a range is not answered (416). The texts are upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// It is no range of bytes.
    #[error("invalid range")]
    Invalid,
    /// All of it lies behind the end.
    #[error("invalid range: failed to overlap")]
    NoOverlap,
}

/// The ranges of a file of `size` bytes that a header asks for. None stands for the whole file:
/// the file is empty, or the ranges are more than the file, or more than [`MAX_RANGES`].
///
/// # Errors
/// [`RangeError`].
pub fn parse(text: &str, size: u64) -> Result<Option<Vec<Range>>, RangeError> {
    let list = text.strip_prefix("bytes=").ok_or(RangeError::Invalid)?;
    let mut ranges = Vec::new();
    let mut behind = false;
    let mut total = 0_u64;
    let mut count = 0_usize;
    for part in list.split(',').map(trim).filter(|part| !part.is_empty()) {
        let Some(range) = one(part, size)? else {
            behind = true;
            continue;
        };
        total = total.saturating_add(range.length);
        count += 1;
        if count <= MAX_RANGES {
            ranges.push(range);
        }
    }
    if ranges.is_empty() {
        return match behind && size > 0 {
            true => Err(RangeError::NoOverlap),
            false => Ok(None),
        };
    }
    Ok((total <= size && count <= MAX_RANGES).then_some(ranges))
}

/// One range; none when it lies behind the end.
fn one(part: &str, size: u64) -> Result<Option<Range>, RangeError> {
    let (first, last) = part.split_once('-').ok_or(RangeError::Invalid)?;
    let (first, last) = (trim(first), trim(last));
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u64>().map_err(|_| RangeError::Invalid),
        false => Err(RangeError::Invalid),
    };
    if first.is_empty() {
        // The last so many bytes.
        let length = number(last)?.min(size);
        return Ok((length > 0).then(|| Range { start: size - length, length }));
    }
    let start = number(first)?;
    let end = match last {
        "" => u64::MAX,
        last => number(last)?,
    };
    if start >= size {
        return Ok(None);
    }
    if end < start {
        return Err(RangeError::Invalid);
    }
    Ok(Some(Range { start, length: end.min(size - 1) - start + 1 }))
}

fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_gos() {
        let some = |pairs: &[(u64, u64)]| {
            Ok(Some(pairs.iter().map(|&(start, length)| Range { start, length }).collect()))
        };
        for (text, expected) in [
            ("bytes=0-4", some(&[(0, 5)])),
            ("bytes=2-", some(&[(2, 8)])),
            ("bytes=-3", some(&[(7, 3)])),
            ("bytes=-99", some(&[(0, 10)])),
            ("bytes=9-99", some(&[(9, 1)])),
            ("bytes=0-0, 5-6 ,-1", some(&[(0, 1), (5, 2), (9, 1)])),
            ("bytes=0-0,20-30", some(&[(0, 1)])),
            ("bytes=", Ok(None)),
            ("bytes=0-8,1-9", Ok(None)),
            ("bytes=10-", Err(RangeError::NoOverlap)),
            ("bytes=-0", Err(RangeError::NoOverlap)),
            ("bytes=99999999999999999999-", Err(RangeError::Invalid)),
            ("bytes=4-2", Err(RangeError::Invalid)),
            ("bytes=a-b", Err(RangeError::Invalid)),
            ("bytes=5", Err(RangeError::Invalid)),
            ("bytes=-", Err(RangeError::Invalid)),
            ("bytes=--1", Err(RangeError::Invalid)),
            ("lines=0-1", Err(RangeError::Invalid)),
        ] {
            assert_eq!(parse(text, 10), expected, "{text}");
        }
        assert_eq!(parse("bytes=0-1", 0), Ok(None), "an empty file is sent");
        let many = format!("bytes={}", "0-0,".repeat(MAX_RANGES + 1));
        assert_eq!(parse(&many, 1 << 20), Ok(None));
        assert_eq!(parse("bytes=0-0", 10).unwrap().unwrap()[0].content_range(10), "bytes 0-0/10");
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_lies_inside(text in "bytes=[0-9,\\- ]{0,24}", size in 0_u64..200) {
            if let Ok(Some(ranges)) = parse(&text, size) {
                prop_assert!(!ranges.is_empty());
                prop_assert!(ranges.iter().map(|range| range.length).sum::<u64>() <= size);
                for range in ranges {
                    prop_assert!(range.length > 0 && range.start + range.length <= size);
                }
            }
        }
    }
}
