//! From the arguments to the struct.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use lexopt::{Arg, Parser, ValueExt};

use super::{Command, Config, ConfigError, DEFAULT_PORT};
use crate::{
    fs::watch::Retention,
    guest::mmds,
    process::{
        self,
        options::{MAX_OUTPUT_WINDOW, MIN_OUTPUT_WINDOW, MIN_RETENTION},
    },
    telemetry::TelemetryError,
    version,
    wire::{
        listen::{Address, Place},
        peer::Trust,
    },
};

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
                        let (own, e2b) = (version::OWN, version::E2B);
                        return Ok(Command::Print(format!("envd {own} (for E2B {e2b})")));
                    }
                }
                Arg::Long(E2B_VERSION) => {
                    if switch(&mut parser)? {
                        return Ok(Command::Print(version::E2B.to_owned()));
                    }
                }
                Arg::Long("commit") => {
                    if switch(&mut parser)? {
                        return Ok(Command::Print(version::COMMIT.to_owned()));
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

/// `-version` behind the translation of dashes: with one, as orchestrators write it, it means upstream's
/// version and nothing else.
const E2B_VERSION: &str = "e2b-version";

/// Go's single-dash flags as lexopt knows long ones.
fn with_two_dashes(arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if text == "-version" || text.starts_with("-version=") => {
            text.replacen("-version", &format!("--{E2B_VERSION}"), 1).into()
        }
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
