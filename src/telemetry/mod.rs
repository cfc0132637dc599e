//! The daemon's own log, and with the cargo feature `otlp` traces and logs for an OpenTelemetry
//! collector.
//!
//! The contract of this module:
//!
//! * The log goes to stderr in any case. A collector gets the same lines as well.
//! * **A reader of stderr slows nothing.** Lines wait in a bounded queue for a thread of their own
//!   ([`log`]); what finds it full is dropped and counted. A stranger cannot flood it ([`rate_limit`]).
//!   A panic is a line like any other. At the end what waits is written, within a deadline.
//! * Each request from a socket is a span ([`crate::wire::spans`]), which holds nothing that a caller
//!   chose: no token, path, query, argument, variable or content.
//! * **A collector slows nothing.** Spans and lines wait in queues of a fixed length; what finds one
//!   full is dropped and counted. A collector that is down or hangs costs what is in the queue.
//! * At the end what waits is sent, within a deadline.
//! * Without a collector there are no spans, and nothing here runs while nothing happens.
//!
//! Everything but the log is empty in a binary without the feature. Where it is: [`Collector`].

#[cfg(feature = "otlp")]
mod batch;
mod collector;
#[cfg(feature = "otlp")]
mod export;
pub mod log;
pub mod rate_limit;

use std::{
    io::{self, IsTerminal},
    panic::PanicHookInfo,
    sync::Arc,
    time::Duration,
};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, filter::Targets, fmt, prelude::*, registry};

pub use collector::{Collector, TelemetryError};
/// How long the end of the daemon waits for a collector.
pub const FLUSH_TIME: Duration = Duration::from_secs(2);
/// How long the end of the daemon waits for stderr to take the last lines.
pub const LOG_FLUSH_TIME: Duration = Duration::from_millis(250);

/// What goes on beside the daemon to send what it tells.
#[derive(Debug)]
#[must_use]
pub struct Telemetry {
    log: Arc<log::Queue>,
    #[cfg(feature = "otlp")]
    exports: Option<export::Exports>,
}

/// Logs to stderr: text for a person at a terminal, JSON lines for a machine; and to a collector, if
/// one is given or named by the environment. Of the libraries below only warnings are of interest.
/// To be called once, within the runtime.
///
/// # Errors
/// [`TelemetryError`], naming the flag or variable.
pub fn start(verbose: bool, collector: Option<&Collector>) -> Result<Telemetry, TelemetryError> {
    let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let of_interest = Targets::new().with_target("envd", level).with_default(LevelFilter::WARN);
    let log = log::Queue::start().map_err(TelemetryError::Thread)?;
    let limited = rate_limit::Limited::reporting(of_interest, Arc::clone(&log));
    let lines = fmt::layer().with_writer(log::Lines(Arc::clone(&log)));
    let lines = match io::stderr().is_terminal() {
        true => lines.with_filter(limited).boxed(),
        false => lines.json().flatten_event(true).with_filter(limited).boxed(),
    };
    let queue = Arc::clone(&log);
    std::panic::set_hook(Box::new(move |panic| log_panic(panic, &queue)));
    #[cfg(feature = "otlp")]
    {
        let (exports, layers) = export::start(collector)?.unzip();
        registry().with(layers).with(lines).init();
        Ok(Telemetry { log, exports })
    }
    #[cfg(not(feature = "otlp"))]
    {
        // The command line has refused one already.
        let _ = collector;
        registry().with(lines).init();
        Ok(Telemetry { log })
    }
}

impl Telemetry {
    /// Sends what waits for a collector, for [`FLUSH_TIME`] at most.
    pub async fn flush(&mut self, limit: Duration) {
        #[cfg(feature = "otlp")]
        if let Some(exports) = self.exports.take() {
            exports.flush(FLUSH_TIME.min(limit)).await;
        }
        #[cfg(not(feature = "otlp"))]
        let _ = limit;
    }

    /// Writes what waits for stderr, for [`LOG_FLUSH_TIME`] at most; the last thing before the exit.
    pub fn finish(self) {
        self.log.flush(LOG_FLUSH_TIME);
    }
}

/// Logs a panic as any other line. The default hook writes to stderr, where it may block for ever.
fn log_panic(panic: &PanicHookInfo<'_>, log: &log::Queue) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let location = panic.location().map(ToString::to_string);
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or_default();
    tracing::error!(panic = text.unwrap_or_default(), location, thread, "the daemon panicked");
    if thread == "main" {
        // It ends the process.
        log.flush(LOG_FLUSH_TIME);
    }
}
