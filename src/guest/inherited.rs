//! What a parent hands down that a daemon must not keep.

use nix::sys::{prctl, signal::SigSet};

/// Unblocks all signals, which PID 1 blocks and some supervisors too, and takes the daemon's own
/// name in lists of processes, whatever its file is called. For the start, before any thread.
pub fn reset() {
    // Neither can fail with these arguments.
    let _ = SigSet::empty().thread_set_mask();
    let _ = prctl::set_name(c"envd");
}
