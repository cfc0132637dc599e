//! The service `envd.v1.Template`.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use futures_util::Stream;
use tokio::sync::broadcast::{self, error::RecvError};
use tonic::{Request, Response, Status};

use super::{
    keepalive::{self, Source, Step},
    outcome::{duration, timestamp},
};
use crate::{
    process::Channel,
    proto::v1::{
        self as pb,
        template_server::Template,
        watch_template_response::{Event as PbEvent, KeepAlive, Output, Snapshot, output},
    },
    sandbox::Sandbox,
    template::{self, Attempt, Event, State},
};

/// The service.
#[derive(Debug)]
pub struct Templates {
    sandbox: Arc<Sandbox>,
}

impl Templates {
    /// Tells of a sandbox's template.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<pb::WatchTemplateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Template for Templates {
    async fn get(
        &self,
        _: Request<pb::GetTemplateRequest>,
    ) -> Result<Response<pb::GetTemplateResponse>, Status> {
        let template = &self.sandbox.template;
        let snapshot = template.snapshot();
        Ok(Response::new(pb::GetTemplateResponse {
            present: template.config().is_some(),
            status: Some(status(snapshot.status)),
            attempts: snapshot.attempts.into_iter().map(attempt).collect(),
        }))
    }

    type WatchStream = Events;

    async fn watch(
        &self,
        request: Request<pb::WatchTemplateRequest>,
    ) -> Result<Response<Events>, Status> {
        let interval = keepalive::interval(request.metadata());
        let until_settled = request.into_inner().until_settled;
        let (first, events) = self.sandbox.template.watch();
        let settled = until_settled && is_settled(first.status.state);
        let first = snapshot(first, 0);
        if settled {
            return Ok(Response::new(Box::pin(futures_util::stream::iter([Ok(first)]))));
        }
        let follow = Follow { sandbox: Arc::clone(&self.sandbox), events, until_settled };
        Ok(Response::new(Box::pin(keepalive::stream(first, follow, interval))))
    }
}

/// What comes after the first snapshot.
struct Follow {
    sandbox: Arc<Sandbox>,
    events: broadcast::Receiver<Event>,
    until_settled: bool,
}

impl Source for Follow {
    type Message = pb::WatchTemplateResponse;

    async fn next(&mut self) -> Option<Step<pb::WatchTemplateResponse>> {
        let (message, state) = match self.events.recv().await {
            Ok(Event::Changed(changed)) => {
                let state = changed.state;
                (message(PbEvent::Changed(status(changed))), Some(state))
            }
            Ok(Event::Attempt(it)) => (message(PbEvent::Attempt(attempt(it))), None),
            Ok(Event::Output { source, channel, data }) => {
                let source = match source {
                    template::Source::Start => output::Source::Start,
                    template::Source::Ready => output::Source::Ready,
                };
                let data = match channel {
                    Channel::Stderr => output::Data::Stderr(data),
                    Channel::Stdout | Channel::Pty => output::Data::Stdout(data),
                };
                let output = Output { source: source.into(), data: Some(data) };
                (message(PbEvent::Output(output)), None)
            }
            Err(RecvError::Lagged(missed)) => {
                let (again, events) = self.sandbox.template.watch();
                self.events = events;
                let state = again.status.state;
                (snapshot(again, missed), Some(state))
            }
            Err(RecvError::Closed) => return None,
        };
        Some(match state {
            Some(state) if self.until_settled && is_settled(state) => Step::Last(message),
            _ => Step::Message(message),
        })
    }

    fn keepalive(&self) -> pb::WatchTemplateResponse {
        message(PbEvent::Keepalive(KeepAlive {}))
    }
}

fn is_settled(state: State) -> bool {
    matches!(state, State::Ready | State::Failed)
}

fn message(event: PbEvent) -> pb::WatchTemplateResponse {
    pb::WatchTemplateResponse { event: Some(event) }
}

fn snapshot(snapshot: template::Snapshot, missed: u64) -> pb::WatchTemplateResponse {
    message(PbEvent::Snapshot(Snapshot {
        status: Some(status(snapshot.status)),
        attempts: snapshot.attempts.into_iter().map(attempt).collect(),
        missed,
    }))
}

fn status(status: template::Status) -> pb::TemplateStatus {
    let state = match status.state {
        State::Starting => pb::TemplateState::Starting,
        State::Waiting => pb::TemplateState::Waiting,
        State::Ready => pb::TemplateState::Ready,
        State::Failed => pb::TemplateState::Failed,
    };
    pb::TemplateStatus {
        state: state.into(),
        since: Some(timestamp(status.since)),
        attempts: status.attempts,
        last_error: status.last_error,
        reason: status.reason,
        start_pid: status.start_pid,
        restarts: status.restarts,
    }
}

fn attempt(attempt: Attempt) -> pb::TemplateAttempt {
    let began: SystemTime = attempt.began;
    pb::TemplateAttempt {
        number: attempt.number,
        began: Some(timestamp(began)),
        took: attempt.took.map(duration),
        error: attempt.error,
        output: attempt.output,
    }
}
