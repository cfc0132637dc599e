//! The domain of files: paths, entries, directories, transfers, watches. It knows no protobuf and
//! no HTTP; the texts of its errors are those that clients of E2B's daemon have seen.
//!
//! Everything but watching and searching is synchronous and may block: async callers go through
//! [`Pool`](crate::blocking::Pool). Paths come in as the client wrote them, are resolved once
//! ([`path::resolve`]) and are used verbatim from there on: cleaning `a/../b` would change what a
//! path through a symbolic link means.
//!
//! * [`resolve`]: from an absolute path to descriptors, with the rights of the daemon or of the user
//!   ([`actor`]): no operation looks a client's path up in any other way.
//! * [`path`]: from a client's path to an absolute one, and the directories above it.
//! * [`entry`]: what is told about one file; [`metadata`]: the attributes clients attach to it.
//! * [`dir`]: make, move, list ([`list`]), remove.
//! * [`read`]: reading files; [`transfer`]: writing whole ones.
//! * [`watch`]: what changes below a directory.
//! * [`search`]: what is in it, by name and by content.

pub mod actor;
pub mod archive;
pub mod attributes;
mod beneath;
pub mod compose;
pub mod copy;
pub mod dir;
pub mod entry;
pub mod errno;
mod error;
pub mod leftovers;
pub mod list;
pub mod metadata;
pub mod move_across;
pub mod path;
mod privileges;
pub mod read;
mod remove;
pub mod resolve;
pub mod search;
pub mod staged;
pub mod transfer;
mod tree;
mod unnamed;
pub mod uploads;
pub mod watch;

pub use tree::{MAX_LEVELS, MAX_NAMES};

pub use error::{FsError, Kind, PathError, RenameError};

/// Opening a FIFO must not wait for its other end, and a terminal must not become ours.
const CAREFULLY: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;
