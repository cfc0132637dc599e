//! The machine around the processes: its users, the daemon's own limits in it, its boot and PID 1,
//! and whom to tell that the daemon is ready.

pub mod boot;
pub mod inherited;
pub mod init;
pub mod limits;
pub mod notify;
pub mod ready;
pub mod users;
