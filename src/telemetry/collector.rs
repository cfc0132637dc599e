//! Where an OpenTelemetry collector is: `http://HOST[:PORT]` as OpenTelemetry writes it, or an address
//! as this daemon writes them, so that a collector can be the host's, behind vsock.

use std::str::FromStr;

use crate::wire::listen::{Address, ListenError, Place};

/// The port of OTLP over gRPC.
const DEFAULT_PORT: u16 = 4317;

/// Why there is no telemetry.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The binary has none.
    #[error("this envd was built without OpenTelemetry (the cargo feature `otlp`)")]
    NotBuilt,
    /// What is no place of a collector.
    #[error(
        "'{text}' is no collector: {why}; write http://HOST:PORT, unix:///PATH or vsock://PORT"
    )]
    Collector {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An address that is none.
    #[error(transparent)]
    Address(#[from] ListenError),
    /// A variable of the environment makes no sense.
    #[error("{name}: {why}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// What is wrong with it; it may be a secret, and is not quoted.
        why: String,
    },
    /// There is no thread for the log.
    #[error("cannot start the thread of the log: {0}")]
    Thread(std::io::Error),
    /// The libraries refuse.
    #[error("OpenTelemetry: {0}")]
    Export(String),
}

/// The place of a collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector(Address);

impl Collector {
    /// Where to connect to.
    pub fn address(&self) -> &Address {
        &self.0
    }
}

impl FromStr for Collector {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, TelemetryError> {
        // What stands before an @ is a password.
        let shown = text.rsplit_once('@').map_or(text, |(_, place)| place);
        let wrong = |why| TelemetryError::Collector { text: shown.to_owned(), why };
        if text.starts_with("https://") {
            return Err(wrong("this envd speaks to collectors without TLS"));
        }
        let address = match text.strip_prefix("http://") {
            Some(rest) => {
                let place = rest.strip_suffix('/').unwrap_or(rest);
                if place.contains(['/', '?', '#', '@']) {
                    return Err(wrong("OTLP over gRPC has no path"));
                }
                let has_port = match place.rsplit_once(']') {
                    Some((_, behind)) => behind.starts_with(':'),
                    None => place.contains(':'),
                };
                match has_port {
                    true => format!("tcp://{place}"),
                    false => format!("tcp://{place}:{DEFAULT_PORT}"),
                }
            }
            None => text.to_owned(),
        };
        let address: Address =
            address.parse().map_err(|error| match text.starts_with("http://") {
                true => wrong("it is not http://HOST:PORT"),
                false => TelemetryError::Address(error),
            })?;
        match address.place {
            Place::Tls { .. } => Err(wrong("this envd speaks to collectors without TLS")),
            Place::Tcp { port: 0, .. } => Err(wrong("the port is 0")),
            _ => Ok(Self(address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_opentelemetry_writes_it_or_as_this_daemon_does() {
        for (text, address) in [
            ("http://localhost:4317", "tcp://localhost:4317"),
            ("http://collector/", "tcp://collector:4317"),
            ("http://[::1]", "tcp://[::1]:4317"),
            ("http://[::1]:55", "tcp://[::1]:55"),
            ("tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
            ("vsock://4317", "vsock://4317"),
            ("unix:///run/otlp.sock", "unix:///run/otlp.sock"),
        ] {
            let collector: Collector = text.parse().unwrap();
            assert_eq!(collector.address().to_string(), address, "{text}");
        }
        for wrong in [
            "",
            "localhost:4317",
            "https://localhost:4317",
            "http://",
            "http://x:port",
            "http://x:4318/v1/traces",
            "tls://x:1?cert=/c&key=/k",
            "tcp://x:0",
        ] {
            let error = wrong.parse::<Collector>().unwrap_err().to_string();
            assert!(error.contains(wrong), "{wrong}: {error}");
        }
        let error = "http://user:secret@x:1".parse::<Collector>().unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
