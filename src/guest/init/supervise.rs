//! PID 1's life: reap every orphan, start the daemon again when it dies, and wait for the signal
//! that ends the machine.

use std::time::{Duration, Instant};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    agent::{Agent, Backoff},
    console::say,
    power::Ending,
};
use crate::sys::signals;

/// The daemon, as PID 1 sees it.
#[derive(Debug, Clone, Copy)]
enum State {
    Running {
        pid: Pid,
        since: Instant,
    },
    /// It died, and is started again then.
    Waiting {
        until: Instant,
    },
}

/// Runs the daemon until a signal asks for the end. `running` is one that was started before;
/// `machine` says whether there is more to end than a container.
/// Returns what was asked for, and the daemon if it runs.
pub(super) fn supervise(
    agent: &Agent,
    running: Option<Pid>,
    machine: bool,
) -> (Ending, Option<Pid>) {
    let mut backoff = Backoff::new();
    let mut state = match running {
        Some(pid) => State::Running { pid, since: Instant::now() },
        None => start(agent, &mut backoff),
    };
    let wanted = wanted();
    loop {
        let timeout = match state {
            State::Running { .. } => None,
            State::Waiting { until } => Some(until.saturating_duration_since(Instant::now())),
        };
        let ending = next(&wanted, timeout).and_then(|signal| Ending::asked_by(signal, machine));
        // Whatever the signal was: several SIGCHLD may have become one.
        reap(|dead, status| match state {
            State::Running { pid, since } if pid == dead => {
                let pause = backoff.after(since.elapsed());
                say!("envd has {}; it is started again in {pause:?}", how(status));
                state = State::Waiting { until: Instant::now() + pause };
            }
            _ => {}
        });
        let agent_pid = match state {
            State::Running { pid, .. } => Some(pid),
            State::Waiting { .. } => None,
        };
        if let Some(ending) = ending {
            return (ending, agent_pid);
        }
        if matches!(state, State::Waiting { until } if until <= Instant::now()) {
            state = start(agent, &mut backoff);
        }
    }
}

/// The signals that PID 1 takes; all are blocked.
pub(super) fn wanted() -> SigSet {
    let mut wanted = SigSet::empty();
    wanted.add(Signal::SIGCHLD);
    for signal in Ending::SIGNALS {
        wanted.add(signal);
    }
    wanted
}

/// The next of these signals.
pub(super) fn next(wanted: &SigSet, timeout: Option<Duration>) -> Option<Signal> {
    signals::wait(wanted, timeout).unwrap_or_else(|error| {
        // It cannot fail; if it did, PID 1 must not spin.
        say!("waiting for signals: {error}");
        std::thread::sleep(Duration::from_secs(1));
        None
    })
}

/// Takes every child away that has ended. Says whether any child is left.
pub(super) fn reap(mut ended: impl FnMut(Pid, WaitStatus)) -> bool {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return true,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    ended(pid, status);
                }
            }
            Err(Errno::EINTR) => {}
            // ECHILD: there is none.
            Err(_) => return false,
        }
    }
}

fn start(agent: &Agent, backoff: &mut Backoff) -> State {
    match agent.start() {
        Ok(pid) => State::Running { pid, since: Instant::now() },
        Err(error) => {
            let pause = backoff.after(Duration::ZERO);
            say!("starting envd: {error}; it is tried again in {pause:?}");
            State::Waiting { until: Instant::now() + pause }
        }
    }
}

fn how(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("left with status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("died of {signal}"),
        other => format!("ended: {other:?}"),
    }
}
