//! The splitter of envelopes and the decompression of what is in them, under any cutting.
#![no_main]

use envd::wire::envelope::{Splitter, decompress};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 1 << 12;

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let mut splitter = Splitter::new(LIMIT);
    for piece in bytes.chunks(usize::from(step) + 1) {
        splitter.push(piece);
        loop {
            match splitter.take() {
                Ok(Some(envelope)) => {
                    assert!(envelope.message.len() <= LIMIT);
                    if let Ok(plain) = decompress(&envelope.message, LIMIT, |_| Ok(())) {
                        assert!(plain.len() <= LIMIT);
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = splitter.end();
});
