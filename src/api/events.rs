//! The stream of a process's events: what Start and Connect answer.

use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tonic::Status;

use super::{
    keepalive::{self, Source, Step},
    outcome,
};
use crate::{
    process::{
        Event, Found, Subscription, Tether,
        journal::{Channel, Ended, Piece},
    },
    proto::process::{
        self as pb, output_chunk, process_event,
        process_event::{Event as PbEvent, data_event::Output},
    },
};

/// A subscriber's stream.
pub(super) struct Follow {
    pub(super) subscription: Subscription,
    /// Whether this is the stream of the call that started the process.
    pub(super) starter: bool,
    /// What to end when the stream ends before the process does.
    pub(super) tether: Option<Tether>,
}

impl Source for Follow {
    type Message = pb::ProcessEvent;

    async fn next(&mut self) -> Option<Step<pb::ProcessEvent>> {
        Some(match self.subscription.next().await? {
            Event::Output(piece) => Step::Message(data(piece)),
            Event::Gap { from, to } => Step::Message(event(PbEvent::Gap(gap(from, to)))),
            Event::End(end) => {
                if let Some(tether) = self.tether.take() {
                    tether.release();
                }
                // The starter asked for the time limit, and hears that it was reached, not what
                // the kill looked like. Others see the ending.
                match self.starter && end.ending.timed_out {
                    true => Step::Error(Status::deadline_exceeded("context deadline exceeded")),
                    false => Step::Last(event(PbEvent::End(end_event(end)))),
                }
            }
            Event::Detached => Step::Error(Status::resource_exhausted(
                "this stream took no data while the process waited for it, and was let go; the \
                 process goes on, and can be followed again from an offset",
            )),
        })
    }

    fn keepalive(&self) -> pb::ProcessEvent {
        event(PbEvent::Keepalive(process_event::KeepAlive {}))
    }
}

/// The events of a subscription, each in the response of its call.
pub(super) fn stream<T: 'static, F: Fn(pb::ProcessEvent) -> T + Send + 'static>(
    found: &Found,
    follow: Follow,
    interval: Duration,
    respond: F,
) -> impl Stream<Item = Result<T, Status>> + Send + use<T, F> {
    let (earliest, _) = follow.subscription.range();
    let record = found.record();
    let start = event(PbEvent::Start(process_event::StartEvent {
        pid: record.pid,
        process_id: record.id.clone(),
        next_offset: follow.subscription.begin(),
        earliest_offset: earliest,
    }));
    keepalive::stream(start, follow, interval).map(move |event| event.map(&respond))
}

/// An end, as a message.
pub(super) fn end_event(end: Ended) -> process_event::EndEvent {
    outcome::end_event(end.ending, end.offset)
}

/// What is gone, as a message.
pub(super) fn gap(from: u64, to: u64) -> process_event::Gap {
    process_event::Gap { from, to }
}

/// Output, as a chunk of a Read.
pub(super) fn chunk(piece: Piece) -> pb::OutputChunk {
    let Piece { channel, offset, data } = piece;
    let output = match channel {
        Channel::Stdout => output_chunk::Output::Stdout(data),
        Channel::Stderr => output_chunk::Output::Stderr(data),
        Channel::Pty => output_chunk::Output::Pty(data),
    };
    pb::OutputChunk { offset, output: Some(output) }
}

fn data(piece: Piece) -> pb::ProcessEvent {
    let Piece { channel, offset, data } = piece;
    let output = match channel {
        Channel::Stdout => Output::Stdout(data),
        Channel::Stderr => Output::Stderr(data),
        Channel::Pty => Output::Pty(data),
    };
    event(PbEvent::Data(process_event::DataEvent { output: Some(output), offset }))
}

fn event(event: PbEvent) -> pb::ProcessEvent {
    pb::ProcessEvent { event: Some(event) }
}
