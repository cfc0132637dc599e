//! The methods of the filesystem service that are our own: content and whole trees over RPC, for
//! callers that have no use for REST, on vsock above all.

pub(super) mod archive;
pub(super) mod change;
pub(super) mod read;
pub(super) mod write;

use std::time::Duration;

use tonic::{Status, Streaming};

use crate::wire::STALL_TIMEOUT;

/// How long a client that sends a stream may send no message. Its slot, if it has one, goes to another before
/// that when there is none left.
const MESSAGE_STALL: Duration = STALL_TIMEOUT;

/// The next message of a client that may not take for ever.
async fn next_message<T>(requests: &mut Streaming<T>) -> Result<Option<T>, Status> {
    match tokio::time::timeout(MESSAGE_STALL, requests.message()).await {
        Ok(message) => message,
        Err(_) => {
            let seconds = MESSAGE_STALL.as_secs();
            Err(Status::deadline_exceeded(format!("no message came for {seconds} s")))
        }
    }
}

fn no_start() -> Status {
    Status::invalid_argument("start: the first message must have it")
}

fn second_start() -> Status {
    Status::invalid_argument("start: only the first message may have it")
}
