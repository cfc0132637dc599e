//! The journal without its surroundings: a bounded log and the readers that share it.
//!
//! It knows no runtime, no disk and no clock but the one that it is handed, so that all
//! interleavings of it can be checked (`tests/model` compiles these files against a lock whose
//! every turn is tried).

// What is public here is so for the journal, and for the model.
#![allow(unreachable_pub)]

mod fanout;
mod log;
mod state;

pub use fanout::{Append, Attach, Beyond, Bounds, Fanout, Pressure, Stall, Taken};
pub use log::{Channel, Piece};

/// What a chunk costs beyond its bytes.
pub const CHUNK_COST: usize = 64;

/// Short writes of one channel are joined up to this size.
pub const JOIN_LIMIT: usize = 4096;

/// The most that one event carries. A reader that is behind gets adjacent chunks of one channel in
/// one event.
pub const MAX_EVENT: usize = 64 * 1024;

/// The most readers of one journal; a further one is born detached.
pub const MAX_READERS: usize = 1024;

/// What a journal keeps of output that nobody waits for while all journals together are beyond
/// their bound.
pub const LEAN_WINDOW: usize = 64 * 1024;

/// How much of the log is put on disk at a time.
pub const SPILL_BATCH: usize = 256 * 1024;

const _: () = assert!(JOIN_LIMIT <= MAX_EVENT && MAX_EVENT <= LEAN_WINDOW);
