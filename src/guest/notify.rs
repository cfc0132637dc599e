//! The service manager's side of starting and ending: `sd_notify(3)` and its watchdog.
//!
//! The protocol is datagrams of `NAME=VALUE` lines to the socket that `NOTIFY_SOCKET` names. Where
//! it is not set, nothing happens and no timer runs.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram as StdDatagram},
    },
    time::Duration,
};

use tokio::{
    net::UnixDatagram,
    time::{MissedTickBehavior, interval, timeout},
};

/// How long the manager may take to accept a message; it is then given up.
const SEND: Duration = Duration::from_secs(5);
/// The shortest time between two signs of life, whatever the manager asks for.
const SHORTEST_PULSE: Duration = Duration::from_millis(10);

/// The manager that started the daemon and wants to hear from it.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    watchdog: Option<Duration>,
}

impl Manager {
    /// The one that the environment names, if any. Must be called in the runtime's context.
    pub fn from_env() -> Option<Self> {
        let name = env::var("NOTIFY_SOCKET").ok().filter(|name| !name.is_empty())?;
        let watchdog = watchdog(
            env::var("WATCHDOG_USEC").ok().as_deref(),
            env::var("WATCHDOG_PID").ok().as_deref(),
            std::process::id(),
        );
        match connect(&name) {
            Ok(socket) => Some(Self { socket, watchdog }),
            Err(error) => {
                tracing::warn!(socket = name, %error, "the service manager cannot be notified");
                None
            }
        }
    }

    /// The daemon serves.
    pub async fn ready(&self) {
        self.send("READY=1\n").await;
    }

    /// The daemon's own words for how it stands, in one line.
    pub async fn status(&self, text: &str) {
        let line = text.replace(['\n', '\r'], " ");
        self.send(&format!("STATUS={line}\n")).await;
    }

    /// The daemon ends.
    pub async fn stopping(&self) {
        self.send("STOPPING=1\n").await;
    }

    /// Gives a sign of life as often as the manager wants it, as long as `is_healthy` says so in
    /// time. Ends at once when no watchdog is set.
    pub async fn watch<F: Future<Output = bool>>(&self, mut is_healthy: impl FnMut() -> F) {
        let Some(limit) = self.watchdog else { return };
        let pulse = (limit / 2).max(SHORTEST_PULSE);
        let mut pulses = interval(pulse);
        pulses.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pulses.tick().await;
            // A daemon that is late is as good as dead, and the manager shall see it.
            if matches!(timeout(limit, is_healthy()).await, Ok(true)) {
                self.send("WATCHDOG=1\n").await;
            } else {
                tracing::error!(?limit, "not healthy: the watchdog gets no sign of life");
            }
        }
    }

    async fn send(&self, message: &str) {
        let sent = timeout(SEND, self.socket.send(message.as_bytes())).await;
        if let Err(error) = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            tracing::warn!(message = message.trim_end(), %error, "the service manager cannot be notified");
        }
    }
}

/// A path, or behind `@` a name in the abstract namespace.
fn connect(name: &str) -> io::Result<UnixDatagram> {
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None if name.starts_with('/') => SocketAddr::from_pathname(name)?,
        None => return Err(io::Error::other("it is neither a path nor an abstract name")),
    };
    let socket = StdDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

/// `sd_watchdog_enabled(3)`: the time within which a sign of life is due, if it is meant for us.
fn watchdog(microseconds: Option<&str>, pid: Option<&str>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    let microseconds = microseconds?.parse().ok().filter(|time| *time > 0)?;
    Some(Duration::from_micros(microseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_for_the_process_that_it_names() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog(Some("1000000"), None, 7), second);
        assert_eq!(watchdog(Some("1000000"), Some("7"), 7), second);
        assert_eq!(watchdog(Some("1000000"), Some("8"), 7), None);
        assert_eq!(watchdog(Some("1000000"), Some("x"), 7), None);
        assert_eq!(watchdog(Some("0"), None, 7), None);
        assert_eq!(watchdog(Some("x"), None, 7), None);
        assert_eq!(watchdog(None, None, 7), None);
    }
}
