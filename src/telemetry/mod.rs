//! The daemon's own log, and with the cargo feature `otlp` traces and logs for an OpenTelemetry
//! collector.
//!
//! The contract of this module:
//!
//! * The log goes to stderr in any case. A collector gets the same lines as well.
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

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, filter::Targets, fmt, prelude::*, registry};

pub use collector::{Collector, TelemetryError};
/// How long the end of the daemon waits for a collector.
pub const FLUSH_TIME: Duration = Duration::from_secs(2);

/// What goes on beside the daemon to send what it tells.
#[derive(Debug)]
#[must_use]
pub struct Telemetry {
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
    let lines = fmt::layer().with_writer(io::stderr);
    let lines = match io::stderr().is_terminal() {
        true => lines.with_filter(of_interest).boxed(),
        false => lines.json().flatten_event(true).with_filter(of_interest).boxed(),
    };
    #[cfg(feature = "otlp")]
    {
        let (exports, layers) = export::start(collector)?.unzip();
        registry().with(layers).with(lines).init();
        Ok(Telemetry { exports })
    }
    #[cfg(not(feature = "otlp"))]
    {
        // The command line has refused one already.
        let _ = collector;
        registry().with(lines).init();
        Ok(Telemetry {})
    }
}

impl Telemetry {
    /// Sends what waits, for [`FLUSH_TIME`] at most.
    pub async fn flush(self) {
        #[cfg(feature = "otlp")]
        if let Some(exports) = self.exports {
            exports.flush(FLUSH_TIME).await;
        }
    }
}
