//! The `envd` binary: arguments, logs, runtime, and then [`envd::daemon::run`].

use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use envd::{
    config::{Command, Config, ConfigError, Origin, Subcommand},
    daemon,
    guest::{inherited, init},
    quote, telemetry, wait,
};

/// Threads that run tasks. The daemon waits more than it computes; more threads only cost memory.
const WORKERS: usize = 2;
/// The most threads of tokio's own for calls that block. What blocks of ours goes elsewhere
/// (`envd::blocking`); what is left is the look-up of a name.
const BLOCKING_THREADS: usize = 4;
/// How long a daemon that could not start waits for telemetry and for threads that block.
const CLEANUP_TIME: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Before there is any thread: PID 1 never has a second one.
    let args = match Subcommand::of(&args, std::process::id()) {
        Ok(Subcommand::Daemon(args)) => args,
        Ok(Subcommand::Init { args, by_name }) => {
            return init::run(init::Start { args: &args, by_name, check });
        }
        Ok(Subcommand::Wait(args)) => return wait::run(&args),
        Ok(Subcommand::End(ending)) => return ask(ending),
        Ok(Subcommand::Print(text)) => return print(text),
        Err(error) => return misused(&error),
    };
    inherited::reset();
    let mut config = match Config::parse(args) {
        Ok(Command::Run(config)) => *config,
        Ok(Command::Print(text)) => return print(&text),
        Err(error) => return misused(&error),
    };
    if let Err(error) = config.check_files() {
        return misused(&error);
    }
    if let Some(line) = config.restrict_first_run(Origin::of_this_process()) {
        let _ = writeln!(io::stderr(), "envd: {line}");
    }
    if config.resume_handover {
        // Those of the processes of the daemon before, which are not adopted: whoever waits at their other
        // ends has to see that.
        envd::sys::inherited_fds::close_all();
    }
    // Before anything is opened. Without it children have copies of the daemon's descriptors until they
    // execute.
    let _ = envd::sys::low_fds::reserve();
    inherited::keep_secrets();
    envd::sys::heap::limit_arenas();
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
    let mut telemetry = match started {
        Ok(telemetry) => telemetry,
        Err(error) => return failed(&error),
    };
    if !config.ignored.is_empty() {
        let words = config.ignored.join(" ");
        tracing::warn!(words = &*quote::text(&words), "words on the command line are ignored");
    }
    let result = runtime.block_on(daemon::run(config));
    if let Err(error) = &result {
        tracing::error!("{error}");
    }
    let left = || result.as_ref().map_or(CLEANUP_TIME, daemon::Ended::left);
    runtime.block_on(telemetry.flush(left()));
    // It drops every call, and with it the file that the call was writing.
    runtime.shutdown_timeout(left());
    let code = match result {
        Ok(ended) => {
            ended.clean_up();
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    };
    telemetry.finish();
    code
}

/// Prints a text that was asked for. A closed stdout is the reader's choice.
fn print(text: &str) -> ExitCode {
    let _ = io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// What PID 1 of a container exits with when its arguments start no daemon.
fn check(args: &[OsString]) -> Option<ExitCode> {
    let checked = match Config::parse(args.iter().cloned()) {
        Ok(Command::Run(config)) => config.check_files(),
        Ok(Command::Print(text)) => return Some(print(&text)),
        Err(error) => Err(error),
    };
    checked.err().map(|error| misused(&error))
}

/// Says what is wrong with the command line.
fn misused(error: &ConfigError) -> ExitCode {
    let _ = write!(io::stderr(), "envd: {error}\nTry 'envd --help'\n");
    ExitCode::from(2)
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
