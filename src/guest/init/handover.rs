//! Becoming the distribution's init, with the daemon running beside it.
//!
//! Everything that can be checked is checked before the daemon is started, because afterwards
//! PID 1 is another program, and what it does about a mistake is its own affair. The daemon stays
//! that init's child: it is reaped there, and not started again when it dies.

use std::{fs, io, os::unix::process::CommandExt, path::Path, process::Command};

use nix::unistd::Pid;

use super::agent::Agent;

/// Why PID 1 stays what it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandoverError {
    /// The init is none.
    #[error("checking the init: {0}")]
    Init(io::Error),
    /// The daemon cannot be started.
    #[error("starting envd: {0}")]
    Agent(io::Error),
    /// The init cannot be executed; the daemon runs already.
    #[error("executing the init: {source}")]
    Exec {
        /// The daemon.
        agent: Pid,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Starts the daemon and becomes `init`; returns only when that fails.
pub(super) fn hand_over(init: &Path, agent: &Agent, prepare: impl FnOnce()) -> HandoverError {
    let checked = fs::metadata(init).and_then(|meta| super::executable(&meta));
    if let Err(error) = checked {
        return HandoverError::Init(error);
    }
    let agent = match agent.check().and_then(|()| agent.start()) {
        Ok(agent) => agent,
        Err(error) => return HandoverError::Agent(error),
    };
    prepare();
    HandoverError::Exec { agent, source: Command::new(init).exec() }
}
