//! The watching methods of `filesystem.Filesystem`.

use std::pin::Pin;

use futures_util::Stream;
use tonic::{Request, Response, Status};

use super::{
    filesystem::{Files, info},
    keepalive::{self, Source, Step},
    legacy::View,
    status,
};
use crate::{
    fs::watch::{Follower, Item, Rescan, RescanReason, Told, WatchEvent, WatchKind, WatchOptions},
    proto::filesystem::{self as pb, watch_dir_response},
    wire::{extensions::Extensions, metadata::ResponseMetadata},
};

pub(super) type WatchStream =
    Pin<Box<dyn Stream<Item = Result<pb::WatchDirResponse, Status>> + Send>>;

pub(super) async fn watch_dir(
    files: &Files,
    request: Request<pb::WatchDirRequest>,
) -> Result<Response<WatchStream>, Status> {
    let interval = keepalive::interval(request.metadata());
    let call = files.call(request)?;
    let path = files.resolve(&call.message.path, &call.user)?;
    let from = Some(call.message.from_cursor.as_str()).filter(|cursor| !cursor.is_empty());
    let options = WatchOptions {
        recursive: call.message.recursive,
        include_entry: call.message.include_entry,
        allow_network_mounts: call.message.allow_network_mounts,
        cursors: call.message.cursors || from.is_some(),
    };
    let watches = &files.sandbox().watches;
    let follower = watches.follow(&path, &call.actor, options, from).await;
    let follower = follower.map_err(|error| status::of_files(&error))?;
    call.view.announce(call.metadata.as_ref());
    let start = watch_dir_response::StartEvent { cursor: follower.start() };
    let start = response(watch_dir_response::Event::Start(start));
    let follow = Follow { follower, view: call.view };
    Ok(Response::new(Box::pin(keepalive::stream(start, follow, interval))))
}

pub(super) async fn create_watcher(
    files: &Files,
    request: Request<pb::CreateWatcherRequest>,
) -> Result<Response<pb::CreateWatcherResponse>, Status> {
    let call = files.call(request)?;
    let path = files.resolve(&call.message.path, &call.user)?;
    let options = WatchOptions {
        recursive: call.message.recursive,
        include_entry: call.message.include_entry,
        allow_network_mounts: call.message.allow_network_mounts,
        cursors: call.message.cursors,
    };
    let created = files.sandbox().watches.create_polled(&path, &call.actor, options).await;
    let watcher_id = created.map_err(|error| status::of_files(&error))?;
    call.view.announce(call.metadata.as_ref());
    Ok(Response::new(pb::CreateWatcherResponse { watcher_id }))
}

pub(super) async fn get_watcher_events(
    files: &Files,
    request: Request<pb::GetWatcherEventsRequest>,
) -> Result<Response<pb::GetWatcherEventsResponse>, Status> {
    let view = View::of(&request);
    let metadata: Option<ResponseMetadata> = request.extensions().get().cloned();
    let extensions: Option<Extensions> = request.extensions().get().cloned();
    let request = request.into_inner();
    let (id, from) = (request.watcher_id, request.from_cursor);
    let from = Some(from.as_str()).filter(|cursor| !cursor.is_empty());
    let taken = files.sandbox().watches.take_events(&id, from).await;
    let (told, cursors) = taken.map_err(|error| status::of_files(&error))?;
    view.announce(metadata.as_ref());
    // Who created the watcher with cursors has asked for them.
    if let Some(extensions) = extensions.filter(|_| cursors) {
        extensions.ask();
    }
    let mut response = pb::GetWatcherEventsResponse::default();
    for Told { item, position } in told {
        let cursor = cursors.then(|| format!("{id}.{position}"));
        match item {
            Item::Event(event) => response.events.push(view.event(change(event, cursor))),
            Item::Rescan(rescan) => {
                let before = u32::try_from(response.events.len()).unwrap_or(u32::MAX);
                response.rescans.push(missed(rescan, cursor, before));
            }
        }
    }
    Ok(Response::new(response))
}

pub(super) fn remove_watcher(
    files: &Files,
    request: Request<pb::RemoveWatcherRequest>,
) -> Result<Response<pb::RemoveWatcherResponse>, Status> {
    let id = request.into_inner().watcher_id;
    files.sandbox().watches.remove_polled(&id).map_err(|error| status::of_files(&error))?;
    Ok(Response::new(pb::RemoveWatcherResponse {}))
}

/// A watcher's stream of changes.
struct Follow {
    follower: Follower,
    view: View,
}

impl Source for Follow {
    type Message = pb::WatchDirResponse;

    async fn next(&mut self) -> Option<Step<pb::WatchDirResponse>> {
        let told = match self.follower.next().await {
            Ok(told) => told?,
            Err(taken) => return Some(Step::Error(Status::aborted(taken.to_string()))),
        };
        let cursor = self.follower.cursor(told.position);
        let event = match told.item {
            Item::Event(event) => {
                watch_dir_response::Event::Filesystem(self.view.event(change(event, cursor)))
            }
            Item::Rescan(rescan) => watch_dir_response::Event::Rescan(missed(rescan, cursor, 0)),
        };
        Some(Step::Message(response(event)))
    }

    fn keepalive(&self) -> pb::WatchDirResponse {
        response(watch_dir_response::Event::Keepalive(watch_dir_response::KeepAlive {}))
    }
}

fn response(event: watch_dir_response::Event) -> pb::WatchDirResponse {
    pb::WatchDirResponse { event: Some(event) }
}

/// An event; what upstream's has not goes only to those who asked for cursors.
fn change(event: WatchEvent, cursor: Option<String>) -> pb::FilesystemEvent {
    let kind = match event.kind {
        WatchKind::Create => pb::EventType::Create,
        WatchKind::Write => pb::EventType::Write,
        WatchKind::Remove => pb::EventType::Remove,
        WatchKind::Rename => pb::EventType::Rename,
        WatchKind::Chmod => pb::EventType::Chmod,
    };
    pb::FilesystemEvent {
        name: event.name,
        r#type: kind.into(),
        entry: event.entry.map(|entry| info(*entry)),
        cursor,
    }
}

fn missed(rescan: Rescan, cursor: Option<String>, events_before: u32) -> pb::RescanEvent {
    let reason = match rescan.reason {
        RescanReason::KernelQueue => pb::rescan_event::Reason::KernelQueue,
        RescanReason::WatchLimit => pb::rescan_event::Reason::WatchLimit,
        RescanReason::SlowClient => pb::rescan_event::Reason::SlowClient,
        RescanReason::CursorExpired => pb::rescan_event::Reason::CursorExpired,
    };
    pb::RescanEvent {
        reason: reason.into(),
        complete: rescan.complete,
        cursor: cursor.unwrap_or_default(),
        events_before,
    }
}
