//! A live process, as its callers see it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::Bytes;
use tokio::io::unix::AsyncFd;

use super::{
    Beyond, Stdio, Subscription,
    descent::Known,
    exit_watch::ExitWatch,
    input::{Input, InputError, WriteError, stdin_error, terminal_error},
    journal::{Attach, Journal},
    ports::{self, Listening},
    record::Record,
    tree::Tree,
};
use crate::{
    blocking::{Busy, Pool},
    sys::{errno, pty},
};

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
    /// There is no thread to do it on.
    #[error(transparent)]
    Blocking(#[from] Busy),
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
    pub(super) exit: ExitWatch,
    pub(super) input: Input,
    pub(super) journal: Arc<Journal>,
    pub(super) tree: Arc<Tree>,
    trees: Arc<Pool>,
}

impl Process {
    pub(super) fn new(
        record: Record,
        exit: ExitWatch,
        input: Option<Arc<AsyncFd<OwnedFd>>>,
        journal: Arc<Journal>,
        (tree, trees): (Tree, Arc<Pool>),
    ) -> Self {
        let is_pty = matches!(record.spec.stdio, Stdio::Pty { .. });
        let (record, input, tree) = (Arc::new(record), Input::new(input), Arc::new(tree));
        Self { record, is_pty, exit, input, journal, tree, trees }
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
        self.journal.subscribe(at, true)
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
        let sent = self.tree.signal_process(self.exit.child(), signal);
        sent.map_err(|error| self.not_signalled(signal, &error))
    }

    /// Sends a signal to its process group: itself, and those of its descendants that have not made
    /// a group of their own.
    ///
    /// # Errors
    /// It has finished, or the kernel refuses.
    pub fn signal_group(&self, signal: i32) -> Result<(), SignalError> {
        self.tree.signal_group(signal).map_err(|error| self.not_signalled(signal, &error))
    }

    /// Sends a signal to all that descends from it and to itself.
    ///
    /// # Errors
    /// It has finished, the kernel refuses for one of them, or there is no thread to do it on.
    pub async fn signal_tree(&self, signal: i32) -> Result<(), SignalError> {
        let tree = Arc::clone(&self.tree);
        let sent = self.trees.run(move || tree.signal_all(signal, Known::default())).await?;
        sent.map(|_| ()).map_err(|error| self.not_signalled(signal, &error))
    }

    /// Kills it and all that descends from it, as far as known from before or found now. It is not
    /// refused because others wait: a process is killed so once, or again when it went wrong.
    ///
    /// # Errors
    /// The kernel refuses for one of them, or there is no thread to do it on.
    pub(super) async fn finish_tree(&self, known: Known) -> Result<(), SignalError> {
        let tree = Arc::clone(&self.tree);
        match self.trees.run_next_step(move || tree.signal_all(libc::SIGKILL, known)).await? {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(self.not_signalled(libc::SIGKILL, &error))
            }
            _ => Ok(()),
        }
    }

    /// Kills it and all that descends from it, soon, whether or not anybody waits for that.
    pub fn kill_tree(&self) {
        let (tree, pid) = (Arc::clone(&self.tree), self.pid());
        self.trees.run_later(move || {
            if let Err(error) = tree.signal_all(libc::SIGKILL, Known::default())
                && error.raw_os_error() != Some(libc::ESRCH)
            {
                tracing::warn!(pid, %error, "its tree was not all killed");
            }
        });
    }

    /// Asks all that descends from it and itself to end, by SIGTERM; gives those that were found
    /// where there is no control group. What goes wrong is only logged: SIGKILL is to follow.
    pub(super) async fn terminate_tree(&self) -> Known {
        let tree = Arc::clone(&self.tree);
        let sent =
            self.trees.run_next_step(move || tree.signal_all(libc::SIGTERM, Known::default()));
        match sent.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::debug!(pid = self.pid(), %error, "SIGTERM to its tree");
                Known::default()
            }
            Err(error) => {
                tracing::warn!(pid = self.pid(), %error, "SIGTERM to its tree");
                Known::default()
            }
        }
    }

    fn not_signalled(&self, signal: i32, error: &io::Error) -> SignalError {
        match error.raw_os_error() {
            Some(libc::ESRCH) => SignalError::Finished,
            _ => SignalError::Failed { signal, pid: self.pid(), reason: errno::text_of(error) },
        }
    }

    /// The first socket of it, or of what descends from it, that listens on a port; on any for 0.
    pub async fn listening(&self, port: u16) -> Option<Listening> {
        let tree = Arc::clone(&self.tree);
        let looked = self.trees.run(move || ports::listening(&tree.pids(), port)).await;
        looked.ok().flatten()
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
