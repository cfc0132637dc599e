//! The daemon's own resource limits, and its protection.

use std::fs;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the daemon's soft limit of open files to the hard one: each connection, process and
/// watch takes descriptors, and the common soft limit of 1024 is `select(2)`'s, which envd does
/// not use. Returns the limits as they were, for the processes that envd starts.
pub fn raise_open_files() -> Option<(u64, u64)> {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => Some((soft, hard)),
            Err(error) => {
                tracing::warn!(%error, soft, hard, "the limit of open files cannot be raised");
                None
            }
        },
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files cannot be read");
            None
        }
    }
}

/// Where the kernel keeps how willingly it kills the daemon for want of memory.
const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Keeps the kernel from killing the daemon for want of memory, where the service manager has not
/// decided otherwise: the daemon is what tells that something else was killed. Its processes get a
/// score of their own.
pub fn protect_from_oom_killer() {
    let decided = fs::read_to_string(OOM_SCORE_ADJ).is_ok_and(|score| score.trim() != "0");
    if decided || !nix::unistd::geteuid().is_root() {
        return;
    }
    // Without the right to (in a container, say) the daemon runs all the same.
    if let Err(error) = fs::write(OOM_SCORE_ADJ, "-1000") {
        tracing::info!(%error, "not protected from the kernel's OOM killer");
    }
}
