//! The command line, as one validated struct.
//!
//! Flags are read as Go reads them, one dash or two, `-port 1` and `-port=1`, so that a unit file
//! made for upstream's envd starts this one unchanged.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use lexopt::{Arg, Parser, ValueExt};

use crate::{
    fs::watch::Retention,
    guest::mmds,
    process::{
        self,
        options::{MAX_OUTPUT_WINDOW, MIN_OUTPUT_WINDOW, MIN_RETENTION},
    },
    telemetry::{Collector, TelemetryError},
    wire::{
        listen::{Address, ListenError, Place},
        peer::Trust,
    },
};

/// The port that E2B's clients and proxies expect.
pub const DEFAULT_PORT: u16 = 49983;

/// What `-help` prints.
pub const USAGE: &str = "\
Usage: envd [flags]
       envd init [flags]               as PID 1, with the flags for the daemon
       envd wait CONDITION...          wait for a port, URL, process, file or time
       envd poweroff | reboot | halt   ask PID 1 to end the machine

Where to listen:
  --listen ADDRESS        tcp://HOST:PORT, unix:///PATH[?mode=0660], vsock://[CID:]PORT;
                          tls://HOST:PORT?cert=PATH&key=PATH[&client_ca=PATH], if it was built in;
                          may be given several times; `?optional` behind an address makes
                          it no error that it cannot be had (default tcp://0.0.0.0:49983)
  --port N                short for --listen tcp://0.0.0.0:N
  --ready ADDRESS         connect there once calls are served, and write one line of JSON
                          with version, times since boot and addresses; vsock://PORT is
                          the host's

Whom to serve:
  --default-user NAME     the user for calls that name none: NAME or UID, and :GROUP or :GID
                          behind it if need be
                          (default root, or without root the user who runs envd)
  --default-workdir PATH  where relative paths and processes start (default the user's home)

Whom to let in:
  --access-token-file PATH
                          the access token from the start; its first line is read
  --require-token         serve nobody but health and /init while there is no access token
  --trust-uid N           a user who needs none over unix sockets; may be given several times
  --trust-cid N           a machine that needs none over vsock, 2 is the host; as above
  --trust-certificates    clients of a tls:// listener with client_ca need none

What the host may set up:
  --template PATH         the template's start and ready commands, with drop-ins beside it in
                          a directory of the same name that ends in .d
                          (default /etc/envd/template.toml, if it is there)
  --mmds HOST:PORT        Firecracker's metadata service, or none
                          (default 169.254.169.254:80, with -isnotfc none)
  --no-clock              /init does not set the clock
  --guest-root PATH       where /etc and /run are, for what /init writes (default /)

Limits:
  --max-connections N     connections at the same time, over all listeners (default 1024)
  --max-message-bytes N   the largest request message (default 67108864)
  --max-buffered-bytes N  all request messages that wait in memory, together
                          (default 268435456)
  --header-timeout N      seconds that a client may take for the head of a request (default 30)
  --stall-timeout N       seconds that a client may take nothing, or send nothing of a message
                          that it has begun (default 60)
  --idle-timeout N        seconds that a connection without a call stays open (default 640)
  --shutdown-grace N      seconds that running calls have after SIGTERM (default 5)
  --watcher-expiry N      seconds that a watcher is kept that nobody polls (default 3600)
  --cursor-retention N    seconds that a watch with cursors is kept without its stream
                          (default 300)

Processes:
  --max-processes N       at the same time (default 4096)
  --output-window N       bytes of output that a process's journal keeps in memory, and that a
                          reader may be behind (default 1048576)
  --output-total N        bytes of output of all processes in memory; beyond it what nobody reads
                          goes sooner (default 268435456)
  --output-stall-timeout N  seconds that a reader may hold up a process without taking anything
                          (default 30)
  --spill-dir PATH        where output goes that a client wants kept on disk
                          (default /run/envd/journal)
  --drain-grace N         milliseconds that the end of a process waits for background children
                          that hold its output open (default 250)
  --retention N           seconds that an ended process is kept, with its output
                          (default 600, at least 30)
  --max-retained N        ended processes that are kept (default 256)

Telemetry:
  --otlp ADDRESS          an OpenTelemetry collector (gRPC), if that was built in:
                          http://HOST:PORT, unix:///PATH or vsock://[CID:]PORT
                          (default OTEL_EXPORTER_OTLP_ENDPOINT of the environment)

Other:
  -isnotfc                not in a Firecracker VM
  -resume-handover        closed until /init: this envd goes on for another one
  -no-cgroups             do not use cgroups
  -cgroup-root PATH       where cgroup2 is mounted (default /sys/fs/cgroup)
  -verbose                log more
  -version, -commit       print it and exit
  -help                   print this and exit

Every flag may be written with one dash or two.
";

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

impl Config {
    /// Reads the arguments behind the program's name.
    ///
    /// # Errors
    /// [`ConfigError`], naming the flag.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, ConfigError> {
        let mut config = Self {
            listen: Vec::new(),
            ready: None,
            default_user: None,
            default_workdir: None,
            access_token_file: None,
            require_token: false,
            resume_handover: false,
            trust: Trust::default(),
            template: None,
            mmds: Some(mmds::ADDRESS),
            no_clock: false,
            guest_root: PathBuf::from("/"),
            max_connections: crate::wire::MAX_CONNECTIONS,
            max_message_bytes: crate::wire::MAX_MESSAGE_BYTES,
            max_buffered_bytes: crate::wire::MAX_BUFFERED_BYTES,
            header_timeout: crate::wire::HEADER_TIMEOUT,
            stall_timeout: crate::wire::STALL_TIMEOUT,
            idle_timeout: crate::wire::IDLE_TIMEOUT,
            shutdown_grace: Duration::from_secs(5),
            processes: process::Options::default(),
            watches: Retention::default(),
            is_not_fc: false,
            no_cgroups: false,
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            verbose: false,
            otlp: None,
        };
        let (mut port, mut mmds) = (None, None);
        let mut parser = Parser::from_args(args.into_iter().map(with_two_dashes));
        while let Some(arg) = parser.next()? {
            match arg {
                Arg::Long("listen") => config.listen.push(address("listen", &mut parser)?),
                Arg::Long("ready") => config.ready = Some(address("ready", &mut parser)?),
                Arg::Long("port") => port = Some(parser.value()?.parse::<u16>()?),
                Arg::Long("default-user") => {
                    config.default_user = Some(filled("default-user", parser.value()?.string()?)?);
                }
                Arg::Long("default-workdir") => {
                    let workdir = filled("default-workdir", parser.value()?.string()?)?;
                    if !workdir.starts_with('/') {
                        let why = "the path is not absolute";
                        return Err(ConfigError::Value { flag: "default-workdir", why });
                    }
                    config.default_workdir = Some(workdir);
                }
                Arg::Long("access-token-file") => {
                    config.access_token_file = Some(parser.value()?.into());
                }
                Arg::Long("require-token") => config.require_token = switch(&mut parser)?,
                Arg::Long("resume-handover") => config.resume_handover = switch(&mut parser)?,
                Arg::Long("trust-uid") => config.trust.uids.push(parser.value()?.parse()?),
                Arg::Long("trust-cid") => config.trust.cids.push(parser.value()?.parse()?),
                Arg::Long("trust-certificates") => {
                    config.trust.certificates = switch(&mut parser)?;
                }
                Arg::Long("template") => config.template = Some(parser.value()?.into()),
                Arg::Long("mmds") => {
                    let value = parser.value()?;
                    mmds = Some(if value == "none" { None } else { Some(value.parse()?) });
                }
                Arg::Long("no-clock") => config.no_clock = switch(&mut parser)?,
                Arg::Long("guest-root") => config.guest_root = parser.value()?.into(),
                Arg::Long("max-connections") => {
                    let value = parser.value()?.parse()?;
                    config.max_connections = within("max-connections", value, 1, 1 << 20)?;
                }
                Arg::Long("max-buffered-bytes") => {
                    let value = parser.value()?.parse()?;
                    config.max_buffered_bytes = within("max-buffered-bytes", value, 1024, 1 << 40)?;
                }
                Arg::Long("max-message-bytes") => {
                    let value = parser.value()?.parse()?;
                    config.max_message_bytes = within("max-message-bytes", value, 1024, 1 << 30)?;
                }
                Arg::Long("header-timeout") => {
                    config.header_timeout = seconds("header-timeout", 1, &mut parser)?;
                }
                Arg::Long("stall-timeout") => {
                    config.stall_timeout = seconds("stall-timeout", 1, &mut parser)?;
                }
                Arg::Long("idle-timeout") => {
                    config.idle_timeout = seconds("idle-timeout", 1, &mut parser)?;
                }
                Arg::Long("shutdown-grace") => {
                    config.shutdown_grace = seconds("shutdown-grace", 0, &mut parser)?;
                }
                Arg::Long("max-processes") => {
                    let value = parser.value()?.parse()?;
                    config.processes.max_processes = within("max-processes", value, 1, 1 << 20)?;
                }
                Arg::Long("output-window") => {
                    let (min, max) = (MIN_OUTPUT_WINDOW as u64, MAX_OUTPUT_WINDOW as u64);
                    let value = parser.value()?.parse()?;
                    config.processes.output_window = within("output-window", value, min, max)?;
                }
                Arg::Long("output-total") => {
                    let value = parser.value()?.parse()?;
                    config.processes.output_total = within("output-total", value, 0, 1 << 40)?;
                }
                Arg::Long("output-stall-timeout") => {
                    config.processes.stall_limit = seconds("output-stall-timeout", 1, &mut parser)?;
                }
                Arg::Long("spill-dir") => {
                    let dir = filled("spill-dir", parser.value()?.string()?)?;
                    config.processes.spill_dir = dir.into();
                }
                Arg::Long("drain-grace") => {
                    let value = parser.value()?.parse()?;
                    let grace = within("drain-grace", value, 0, 60_000)?;
                    config.processes.drain_grace = Duration::from_millis(grace as u64);
                }
                Arg::Long("retention") => {
                    let least = MIN_RETENTION.as_secs();
                    config.processes.retention = seconds("retention", least, &mut parser)?;
                }
                Arg::Long("max-retained") => {
                    let value = parser.value()?.parse()?;
                    config.processes.max_retained = within("max-retained", value, 0, 1 << 20)?;
                }
                Arg::Long("watcher-expiry") => {
                    config.watches.polled = seconds("watcher-expiry", 1, &mut parser)?;
                }
                Arg::Long("cursor-retention") => {
                    config.watches.cursors = seconds("cursor-retention", 1, &mut parser)?;
                }
                Arg::Long("cgroup-root") => config.cgroup_root = parser.value()?.into(),
                Arg::Long("isnotfc") => config.is_not_fc = switch(&mut parser)?,
                Arg::Long("no-cgroups") => config.no_cgroups = switch(&mut parser)?,
                Arg::Long("verbose") => config.verbose = switch(&mut parser)?,
                Arg::Long("otlp") => {
                    let text = parser.value()?.string()?;
                    if !cfg!(feature = "otlp") {
                        return Err(ConfigError::Otlp(TelemetryError::NotBuilt));
                    }
                    config.otlp = Some(text.parse().map_err(ConfigError::Otlp)?);
                }
                Arg::Long("version") => {
                    if switch(&mut parser)? {
                        return Ok(Command::Print(env!("CARGO_PKG_VERSION").to_owned()));
                    }
                }
                Arg::Long("commit") => {
                    if switch(&mut parser)? {
                        let commit = option_env!("ENVD_COMMIT").unwrap_or("unknown");
                        return Ok(Command::Print(commit.to_owned()));
                    }
                }
                Arg::Long("help") | Arg::Short('h') => return Ok(Command::Help),
                // Upstream takes no notice of them either.
                Arg::Value(_) => {}
                other => return Err(other.unexpected().into()),
            }
        }
        match mmds {
            Some(mmds) => config.mmds = mmds,
            None if config.is_not_fc => config.mmds = None,
            None => {}
        }
        if config.max_buffered_bytes / 2 < config.max_message_bytes {
            let why = "is less than twice --max-message-bytes";
            return Err(ConfigError::Value { flag: "max-buffered-bytes", why });
        }
        match (port, config.listen.is_empty()) {
            (Some(_), false) => {
                let why = "cannot be given beside --listen; put the port into the address";
                return Err(ConfigError::Value { flag: "port", why });
            }
            (port, true) => {
                let place =
                    Place::Tcp { host: "0.0.0.0".into(), port: port.unwrap_or(DEFAULT_PORT) };
                config.listen.push(Address { place, optional: false });
            }
            (None, false) => {}
        }
        Ok(Command::Run(Box::new(config)))
    }
}

/// Go's single-dash flags as lexopt knows long ones.
fn with_two_dashes(arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && !text.starts_with("--") => {
            format!("-{text}").into()
        }
        _ => arg,
    }
}

/// A flag without a value, or Go's `-flag=false`.
fn switch(parser: &mut Parser) -> Result<bool, lexopt::Error> {
    match parser.optional_value() {
        None => Ok(true),
        Some(value) => match value.string()?.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            other => Err(format!("'{other}' is neither true nor false").into()),
        },
    }
}

fn address(flag: &'static str, parser: &mut Parser) -> Result<Address, ConfigError> {
    let text = parser.value()?.string()?;
    text.parse().map_err(|source| ConfigError::Address { flag, source })
}

/// At most a day.
fn seconds(flag: &'static str, min: u64, parser: &mut Parser) -> Result<Duration, ConfigError> {
    let value = parser.value()?.parse()?;
    within(flag, value, min, 86_400)?;
    Ok(Duration::from_secs(value))
}

fn within(flag: &'static str, value: u64, min: u64, max: u64) -> Result<usize, ConfigError> {
    let wrong = ConfigError::Range { flag, value, min, max };
    if (min..=max).contains(&value) {
        usize::try_from(value).map_err(|_| wrong)
    } else {
        Err(wrong)
    }
}

fn filled(flag: &'static str, value: String) -> Result<String, ConfigError> {
    match value.is_empty() {
        true => Err(ConfigError::Value { flag, why: "is empty" }),
        false => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Command, String> {
        Config::parse(args.iter().map(OsString::from)).map_err(|error| error.to_string())
    }

    fn config(args: &[&str]) -> Config {
        match parse(args) {
            Ok(Command::Run(config)) => *config,
            other => panic!("{args:?}: {other:?}"),
        }
    }

    #[test]
    fn upstream_flags_with_one_dash_and_two() {
        let upstream =
            config(&["-isnotfc", "--no-cgroups", "-port", "1234", "-cgroup-root=/cg", "stray"]);
        assert!(upstream.is_not_fc && upstream.no_cgroups && !upstream.verbose);
        assert_eq!(upstream.listen, ["tcp://0.0.0.0:1234".parse().unwrap()]);
        assert_eq!(upstream.cgroup_root, PathBuf::from("/cg"));
        assert!(!config(&["-verbose=false"]).verbose);
        assert!(matches!(parse(&["-version"]), Ok(Command::Print(_))));
        assert!(matches!(parse(&["-commit"]), Ok(Command::Print(_))));
        assert_eq!(parse(&["-h"]), Ok(Command::Help));
        assert_eq!(parse(&["--help"]), Ok(Command::Help));
    }

    #[test]
    fn listens_on_upstreams_port_unless_told_otherwise() {
        assert_eq!(config(&[]).listen, ["tcp://0.0.0.0:49983".parse().unwrap()]);
        let two = config(&["--listen", "unix:///a", "--listen=vsock://5?optional"]);
        assert_eq!(two.listen.len(), 2);
    }

    #[test]
    fn whom_to_let_in() {
        assert_eq!(config(&[]).trust, Trust::default());
        let flags = ["--require-token", "--trust-uid=0", "--trust-uid=7", "--trust-cid", "2"];
        let strict = config(&flags);
        assert!(strict.require_token && !strict.resume_handover);
        assert_eq!((strict.trust.uids, strict.trust.cids), (vec![0, 7], vec![2]));
        assert!(config(&["-resume-handover"]).resume_handover);
    }

    #[test]
    fn where_the_metadata_is() {
        assert_eq!(config(&[]).mmds, Some(mmds::ADDRESS));
        assert_eq!(config(&["-isnotfc"]).mmds, None);
        assert_eq!(config(&["--mmds", "none"]).mmds, None);
        let given = config(&["--mmds=127.0.0.1:1", "-isnotfc"]);
        assert_eq!(given.mmds, Some("127.0.0.1:1".parse().unwrap()));
    }

    #[test]
    fn whom_to_tell() {
        assert_eq!(config(&[]).ready, None);
        let ready = config(&["--ready", "vsock://2:1024?optional"]).ready.unwrap();
        assert!(ready.optional && ready.to_string() == "vsock://2:1024");
    }

    #[test]
    fn bad_flags_are_named() {
        for (args, name) in [
            (&["--what"][..], "--what"),
            (&["-port", "99999"], "99999"),
            (&["-port"], "--port"),
            (&["-isnotfc=maybe"], "maybe"),
            (&["--listen", "nowhere"], "nowhere"),
            (&["--listen", "unix:///a", "-port", "1"], "--port"),
            (&["--ready", "1024"], "--ready"),
            (&["--max-connections", "0"], "--max-connections"),
            (&["--max-message-bytes", "1"], "--max-message-bytes"),
            (&["--output-window", "1"], "--output-window"),
            (&["--retention", "29"], "--retention"),
            (&["--drain-grace", "60001"], "--drain-grace"),
            (&["--default-workdir", "relative"], "--default-workdir"),
            (&["--default-user", ""], "--default-user"),
            (&["--mmds", "nowhere"], "nowhere"),
            (&["--trust-uid", "root"], "root"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(name), "{args:?}: {error}");
        }
    }
}
