//! The input of a process: its stdin, or its terminal.
//!
//! Writes go in the order in which they were called, each as a whole. One that blocks because the
//! process does not read holds nothing but later writes: closing the input makes it fail, signals
//! pass by, and dropping its future cancels it.
//!
//! A write may say at which position of the whole input it begins: what the process has been given
//! already is left out then, so that a write whose answer was lost can be repeated.

use std::{
    io,
    os::fd::OwnedFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

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
    /// The position lies ahead of the input.
    #[error(
        "input offset {offset} is ahead of the input of process '{pid}', which is at {accepted}"
    )]
    Ahead {
        /// The position that was asked for.
        offset: u64,
        /// The process.
        pid: u32,
        /// How much it has been given.
        accepted: u64,
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
    /// How many bytes the process has been given. Changed by whoever holds `order`.
    accepted: AtomicU64,
}

/// Why a write failed.
#[derive(Debug)]
pub(super) enum WriteError {
    /// The input is closed, or was closed meanwhile.
    Closed,
    /// It would begin ahead of the input, which is at this position.
    Ahead(u64),
    /// What the kernel said.
    Os(io::Error),
}

impl Input {
    pub(super) fn new(fd: Option<Arc<AsyncFd<OwnedFd>>>) -> Self {
        Self {
            fd: Mutex::new(fd),
            closed: Notify::new(),
            order: tokio::sync::Mutex::new(()),
            accepted: AtomicU64::new(0),
        }
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

    /// Writes everything from `offset` on that was not written before; without one, all of it.
    /// Returns how much has been written in all. After an error, or when the future was dropped, a
    /// part may be written.
    pub(super) async fn write(
        &self,
        mut data: Bytes,
        offset: Option<u64>,
    ) -> Result<u64, WriteError> {
        let _turn = self.order.lock().await;
        let accepted = self.accepted.load(Ordering::Relaxed);
        match accepted.checked_sub(offset.unwrap_or(accepted)) {
            None => return Err(WriteError::Ahead(accepted)),
            Some(repeated) => {
                let repeated = usize::try_from(repeated).unwrap_or(usize::MAX).min(data.len());
                data.advance(repeated);
                // Nothing to do, even where the input has been closed since.
                if data.is_empty() && repeated > 0 {
                    return Ok(accepted);
                }
            }
        }
        let mut closed = pin!(self.closed.notified());
        // Registered before looking, so that a close in between is not missed.
        closed.as_mut().enable();
        let fd = self.fd().ok_or(WriteError::Closed)?;
        while !data.is_empty() {
            let write = fd.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, &data)?));
            tokio::select! {
                biased;
                () = &mut closed => return Err(WriteError::Closed),
                written = write => match written {
                    Ok(written) => {
                        data.advance(written);
                        self.accepted.fetch_add(written as u64, Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(WriteError::Os(error)),
                },
            }
        }
        Ok(self.accepted.load(Ordering::Relaxed))
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
