//! The bounds of the domain, each with its default.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::journal::Stall;

/// The most processes at a time. One that has ended counts for as long as a background child of it
/// holds its output open, since that is still read.
pub const MAX_PROCESSES: usize = 4096;

/// How much output one process's journal holds in memory, and how far a subscriber may fall behind,
/// in bytes.
pub const OUTPUT_WINDOW: usize = 1024 * 1024;
/// The least and the most that a client may ask for instead.
pub const MIN_OUTPUT_WINDOW: usize = 64 * 1024;
/// See [`MIN_OUTPUT_WINDOW`].
pub const MAX_OUTPUT_WINDOW: usize = 64 * 1024 * 1024;

/// The most that a client may ask for on disk behind that, in bytes.
pub const MAX_SPILL: u64 = 16 * 1024 * 1024 * 1024;

/// Output of all processes in memory, in bytes; beyond it, what nobody waits for is dropped down to
/// [`LEAN_WINDOW`](super::journal::LEAN_WINDOW) a process, and that of ended processes wholly.
pub const OUTPUT_TOTAL: usize = 256 * 1024 * 1024;

/// How long a subscriber may hold up the process without taking anything, while another one waits for it or
/// memory is short.
pub const STALL_LIMIT: Duration = Duration::from_secs(30);
/// The same where nobody else is hit: a client that is stopped for a while loses nothing.
pub const LONE_STALL_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// How long the end of a process waits for descendants that hold its output open, while they are silent
/// and use no processor time.
pub const DRAIN_GRACE: Duration = Duration::from_millis(500);
/// How long it waits for them in all.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long an ended process can be asked for, its output and its outcome.
pub const RETENTION: Duration = Duration::from_secs(600);
/// Upstream's, and the least here.
pub const MIN_RETENTION: Duration = Duration::from_secs(30);

/// What the large requests of all processes that are known may take together, in bytes: their arguments and
/// variables, which `List` shows. Beyond it such a start is refused.
pub const MAX_REQUESTS: usize = 64 * 1024 * 1024;
/// Requests up to this size are not counted.
pub const SMALL_REQUEST: usize = 32 * 1024;

/// The most ended processes kept; beyond it the oldest goes.
pub const MAX_RETAINED: usize = 256;

/// What the requests of ended processes may take together, in bytes; beyond it the oldest ended
/// process goes.
pub const MAX_RETAINED_REQUESTS: usize = 8 * 1024 * 1024;

/// Where output on disk goes.
pub const SPILL_DIR: &str = "/run/envd/journal";

const _: () = assert!(MIN_OUTPUT_WINDOW <= OUTPUT_WINDOW && OUTPUT_WINDOW <= MAX_OUTPUT_WINDOW);
const _: () = assert!(super::journal::MAX_EVENT <= MIN_OUTPUT_WINDOW);
const _: () = assert!(super::journal::LEAN_WINDOW <= MIN_OUTPUT_WINDOW);

/// What dies of a SIGKILL that names no scope, and of the deadline of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KillScope {
    /// The process alone, as with upstream.
    #[default]
    Process,
    /// The process and all that descends from it.
    Tree,
}

/// What the daemon's operator may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// See [`MAX_PROCESSES`].
    pub max_processes: usize,
    /// See [`OUTPUT_WINDOW`].
    pub output_window: usize,
    /// See [`OUTPUT_TOTAL`].
    pub output_total: usize,
    /// See [`STALL_LIMIT`] and [`LONE_STALL_LIMIT`].
    pub stall: Stall,
    /// See [`DRAIN_GRACE`].
    pub drain_grace: Duration,
    /// See [`DRAIN_LIMIT`]; at least the grace.
    pub drain_limit: Duration,
    /// See [`RETENTION`].
    pub retention: Duration,
    /// See [`MAX_RETAINED`].
    pub max_retained: usize,
    /// See [`MAX_REQUESTS`].
    pub max_requests: usize,
    /// See [`SPILL_DIR`].
    pub spill_dir: PathBuf,
    /// See [`KillScope`].
    pub kill_scope: KillScope,
    /// Where it is noted which processes are stopped for a moment, if anywhere.
    pub stop_notes: Option<PathBuf>,
    /// The limits of open files (soft, hard) that processes get, where the daemon has changed its
    /// own.
    pub nofile: Option<(u64, u64)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_processes: MAX_PROCESSES,
            output_window: OUTPUT_WINDOW,
            output_total: OUTPUT_TOTAL,
            stall: Stall { shared: STALL_LIMIT, alone: LONE_STALL_LIMIT },
            drain_grace: DRAIN_GRACE,
            drain_limit: DRAIN_LIMIT,
            retention: RETENTION,
            max_retained: MAX_RETAINED,
            max_requests: MAX_REQUESTS,
            spill_dir: SPILL_DIR.into(),
            kill_scope: KillScope::default(),
            stop_notes: None,
            nofile: None,
        }
    }
}
