//! The method `Search` of `filesystem.Filesystem`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use tonic::{Request, Response, Status};

use super::{
    filesystem::{Files, info},
    keepalive::{self, Source, Step},
    legacy::View,
    status,
};
use crate::{
    fs::{
        entry::EntryKind,
        search::{
            self, Found, Match, Query, SearchError, SearchOptions, Skip, Summary, Truncation,
        },
    },
    proto::filesystem::{self as pb, search_response, search_summary},
    to_client::FromThread,
};

pub(super) type SearchStream =
    Pin<Box<dyn Stream<Item = Result<pb::SearchResponse, Status>> + Send>>;

pub(super) async fn search(
    files: &Files,
    request: Request<pb::SearchRequest>,
) -> Result<Response<SearchStream>, Status> {
    let interval = keepalive::interval(request.metadata());
    let call = files.call(request)?;
    let path = files.resolve(&call.message.path, &call.user)?;
    let failed = |error: SearchError| status::of_search(&error);
    let query = options(call.message).and_then(Query::new).map_err(failed)?;
    let sandbox = files.sandbox();
    let slot = sandbox.searches.wait().await;
    let users = Arc::clone(&sandbox.users);
    let found = search::start(query, path, call.actor, users, &sandbox.files, slot);
    let found = found.await.map_err(failed)?;
    call.view.announce(call.metadata.as_ref());
    let start = response(search_response::Event::Start(search_response::StartEvent {}));
    let results = Results { found, view: call.view };
    Ok(Response::new(Box::pin(keepalive::stream(start, results, interval))))
}

fn options(request: pb::SearchRequest) -> Result<SearchOptions, SearchError> {
    let timeout = request.timeout.map(|timeout| {
        let seconds = u64::try_from(timeout.seconds).map_err(|_| SearchError::Timeout)?;
        let nanos = u32::try_from(timeout.nanos).map_err(|_| SearchError::Timeout)?;
        Duration::from_secs(seconds)
            .checked_add(Duration::from_nanos(nanos.into()))
            .ok_or(SearchError::Timeout)
    });
    Ok(SearchOptions {
        include: request.include,
        exclude: request.exclude,
        pattern: request.pattern,
        fixed_string: request.fixed_string,
        ignore_case: request.ignore_case,
        word: request.word,
        hidden: request.hidden,
        gitignore: request.gitignore,
        binary: request.binary,
        max_depth: request.max_depth,
        max_matches: request.max_matches,
        max_bytes_read: request.max_bytes_read,
        max_bytes_returned: request.max_bytes_returned,
        max_file_bytes: request.max_file_bytes,
        max_line_bytes: request.max_line_bytes,
        timeout: timeout.transpose()?,
        before_context: request.before_context,
        after_context: request.after_context,
        include_entry: request.include_entry,
    })
}

/// What a search finds, as it comes.
struct Results {
    found: FromThread<Found>,
    view: View,
}

impl Source for Results {
    type Message = pb::SearchResponse;

    async fn next(&mut self) -> Option<Step<pb::SearchResponse>> {
        Some(match self.found.recv().await {
            Some(Found::Match(found)) => {
                let event = search_response::Event::Match(matched(found, self.view));
                Step::Message(response(event))
            }
            Some(Found::Summary(summary)) => {
                Step::Last(response(search_response::Event::Summary(summarized(summary))))
            }
            Some(Found::Failed(busy)) => Step::Error(status::of_own_files(&busy.into())),
            None if self.found.is_evicted() => Step::Error(status::of_eviction()),
            None => {
                Step::Error(Status::internal("the search broke down; the daemon's log says why"))
            }
        })
    }

    fn keepalive(&self) -> pb::SearchResponse {
        response(search_response::Event::Keepalive(search_response::KeepAlive {}))
    }
}

fn response(event: search_response::Event) -> pb::SearchResponse {
    pb::SearchResponse { event: Some(event) }
}

fn matched(found: Match, view: View) -> pb::SearchMatch {
    let kind = match found.kind {
        EntryKind::File => pb::FileType::File,
        EntryKind::Directory => pb::FileType::Directory,
        EntryKind::Other => pb::FileType::Unspecified,
    };
    let mut message = pb::SearchMatch {
        path: found.path,
        r#type: kind.into(),
        entry: found.entry.map(|entry| view.entry(info(*entry))),
        ..pb::SearchMatch::default()
    };
    if let Some(line) = found.line {
        let range = |(start, end)| pb::SearchRange {
            start: u32::try_from(start).unwrap_or(u32::MAX),
            end: u32::try_from(end).unwrap_or(u32::MAX),
        };
        message.line_number = line.number;
        message.byte_offset = line.offset;
        message.line = line.bytes.into();
        message.line_truncated = line.truncated;
        message.context = line.context;
        message.ranges = line.ranges.into_iter().map(range).collect();
    }
    message
}

fn summarized(summary: Summary) -> pb::SearchSummary {
    let skipped = summary.skipped.into_iter().map(|(reason, count)| {
        let reason = match reason {
            Skip::Binary => search_summary::SkipReason::Binary,
            Skip::TooLarge => search_summary::SkipReason::TooLarge,
            Skip::LineTooLong => search_summary::SkipReason::LineTooLong,
            Skip::Permission => search_summary::SkipReason::Permission,
            Skip::Error => search_summary::SkipReason::Error,
            Skip::Virtual => search_summary::SkipReason::Virtual,
            Skip::TooDeep => search_summary::SkipReason::TooDeep,
            Skip::Special => search_summary::SkipReason::Special,
            Skip::IgnoreFile => search_summary::SkipReason::IgnoreFile,
        };
        search_summary::Skipped { reason: reason.into(), count }
    });
    let truncated = match summary.truncated {
        None => search_summary::Truncation::Unspecified,
        Some(Truncation::Matches) => search_summary::Truncation::MaxMatches,
        Some(Truncation::BytesRead) => search_summary::Truncation::MaxBytesRead,
        Some(Truncation::BytesReturned) => search_summary::Truncation::MaxBytesReturned,
        Some(Truncation::Timeout) => search_summary::Truncation::Timeout,
    };
    pb::SearchSummary {
        matches: summary.matches,
        searched: summary.searched,
        bytes_read: summary.bytes_read,
        skipped: skipped.collect(),
        truncated: truncated.into(),
    }
}
