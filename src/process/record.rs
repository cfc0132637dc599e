//! What is known of a process from its start on, and stays true after its end.

use std::{sync::Arc, time::SystemTime};

use super::{
    Beyond, Subscription,
    journal::{Attach, Ended, Journal},
    live::Process,
    spec::StartSpec,
};

/// The identity of a process.
#[derive(Debug)]
pub struct Record {
    /// The process id; after the end it may belong to another process.
    pub pid: u32,
    /// The identity that is never reused: chosen by the client, or by the daemon.
    pub id: String,
    /// The place in the order of starts.
    pub number: u64,
    /// When it was started.
    pub started_at: SystemTime,
    /// What was asked for, without the environment as it was given to the process.
    pub spec: StartSpec,
}

/// A process that has ended and is retained.
#[derive(Debug)]
pub struct Finished {
    pub(super) record: Arc<Record>,
    pub(super) journal: Arc<Journal>,
}

/// A process that was found.
#[derive(Debug, Clone)]
pub enum Found {
    /// It lives.
    Live(Arc<Process>),
    /// It has ended.
    Ended(Arc<Finished>),
}

impl Found {
    /// Who it is.
    pub fn record(&self) -> &Arc<Record> {
        match self {
            Self::Live(process) => process.record(),
            Self::Ended(finished) => &finished.record,
        }
    }

    fn journal(&self) -> &Arc<Journal> {
        match self {
            Self::Live(process) => &process.journal,
            Self::Ended(finished) => &finished.journal,
        }
    }

    /// Subscribes to its output.
    ///
    /// # Errors
    /// [`Beyond`] the end.
    pub fn subscribe(&self, at: Attach) -> Result<Subscription, Beyond> {
        self.journal().subscribe(at, true)
    }

    /// As [`Found::subscribe`], for one who only looks on: what it has seen does not count as read.
    ///
    /// # Errors
    /// [`Beyond`] the end.
    pub fn look_on(&self, at: Attach) -> Result<Subscription, Beyond> {
        self.journal().subscribe(at, false)
    }

    /// The offset of the oldest byte that is retained, and of the next one.
    pub fn range(&self) -> (u64, u64) {
        self.journal().range()
    }

    /// The end of its output, once that is known.
    pub fn ended(&self) -> Option<Ended> {
        self.journal().ended()
    }

    /// When it wrote something last.
    pub fn last_output(&self) -> Option<tokio::time::Instant> {
        self.journal().last_output()
    }
}
