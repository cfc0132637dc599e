//! The command line, as one validated struct.
//!
//! Flags are read as Go reads them, one dash or two, `-port 1` and `-port=1`, so that a unit file
//! made for upstream's envd starts this one unchanged.

mod parse;
#[cfg(test)]
mod tests;
mod usage;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

pub use usage::USAGE;

use crate::{
    fs::watch::Retention,
    process,
    telemetry::{Collector, TelemetryError},
    wire::{
        listen::{Address, ListenError},
        peer::Trust,
    },
};

/// The port that E2B's clients and proxies expect.
pub const DEFAULT_PORT: u16 = 49983;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Run(Box<Config>),
    /// Print a text on stdout and exit 0.
    Print(String),
    /// Print the usage on stderr and exit 0.
    Help,
}

/// A validated configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; at least one.
    pub listen: Vec<Address>,
    /// Whom to tell that the daemon is ready.
    pub ready: Option<Address>,
    /// The user for calls that name none; `None` for the daemon's own.
    pub default_user: Option<String>,
    /// Where relative paths start.
    pub default_workdir: Option<String>,
    /// Where the access token is from the start.
    pub access_token_file: Option<PathBuf>,
    /// Whether a sandbox without a token is closed.
    pub require_token: bool,
    /// Whether nobody is served before `/init`.
    pub resume_handover: bool,
    /// Who needs no token.
    pub trust: Trust,
    /// Where the template's file is, if not where it usually is.
    pub template: Option<PathBuf>,
    /// Where the host's metadata is; `None` for nowhere.
    pub mmds: Option<SocketAddr>,
    /// Whether `/init` leaves the clock alone.
    pub no_clock: bool,
    /// Where `/etc` and `/run` are.
    pub guest_root: PathBuf,
    /// Connections at the same time.
    pub max_connections: usize,
    /// Bytes of all request messages that wait in memory.
    pub max_buffered_bytes: usize,
    /// Bytes of a request message.
    pub max_message_bytes: usize,
    /// The time that a client may take for the head of a request.
    pub header_timeout: Duration,
    /// The time that a client may make no progress.
    pub stall_timeout: Duration,
    /// The time that a connection without a call stays open.
    pub idle_timeout: Duration,
    /// The time that running calls have after SIGTERM.
    pub shutdown_grace: Duration,
    /// The bounds of processes and their output.
    pub processes: process::Options,
    /// How long watchers are kept that nobody listens to.
    pub watches: Retention,
    /// Not in a Firecracker VM.
    pub is_not_fc: bool,
    /// Do not use cgroups.
    pub no_cgroups: bool,
    /// Where cgroup2 is mounted.
    pub cgroup_root: PathBuf,
    /// Log more.
    pub verbose: bool,
    /// The OpenTelemetry collector, if it is not in the environment.
    pub otlp: Option<Collector>,
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A flag that does not exist or lacks its value.
    #[error("{0}")]
    Flag(#[from] lexopt::Error),
    /// An address that is none.
    #[error("--{flag}: {source}")]
    Address {
        /// The flag.
        flag: &'static str,
        /// What is wrong with the address.
        source: ListenError,
    },
    /// A collector that is none.
    #[error("--otlp: {0}")]
    Otlp(TelemetryError),
    /// A value out of range.
    #[error("--{flag}: {value} is not between {min} and {max}")]
    Range {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: u64,
        /// The least that is allowed.
        min: u64,
        /// The most that is allowed.
        max: u64,
    },
    /// A value that makes no sense.
    #[error("--{flag}: {why}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}
