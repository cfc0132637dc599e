//! What a request says about limits, as the domain has it.

use tonic::Status;

use super::outcome::span;
use crate::{
    process::{
        Limits, TimeLimit,
        limits::{DEFAULT_KILL_GRACE, LimitError, MAX_KILL_GRACE},
    },
    proto::process as pb,
};

/// The limits of a tree.
///
/// # Errors
/// `invalid_argument`, naming the field.
pub(super) fn limits(message: Option<pb::Limits>) -> Result<Limits, Status> {
    let Some(message) = message else { return Ok(Limits::default()) };
    let pb::Limits { memory_bytes, pids, cpu_millis, rlimits } = message;
    let invalid = |error: LimitError| Status::invalid_argument(error.to_string());
    let mut limits = Limits::new(memory_bytes, pids, cpu_millis).map_err(invalid)?;
    for pb::Rlimit { name, soft, hard } in rlimits {
        limits.add_rlimit(&name, soft, hard).map_err(invalid)?;
    }
    Ok(limits)
}

/// The time that a tree has.
///
/// # Errors
/// `invalid_argument`, naming the field.
pub(super) fn time_limit(
    timeout: Option<pbjson_types::Duration>,
    kill_grace: Option<pbjson_types::Duration>,
) -> Result<Option<TimeLimit>, Status> {
    let timeout = span("timeout", timeout)?;
    let grace = span("kill_grace", kill_grace)?.unwrap_or(DEFAULT_KILL_GRACE);
    if timeout.is_some_and(|timeout| timeout.is_zero()) {
        let why = "the field `timeout` is 0: leave it out where there is no limit";
        return Err(Status::invalid_argument(why));
    }
    if grace > MAX_KILL_GRACE {
        return Err(Status::invalid_argument(format!(
            "the field `kill_grace` is above {} s",
            MAX_KILL_GRACE.as_secs()
        )));
    }
    Ok(timeout.map(|timeout| TimeLimit { timeout, grace }))
}
