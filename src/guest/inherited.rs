//! What a parent hands down that a daemon must not keep.

use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
    stat::{Mode, umask},
};

use crate::sys::{inherited_fds, signals, spawn};

/// The signals that end a process by default and never the daemon.
const NOT_AN_END: [Signal; 3] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// The umask of the daemon itself: what it makes for clients does not depend on how it was started.
const UMASK: Mode = Mode::S_IWGRP.union(Mode::S_IWOTH);

/// Keeps the daemon's memory, and the access token in it, out of core dumps and away from every
/// process without root's rights. Nothing may undo it later (`sys/child.rs` says why). Without root
/// it would change nothing for the better: who runs the daemon can do to it what they like.
pub fn keep_secrets() {
    if nix::unistd::geteuid().is_root()
        && let Err(error) = prctl::set_dumpable(false)
    {
        tracing::warn!(%error, "the daemon may leave core dumps");
    }
}

/// Unblocks all signals, which PID 1 blocks and some supervisors too, keeps the descriptors that the
/// daemon was started with from its commands, and takes the daemon's own
/// name in lists of processes, whatever its file is called. For the start, before any thread.
///
/// From here on a terminal that hangs up and a signal that asks other daemons to open their logs
/// again do not end this one. Commands get the default action ([`crate::sys::spawn`]), and the umask with
/// which the daemon was started; its own is 022.
pub fn reset() {
    // None of these can fail with these arguments.
    for signal in NOT_AN_END {
        let _ = signals::ignore(signal);
    }
    let _ = SigSet::empty().thread_set_mask();
    let _ = prctl::set_name(c"envd");
    spawn::set_umask_of_children(umask(UMASK).bits());
    // There is no log yet; each child tries again by itself.
    let _ = inherited_fds::set_close_on_exec();
}
