//! Errors of the domain as statuses: the one place that decides codes.

use tonic::{Code, Status};

use crate::{
    blocking::Busy,
    fs::{FsError, Kind, search::SearchError},
    process::{Beyond, InputError, ResizeError, SignalError, StartError},
};

/// The status of a file error of one of upstream's methods.
pub(super) fn of_files(error: &FsError) -> Status {
    let code = match code_of(error.kind()) {
        // E2B's JavaScript SDK takes it for a sandbox that is lost.
        Code::Unavailable => Code::Internal,
        code => code,
    };
    Status::new(code, error.to_string())
}

/// The status of a file error of a method of our own.
pub(super) fn of_own_files(error: &FsError) -> Status {
    Status::new(code_of(error.kind()), error.to_string())
}

/// The status of a search that does not begin.
pub(super) fn of_search(error: &SearchError) -> Status {
    Status::new(code_of(error.kind()), error.to_string())
}

/// The status of a call whose client was too slow while others waited.
pub(super) fn of_eviction() -> Status {
    let text = "too many calls of this kind: the client of this one was the slowest while another waited; try again";
    Status::unavailable(text)
}

fn code_of(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Internal => Code::Internal,
        Kind::NoSpace | Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::OutOfRange => Code::OutOfRange,
        Kind::DataLoss => Code::DataLoss,
        Kind::Aborted => Code::Aborted,
        Kind::Unresponsive => Code::Unavailable,
    }
}

/// The status of a process that did not start.
pub(super) fn of_start(error: &StartError) -> Status {
    let code = match error {
        // As upstream has it from 0.8 on.
        _ if error.is_exhaustion() => Code::ResourceExhausted,
        StartError::ShuttingDown => Code::Unavailable,
        StartError::IdTaken(_) => Code::AlreadyExists,
        StartError::NoDirectory(_) | StartError::Nul { .. } | StartError::Spawn { .. } => {
            Code::InvalidArgument
        }
        StartError::Limit { .. } => Code::FailedPrecondition,
        StartError::TooMany { .. }
        | StartError::Requests { .. }
        | StartError::Pipe { .. }
        | StartError::Blocking(_)
        | StartError::Task(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The status of input that was not taken; `to` is `stdin` or `tty`.
pub(super) fn of_input(to: &str, error: &InputError) -> Status {
    let code = match error {
        InputError::Ahead { .. } => Code::OutOfRange,
        _ => Code::Internal,
    };
    Status::new(code, format!("error writing to {to}: {error}"))
}

/// The status of an offset beyond the end.
pub(super) fn of_offset(error: &Beyond) -> Status {
    Status::out_of_range(error.to_string())
}

/// The status of an input that could not be closed.
pub(super) fn of_close(error: &InputError) -> Status {
    Status::unknown(format!("error closing stdin: {error}"))
}

/// The status of a signal that was not sent.
pub(super) fn of_signal(error: &SignalError) -> Status {
    let code = match error {
        SignalError::Blocking(Busy::Full(_) | Busy::NoThread(_)) => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    Status::new(code, format!("error sending signal: {error}"))
}

/// The status of a terminal that was not resized.
pub(super) fn of_resize(error: &ResizeError) -> Status {
    Status::internal(format!("error resizing tty: {error}"))
}
