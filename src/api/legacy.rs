//! The view of clients that are older than the present messages.
//!
//! E2B's first Python SDK fails on fields that it does not know. It calls itself exactly
//! `connect-python`; to it, entries have a name, type and path, events a name and type, and a
//! header tells that this was done.

use http::{HeaderName, HeaderValue};
use tonic::{Request, metadata::MetadataMap};

use crate::{
    proto::filesystem::{EntryInfo, FilesystemEvent},
    wire::metadata::ResponseMetadata,
};

/// How much a client may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Full,
    Legacy,
}

impl View {
    /// The view of the client that made a request.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        if is_legacy(request.metadata()) { Self::Legacy } else { Self::Full }
    }

    /// Tells the client that its answer was cut down. Only successes say so.
    pub(super) fn announce(self, metadata: Option<&ResponseMetadata>) {
        if let (Self::Legacy, Some(metadata)) = (self, metadata) {
            let name = HeaderName::from_static("x-e2b-legacy-sdk");
            metadata.append_header(name, HeaderValue::from_static("true"));
        }
    }

    pub(super) fn entry(self, entry: EntryInfo) -> EntryInfo {
        match self {
            Self::Full => entry,
            Self::Legacy => EntryInfo {
                name: entry.name,
                r#type: entry.r#type,
                path: entry.path,
                ..EntryInfo::default()
            },
        }
    }

    pub(super) fn event(self, event: FilesystemEvent) -> FilesystemEvent {
        match self {
            Self::Full => event,
            Self::Legacy => FilesystemEvent { entry: None, ..event },
        }
    }
}

fn is_legacy(metadata: &MetadataMap) -> bool {
    metadata.get("user-agent").is_some_and(|agent| agent == "connect-python")
}
