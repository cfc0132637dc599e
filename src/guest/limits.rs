//! The daemon's own resource limits.

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
