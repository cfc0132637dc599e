//! The orderly end: the daemon drains, every process gets SIGTERM and some time, then SIGKILL;
//! what is on disks is written, the file systems are made clean, and the machine goes off.
//!
//! Each step has a deadline, so the machine does go off.

use std::time::{Duration, Instant};

use nix::{
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, kill},
    },
    unistd::{Pid, pause, sync},
};

use super::{
    console::say,
    supervise::{next, reap, wanted},
    teardown,
};

/// How long the daemon may finish running calls before the processes end under them. What it has
/// not finished then is cut: the SIGTERM for all reaches it too, and a second one makes it leave.
const DRAIN: Duration = Duration::from_secs(2);
/// How long processes have between SIGTERM and SIGKILL. The daemon has ended its own by then, but for
/// those of `--keep-processes`.
const GRACE: Duration = Duration::from_secs(5);
/// The same in a container, whose engine restarts it and waits for the port.
const CONTAINER_GRACE: Duration = Duration::from_millis(500);
/// How long killed processes may take to go; one in an uninterruptible wait never does.
const LAST: Duration = Duration::from_secs(2);

/// What becomes of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The power goes off.
    PowerOff,
    /// It starts again.
    Reboot,
    /// It stops, with the power on.
    Halt,
}

impl Ending {
    /// Every signal that asks for an ending.
    pub(super) const SIGNALS: [Signal; 5] =
        [Signal::SIGTERM, Signal::SIGPWR, Signal::SIGUSR2, Signal::SIGINT, Signal::SIGUSR1];

    /// What a signal to PID 1 asks for. SIGINT is also what the kernel sends for ctrl-alt-del.
    /// SIGUSR1 is busybox's word for halt; in a container it never ends the daemon, as elsewhere.
    pub(super) fn asked_by(signal: Signal, machine: bool) -> Option<Self> {
        match signal {
            Signal::SIGTERM | Signal::SIGPWR | Signal::SIGUSR2 => Some(Self::PowerOff),
            Signal::SIGINT => Some(Self::Reboot),
            Signal::SIGUSR1 if machine => Some(Self::Halt),
            _ => None,
        }
    }

    /// The signal by which `envd poweroff` and its like ask for it. All endings of a container are
    /// the same.
    pub(super) fn signal(self, machine: bool) -> Signal {
        match self {
            Self::Halt if !machine => Self::PowerOff.signal(machine),
            Self::PowerOff => Signal::SIGUSR2,
            Self::Reboot => Signal::SIGINT,
            Self::Halt => Signal::SIGUSR1,
        }
    }

    fn mode(self) -> RebootMode {
        match self {
            Self::PowerOff => RebootMode::RB_POWER_OFF,
            Self::Reboot => RebootMode::RB_AUTOBOOT,
            Self::Halt => RebootMode::RB_HALT_SYSTEM,
        }
    }
}

/// Ends all processes. Signals to PID 1 are blocked, and ones that come now change nothing.
pub(super) fn end_processes(agent: Option<Pid>, machine: bool) {
    let grace = if machine { GRACE } else { CONTAINER_GRACE };
    if let Some(agent) = agent {
        // It may have just died.
        let _ = kill(agent, Signal::SIGTERM);
        wait_until(DRAIN, |dead| dead == agent);
    }
    let everybody = Pid::from_raw(-1);
    // ESRCH: there is nobody but PID 1.
    let _ = kill(everybody, Signal::SIGTERM);
    // A stopped process would not see it.
    let _ = kill(everybody, Signal::SIGCONT);
    if wait_until(grace, |_| false) {
        return;
    }
    say!("processes still run {grace:?} after SIGTERM and are killed");
    let _ = kill(everybody, Signal::SIGKILL);
    if !wait_until(LAST, |_| false) {
        say!("processes still run {LAST:?} after SIGKILL");
    }
}

/// Writes everything to the disks and switches the machine off. Does not return.
pub(super) fn end_machine(ending: Ending) -> ! {
    sync();
    teardown::carry_out();
    sync();
    let Err(error) = reboot(ending.mode());
    // To leave would be a kernel panic.
    say!("{ending:?}: {error}; the machine can be switched off by force");
    loop {
        pause();
    }
}

/// Reaps until no child is left (true), until `enough` says so of one (true), or until the time is
/// over (false).
fn wait_until(limit: Duration, enough: impl Fn(Pid) -> bool) -> bool {
    let wanted = wanted();
    let deadline = Instant::now() + limit;
    loop {
        let mut done = false;
        let some_left = reap(|dead, _| done |= enough(dead));
        if done || !some_left {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        next(&wanted, Some(left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ending_is_asked_for_by_its_own_signal() {
        for ending in [Ending::PowerOff, Ending::Reboot, Ending::Halt] {
            assert_eq!(Ending::asked_by(ending.signal(true), true), Some(ending));
            assert!(Ending::asked_by(ending.signal(false), false).is_some());
            assert!(Ending::SIGNALS.contains(&ending.signal(true)));
        }
        let asks = |signal| Ending::asked_by(signal, true).is_some();
        assert!(Ending::SIGNALS.into_iter().all(asks));
        for machine in [true, false] {
            assert_eq!(Ending::asked_by(Signal::SIGCHLD, machine), None);
            assert_eq!(Ending::asked_by(Signal::SIGHUP, machine), None);
        }
        assert_eq!(Ending::asked_by(Signal::SIGUSR1, false), None);
    }
}
