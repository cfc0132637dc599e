//! Endings and usage, as messages.

use std::time::{Duration, SystemTime};

use crate::{
    process::{Ending, Outcome, Usage, ending},
    proto::{
        Timestamp,
        process::{self as pb, outcome as kinds},
    },
    sys::{errno, pidfd::Exit},
};

/// The message for an ending, after `end_offset` bytes of output.
pub(super) fn end_event(ending: Ending, end_offset: u64) -> pb::process_event::EndEvent {
    pb::process_event::EndEvent {
        outcome: Some(outcome(&ending)),
        usage: Some(usage(&ending.usage)),
        end_offset,
        exited_at: Some(timestamp(ending.exited_at)),
        output_open: ending.output_open,
        output_truncated: ending.output_truncated,
        exit_code: ending.exit_code,
        exited: ending.exited,
        status: ending.status,
        error: ending.error,
    }
}

/// The message for the truth about an ending.
pub(super) fn outcome(ending: &Ending) -> pb::Outcome {
    use kinds::Kind;
    let kind = match &ending.outcome {
        Outcome::Exited { code } => Kind::Exited(kinds::Exited { code: *code }),
        Outcome::Signalled { signal, core_dumped } => Kind::Signalled(kinds::Signalled {
            signal: *signal,
            core_dumped: *core_dumped,
            name: ending::signal_constant(*signal),
        }),
        Outcome::OomKilled { kills, memory_limit } => {
            Kind::OomKilled(kinds::OomKilled { kills: *kills, memory_limit_bytes: *memory_limit })
        }
        Outcome::TimedOut { timeout, exit } => {
            let (signal, code) = match exit {
                Exit::Exited(code) => (0, Some(*code)),
                Exit::Signalled { signal, .. } => (*signal, None),
            };
            Kind::TimedOut(kinds::TimedOut { timeout: Some(duration(*timeout)), signal, code })
        }
        Outcome::SpawnFailed { errno } => Kind::SpawnFailed(kinds::SpawnFailed {
            kind: spawn_failure(*errno).to_owned(),
            errno: *errno,
            stage: "exec".to_owned(),
            message: errno::text(*errno),
        }),
        Outcome::Lost { reason } => Kind::Lost(kinds::Lost { reason: reason.clone() }),
    };
    pb::Outcome {
        kind: Some(kind),
        limits_hit: ending.limits_hit.iter().map(ToString::to_string).collect(),
    }
}

/// What an error of execve(2) says about the command.
fn spawn_failure(errno: i32) -> &'static str {
    match errno {
        libc::ENOENT | libc::ENOTDIR => "not_found",
        libc::EACCES | libc::EPERM => "permission_denied",
        libc::ENOEXEC | libc::EISDIR | libc::ELIBBAD => "not_executable",
        _ => "other",
    }
}

/// The message for what a process used.
pub(super) fn usage(usage: &Usage) -> pb::Usage {
    pb::Usage {
        cpu_user: Some(duration(usage.cpu_user)),
        cpu_system: Some(duration(usage.cpu_system)),
        memory_peak_bytes: usage.memory_peak,
        memory_bytes: usage.memory,
        io_read_bytes: usage.io_read,
        io_write_bytes: usage.io_write,
        pids: usage.pids,
        whole_tree: usage.whole_tree,
    }
}

/// A time span as a message; beyond 292 years it is cut.
pub(super) fn duration(span: Duration) -> pbjson_types::Duration {
    pbjson_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or_default(),
    }
}

/// A point in time as a message; one before 1970, which only a wrong clock gives, as 1970.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let pbjson_types::Duration { seconds, nanos } = duration(since);
    Timestamp { seconds, nanos }
}

/// A time span from a message. The name of the field stands in the error.
///
/// # Errors
/// It is negative or malformed.
pub(super) fn span(
    field: &str,
    duration: Option<pbjson_types::Duration>,
) -> Result<Option<Duration>, tonic::Status> {
    let Some(duration) = duration else { return Ok(None) };
    match (u64::try_from(duration.seconds), u32::try_from(duration.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(Some(Duration::new(seconds, nanos)))
        }
        _ => Err(tonic::Status::invalid_argument(format!(
            "the field `{field}` is no time span: {} s and {} ns",
            duration.seconds, duration.nanos
        ))),
    }
}
