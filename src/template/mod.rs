//! The template: its service, the question whether it is ready, and the answer.
//!
//! The contract of this module:
//!
//! * A template is **starting** (its start command is not running yet, or is to be started again),
//!   **waiting** (it runs, and is asked whether it is ready), **ready**, or **failed**, which says
//!   why and is final. Without a template the sandbox is ready from the beginning.
//! * Its commands are processes like any other, of the same [`Manager`](crate::process::Manager):
//!   listed, journalled, and to be connected to.
//! * The question is put at once, then with a pause after each answer, and at most for the
//!   template's timeout: the loop that E2B's orchestrator runs. A ready command that takes longer is
//!   killed with its tree.
//! * Who watches gets the state and the last attempts, then every event; one who is too slow gets
//!   the state anew instead of what it missed. Nobody is waited for, and everything kept is bounded.
//! * When the template is ready or has failed, and nobody asks, nothing runs here, but that the
//!   start command's end is waited for.

pub mod condition;
pub mod config;
mod run;

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

pub use config::{Config, ConfigError};
pub use run::{Launcher, Program, Specify, run};

use crate::process::Channel;

/// The attempts that are remembered.
pub const MAX_ATTEMPTS: usize = 32;
/// The last bytes of an attempt's output that are remembered, and of the start command's.
pub const MAX_TAIL: usize = 4096;
/// The events that wait for one who watches; one who is further behind gets the state anew.
pub const MAX_EVENTS: usize = 256;

/// Where a template stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its start command does not run yet, or not any more.
    Starting,
    /// It is not ready yet.
    Waiting,
    /// It is ready.
    Ready,
    /// It will not be ready.
    Failed,
}

impl State {
    /// Its name in JSON and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// How a template stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: SystemTime,
    /// How often it was asked whether it is ready, since it was started last.
    pub attempts: u32,
    /// Why it was not ready, or what became of the start command.
    pub last_error: Option<String>,
    /// Why it has failed.
    pub reason: Option<String>,
    /// The process id of the start command, while it runs.
    pub start_pid: Option<u32>,
    /// How often the start command was started again.
    pub restarts: u32,
}

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Its number, from 1 since the start command was started last.
    pub number: u32,
    /// When it began.
    pub began: SystemTime,
    /// How long it took; `None` while it runs.
    pub took: Option<Duration>,
    /// Why the template was not ready; `None` if it was, or while the attempt runs.
    pub error: Option<String>,
    /// The last [`MAX_TAIL`] bytes that a ready command wrote.
    pub output: Bytes,
}

/// Whose output it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The start command's.
    Start,
    /// The ready command's.
    Ready,
}

/// What those who watch hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The template stands otherwise.
    Changed(Status),
    /// An attempt begins, or has ended.
    Attempt(Attempt),
    /// A command wrote something.
    Output {
        /// Which.
        source: Source,
        /// Where to.
        channel: Channel,
        /// What.
        data: Bytes,
    },
}

/// What one who begins to watch gets.
#[derive(Debug)]
pub struct Snapshot {
    /// How it stands.
    pub status: Status,
    /// The last attempts, the oldest first.
    pub attempts: Vec<Attempt>,
}

/// The sandbox's template.
#[derive(Debug)]
pub struct Template {
    config: Option<Config>,
    inner: Mutex<Inner>,
    events: broadcast::Sender<Event>,
    status: watch::Sender<Status>,
}

#[derive(Debug)]
struct Inner {
    attempts: VecDeque<Attempt>,
}

impl Template {
    /// A template, or none.
    pub fn new(config: Option<Config>) -> Self {
        let status = Status {
            state: if config.is_some() { State::Starting } else { State::Ready },
            since: SystemTime::now(),
            attempts: 0,
            last_error: None,
            reason: None,
            start_pid: None,
            restarts: 0,
        };
        Self {
            config,
            inner: Mutex::new(Inner { attempts: VecDeque::new() }),
            events: broadcast::Sender::new(MAX_EVENTS),
            status: watch::Sender::new(status),
        }
    }

    /// One that cannot be read: it has failed from the beginning.
    pub fn broken(reason: String) -> Self {
        let template = Self::new(None);
        template.change(|status| {
            status.state = State::Failed;
            status.last_error = Some(reason.clone());
            status.reason = Some(reason);
        });
        template
    }

    /// What it is; `None` for none.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// How it stands, and when that changes.
    pub fn changes(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Whether the sandbox is healthy: whether it is ready, unless the template says that to live is
    /// enough.
    pub fn is_healthy(&self) -> bool {
        let by_life =
            self.config.as_ref().is_some_and(|config| config.health == config::Health::Live);
        by_life || self.status.borrow().state == State::Ready
    }

    /// How it stands and how it came there.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.inner.lock();
        Snapshot {
            status: self.status.borrow().clone(),
            attempts: inner.attempts.iter().cloned().collect(),
        }
    }

    /// The same, and everything that comes after it.
    pub fn watch(&self) -> (Snapshot, broadcast::Receiver<Event>) {
        // Events are sent under the same lock: none is missing between the two, and none is double.
        let inner = self.inner.lock();
        let snapshot = Snapshot {
            status: self.status.borrow().clone(),
            attempts: inner.attempts.iter().cloned().collect(),
        };
        (snapshot, self.events.subscribe())
    }

    /// Changes how it stands, and tells everybody.
    fn change(&self, change: impl FnOnce(&mut Status)) {
        let _inner = self.inner.lock();
        self.status.send_modify(|status| {
            let before = status.state;
            change(status);
            if status.state != before {
                status.since = SystemTime::now();
            }
        });
        self.tell(Event::Changed(self.status.borrow().clone()));
    }

    /// Notes that an attempt begins, and its number.
    fn attempt_begins(&self) -> u32 {
        let mut number = 0;
        self.status.send_modify(|status| {
            status.attempts = status.attempts.saturating_add(1);
            number = status.attempts;
        });
        let attempt = Attempt {
            number,
            began: SystemTime::now(),
            took: None,
            error: None,
            output: Bytes::new(),
        };
        let mut inner = self.inner.lock();
        if inner.attempts.len() == MAX_ATTEMPTS {
            inner.attempts.pop_front();
        }
        inner.attempts.push_back(attempt.clone());
        self.tell(Event::Attempt(attempt));
        number
    }

    /// Notes how the attempt that began last has ended.
    fn attempt_ends(&self, took: Duration, error: Option<&str>, output: Bytes) {
        if let Some(error) = error {
            self.status.send_modify(|status| status.last_error = Some(error.to_owned()));
        }
        let mut inner = self.inner.lock();
        if let Some(attempt) = inner.attempts.back_mut() {
            attempt.took = Some(took);
            attempt.error = error.map(str::to_owned);
            attempt.output = output;
            let attempt = attempt.clone();
            self.tell(Event::Attempt(attempt));
        }
    }

    /// Notes that a command wrote something.
    fn wrote(&self, source: Source, channel: Channel, data: Bytes) {
        let _inner = self.inner.lock();
        self.tell(Event::Output { source, channel, data });
    }

    /// Only with the lock held.
    fn tell(&self, event: Event) {
        // Nobody may watch.
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_template_it_is_ready() {
        let none = Template::new(None);
        assert_eq!(none.status().state, State::Ready);
        assert!(none.is_healthy());
        let some = Template::new(config::from_text("start = \"x\"").unwrap());
        assert_eq!(some.status().state, State::Starting);
        assert!(!some.is_healthy());
        let live = Template::new(config::from_text("start = \"x\"\nhealth = \"live\"").unwrap());
        assert!(live.is_healthy());
    }

    #[test]
    fn attempts_are_bounded_and_events_follow_the_snapshot() {
        let template = Template::new(config::from_text("start = \"x\"").unwrap());
        for number in 1..=40_u32 {
            assert_eq!(template.attempt_begins(), number);
            template.attempt_ends(Duration::ZERO, Some("not yet"), Bytes::new());
        }
        let (snapshot, mut events) = template.watch();
        assert_eq!(snapshot.attempts.len(), MAX_ATTEMPTS);
        assert_eq!(snapshot.attempts.first().unwrap().number, 9);
        assert_eq!(snapshot.status.last_error.as_deref(), Some("not yet"));
        assert_eq!(events.try_recv(), Err(broadcast::error::TryRecvError::Empty));
        template.change(|status| status.state = State::Ready);
        assert!(
            matches!(events.try_recv(), Ok(Event::Changed(status)) if status.state == State::Ready)
        );
    }
}
