//! `envd wait`: waits on the command line for what templates wait for.
//!
//! It is a program of its own in the same binary, for start and ready commands of images that have
//! neither `ss` nor `curl`. Progress goes to stderr. It exits with 0 when every condition has held,
//! 1 when the time was over before, 2 when the arguments make no sense.

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    blocking::Pool,
    config::args::{Args, Item},
    quote,
    template::{condition::Condition, config},
};

/// What `envd wait --help` prints.
pub const USAGE: &str = "\
Usage: envd wait [flags] CONDITION...

Waits until every condition has held, one after the other:
  port:N            somebody listens on this port
  url:http://...    a GET is answered with 200, or with --status
  process:NAME      a process has this name
  file:/PATH        there is a regular file
  delay:2s          that much time has passed

Flags:
  --timeout TIME    how long all may take together (default 10m)
  --interval TIME   the pause between two looks (default 100ms)
  --status N        the status of every URL (default 200)
  --quiet           print nothing but errors
  --help            print this and exit

Exits with 0 when all have held, 1 when the time was over, 2 when this makes no sense.
";

/// Threads that look at files and processes.
const THREADS: usize = 1;
/// How often is told that it still waits.
const PROGRESS: Duration = Duration::from_secs(10);

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    conditions: Vec<Condition>,
    timeout: Duration,
    interval: Duration,
    quiet: bool,
}

/// Waits, with the arguments behind the word `wait`.
pub fn run(args: &[OsString]) -> ExitCode {
    let options = match parse(args) {
        Ok(Some(options)) => options,
        Ok(None) => {
            // A closed stdout is the reader's choice.
            let _ = io::stdout().write_all(USAGE.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            say(&format!("envd wait: {error}\nTry 'envd wait --help'"));
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let waited = match runtime {
        Ok(runtime) => {
            let waited = runtime.block_on(wait(&options));
            // The look-up of a name may still be under way.
            runtime.shutdown_background();
            waited
        }
        Err(error) => Err(error.to_string()),
    };
    match waited {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("envd wait: {error}"));
            ExitCode::FAILURE
        }
    }
}

async fn wait(options: &Options) -> Result<(), String> {
    let begun = Instant::now();
    let deadline = begun.checked_add(options.timeout);
    let deadline = deadline.ok_or("the timeout is beyond the end of all clocks")?;
    let pool = Pool::new("wait", 0, THREADS);
    for condition in &options.conditions {
        let mut last = String::new();
        let held = timeout_at(deadline, until(condition, options, &pool, &mut last)).await;
        if held.is_err() {
            let timeout = humantime::format_duration(options.timeout);
            let why = if last.is_empty() { "it has not held yet".to_owned() } else { last };
            return Err(format!("{condition}: not within {timeout}: {why}"));
        }
        if !options.quiet {
            say(&format!("envd wait: {condition} after {:.1} s", begun.elapsed().as_secs_f64()));
        }
    }
    Ok(())
}

async fn until(condition: &Condition, options: &Options, pool: &Arc<Pool>, last: &mut String) {
    let mut told = None;
    while let Err(why) = condition.check(pool).await {
        // What is new is told at once, what is not from time to time.
        let due = told.is_none_or(|at: Instant| at.elapsed() >= PROGRESS);
        if !options.quiet && (due || *last != why) {
            say(&format!("envd wait: {why}"));
            told = Some(Instant::now());
        }
        *last = why;
        sleep(options.interval).await;
    }
}

fn parse(args: &[OsString]) -> Result<Option<Options>, String> {
    let mut options = Options {
        conditions: Vec::new(),
        timeout: config::TIMEOUT,
        interval: config::CONDITION_INTERVAL,
        quiet: false,
    };
    let mut wanted_status = None;
    let mut args = Args::new(args.iter().cloned());
    while let Some(item) = args.next() {
        let flag = match item {
            Item::Flag(flag) => flag,
            Item::Word(word) => {
                let word = word.to_string_lossy();
                let condition: Result<Condition, _> = word.parse();
                options.conditions.push(condition.map_err(|error| one_line(&error))?);
                continue;
            }
        };
        match flag.name.as_str() {
            "timeout" => options.timeout = time(&mut args)?,
            "interval" => options.interval = time(&mut args)?.max(Duration::from_millis(1)),
            "status" => {
                wanted_status = Some(args.parsed::<i64>("a number").map_err(|e| e.to_string())?);
            }
            "quiet" | "q" => options.quiet = args.switch().map_err(|error| error.to_string())?,
            "help" | "h" => return Ok(None),
            _ => return Err(flag.wrong("there is no such flag").to_string()),
        }
    }
    if options.conditions.is_empty() {
        return Err("there is nothing to wait for".to_owned());
    }
    if let Some(status) = wanted_status {
        for condition in &mut options.conditions {
            if let Condition::Url { url, .. } = condition {
                *condition = Condition::url(&url.to_string(), status)
                    .map_err(|error| format!("--{error}"))?;
            }
        }
    }
    Ok(Some(options))
}

fn time(args: &mut Args) -> Result<Duration, String> {
    let text = args.text().map_err(|error| error.to_string())?;
    let time = humantime::parse_duration(&text);
    time.map_err(|error| {
        let given = quote::line(&text);
        args.wrong(format_args!("'{given}': {}", one_line(&error))).to_string()
    })
}

/// An error that may quote what was given.
fn one_line(error: &dyn std::fmt::Display) -> String {
    quote::line(error.to_string()).to_string()
}

/// A closed stderr is the reader's choice.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Option<Options>, String> {
        parse(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn arguments() {
        let options = parsed(&["port:80", "--timeout=2s", "url:http://x/", "--status", "404"]);
        let options = options.unwrap().unwrap();
        assert_eq!(options.timeout, Duration::from_secs(2));
        let url = Condition::url("http://x/", 404).unwrap();
        assert_eq!(options.conditions, [Condition::Port(80), url]);
        assert_eq!(parsed(&["--help"]), Ok(None));
        for (args, named) in [
            (&[][..], "nothing"),
            (&["port:x"], "port"),
            (&["what"], "what"),
            (&["port:1", "--timeout", "soon"], "--timeout"),
            (&["port:1", "--status", "x"], "--status"),
            (&["url:http://x", "--status", "1"], "--status"),
            (&["--what", "port:1"], "--what"),
        ] {
            let error = parsed(args).unwrap_err();
            assert!(error.contains(named), "{args:?}: {error}");
        }
    }
}
