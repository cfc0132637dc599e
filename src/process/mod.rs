//! The domain of processes: starting them, their output, their input and their ending.
//!
//! The contract of this module:
//!
//! * [`Manager::start`] starts a process as a user, in a session of its own, with pipes or a
//!   terminal, and hands out a [`Subscription`] that misses no byte.
//! * A process belongs to the daemon, not to the client that started it: dropping a subscription,
//!   or the future of the start itself, leaves it running.
//! * One task per channel reads the output into the process's [`journal`], and every subscriber
//!   reads from there at its own pace. A live subscriber loses nothing; one that takes nothing for
//!   [`STALL_LIMIT`](options::STALL_LIMIT) is let go; an absent one costs the process nothing.
//! * [`Event::End`] comes when the process has exited and all that it wrote before has been put
//!   in the journal. Descendants that keep a pipe open delay it for as long as they write or use
//!   processor time, and by [`DRAIN_GRACE`](options::DRAIN_GRACE) of silence, but never by more than
//!   [`DRAIN_LIMIT`](options::DRAIN_LIMIT).
//! * Whoever sees the end does not find the process among the live ones any more; for
//!   [`RETENTION`](options::RETENTION) its output and its ending can still be asked for.
//! * A process and all that descends from it is a [`tree`]: it can be signalled, limited and measured
//!   as a whole, in a control group of its own where the system has them ([`cgroup`]).
//! * A process is known by its pidfd; its pid is not reused before it has left the registry.
//! * Nothing here wakes up while nothing happens, and no lock is held over an await.
//!
//! It knows no protobuf and no HTTP. Texts of errors are those that upstream's clients know.

mod activity;
pub mod cgroup;
mod child;
mod descent;
pub mod ending;
mod exit_watch;
pub mod input;
pub mod journal;
pub mod limits;
pub mod live;
pub mod options;
pub mod output;
pub mod ports;
mod reach;
pub mod record;
pub mod registry;
mod settle;
mod shutdown;
pub mod spec;
pub mod start;
mod stop_notes;
pub mod supervise;
#[cfg(test)]
mod tests;
pub mod tether;
mod tree;

pub use cgroup::{Groups, Unavailable};
pub use ending::{Ending, Outcome, Usage};
pub use input::InputError;
pub use journal::{Attach, Beyond, Channel, Event, Subscription};
pub use limits::{Limits, TimeLimit};
pub use live::{Process, ResizeError, SignalError};
pub use options::{KillScope, Options};
pub use record::{Found, Record};
pub use registry::{Manager, Selector};
pub use spec::{StartSpec, Stdio};
pub use start::StartError;
pub use stop_notes::StopNotes;
pub use tether::Tether;
