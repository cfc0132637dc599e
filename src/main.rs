//! The `envd` binary: arguments, logs, runtime, and then [`envd::daemon::run`].

use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
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
    telemetry, wait,
};

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
    inherited::keep_secrets();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("envd")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start the runtime: {error}")),
    };
    let started = {
        let _within = runtime.enter();
        telemetry::start(config.verbose, config.otlp.as_ref())
    };
    let telemetry = match started {
        Ok(telemetry) => telemetry,
        Err(error) => return failed(&error),
    };
    let result = runtime.block_on(daemon::run(config));
    if let Err(error) = &result {
        tracing::error!("{error}");
    }
    runtime.block_on(telemetry.flush());
    let deadline = Instant::now() + CLEANUP_TIME;
    // It drops every call, and with it the file that the call was writing.
    runtime.shutdown_timeout(CLEANUP_TIME);
    match result {
        Ok(ended) => {
            ended.clean_up(deadline);
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn ask(ending: init::Ending) -> ExitCode {
    match init::ask(ending) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Says why on stderr: there is no log yet, or this is no daemon.
fn failed(error: &dyn Display) -> ExitCode {
    let _ = writeln!(io::stderr(), "envd: {error}");
    ExitCode::FAILURE
}
