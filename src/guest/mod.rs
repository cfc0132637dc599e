//! The machine around the processes: its users, and the daemon's own limits in it.

pub mod limits;
pub mod users;
