//! What an initialisation did.

use std::{fmt::Display, time::Duration};

use tokio::time::Instant;

/// What became of one part of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Applied,
    /// It was so already.
    Unchanged,
    /// It failed, and the rest was done all the same.
    Failed(String),
}

/// One part of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it is about.
    pub name: &'static str,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether the request was older than one before it, and nothing was done.
    pub stale: bool,
    /// The parts that the request had, in the order in which they were done.
    pub steps: Vec<Step>,
    /// How long all took, without waiting for the turn.
    pub took: Duration,
}

impl Report {
    pub(super) fn note<E: Display>(
        &mut self,
        name: &'static str,
        since: Instant,
        done: Result<bool, E>,
    ) {
        let outcome = match done {
            Ok(true) => Outcome::Applied,
            Ok(false) => Outcome::Unchanged,
            Err(error) => {
                tracing::warn!(step = name, %error, "initialising went on without this");
                Outcome::Failed(error.to_string())
            }
        };
        self.steps.push(Step { name, outcome, took: since.elapsed() });
    }
}
