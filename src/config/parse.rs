//! From the arguments to the struct.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use super::{
    Command, Config, ConfigError, DEFAULT_PORT, USAGE,
    args::{Args, Flag, Item},
};
use crate::{
    fs::{actor::FileAccess, watch::Retention},
    guest::mmds,
    process::{
        self, KillScope,
        options::{MAX_OUTPUT_WINDOW, MIN_OUTPUT_WINDOW, MIN_RETENTION},
    },
    quote,
    telemetry::TelemetryError,
    version,
    wire::{
        listen::{Address, ListenError, Place},
        peer::Trust,
    },
};

/// The longest `--drain-grace`, in milliseconds.
const MAX_DRAIN_GRACE: u64 = 60_000;
/// The longest `--drain-limit`, in milliseconds.
const MAX_DRAIN_LIMIT: u64 = 3_600_000;

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
            shutdown_grace: None,
            keep_processes: false,
            kill_scope: None,
            processes: process::Options::default(),
            file_access: FileAccess::default(),
            watches: Retention::default(),
            is_not_fc: false,
            no_cgroups: false,
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            verbose: false,
            otlp: None,
            no_markers: false,
            says_where: false,
            ignored: Vec::new(),
        };
        let (mut port, mut mmds) = (None, None);
        let mut args = Args::new(args);
        let mut is_first = true;
        while let Some(item) = args.next() {
            let first = std::mem::replace(&mut is_first, false);
            let flag = match item {
                Item::Flag(flag) => flag,
                Item::Word(word) if first => return Err(ConfigError::word(&word)),
                // Upstream takes no notice of them either.
                Item::Word(word) => {
                    config.ignored.push(quote::line(&word));
                    continue;
                }
            };
            config.says_where |=
                matches!(flag.name.as_str(), "listen" | "port" | "ready" | "isnotfc");
            match flag.name.as_str() {
                "listen" => config.listen.push(address(&flag, &mut args)?),
                "ready" => config.ready = Some(address(&flag, &mut args)?),
                "port" => port = Some(args.parsed::<u16>("a port, 0 to 65535")?),
                "default-user" => config.default_user = Some(args.text()?),
                "default-workdir" => {
                    let workdir = args.text()?;
                    if !workdir.starts_with('/') {
                        return Err(flag.wrong("the path is not absolute"));
                    }
                    config.default_workdir = Some(workdir);
                }
                "file-access" => config.file_access = args.parsed("compatible or strict")?,
                "access-token-file" => config.access_token_file = Some(args.path()?),
                "require-token" => config.require_token = args.switch()?,
                "resume-handover" => config.resume_handover = args.switch()?,
                "trust-uid" => config.trust.uids.push(args.user_id()?),
                "trust-cid" => config.trust.cids.push(args.parsed("a vsock context id")?),
                "trust-certificates" => config.trust.certificates = args.switch()?,
                "template" => config.template = Some(args.path()?),
                "mmds" => {
                    let value = args.text()?;
                    mmds = Some(match value.as_str() {
                        "none" => None,
                        other => Some(other.parse().map_err(|_| {
                            let given = quote::line(other);
                            flag.wrong(format_args!("'{given}' is neither IP:PORT nor none"))
                        })?),
                    });
                }
                "no-clock" => config.no_clock = args.switch()?,
                "guest-root" => config.guest_root = args.path()?,
                "max-connections" => config.max_connections = args.size(1, 1 << 20)?,
                "max-buffered-bytes" => config.max_buffered_bytes = args.size(1024, 1 << 40)?,
                "max-message-bytes" => config.max_message_bytes = args.size(1024, 1 << 30)?,
                "header-timeout" => config.header_timeout = args.seconds(1)?,
                "stall-timeout" => config.stall_timeout = args.seconds(1)?,
                "idle-timeout" => config.idle_timeout = args.seconds(1)?,
                "shutdown-grace" => config.shutdown_grace = Some(args.seconds(0)?),
                "keep-processes" => config.keep_processes = args.switch()?,
                "kill-scope" => {
                    config.kill_scope = Some(match args.text()?.as_str() {
                        "process" => KillScope::Process,
                        "tree" => KillScope::Tree,
                        other => {
                            let given = quote::line(other);
                            let why = format_args!("'{given}' is neither process nor tree");
                            return Err(flag.wrong(why));
                        }
                    });
                }
                "max-processes" => config.processes.max_processes = args.size(1, 1 << 20)?,
                "output-window" => {
                    config.processes.output_window =
                        args.size(MIN_OUTPUT_WINDOW as u64, MAX_OUTPUT_WINDOW as u64)?;
                }
                "output-total" => config.processes.output_total = args.size(0, 1 << 40)?,
                "output-stall-timeout" => config.processes.stall = args.seconds(1)?.into(),
                "spill-dir" => config.processes.spill_dir = args.path()?,
                "drain-grace" => {
                    let grace = args.number(0, MAX_DRAIN_GRACE)?;
                    config.processes.drain_grace = Duration::from_millis(grace);
                }
                "drain-limit" => {
                    let limit = args.number(0, MAX_DRAIN_LIMIT)?;
                    config.processes.drain_limit = Duration::from_millis(limit);
                }
                "retention" => {
                    config.processes.retention = args.seconds(MIN_RETENTION.as_secs())?;
                }
                "max-retained" => config.processes.max_retained = args.size(0, 1 << 20)?,
                "watcher-expiry" => config.watches.polled = args.seconds(1)?,
                "cursor-retention" => config.watches.cursors = args.seconds(1)?,
                "cgroup-root" => config.cgroup_root = args.path()?,
                "isnotfc" => config.is_not_fc = args.switch()?,
                "no-cgroups" => config.no_cgroups = args.switch()?,
                "verbose" => config.verbose = args.switch()?,
                "otlp" => {
                    let text = args.text()?;
                    if !cfg!(feature = "otlp") {
                        return Err(flag.wrong(TelemetryError::NotBuilt));
                    }
                    config.otlp = Some(text.parse().map_err(|error| flag.wrong(error))?);
                }
                // The first version in the output is upstream's: embedders take it for the version of
                // the protocol. With one dash, as orchestrators write it, it is the whole output.
                "version" if args.switch()? => {
                    let (own, e2b) = (version::OWN, version::E2B);
                    return Ok(Command::Print(match flag.one_dash {
                        true => format!("{e2b}\n"),
                        false => format!("{e2b}\nenvd {own}\n"),
                    }));
                }
                "commit" if args.switch()? => {
                    return Ok(Command::Print(format!("{}\n", version::COMMIT)));
                }
                "help" | "h" if args.switch()? => return Ok(Command::Print(USAGE.to_owned())),
                "version" | "commit" | "help" | "h" => {}
                unknown => return Err(ConfigError::Unknown(quote::line(unknown))),
            }
        }
        match mmds {
            Some(mmds) => config.mmds = mmds,
            None if config.is_not_fc => config.mmds = None,
            None => {}
        }
        if config.max_buffered_bytes / 2 < config.max_message_bytes {
            let why = "it is less than twice --max-message-bytes";
            return Err(ConfigError::of("max-buffered-bytes", why));
        }
        match (port, config.listen.is_empty()) {
            (Some(_), false) => {
                let why = "it cannot be given beside --listen; put the port into the address";
                return Err(ConfigError::of("port", why));
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

fn address(flag: &Flag, args: &mut Args) -> Result<Address, ConfigError> {
    let text = args.text()?;
    // The text is quoted in the error.
    text.parse().map_err(|error: ListenError| flag.wrong(quote::line(error.to_string())))
}
