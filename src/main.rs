//! The `envd` binary: arguments, logs, runtime, and then [`envd::daemon::run`].

use std::{
    ffi::OsString,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use envd::{
    config::{self, Command, Config},
    daemon,
    guest::{
        inherited,
        init::{self, Duty},
    },
    wait,
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, filter::Targets, fmt, prelude::*, registry};

/// Threads that run tasks. The daemon waits more than it computes; more threads only cost memory.
const WORKERS: usize = 2;
/// The most threads of tokio's own for calls that block. What blocks of ours goes elsewhere
/// (`envd::blocking`); what is left is the look-up of a name.
const BLOCKING_THREADS: usize = 4;
/// How long the end waits for calls that were cut to leave their files in order. A file system that
/// hangs must not hold the exit.
const CLEANUP_TIME: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if wait::is_asked_for(&args) {
        return wait::run(args.get(2..).unwrap_or_default());
    }
    // Before there is any thread: PID 1 never has a second one.
    match Duty::of(&args, std::process::id()) {
        Some(Duty::Init(args)) => return init::run(&args),
        Some(Duty::End(ending)) => return ask(ending),
        None => inherited::reset(),
    }
    let config = match Config::parse(args.into_iter().skip(1)) {
        Ok(Command::Run(config)) => *config,
        Ok(Command::Print(text)) => {
            // A closed stdout is the reader's choice.
            let _ = writeln!(io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Ok(Command::Help) => {
            let _ = write!(io::stderr(), "{}", config::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let _ = write!(io::stderr(), "envd: {error}\n\n{}", config::USAGE);
            return ExitCode::from(2);
        }
    };
    log(config.verbose);
    inherited::keep_secrets();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("envd")
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(daemon::run(config));
            let deadline = Instant::now() + CLEANUP_TIME;
            // It drops every call, and with it the file that the call was writing.
            runtime.shutdown_timeout(CLEANUP_TIME);
            result.map(|ended| ended.clean_up(deadline)).map_err(|error| error.to_string())
        }
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn ask(ending: init::Ending) -> ExitCode {
    match init::ask(ending) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "envd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to stderr: text for a person at a terminal, JSON lines for a machine. Of the libraries
/// below only warnings are of interest.
fn log(verbose: bool) {
    let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let of_interest = Targets::new().with_target("envd", level).with_default(LevelFilter::WARN);
    let lines = fmt::layer().with_writer(io::stderr);
    if io::stderr().is_terminal() {
        registry().with(lines.with_filter(of_interest)).init();
    } else {
        registry().with(lines.json().flatten_event(true).with_filter(of_interest)).init();
    }
}
