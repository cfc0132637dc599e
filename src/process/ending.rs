//! How a process ended: the truth, and beside it upstream's words for it.

use std::{
    io,
    time::{Duration, SystemTime},
};

use super::{settle::Held, tree::Conclusion};
use crate::sys::{errno, pidfd::Exit};

/// The truth about an ending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It exited by itself.
    Exited {
        /// With this code.
        code: i32,
    },
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: i32,
        /// Whether the kernel wrote a core dump.
        core_dumped: bool,
    },
    /// The kernel killed it for want of memory.
    OomKilled {
        /// How many processes of the tree were killed so.
        kills: u64,
        /// The tree's own limit in bytes, if it had one.
        memory_limit: Option<u64>,
    },
    /// Its own time limit was reached and it was made to end.
    TimedOut {
        /// The limit.
        timeout: Duration,
        /// How it went then.
        exit: Exit,
    },
    /// The command was never executed.
    SpawnFailed {
        /// What the kernel said.
        errno: i32,
    },
    /// Somebody else has taken its exit status.
    Lost {
        /// What the kernel said instead.
        reason: String,
    },
}

/// What a process has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in user mode.
    pub cpu_user: Duration,
    /// Processor time in the kernel.
    pub cpu_system: Duration,
    /// The most memory at one time, in bytes; 0 where it is not known: for an ended process without a
    /// control group.
    pub memory_peak: u64,
    /// The memory now, in bytes.
    pub memory: u64,
    /// Bytes read from block devices.
    pub io_read: u64,
    /// Bytes written to block devices.
    pub io_write: u64,
    /// Processes and threads now.
    pub pids: u64,
    /// Whether all that descends from the process is counted, and not only those of its children
    /// that it has waited for.
    pub whole_tree: bool,
}

/// How a process ended. Clients compare the texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The truth.
    pub outcome: Outcome,
    /// The limits that the tree ran into during its life, by the names of their cgroup files.
    pub limits_hit: Vec<&'static str>,
    /// What it used.
    pub usage: Usage,
    /// When its exit was seen.
    pub exited_at: SystemTime,
    /// The exit code, or -1 when a signal ended it.
    pub exit_code: i32,
    /// Whether it exited by itself.
    pub exited: bool,
    /// `exit status N` or `signal: NAME`, perhaps with ` (core dumped)`.
    pub status: String,
    /// The status again, unless the process exited with 0.
    pub error: Option<String>,
    /// Whether the deadline of the call that started it has ended it.
    pub timed_out: bool,
    /// Whether a descendant holds the output open: what it writes now comes after the end.
    pub output_open: bool,
    /// Whether that descendant was writing or working when the longest wait for it was over.
    pub output_truncated: bool,
}

/// What the supervisor knows about an exit beside its status.
#[derive(Debug, Clone)]
pub(super) struct Circumstances {
    /// When it was seen.
    pub(super) exited_at: SystemTime,
    /// Why the command could not be executed.
    pub(super) exec_error: Option<i32>,
    /// What made it end.
    pub(super) cause: Option<Cause>,
    /// What its tree has to say.
    pub(super) conclusion: Conclusion,
    /// Who still holds the output.
    pub(super) held: Held,
}

/// What made a process end, if that was here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The deadline of the call that started it: SIGKILL.
    Deadline(Duration),
    /// Its own time limit: SIGTERM first.
    TimeLimit(Duration),
}

impl Ending {
    /// The ending of a process, with everything that is known.
    pub(super) fn of_process(exit: io::Result<Exit>, known: Circumstances) -> Self {
        let Circumstances { exited_at, exec_error, cause, conclusion, held } = known;
        let Conclusion { usage, verdict, killed, .. } = conclusion;
        let timed_out = matches!(cause, Some(Cause::Deadline(_)));
        let ending = match &exit {
            Ok(exit) => Self::new(*exit, timed_out),
            Err(error) => Self::unknown(error, timed_out),
        };
        let is_kill = matches!(exit, Ok(Exit::Signalled { signal: libc::SIGKILL, .. }));
        let outcome = match (exit, exec_error, cause) {
            (Ok(Exit::Exited(_)), Some(errno), _) => Outcome::SpawnFailed { errno },
            (Ok(exit), _, Some(Cause::TimeLimit(timeout))) => Outcome::TimedOut { timeout, exit },
            // It may have been faster than the kill.
            (Ok(exit), _, Some(Cause::Deadline(timeout))) if is_kill => {
                Outcome::TimedOut { timeout, exit }
            }
            (Ok(_), ..) if is_kill && !killed && verdict.oom_kills > 0 => {
                Outcome::OomKilled { kills: verdict.oom_kills, memory_limit: verdict.memory_limit }
            }
            _ => ending.outcome,
        };
        Self {
            outcome,
            limits_hit: verdict.limits_hit,
            usage,
            exited_at,
            output_open: held.open,
            output_truncated: held.truncated,
            ..ending
        }
    }

    /// Puts an exit in words.
    pub(super) fn new(exit: Exit, timed_out: bool) -> Self {
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
        let outcome = match exit {
            Exit::Exited(code) => Outcome::Exited { code },
            Exit::Signalled { signal, core_dumped } => Outcome::Signalled { signal, core_dumped },
        };
        Self { exit_code, exited, status, error, timed_out, ..Self::of(outcome) }
    }

    fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            limits_hit: Vec::new(),
            usage: Usage::default(),
            exited_at: SystemTime::now(),
            exit_code: -1,
            exited: false,
            status: String::new(),
            error: None,
            timed_out: false,
            output_open: false,
            output_truncated: false,
        }
    }

    /// The ending of a process whose exit status somebody else has taken.
    fn unknown(error: &io::Error, timed_out: bool) -> Self {
        let reason = format!("wait: {}", errno::text_of(error));
        Self {
            status: "wait error".to_owned(),
            error: Some(reason.clone()),
            timed_out,
            ..Self::of(Outcome::Lost { reason })
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

/// A signal's constant, as in `SIGKILL`; `SIG34` for one without a name.
pub fn signal_constant(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal)
        .map_or_else(|_| format!("SIG{signal}"), |signal| signal.as_str().to_owned())
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

    fn outcome(exit: Exit, cause: Option<Cause>, change: impl Fn(&mut Circumstances)) -> Outcome {
        let mut known = Circumstances {
            exited_at: SystemTime::now(),
            exec_error: None,
            cause,
            conclusion: Conclusion::default(),
            held: Held::default(),
        };
        change(&mut known);
        Ending::of_process(Ok(exit), known).outcome
    }

    const KILLED: Exit = Exit::Signalled { signal: 9, core_dumped: false };

    #[test]
    fn a_kill_for_want_of_memory_is_told_from_any_other() {
        let oom = |known: &mut Circumstances| {
            known.conclusion.verdict.oom_kills = 2;
            known.conclusion.verdict.memory_limit = Some(7);
        };
        let oom_killed = Outcome::OomKilled { kills: 2, memory_limit: Some(7) };
        let signalled = Outcome::Signalled { signal: 9, core_dumped: false };
        assert_eq!(outcome(KILLED, None, oom), oom_killed);
        assert_eq!(outcome(KILLED, None, |_| ()), signalled);
        let ours = |known: &mut Circumstances| {
            oom(known);
            known.conclusion.killed = true;
        };
        assert_eq!(outcome(KILLED, None, ours), signalled);
        // A child of it was killed, and it said so.
        assert_eq!(outcome(Exit::Exited(137), None, oom), Outcome::Exited { code: 137 });
    }

    #[test]
    fn a_time_limit_is_the_outcome_however_it_went_then() {
        let timeout = Duration::from_secs(3);
        let limit = Some(Cause::TimeLimit(timeout));
        for exit in [KILLED, Exit::Exited(0), Exit::Exited(3)] {
            assert_eq!(outcome(exit, limit, |_| ()), Outcome::TimedOut { timeout, exit });
        }
        let deadline = Some(Cause::Deadline(timeout));
        assert_eq!(outcome(KILLED, deadline, |_| ()), Outcome::TimedOut { timeout, exit: KILLED });
        assert_eq!(outcome(Exit::Exited(0), deadline, |_| ()), Outcome::Exited { code: 0 });
    }

    #[test]
    fn a_command_that_was_never_executed_and_one_that_others_waited_for() {
        let failed = |known: &mut Circumstances| known.exec_error = Some(2);
        assert_eq!(outcome(Exit::Exited(127), None, failed), Outcome::SpawnFailed { errno: 2 });
        let known = Circumstances {
            exited_at: SystemTime::now(),
            exec_error: None,
            cause: None,
            conclusion: Conclusion::default(),
            held: Held::default(),
        };
        let error = io::Error::from_raw_os_error(libc::ECHILD);
        let ending = Ending::of_process(Err(error), known);
        assert!(matches!(ending.outcome, Outcome::Lost { reason } if reason.contains("child")));
    }
}
