//! What the host and the image write: the body of `/init`, and a template.
#![no_main]

use envd::{http::init, template::config};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(body) = init::parse(bytes) {
        let _ = body.request();
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(error) = config::from_text(text)
    {
        assert!(!error.to_string().is_empty());
    }
});
