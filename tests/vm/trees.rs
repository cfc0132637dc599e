//! Trees of commands in a guest: where their control groups are, and that what runs wild in one
//! leaves the daemon alone. What limits and outcomes are in detail is in `tests/trees.rs`.

use std::{
    cell::Cell,
    fmt,
    time::{Duration, Instant},
};

use envd::proto::process::{
    CloseStdinRequest, CloseStdinResponse, Limits, Pty, SendSignalRequest, SendSignalResponse,
    SignalScope, StartRequest, StartResponse,
    outcome::{Kind as Ended, OomKilled, Signalled},
    process_event::{EndEvent, Event, data_event::Output},
    pty::Size,
};

use crate::{
    checks::{daemon, events, next, of, sh, start},
    common::{
        in_time,
        rpc::{Client, Messages, Wire},
    },
    guest::Kind,
};

/// Answers that are timed in each condition.
const SAMPLES: usize = 300;
/// The longest that /health may take, however wild the commands are and however busy the machine
/// is that emulates the guest.
const HEALTH_PATIENCE: Duration = Duration::from_secs(5);
const HOG_BYTES: u64 = 128 << 20;
const BOMB_PIDS: u64 = 100;

type Started = Messages<StartResponse>;

/// Where cgroup v2 is mounted in every guest.
const MOUNT: &str = "/sys/fs/cgroup";

/// The group below which those of the daemon and of the commands are, as seen from the mount.
fn base(kind: Kind) -> &'static str {
    match kind {
        Kind::Systemd => "/system.slice/envd.service",
        Kind::Openrc | Kind::Pid1 | Kind::Handover | Kind::Minimal => "",
    }
}

/// The next line that a command prints; it prints no more than that.
async fn line(events: &mut Started) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\n") {
        match next(events).await {
            Event::Data(data) => match data.output.unwrap() {
                Output::Stdout(bytes) | Output::Pty(bytes) => text.extend_from_slice(&bytes),
                Output::Stderr(bytes) => panic!("{}", String::from_utf8_lossy(&bytes)),
            },
            Event::Keepalive(_) => {}
            other => panic!("after {:?} came {other:?}", String::from_utf8_lossy(&text)),
        }
    }
    String::from_utf8(text).unwrap().trim().to_owned()
}

async fn end(mut events: Started) -> EndEvent {
    loop {
        if let Event::End(end) = next(&mut events).await {
            return end;
        }
    }
}

/// The directory of a command's group, from the line of /proc/self/cgroup.
fn directory(line: &str) -> String {
    let path = line.strip_prefix("0::").unwrap_or_else(|| panic!("no cgroup v2: {line}"));
    format!("{MOUNT}{path}")
}

async fn goes(address: &str, leaf: &str) {
    let gone = async || sh(address, &format!("test ! -e {leaf} || echo there")).await;
    in_time("the group goes", async || gone().await.is_empty().then_some(())).await;
}

/// The daemon is in the base's `envd`, a command is in a leaf of the pool for its kind while it
/// runs, and the leaf goes with it. Gives what the log says of the base, for whoever reads along.
pub(crate) async fn groups(address: &str, kind: Kind, console: &str) -> String {
    let base = base(kind);
    let daemon = daemon(address, kind).await;
    let own = sh(address, &format!("cat /proc/{daemon}/cgroup")).await;
    assert_eq!(own, format!("0::{base}/envd"));
    let client = Client::at(address, Wire::Grpc);
    let size = Some(Pty { size: Some(Size { cols: 200, rows: 24 }) });
    for (pool, pty) in [("user", None), ("ptys", size)] {
        let script = "cat /proc/self/cgroup; read -r go";
        let request = StartRequest { stdin: Some(true), pty, ..start("sh", &["-c", script]) };
        let (pid, mut events) = events(&client, &request).await;
        let leaf = directory(&line(&mut events).await);
        let wanted = format!("{MOUNT}{base}/{pool}/{daemon}-");
        assert!(leaf.starts_with(&wanted), "{leaf} is not {wanted}*");
        assert_eq!(sh(address, &format!("cat {leaf}/cgroup.procs")).await, pid.to_string());
        let request = CloseStdinRequest { process: of(pid) };
        if pool == "user" {
            let _: CloseStdinResponse =
                client.unary("/process.Process/CloseStdin", &request).await.unwrap();
        } else {
            kill_tree(&client, pid).await;
        }
        end(events).await;
        goes(address, &leaf).await;
    }
    let log = match kind {
        Kind::Systemd => sh(address, "journalctl -o cat -u envd").await,
        Kind::Openrc => sh(address, "cat /var/log/envd.log").await,
        Kind::Pid1 | Kind::Handover | Kind::Minimal => console.to_owned(),
    };
    let said = log.lines().rfind(|line| line.contains("control groups"));
    let said = said.unwrap_or_else(|| panic!("no word of the control groups in {log}"));
    assert!(said.contains(&format!("{MOUNT}{base}")), "{said}");
    said.to_owned()
}

async fn kill_tree(client: &Client, pid: u32) {
    let scope = SignalScope::Tree.into();
    let request = SendSignalRequest { process: of(pid), signal: 9, scope, ..Default::default() };
    let _: SendSignalResponse =
        client.unary("/process.Process/SendSignal", &request).await.unwrap();
}

/// How long /health took.
pub(crate) struct Answers(Vec<Duration>);

impl Answers {
    /// From one connection, one request after another.
    pub(crate) async fn of(address: &str) -> Self {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut times = Vec::with_capacity(SAMPLES);
        for _ in 0..SAMPLES {
            let begun = Instant::now();
            let request = client.get(format!("http://{address}/health")).send();
            let answer = tokio::time::timeout(HEALTH_PATIENCE, request).await;
            let answer = answer.expect("/health answers in time").unwrap();
            assert_eq!(answer.status(), 204);
            times.push(begun.elapsed());
        }
        times.sort();
        Self(times)
    }

    fn at(&self, percent: usize) -> Duration {
        self.0[(self.0.len() - 1) * percent / 100]
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |percent| self.at(percent).as_secs_f64() * 1e3;
        let (median, late, slowest) = (ms(50), ms(99), ms(100));
        let count = self.0.len();
        write!(f, "{median:.2}/{late:.2}/{slowest:.2} ms (median/p99/slowest of {count})")
    }
}

/// Commands of the default user that take all memory they can get, one after another for as long as
/// /health is asked: each ends as killed for want of memory.
pub(crate) async fn memory_hog(address: &str) -> Answers {
    let client = Client::at(address, Wire::Grpc).with("keepalive-ping-interval", "5");
    let limits = Limits { memory_bytes: Some(HOG_BYTES), ..Limits::default() };
    // tail keeps its last line, which is all of it.
    let hog = StartRequest { limits: Some(limits), ..start("tail", &["-n", "1", "/dev/zero"]) };
    let asked = Cell::new(false);
    let answers = async {
        let answers = Answers::of(address).await;
        asked.set(true);
        answers
    };
    let hogs = async {
        loop {
            let end = end(events(&client, &hog).await.1).await;
            let outcome = end.outcome.unwrap();
            match outcome.kind.unwrap() {
                Ended::OomKilled(OomKilled { kills, memory_limit_bytes }) => {
                    assert!(kills > 0);
                    assert_eq!(memory_limit_bytes, Some(HOG_BYTES));
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(outcome.limits_hit, ["memory.max"]);
            if asked.get() {
                return;
            }
        }
    };
    let (answers, ()) = tokio::join!(answers, hogs);
    answers
}

/// A command of the default user that forks without end, and goes on trying at its limit.
pub(crate) async fn fork_bomb(address: &str) -> Answers {
    let client = Client::at(address, Wire::Grpc).with("keepalive-ping-interval", "5");
    let limits = Limits { pids: Some(BOMB_PIDS), ..Limits::default() };
    let bomb = "\
import os
print(open('/proc/self/cgroup').read(), end='', flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass";
    let bomb = StartRequest { limits: Some(limits), ..start("python3", &["-c", bomb]) };
    let (pid, mut events) = events(&client, &bomb).await;
    let leaf = directory(&line(&mut events).await);
    // Meanwhile others are started, and answer.
    let hits = async || sh(address, &format!("cat {leaf}/pids.events")).await;
    in_time("it meets its limit", async || (hits().await != "max 0").then_some(())).await;
    let answers = Answers::of(address).await;
    let count = sh(address, &format!("cat {leaf}/pids.current")).await;
    assert!((1..=BOMB_PIDS).contains(&count.parse().unwrap()), "{count}");
    kill_tree(&client, pid).await;
    let outcome = end(events).await.outcome.unwrap();
    assert_eq!(outcome.limits_hit, ["pids.max"]);
    match outcome.kind.unwrap() {
        Ended::Signalled(Signalled { signal: 9, .. }) => {}
        other => panic!("{other:?}"),
    }
    goes(address, &leaf).await;
    answers
}
