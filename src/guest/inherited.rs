//! What a parent hands down that a daemon must not keep.

use nix::sys::{prctl, signal::SigSet};

use crate::sys::inherited_fds;

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
pub fn reset() {
    // Neither can fail with these arguments.
    let _ = SigSet::empty().thread_set_mask();
    let _ = prctl::set_name(c"envd");
    // There is no log yet; each child tries again by itself.
    let _ = inherited_fds::set_close_on_exec();
}
