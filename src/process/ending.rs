//! How a process ended, in upstream's words.

use std::io;

use crate::sys::{errno, pidfd::Exit};

/// How a process ended. Clients compare the texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The exit code, or -1 when a signal ended it.
    pub exit_code: i32,
    /// Whether it exited by itself.
    pub exited: bool,
    /// `exit status N` or `signal: NAME`, perhaps with ` (core dumped)`.
    pub status: String,
    /// The status again, unless the process exited with 0.
    pub error: Option<String>,
    /// Whether its time ran out.
    pub timed_out: bool,
}

impl Ending {
    /// Puts an exit in words.
    pub fn new(exit: Exit, timed_out: bool) -> Self {
        let (exit_code, exited, status) = match exit {
            Exit::Exited(code) => (code, true, format!("exit status {code}")),
            Exit::Signalled { signal, core_dumped } => {
                let dumped = if core_dumped { " (core dumped)" } else { "" };
                (-1, false, format!("signal: {}{dumped}", signal_name(signal)))
            }
        };
        let error = match exit {
            // It was faster than the kill.
            Exit::Exited(0) => timed_out.then(|| "context deadline exceeded".to_owned()),
            _ => Some(status.clone()),
        };
        Self { exit_code, exited, status, error, timed_out }
    }

    /// The ending of a process whose exit status somebody else has taken.
    pub(super) fn unknown(error: &io::Error, timed_out: bool) -> Self {
        Self {
            exit_code: -1,
            exited: false,
            status: "wait error".to_owned(),
            error: Some(format!("wait: {}", errno::text_of(error))),
            timed_out,
        }
    }
}

/// A signal's name in Go's table, which upstream prints; `signal N` for one without a name.
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        16 => "stack fault",
        17 => "child exited",
        18 => "continued",
        19 => "stopped (signal)",
        20 => "stopped",
        21 => "stopped (tty input)",
        22 => "stopped (tty output)",
        23 => "urgent I/O condition",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        26 => "virtual timer expired",
        27 => "profiling timer expired",
        28 => "window changed",
        29 => "I/O possible",
        30 => "power failure",
        31 => "bad system call",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speaks_as_upstream() {
        let ok = Ending::new(Exit::Exited(0), false);
        assert_eq!((ok.exit_code, ok.exited, ok.error), (0, true, None));
        assert_eq!(ok.status, "exit status 0");
        let seven = Ending::new(Exit::Exited(7), false);
        assert_eq!((seven.exit_code, seven.exited), (7, true));
        assert_eq!(seven.error.as_deref(), Some("exit status 7"));
        let signalled = |signal, core_dumped| {
            let ending = Ending::new(Exit::Signalled { signal, core_dumped }, false);
            assert_eq!((ending.exit_code, ending.exited), (-1, false));
            assert_eq!(ending.error.as_ref(), Some(&ending.status));
            ending.status
        };
        assert_eq!(signalled(9, false), "signal: killed");
        assert_eq!(signalled(6, true), "signal: aborted (core dumped)");
        assert_eq!(signalled(34, false), "signal: signal 34");
        let late = Ending::new(Exit::Exited(0), true);
        assert_eq!((late.exit_code, late.exited), (0, true));
        assert_eq!(late.error.as_deref(), Some("context deadline exceeded"));
    }
}
