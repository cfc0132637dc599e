//! The headers of a download that are read by hand: ranges lie in the file, and a coding is one that
//! was accepted.
#![no_main]

use envd::http::download::{encoding, range};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &str)| {
    let (size, text) = input;
    if let Ok(Some(ranges)) = range::parse(&format!("bytes={text}"), size) {
        assert!(!ranges.is_empty() && ranges.len() <= range::MAX_RANGES);
        let total: u64 = ranges.iter().map(|range| range.length).sum();
        assert!(total <= size);
        for range in ranges {
            assert!(range.length > 0 && range.start + range.length <= size);
        }
    }
    let _ = range::parse(text, size);
    if let Ok(accepted) = encoding::parse(text) {
        assert!(accepted.gzip || accepted.identity);
    }
});
