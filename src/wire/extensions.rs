//! Extension fields in answers, for callers that ask for them.
//!
//! An unmodified client of upstream must not see a difference, not even one that parses JSON
//! strictly or compares answers byte by byte. So extension fields (numbers from 100, see
//! `build/extensions.rs`) are sent only where the caller asks:
//!
//! * the call is native gRPC over HTTP/2,
//! * or its method is an extension,
//! * or its request uses an extension field,
//! * or it carries the header `Envd-Extensions: 1`.
//!
//! The first, second and fourth are known before the call begins ([`super::translate`]). The codec
//! ([`super::codec`]) looks for the third when it decodes a request, and clears the fields when it
//! encodes an answer to somebody who has not asked.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use http::{HeaderMap, HeaderName};

/// The header that asks for extension fields in any protocol.
pub const HEADER: HeaderName = HeaderName::from_static("envd-extensions");

/// A message that may have extension fields. `build.rs` implements it for all of ours.
pub trait Extensible {
    /// Whether an extension field is set, here or in a message inside.
    fn has_extensions(&self) -> bool {
        false
    }

    /// Resets every extension field, here and in the messages inside, to its default.
    fn clear_extensions(&mut self) {}
}

/// Whether a field differs from its default.
pub fn is_set<T: Default + PartialEq>(field: &T) -> bool {
    *field != T::default()
}

/// Whether the caller of one call has asked for extension fields. Clones share the answer. It is in
/// the extensions of every RPC's request.
#[derive(Debug, Clone, Default)]
pub struct Extensions(Arc<AtomicBool>);

impl Extensions {
    /// The flag of a new call.
    pub fn new(asked: bool) -> Self {
        Self(Arc::new(AtomicBool::new(asked)))
    }

    /// Records that the caller has asked.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the caller has asked.
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks on behalf of a request that uses an extension field.
    pub fn note(&self, request: &impl Extensible) {
        if request.has_extensions() {
            self.ask();
        }
    }

    /// The answer as the caller may see it.
    pub fn filter<T: Extensible>(&self, mut answer: T) -> T {
        if !self.asked() {
            answer.clear_extensions();
        }
        answer
    }
}

/// Whether the headers of a request ask for extension fields.
pub fn asked_by(headers: &HeaderMap) -> bool {
    headers.get(HEADER).is_some_and(|value| value.as_bytes().trim_ascii() == b"1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        filesystem::{EntryInfo, ListDirResponse},
        process::{
            ProcessEvent, ProcessSelector, SendSignalRequest, StartResponse,
            process_event::{DataEvent, Event, Gap},
            process_selector::Selector,
        },
    };

    #[test]
    fn extensions_are_found_and_cleared_at_every_level() {
        let entry = EntryInfo { name: "a".to_owned(), is_symlink: true, ..EntryInfo::default() };
        let mut listing =
            ListDirResponse { entries: vec![entry], next_page_token: "next".to_owned() };
        assert!(listing.has_extensions());
        listing.clear_extensions();
        assert!(!listing.has_extensions());
        assert_eq!((listing.entries[0].name.as_str(), listing.entries.len()), ("a", 1));

        let event = |event| StartResponse { event: Some(ProcessEvent { event: Some(event) }) };
        let data = Extensions::new(false)
            .filter(event(Event::Data(DataEvent { offset: 7, ..DataEvent::default() })));
        assert_eq!(data, event(Event::Data(DataEvent::default())));
        let gap = Extensions::new(false).filter(event(Event::Gap(Gap { from: 1, to: 2 })));
        assert_eq!(gap.event.unwrap().event, None);
        let gap = event(Event::Gap(Gap { from: 1, to: 2 }));
        assert_eq!(Extensions::new(true).filter(gap.clone()), gap);
    }

    #[test]
    fn a_request_asks_by_what_it_uses() {
        let selecting = |selector| SendSignalRequest {
            process: Some(ProcessSelector { selector: Some(selector) }),
            ..SendSignalRequest::default()
        };
        let asked = Extensions::new(false);
        asked.note(&selecting(Selector::Pid(7)));
        assert!(!asked.asked());
        asked.note(&selecting(Selector::ProcessId("p".to_owned())));
        assert!(asked.asked());
    }
}
