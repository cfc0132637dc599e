//! `envd poweroff`, `envd reboot`, `envd halt`: asking PID 1, whichever of two it is.

use std::{fs, io};

use nix::{errno::Errno, sys::signal::kill, unistd::Pid};

use super::{NAME, in_first_pid_namespace, power::Ending};
use crate::sys::signals;

const PID_1: i32 = 1;

/// Why the machine is not ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It cannot be known who PID 1 is.
    #[error("who is PID 1 cannot be read from /proc/1/comm: {0}")]
    Unknown(io::Error),
    /// PID 1 would not understand.
    #[error("PID 1 is '{0}', which is neither envd nor systemd; use its own command")]
    Other(String),
    /// PID 1 cannot be asked.
    #[error("PID 1 cannot be signalled: {0}")]
    Signal(io::Error),
}

/// Asks PID 1 for this ending.
///
/// # Errors
/// [`ControlError`]; nothing has happened then.
pub fn ask(ending: Ending) -> Result<(), ControlError> {
    let comm = fs::read("/proc/1/comm").map_err(ControlError::Unknown)?;
    let comm = comm.trim_ascii_end();
    if comm == NAME.to_bytes() {
        kill(Pid::from_raw(PID_1), ending.signal(in_first_pid_namespace()))
            .map_err(Errno::into)
            .map_err(ControlError::Signal)
    } else if comm == b"systemd" {
        signals::send_realtime(PID_1, of_systemd(ending)).map_err(ControlError::Signal)
    } else {
        Err(ControlError::Other(String::from_utf8_lossy(comm).into_owned()))
    }
}

/// How far behind SIGRTMIN systemd expects it; systemd(1), "Signals".
fn of_systemd(ending: Ending) -> i32 {
    match ending {
        Ending::Halt => 3,
        Ending::PowerOff => 4,
        Ending::Reboot => 5,
    }
}
