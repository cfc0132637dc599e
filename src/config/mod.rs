//! The command line, as one validated struct.
//!
//! Flags are read as Go reads them, one dash or two, `-port 1` and `-port=1`, so that a unit file
//! made for upstream's envd starts this one unchanged. A first word must be a subcommand: what
//! somebody took for one must not start a daemon that serves everybody.

pub(crate) mod args;
mod first_run;
mod parse;
mod subcommand;
#[cfg(test)]
mod tests;
mod usage;

use std::{ffi::OsStr, io, net::SocketAddr, path::PathBuf, time::Duration};

pub use self::{first_run::Origin, subcommand::Subcommand, usage::USAGE};

use crate::{
    fs::{actor::FileAccess, watch::Retention},
    process, quote,
    sys::errno,
    telemetry::Collector,
    wire::{listen::Address, peer::Trust},
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
    /// The time that unary calls and transfers have after SIGTERM; `None` for none.
    pub shutdown_grace: Option<Duration>,
    /// Whether SIGTERM leaves the processes running.
    pub keep_processes: bool,
    /// What dies of a SIGKILL that names no scope; without it the template decides.
    pub kill_scope: Option<process::KillScope>,
    /// The bounds of processes and their output.
    pub processes: process::Options,
    /// When operations on files have the rights of their user only.
    pub file_access: FileAccess,
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
    /// Whether nothing is written to `/run/e2b`.
    pub no_markers: bool,
    /// Whether anything was given that says where the daemon is to be reached from, or what kind of
    /// place it is in: `--listen`, `-port`, `--ready` or `-isnotfc`.
    pub says_where: bool,
    /// Words behind flags, which mean nothing; as they are logged.
    pub ignored: Vec<String>,
}

/// What is wrong with the command line. Each is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A flag that does not exist.
    #[error("--{0}: there is no such flag")]
    Unknown(String),
    /// A flag without its value, or with one that is not valid.
    #[error("--{flag}: {why}")]
    Value {
        /// The flag, without dashes.
        flag: String,
        /// What is wrong with it.
        why: String,
    },
    /// A first word that is no subcommand.
    #[error("'{word}' is not a subcommand; {hint}")]
    Word {
        /// The word.
        word: String,
        /// What to write instead.
        hint: String,
    },
    /// An argument of a subcommand that takes none.
    #[error("{subcommand}: '{arg}' is not an argument that it takes")]
    Unexpected {
        /// The subcommand.
        subcommand: String,
        /// The argument.
        arg: String,
    },
}

impl ConfigError {
    fn of(flag: &str, why: &str) -> Self {
        Self::Value { flag: flag.to_owned(), why: why.to_owned() }
    }

    fn word(word: &OsStr) -> Self {
        let word = word.to_string_lossy();
        let hint = match subcommand::suggestion(&word) {
            Some(meant) => format!("did you mean '{meant}'?"),
            None => "the daemon is run without one".to_owned(),
        };
        Self::Word { word: quote::line(word.as_ref()), hint }
    }
}

impl Config {
    /// Checks the files that must be there when the daemon starts.
    ///
    /// # Errors
    /// [`ConfigError::Value`]: the file of `--template` does not exist. One that exists and is
    /// broken is no error here: the daemon serves, so that the image can be looked into.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        let Some(path) = &self.template else { return Ok(()) };
        match std::fs::metadata(path) {
            Err(error) if is_missing(&error) => Err(ConfigError::Value {
                flag: "template".to_owned(),
                why: format!("'{}': {}", quote::line(path), errno::text_of(&error)),
            }),
            _ => Ok(()),
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
