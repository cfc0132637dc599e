//! Every `unsafe` block and raw system call of the program, each behind a safe function.
//!
//! The contract of this module:
//!
//! * Nothing outside it is `unsafe`; the crate denies it, and only this module lifts the ban.
//! * Every block says in a SAFETY comment which rule makes it sound.
//! * A function here does one system job and knows no domain: no process table, no RPC.
//! * What `nix` offers safely is used from there instead.

#![allow(unsafe_code)]

mod child;
mod clone;
pub mod errno;
pub mod fs_credentials;
pub mod heap;
pub mod inherited_fds;
pub mod low_fds;
pub mod mounts;
pub mod net;
pub mod path_fd;
pub mod pidfd;
pub mod procfs;
pub mod pty;
pub mod random;
pub mod ready;
pub mod reflink;
pub mod rename;
pub mod signals;
pub mod spawn;
mod stack;

pub use child::DEFAULT_PATH;
