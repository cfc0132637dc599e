//! A live process, as its callers see it.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use tokio::io::unix::AsyncFd;

use super::{
    StartSpec, Stdio, Subscription,
    input::{Input, InputError, stdin_error, terminal_error},
    journal::{Journal, STALL_LIMIT},
};
use crate::sys::{errno, pidfd, pty};

/// Why a signal was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignalError {
    /// os: process already finished
    #[error("os: process already finished")]
    Finished,
    /// The kernel refused.
    #[error("signal {signal} to process '{pid}': {reason}")]
    Failed {
        /// The signal's number.
        signal: i32,
        /// The process.
        pid: u32,
        /// What the kernel said.
        reason: String,
    },
}

/// Why a terminal was not resized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// tty not assigned to process
    #[error("tty not assigned to process")]
    NoTerminal,
    /// os: process already finished
    #[error("os: process already finished")]
    Finished,
    /// The kernel refused.
    #[error("size of the tty of process '{pid}': {reason}")]
    Failed {
        /// The process.
        pid: u32,
        /// What the kernel said.
        reason: String,
    },
}

/// A process that was started here and has not been reported as ended.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    /// The place in the order of starts.
    pub(super) number: u64,
    cmd: String,
    args: Vec<String>,
    requested_env: BTreeMap<String, String>,
    requested_cwd: Option<String>,
    tag: Option<String>,
    is_pty: bool,
    pub(super) pidfd: AsyncFd<OwnedFd>,
    pub(super) input: Input,
    pub(super) journal: Arc<Journal>,
}

impl Process {
    pub(super) fn new(
        pid: u32,
        number: u64,
        spec: StartSpec,
        pidfd: AsyncFd<OwnedFd>,
        input: Option<Arc<AsyncFd<OwnedFd>>>,
    ) -> Self {
        Self {
            pid,
            number,
            cmd: spec.cmd,
            args: spec.args,
            requested_env: spec.requested_env,
            requested_cwd: spec.requested_cwd,
            tag: spec.tag,
            is_pty: matches!(spec.stdio, Stdio::Pty { .. }),
            pidfd,
            input: Input::new(input),
            journal: Arc::new(Journal::new(STALL_LIMIT)),
        }
    }

    /// The process id: that of the command itself.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The tag that it was started with.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The command, as asked for.
    pub fn cmd(&self) -> &str {
        &self.cmd
    }

    /// The arguments, as asked for.
    pub fn args(&self) -> &[String] {
        &self.args
    }

    /// The variables, as asked for; defaults are not among them. They may hold secrets.
    pub fn requested_env(&self) -> &BTreeMap<String, String> {
        &self.requested_env
    }

    /// The working directory, as asked for.
    pub fn requested_cwd(&self) -> Option<&str> {
        self.requested_cwd.as_deref()
    }

    /// Whether it has a terminal.
    pub fn is_pty(&self) -> bool {
        self.is_pty
    }

    /// Subscribes to its output from now on, then its end.
    pub fn subscribe(&self) -> Subscription {
        self.journal.subscribe()
    }

    /// Writes to its stdin; waits while it does not read. Dropping the future cancels the rest.
    ///
    /// # Errors
    /// It has a terminal instead, or its stdin is (or gets) closed at either end.
    pub async fn write_stdin(&self, data: Bytes) -> Result<(), InputError> {
        if self.is_pty {
            return Err(InputError::HasTerminal);
        }
        match self.input.write(data).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(InputError::Closed),
            Err(error) => Err(stdin_error(self.pid, &error)),
        }
    }

    /// Writes to its terminal, as if typed. As [`Process::write_stdin`] otherwise.
    ///
    /// # Errors
    /// It has no terminal, or has ended.
    pub async fn write_pty(&self, data: Bytes) -> Result<(), InputError> {
        if !self.is_pty {
            return Err(InputError::NoTerminal);
        }
        match self.input.write(data).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(InputError::TerminalClosed { pid: self.pid }),
            Err(error) => Err(terminal_error(self.pid, &error)),
        }
    }

    /// Closes its stdin; no error when that is closed already. A write that blocks fails.
    ///
    /// # Errors
    /// It has a terminal.
    pub fn close_stdin(&self) -> Result<(), InputError> {
        if self.is_pty {
            return Err(InputError::CannotCloseTerminal);
        }
        self.input.close();
        Ok(())
    }

    /// Sends a signal to the process itself, not to its children. A zombie takes it silently.
    ///
    /// # Errors
    /// It has finished, or the kernel refuses.
    pub fn signal(&self, signal: i32) -> Result<(), SignalError> {
        pidfd::send_signal(self.pidfd.as_fd(), signal).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => SignalError::Finished,
            _ => {
                let reason = errno::text_of(&error);
                SignalError::Failed { signal, pid: self.pid, reason }
            }
        })
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has no terminal, or has ended.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<(), ResizeError> {
        if !self.is_pty {
            return Err(ResizeError::NoTerminal);
        }
        let terminal = self.input.fd().ok_or(ResizeError::Finished)?;
        pty::set_size(terminal.as_fd(), cols, rows)
            .map_err(|error| ResizeError::Failed { pid: self.pid, reason: errno::text_of(&error) })
    }
}
