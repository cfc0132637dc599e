//! Waiting for the exit of a child without a thread for it.
//!
//! A pidfd becomes readable then (Linux 5.3). Where there are none, or none that can be waited for,
//! SIGCHLD says that some child has changed, and each process that is waited for looks at its own.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::sys::{
    pidfd::{self, ChildRef, Exit},
    ready,
};

/// The pause between two looks where not even SIGCHLD can be had.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How the exit of one child is seen.
#[derive(Debug)]
pub(super) struct ExitWatch {
    pid: u32,
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl ExitWatch {
    /// Watches a child that nobody has waited for.
    ///
    /// # Errors
    /// When the daemon lacks memory or watches for its pidfd, which is given back.
    pub(super) fn new(
        pid: u32,
        pidfd: Option<OwnedFd>,
    ) -> Result<Self, (Option<OwnedFd>, io::Error)> {
        let Some(pidfd) = pidfd else { return Ok(Self { pid, pidfd: None }) };
        match ready::watch(pidfd).map_err(|error| error.into_parts()) {
            Ok(pidfd) => Ok(Self { pid, pidfd: Some(pidfd) }),
            // Linux 5.2 has pidfds that cannot be polled.
            Err((_, error)) if pidfd::is_refusal(&error) => Ok(Self { pid, pidfd: None }),
            Err((pidfd, error)) => Err((Some(pidfd), error)),
        }
    }

    /// The child, until it is waited for.
    pub(super) fn child(&self) -> ChildRef<'_> {
        ChildRef { pid: self.pid, pidfd: self.pidfd.as_ref().map(|fd| fd.get_ref().as_fd()) }
    }

    /// Waits until it has exited; the zombie stays.
    ///
    /// # Errors
    /// ECHILD when somebody else has waited for it.
    pub(super) async fn exited(&self) -> io::Result<Exit> {
        if let Some(pidfd) = &self.pidfd {
            let looked = pidfd.async_io(Interest::READABLE, |_| {
                pidfd::peek(self.child())?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
            });
            return looked.await;
        }
        // Before the first look, so that no change is missed.
        let mut changes = signal(SignalKind::child()).ok();
        loop {
            if let Some(exit) = pidfd::peek(self.child())? {
                return Ok(exit);
            }
            let changed = match &mut changes {
                Some(changes) => changes.recv().await,
                None => None,
            };
            if changed.is_none() {
                sleep(LOOK_AGAIN).await;
            }
        }
    }
}
