//! Response metadata that tonic has no place for.
//!
//! tonic can send headers with a success and metadata with an error, but neither trailers with a
//! success nor headers apart from an error's trailers. Each request carries a [`ResponseMetadata`]
//! in its extensions; what a handler puts there is sent in every protocol, whatever the outcome.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;

/// The extra headers and trailers of one response; clones share them.
#[derive(Debug, Clone, Default)]
pub struct ResponseMetadata(Arc<Mutex<Pair>>);

#[derive(Debug, Default)]
struct Pair {
    leading: HeaderMap,
    trailing: HeaderMap,
}

impl ResponseMetadata {
    /// Adds a header; it is sent only if the response has not begun.
    pub fn append_header(&self, name: HeaderName, value: HeaderValue) {
        self.0.lock().leading.append(name, value);
    }

    /// Adds a trailer; it is sent only if the response has not ended.
    pub fn append_trailer(&self, name: HeaderName, value: HeaderValue) {
        self.0.lock().trailing.append(name, value);
    }

    /// The names of the trailers so far.
    pub(super) fn trailer_names(&self) -> Vec<HeaderName> {
        self.0.lock().trailing.keys().cloned().collect()
    }

    pub(super) fn take_headers(&self) -> HeaderMap {
        std::mem::take(&mut self.0.lock().leading)
    }

    pub(super) fn take_trailers(&self) -> HeaderMap {
        std::mem::take(&mut self.0.lock().trailing)
    }
}

/// Adds all of `more` to `headers`, keeping what is there.
pub(super) fn append_all(headers: &mut HeaderMap, more: HeaderMap) {
    let mut last = None;
    for (name, value) in more {
        // HeaderMap's iterator names a key only with its first value.
        last = name.or(last);
        if let Some(name) = &last {
            headers.append(name.clone(), value);
        }
    }
}
