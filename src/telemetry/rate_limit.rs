//! Bounds how many lines one peer, and one place in the code, may log.
//!
//! A peer that has not shown the access token can cause log lines: a refused `/init`, a connection too
//! many. All that is logged while such a peer's request runs counts for that peer ([`of_peer`]), and all
//! programs of the sandbox are one peer. Every other line counts for its place in the code (its call
//! site), with a much larger bound. Suppressed lines are counted and reported when their window ends.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::task::futures::TaskLocalFuture;
use tracing::{Level, Metadata, Subscriber, callsite::Identifier, subscriber::Interest};
use tracing_subscriber::{
    filter::Targets,
    layer::{Context, Filter},
};

use super::log::Queue;

/// The time in which lines are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// The most lines of a peer without the token in a window.
pub const MAX_PEER_LINES: u32 = 20;
/// The most lines of one call site in a window.
pub const MAX_CALLSITE_LINES: u32 = 500;
/// The most peers that are told apart; the others share one window.
const MAX_PEERS: usize = 64;
/// With `-verbose` the output of the template's commands is logged, which its owner wants whole.
const UNLIMITED_TARGET: &str = "envd::template";

/// Lines that were suppressed since the start.
static SUPPRESSED: AtomicU64 = AtomicU64::new(0);
/// The limit of the log on stderr, for its reports.
static STDERR: OnceLock<Arc<Windows>> = OnceLock::new();

tokio::task_local! {
    static PEER: Option<Peer>;
}

/// How many log lines were suppressed since the start because too many of their kind came.
pub fn suppressed_lines() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// Who causes log lines without having shown the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Any program of the sandbox, whichever address it uses.
    Inside,
    /// Whoever has this address; of IPv6 the network of 64 bits.
    Address(IpAddr),
    /// A user, over a unix socket.
    User(Option<u32>),
    /// A machine, over vsock.
    Machine(u32),
}

impl Peer {
    /// The peer at an address outside of the sandbox.
    pub fn at(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                IpAddr::from([a, b, c, d, 0, 0, 0, 0])
            }
            address => address,
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inside => f.write_str("programs of the sandbox"),
            Self::Address(address) => address.fmt(f),
            Self::User(Some(uid)) => write!(f, "uid {uid}"),
            Self::User(None) => f.write_str("a unix socket"),
            Self::Machine(cid) => write!(f, "vsock {cid}"),
        }
    }
}

/// Counts what `work` logs for this peer; with `None`, for its call sites.
pub fn of_peer<F: Future>(peer: Option<Peer>, work: F) -> TaskLocalFuture<Option<Peer>, F> {
    PEER.scope(peer, work)
}

/// As [`of_peer`], for work that does not wait.
pub fn of_peer_now<T>(peer: Peer, work: impl FnOnce() -> T) -> T {
    PEER.sync_scope(Some(peer), work)
}

/// Reports suppressed lines whose window has ended; when to report again, if there are more.
pub(super) fn report() -> Option<Duration> {
    let (reports, again) = STDERR.get()?.ended(Instant::now());
    for (key, suppressed) in reports {
        match key {
            Key::Peer(peer) => {
                tracing::warn!(%peer, suppressed, "log lines of a peer without the token were suppressed");
            }
            Key::OtherPeers => {
                tracing::warn!(
                    suppressed,
                    "log lines of many peers without the token were suppressed"
                );
            }
            Key::Callsite(callsite) => {
                let meta = callsite.0.metadata();
                let (target, line) = (meta.target(), meta.line());
                tracing::warn!(target_of = target, line, suppressed, "log lines were suppressed");
            }
        }
    }
    again
}

/// Whose lines a window counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Callsite(Identifier),
    Peer(Peer),
    OtherPeers,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// All windows: one a call site, of which the program has a fixed number, and [`MAX_PEERS`] of peers.
#[derive(Debug, Default)]
struct Windows(Mutex<HashMap<Key, Window>>);

/// What becomes of a line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Log,
    Suppress,
    /// As `Suppress`; the first of its window.
    SuppressAndReport,
}

impl Windows {
    fn count(&self, key: Key, max: u32, now: Instant) -> Verdict {
        let mut windows = self.0.lock();
        let key = match key {
            Key::Peer(_) if !windows.contains_key(&key) => {
                let is_over = |window: &Window| now.duration_since(window.since) >= WINDOW;
                windows.retain(|key, window| {
                    !matches!(key, Key::Peer(_)) || !is_over(window) || window.suppressed > 0
                });
                let peers = windows.keys().filter(|key| matches!(key, Key::Peer(_))).count();
                if peers < MAX_PEERS { key } else { Key::OtherPeers }
            }
            key => key,
        };
        let fresh = || Window { since: now, lines: 0, suppressed: 0 };
        let window = windows.entry(key).or_insert_with(fresh);
        if now.duration_since(window.since) >= WINDOW && window.suppressed == 0 {
            *window = fresh();
        }
        if window.lines < max {
            window.lines += 1;
            return Verdict::Log;
        }
        window.suppressed += 1;
        if window.suppressed == 1 { Verdict::SuppressAndReport } else { Verdict::Suppress }
    }

    /// Takes the counts of windows that have ended, and says when the next one with a count ends.
    fn ended(&self, now: Instant) -> (Vec<(Key, u64)>, Option<Duration>) {
        let (mut reports, mut again) = (Vec::new(), None);
        self.0.lock().retain(|key, window| {
            let left = WINDOW.saturating_sub(now.duration_since(window.since));
            if window.suppressed == 0 {
                return true;
            }
            if left.is_zero() {
                reports.push((key.clone(), window.suppressed));
                return false;
            }
            again = Some(again.map_or(left, |again: Duration| again.min(left)));
            true
        });
        (reports, again)
    }
}

/// Lets pass what is of interest, as long as it is not too much.
#[derive(Debug)]
pub(super) struct Limited {
    of_interest: Targets,
    windows: Arc<Windows>,
    /// Who reports; without, suppressed lines are not counted.
    reporter: Option<Arc<Queue>>,
}

impl Limited {
    /// For the log on stderr, which reports what it suppresses.
    pub(super) fn reporting(of_interest: Targets, reporter: Arc<Queue>) -> Self {
        let windows = Arc::clone(STDERR.get_or_init(Arc::default));
        Self { of_interest, windows, reporter: Some(reporter) }
    }

    /// For a copy of that log.
    #[cfg(feature = "otlp")]
    pub(super) fn silent(of_interest: Targets) -> Self {
        Self { of_interest, windows: Arc::default(), reporter: None }
    }

    fn admits(&self, meta: &Metadata<'_>) -> bool {
        let peer = PEER.try_with(|peer| *peer).ok().flatten();
        let (key, max) = match peer {
            Some(peer) => (Key::Peer(peer), MAX_PEER_LINES),
            None if *meta.level() == Level::DEBUG
                && meta.target().starts_with(UNLIMITED_TARGET) =>
            {
                return true;
            }
            None => (Key::Callsite(meta.callsite()), MAX_CALLSITE_LINES),
        };
        let verdict = self.windows.count(key, max, Instant::now());
        if verdict != Verdict::Log
            && let Some(reporter) = &self.reporter
        {
            SUPPRESSED.fetch_add(1, Ordering::Relaxed);
            if verdict == Verdict::SuppressAndReport {
                reporter.report_after(WINDOW);
            }
        }
        verdict == Verdict::Log
    }
}

impl<S: Subscriber> Filter<S> for Limited {
    /// Counts: `tracing` asks once for each event, because of [`Self::callsite_enabled`]. Not in
    /// `event_enabled`, which trips an assertion of the registry.
    fn enabled(&self, meta: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        Filter::<S>::enabled(&self.of_interest, meta, context)
            && (!meta.is_event() || self.admits(meta))
    }

    fn callsite_enabled(&self, meta: &'static Metadata<'static>) -> Interest {
        let interest = Filter::<S>::callsite_enabled(&self.of_interest, meta);
        if interest.is_always() && meta.is_event() { Interest::sometimes() } else { interest }
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Filter::<S>::max_level_hint(&self.of_interest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u32) -> Key {
        Key::Peer(Peer::Machine(number))
    }

    #[test]
    fn a_peer_has_its_lines_and_what_is_more_is_counted_once() {
        let (windows, begun) = (Windows::default(), Instant::now());
        for _ in 0..3 {
            assert_eq!(windows.count(peer(1), 3, begun), Verdict::Log);
        }
        assert_eq!(windows.count(peer(1), 3, begun), Verdict::SuppressAndReport);
        assert_eq!(windows.count(peer(1), 3, begun), Verdict::Suppress);
        assert_eq!(windows.count(peer(2), 3, begun), Verdict::Log, "another peer");
        assert_eq!(windows.ended(begun), (Vec::new(), Some(WINDOW)));
        let later = begun + WINDOW;
        assert_eq!(windows.count(peer(1), 3, later), Verdict::Suppress, "not reported yet");
        assert_eq!(windows.ended(later), (vec![(peer(1), 3)], None));
        assert_eq!(windows.count(peer(1), 3, later), Verdict::Log);
    }

    #[test]
    fn many_peers_share_one_window() {
        let (windows, now) = (Windows::default(), Instant::now());
        for number in 0..1000 {
            windows.count(peer(number), 1, now);
        }
        assert_eq!(windows.0.lock().len(), MAX_PEERS + 1);
        let (reports, _) = windows.ended(now + WINDOW);
        assert_eq!(reports, [(Key::OtherPeers, 1000 - MAX_PEERS as u64 - 1)]);
    }

    #[test]
    fn peers_by_network() {
        let of = |text: &str| Peer::at(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
