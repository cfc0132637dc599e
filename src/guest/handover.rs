//! What the daemon before this one has left for it in a live upgrade (`-resume-handover`).
//!
//! The outgoing daemon executes this one in its place, with its children and their descriptors, and describes
//! them in a file, the blob. Adopting them is not implemented. So a blob that has anything but defaults is
//! refused, and every answer to `/init` says so in [`HEADER`]: a host must not take a sandbox whose
//! processes are lost for one that was upgraded.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use prost::Message;
use serde::Serialize;

/// The header of answers to `/init`.
pub const HEADER: &str = "x-envd-handover";
/// The blob, below the guest's root.
const BLOB: &str = "run/e2b/envd-handover.pb";
/// The largest blob: the requests of all processes are in it.
const MAX_BLOB: u64 = 64 << 20;
/// The newest schema that is understood.
const MAX_SCHEMA: u32 = 3;

/// How the hand-over went, with upstream's names. The totals include what failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    failed: bool,
    procs: usize,
    procs_failed: usize,
    retained: usize,
    retained_failed: usize,
    watchers: usize,
    watchers_failed: usize,
}

impl Report {
    /// The value of [`HEADER`].
    pub fn to_json(self) -> String {
        // Numbers and names of our own.
        serde_json::to_string(&self).unwrap_or_default()
    }
}

/// What this daemon goes on with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handover {
    /// For the host.
    pub report: Report,
    /// The default user that was delivered to the outgoing daemon.
    pub user: Option<String>,
    /// Its default working directory.
    pub workdir: Option<String>,
}

/// `upgrade.HandoverState` of upstream, as far as it is looked at.
#[derive(Clone, PartialEq, Message)]
struct State {
    #[prost(uint32, tag = "1")]
    schema: u32,
    #[prost(message, repeated, tag = "3")]
    processes: Vec<Item>,
    #[prost(message, repeated, tag = "4")]
    terminated: Vec<Item>,
    #[prost(message, repeated, tag = "5")]
    watchers: Vec<Item>,
    #[prost(message, repeated, tag = "6")]
    mounts: Vec<Item>,
    #[prost(message, repeated, tag = "7")]
    forwards: Vec<Item>,
    #[prost(string, repeated, tag = "8")]
    guest_frozen_cgroups: Vec<String>,
    #[prost(message, optional, tag = "9")]
    defaults: Option<Defaults>,
}

/// Anything that would have to be adopted.
#[derive(Clone, Copy, PartialEq, Message)]
struct Item {}

#[derive(Clone, PartialEq, Message)]
struct Defaults {
    #[prost(string, tag = "1")]
    user: String,
    #[prost(string, tag = "2")]
    workdir: String,
    #[prost(bool, tag = "3")]
    has_workdir: bool,
}

/// Why a blob is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Unreadable(#[from] io::Error),
    #[error("it is larger than {MAX_BLOB} bytes")]
    TooLarge,
    #[error("{0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("handover schema {0} exceeds max supported {MAX_SCHEMA}")]
    Schema(u32),
    #[error("processes, watchers, mounts, forwarded ports and frozen groups cannot be adopted")]
    NotAdopted(Box<State>),
}

/// Reads the blob below the guest's root and removes it. Without one nothing was handed over, which is no
/// error. Blocks.
pub fn take(root: &Path) -> Handover {
    let path = root.join(BLOB);
    let refused = match read(&path) {
        Ok(None) => return Handover::default(),
        Ok(Some(handover)) => {
            remove(&path);
            return handover;
        }
        Err(refused) => refused,
    };
    tracing::error!(path = %path.display(), error = %refused, "the hand-over has failed");
    remove(&path);
    let mut report = Report { failed: true, ..Report::default() };
    if let Refused::NotAdopted(state) = refused {
        let (procs, retained) = (state.processes.len(), state.terminated.len());
        let watchers = state.watchers.len();
        report = Report {
            procs,
            procs_failed: procs,
            retained,
            retained_failed: retained,
            watchers,
            watchers_failed: watchers,
            ..report
        };
    }
    Handover { report, ..Handover::default() }
}

fn read(path: &Path) -> Result<Option<Handover>, Refused> {
    // Whatever lies there must not hold up the start.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut blob = Vec::new();
    file.take(MAX_BLOB + 1).read_to_end(&mut blob)?;
    if blob.len() as u64 > MAX_BLOB {
        return Err(Refused::TooLarge);
    }
    let state = State::decode(&*blob)?;
    if state.schema > MAX_SCHEMA {
        return Err(Refused::Schema(state.schema));
    }
    let items =
        [&state.processes, &state.terminated, &state.watchers, &state.mounts, &state.forwards];
    if items.iter().any(|items| !items.is_empty()) || !state.guest_frozen_cgroups.is_empty() {
        return Err(Refused::NotAdopted(Box::new(state)));
    }
    let defaults = state.defaults.unwrap_or_default();
    Ok(Some(Handover {
        report: Report::default(),
        user: Some(defaults.user).filter(|user| !user.is_empty()),
        workdir: defaults.has_workdir.then_some(defaults.workdir),
    }))
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "could not remove the hand-over blob");
    }
}
