//! The input of a process: its stdin, or its terminal.
//!
//! Writes go in the order in which they were called, each as a whole. One that blocks because the
//! process does not read holds nothing but later writes: closing the input makes it fail, signals
//! pass by, and dropping its future cancels it.

use std::{io, os::fd::OwnedFd, pin::pin, sync::Arc};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use crate::sys::errno;

/// Why input was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// stdin not enabled or closed
    #[error("stdin not enabled or closed")]
    Closed,
    /// Input for stdin, but the process has a terminal.
    #[error("tty assigned to process — input should be written to the pty, not the stdin")]
    HasTerminal,
    /// Input for a terminal, but the process has none.
    #[error("tty not assigned to process — input should be written to the stdin, not the tty")]
    NoTerminal,
    /// The process has closed its end.
    #[error("error writing to stdin of process '{pid}': write |1: broken pipe")]
    BrokenPipe {
        /// The process.
        pid: u32,
    },
    /// The terminal's process has ended.
    #[error("error writing to tty of process '{pid}': write /dev/ptmx: file already closed")]
    TerminalClosed {
        /// The process.
        pid: u32,
    },
    /// Another error of the kernel.
    #[error("error writing to {what} of process '{pid}': {reason}")]
    Failed {
        /// `stdin` or `tty`.
        what: &'static str,
        /// The process.
        pid: u32,
        /// What the kernel said.
        reason: String,
    },
    /// A terminal has no end of input, but a character that says so.
    #[error("cannot close stdin for PTY process — send Ctrl+D (0x04) instead")]
    CannotCloseTerminal,
}

/// A descriptor to write to, until it is closed.
#[derive(Debug)]
pub(super) struct Input {
    fd: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    closed: Notify,
    order: tokio::sync::Mutex<()>,
}

impl Input {
    pub(super) fn new(fd: Option<Arc<AsyncFd<OwnedFd>>>) -> Self {
        Self { fd: Mutex::new(fd), closed: Notify::new(), order: tokio::sync::Mutex::new(()) }
    }

    /// The descriptor, unless it is closed.
    pub(super) fn fd(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        self.fd.lock().clone()
    }

    /// Closes it and ends a write that blocks. More than once is fine.
    pub(super) fn close(&self) {
        drop(self.fd.lock().take());
        self.closed.notify_waiters();
    }

    /// Writes everything. `Ok(false)` when it is or gets closed; then a part may be written.
    pub(super) async fn write(&self, mut data: Bytes) -> io::Result<bool> {
        let _turn = self.order.lock().await;
        let mut closed = pin!(self.closed.notified());
        // Registered before looking, so that a close in between is not missed.
        closed.as_mut().enable();
        let Some(fd) = self.fd() else {
            return Ok(false);
        };
        while !data.is_empty() {
            let write = fd.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, &data)?));
            tokio::select! {
                biased;
                () = &mut closed => return Ok(false),
                written = write => match written {
                    Ok(written) => data.advance(written),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                },
            }
        }
        Ok(true)
    }
}

/// Puts the error of a write to stdin in words.
pub(super) fn stdin_error(pid: u32, error: &io::Error) -> InputError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => InputError::BrokenPipe { pid },
        _ => InputError::Failed { what: "stdin", pid, reason: errno::text_of(error) },
    }
}

/// Puts the error of a write to a terminal in words.
pub(super) fn terminal_error(pid: u32, error: &io::Error) -> InputError {
    match error.raw_os_error() {
        Some(libc::EIO) => InputError::TerminalClosed { pid },
        _ => InputError::Failed { what: "tty", pid, reason: errno::text_of(error) },
    }
}
