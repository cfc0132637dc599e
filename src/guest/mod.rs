//! The machine around the processes: its users, the daemon's own limits in it, its boot and PID 1,
//! what the host tells it to be, and whom to tell that the daemon is ready.

pub mod boot;
pub mod ca;
pub mod clock;
pub mod handover;
pub mod hosts;
pub mod inherited;
pub mod init;
pub mod limits;
pub mod markers;
pub mod metrics;
pub mod mmds;
pub mod nfs;
pub mod notify;
pub mod ready;
pub mod replace;
pub mod users;
