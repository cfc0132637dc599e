//! Trees of processes: signals, limits, time limits, what was used, and how they ended.
//!
//! Where there is a cgroup v2 to write to, tests of trees run twice, with it and without. Those of
//! limits need its controllers; `scripts/vm.sh inside` runs them in a guest that has all of them.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use common::{
    Daemon, able, able_as_root, basic, eventually, in_time, is_root, offered,
    rpc::{Client, Failure, Messages, WIRES, Wire},
};
use envd::proto::process::{
    Limits, ListRequest, ListResponse, ProcessConfig, ProcessSelector, Pty, Rlimit,
    SendSignalRequest, SendSignalResponse, SignalScope, StartRequest, StartResponse,
    outcome::{Exited, Kind, OomKilled, Signalled},
    process_event::{EndEvent, Event, data_event::Output},
    process_selector::Selector,
    pty::Size,
};
use futures_util::{StreamExt, stream};

const START: &str = "/process.Process/Start";
const LIST: &str = "/process.Process/List";
const SEND_SIGNAL: &str = "/process.Process/SendSignal";

/// The base of a daemon's control groups, below wherever cgroup v2 is mounted. Everything in it is
/// killed and removed on drop, so it must outlive the daemon.
struct Base {
    dir: PathBuf,
    controllers: String,
}

impl Base {
    /// None where there is no cgroup v2 that can be written to.
    fn find() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let place = words.nth(1)?;
            (words.next()? == "cgroup2").then(|| PathBuf::from(place))
        })?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = mount.join(format!("envd-trees-{}-{number}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        for controller in ["cpu", "memory", "pids", "io"] {
            // They are there where nobody else, as an older version, has taken them.
            let _ = fs::write(mount.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        let controllers = fs::read_to_string(dir.join("cgroup.controllers")).unwrap();
        Some(Self { dir, controllers })
    }

    /// With these controllers; says so where they lack.
    fn with(controllers: &[&str]) -> Option<Self> {
        let base = Self::find().filter(|base| {
            controllers.iter().all(|one| base.controllers.split_whitespace().any(|has| has == *one))
        });
        let what = format!("root and a cgroup v2 with the controllers {controllers:?}");
        offered(&what, base.is_some()).then_some(base).flatten()
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(&["-cgroup-root", self.dir.to_str().unwrap()])
    }

    /// The leaves of both pools.
    fn leaves(&self) -> Vec<PathBuf> {
        ["user", "ptys"].iter().flat_map(|pool| directories(&self.dir.join(pool))).collect()
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap().trim().to_owned()
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        fn remove(dir: &Path) {
            directories(dir).iter().for_each(|dir| remove(dir));
            let _ = fs::remove_dir(dir);
        }
        let _ = fs::write(self.dir.join("cgroup.kill"), "1");
        eventually("the test's control groups go", || {
            remove(&self.dir);
            (!self.dir.exists()).then_some(())
        });
    }
}

fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// A daemon with control groups, if there can be any, and one without.
fn both_ways() -> Vec<(Daemon, Option<Base>)> {
    let mut ways = Vec::new();
    let base = Base::find();
    if offered("root and a cgroup v2 that can be written to", base.is_some()) {
        ways.extend(base.map(|base| (base.daemon(), Some(base))));
    }
    ways.push((Daemon::start(&["-no-cgroups"]), None));
    ways
}

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

fn start(cmd: &str, args: &[&str]) -> StartRequest {
    StartRequest {
        process: Some(ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(ToString::to_string).collect(),
            cwd: Some("/".to_owned()),
            ..ProcessConfig::default()
        }),
        stdin: Some(false),
        ..StartRequest::default()
    }
}

fn sh(script: &str) -> StartRequest {
    start("/bin/sh", &["-c", script])
}

fn limited(request: StartRequest, limits: Limits) -> StartRequest {
    StartRequest { limits: Some(limits), ..request }
}

fn span(span: Duration) -> Option<pbjson_types::Duration> {
    Some(span.into())
}

/// A process that was started.
struct Running {
    pid: u32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    messages: Messages<StartResponse>,
}

impl Running {
    async fn step(&mut self) -> Result<Option<EndEvent>, Failure> {
        let message = self.messages.next().await?.expect("an end before the end");
        match message.event.unwrap().event.unwrap() {
            Event::Data(data) => match data.output.unwrap() {
                Output::Stdout(bytes) | Output::Pty(bytes) => self.stdout.extend_from_slice(&bytes),
                Output::Stderr(bytes) => self.stderr.extend_from_slice(&bytes),
            },
            Event::End(end) => return Ok(Some(end)),
            _ => {}
        }
        Ok(None)
    }

    /// The first words that it says, once there are so many.
    async fn words(&mut self, count: usize) -> Vec<String> {
        loop {
            let text = String::from_utf8_lossy(&self.stdout);
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            if words.len() >= count && text.ends_with('\n') {
                return words;
            }
            let end = self.step().await.unwrap();
            assert!(end.is_none(), "it ended with {end:?} after {text:?}", text = self.stdout);
        }
    }

    async fn pids(&mut self, count: usize) -> Vec<u32> {
        self.words(count).await.iter().map(|word| word.parse().unwrap()).collect()
    }

    async fn end(mut self) -> EndEvent {
        loop {
            if let Some(end) = self.step().await.unwrap() {
                return end;
            }
        }
    }
}

async fn try_begin(client: &Client, request: &StartRequest) -> Result<Running, Failure> {
    let mut messages = client.stream::<_, StartResponse>(START, request).await?;
    let first = messages.next().await?.expect("a start").event.unwrap().event.unwrap();
    let Event::Start(start) = first else { panic!("first came {first:?}") };
    Ok(Running { pid: start.pid, stdout: Vec::new(), stderr: Vec::new(), messages })
}

async fn begin(client: &Client, request: &StartRequest) -> Running {
    try_begin(client, request).await.unwrap()
}

async fn run(client: &Client, request: &StartRequest) -> EndEvent {
    begin(client, request).await.end().await
}

async fn refused(client: &Client, request: &StartRequest) -> Failure {
    match try_begin(client, request).await {
        Ok(started) => panic!("{} was started", started.pid),
        Err(failure) => failure,
    }
}

async fn signal(client: &Client, pid: u32, signal: i32, scope: SignalScope) -> Result<(), Failure> {
    let process = Some(ProcessSelector { selector: Some(Selector::Pid(pid)) });
    let request = SendSignalRequest { process, signal, scope: scope.into(), ..Default::default() };
    client.unary::<_, SendSignalResponse>(SEND_SIGNAL, &request).await.map(|_| ())
}

fn kind(end: &EndEvent) -> Kind {
    end.outcome.clone().unwrap().kind.unwrap()
}

fn limits_hit(end: &EndEvent) -> Vec<String> {
    end.outcome.clone().unwrap().limits_hit
}

fn signalled(signal: i32, name: &str) -> Kind {
    Kind::Signalled(Signalled { signal, core_dumped: false, name: name.to_owned() })
}

/// Zombies are dead: a guest whose PID 1 is slow keeps them for a moment.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn dies(pid: u32) {
    eventually(&format!("the process {pid} dies"), || (!lives(pid)).then_some(()));
}

fn kill_stranger(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

#[tokio::test]
async fn a_signal_reaches_the_process_or_its_group_or_its_tree() {
    for (daemon, base) in both_ways() {
        let client = client(&daemon);
        // One child in the group, and one in a session of its own with a child there.
        let script = "sleep 1000 & echo $!; setsid sh -c 'sleep 1000 & echo $! $$; wait' & wait";
        for scope in [SignalScope::Process, SignalScope::Group, SignalScope::Tree] {
            let mut running = begin(&client, &sh(script)).await;
            let other = begin(&client, &start("sleep", &["1000"])).await;
            let pids = running.pids(3).await;
            assert!(pids.iter().all(|pid| lives(*pid)));
            signal(&client, running.pid, 9, scope).await.unwrap();
            let end = running.end().await;
            assert_eq!(kind(&end), signalled(9, "SIGKILL"));
            let dead = match scope {
                SignalScope::Process => 0,
                SignalScope::Group => 1,
                SignalScope::Tree => 3,
            };
            pids[..dead].iter().for_each(|pid| dies(*pid));
            let alive = pids[dead..].iter().all(|pid| lives(*pid));
            assert!(alive, "{scope:?} with {:?}", base.as_ref().map(|base| &base.dir));
            pids[dead..].iter().for_each(|pid| kill_stranger(*pid));
            assert!(lives(other.pid), "{scope:?}");
            signal(&client, other.pid, 9, scope).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_signal_that_can_be_caught_reaches_each_process_of_a_tree_once() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon);
        let script =
            "trap 'echo usr1' USR1; trap 'exit 4' TERM; echo ready; while :; do sleep 0.01; done";
        let script = format!("sh -c \"{script}\" & sh -c \"{script}\" & {script}");
        let mut running = begin(&client, &sh(&script)).await;
        running.words(3).await;
        signal(&client, running.pid, 10, SignalScope::Tree).await.unwrap();
        let words = running.words(6).await;
        assert_eq!(words.iter().filter(|word| *word == "usr1").count(), 3);
        signal(&client, running.pid, 15, SignalScope::Tree).await.unwrap();
        let end = running.end().await;
        assert_eq!(kind(&end), Kind::Exited(Exited { code: 4 }));
    }
}

#[tokio::test]
async fn a_signal_to_a_tree_does_not_stop_the_job_of_a_shell() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon);
        let job = "trap 'exit 7' USR1; echo ready; while :; do sleep 0.01; done";
        let script = format!("set -m; trap : USR1; sh -c \"{job}\"; echo code $?");
        let pty = Some(Pty { size: Some(Size { cols: 80, rows: 24 }) });
        for round in 0..10 {
            let mut running = begin(&client, &StartRequest { pty, ..sh(&script) }).await;
            running.words(1).await;
            signal(&client, running.pid, 10, SignalScope::Tree).await.unwrap();
            while running.step().await.unwrap().is_none() {}
            let text = String::from_utf8_lossy(&running.stdout);
            assert!(text.contains("code 7"), "round {round}: {text}");
        }
    }
}

#[tokio::test]
async fn a_tree_that_is_asked_to_stop_may_answer_for_itself() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon);
        let script = "trap 'echo asked' TSTP; echo ready; while :; do sleep 0.01; done";
        let mut running = begin(&client, &sh(script)).await;
        running.words(1).await;
        signal(&client, running.pid, 20, SignalScope::Tree).await.unwrap();
        assert_eq!(running.words(2).await, ["ready", "asked"]);
        signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
        running.end().await;
    }
}

#[tokio::test]
async fn every_signal_can_be_sent_by_its_number() {
    let daemon = Daemon::start(&[]);
    // In JSON only those with names can be written.
    let client = Client::new(&daemon, Wire::Grpc);
    // Those that end a process which does nothing about them; 32 and 33 are the C library's.
    let harmless = [17, 18, 19, 20, 21, 22, 23, 28, 32, 33];
    for number in (1..=64).filter(|number| !harmless.contains(number)) {
        let running = begin(&client, &start("sleep", &["1000"])).await;
        signal(&client, running.pid, number, SignalScope::Group).await.unwrap();
        match kind(&running.end().await) {
            Kind::Signalled(Signalled { signal, .. }) => assert_eq!(signal, number),
            other => panic!("{number}: {other:?}"),
        }
    }
    let running = begin(&client, &start("sleep", &["1000"])).await;
    let failure = signal(&client, running.pid, 65, SignalScope::Process).await.unwrap_err();
    assert_eq!(failure.message, "invalid signal: 65");
    signal(&client, running.pid, 9, SignalScope::Process).await.unwrap();
}

#[tokio::test]
async fn a_daemon_that_forked_twice_and_began_a_session_dies_with_its_tree() {
    let Some(base) = Base::with(&[]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    // Nothing but the control group still tells where it came from.
    let script = "setsid sh -c 'setsid sleep 1000 & echo $!' & wait; sleep 1000";
    let mut running = begin(&client, &sh(script)).await;
    let orphan = running.pids(1).await[0];
    assert!(lives(orphan));
    signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
    dies(orphan);
    assert_eq!(running.end().await.status, "signal: killed");
    eventually("its control group goes", || base.leaves().is_empty().then_some(()));
}

#[tokio::test]
async fn a_group_is_removed_when_the_last_descendant_goes() {
    let Some(base) = Base::with(&[]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    let mut running = begin(&client, &sh("setsid sleep 1000 >/dev/null 2>&1 & echo $!")).await;
    let child = running.pids(1).await[0];
    assert_eq!(running.end().await.exit_code, 0);
    assert!(lives(child));
    assert_eq!(base.leaves().len(), 1);
    let descriptors = daemon.descriptors();
    kill_stranger(child);
    eventually("its control group goes", || base.leaves().is_empty().then_some(()));
    eventually("nobody watches it", || (daemon.descriptors() < descriptors).then_some(()));
}

#[tokio::test]
async fn a_daemon_removes_what_others_have_left_and_nothing_else() {
    let Some(base) = Base::with(&[]) else { return };
    fs::create_dir(base.dir.join("user")).unwrap();
    // No process has such a pid.
    let (left, alive, strange) = ("4194305-7", format!("{}-0", std::process::id()), "strange");
    for name in [left, &alive, strange] {
        fs::create_dir(base.dir.join("user").join(name)).unwrap();
    }
    let _daemon = base.daemon();
    let has = |name: &str| base.dir.join("user").join(name).exists();
    assert!(!has(left) && has(&alive) && has(strange));
}

#[tokio::test]
async fn commands_are_in_leaves_of_two_pools_and_those_of_the_system_are_not() {
    let Some(base) = Base::with(&[]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    let group = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        text.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
    };
    let request = start("sleep", &["1000"]);
    let pipes = begin(&client, &request).await;
    let pty = Some(Pty { size: Some(Size { cols: 80, rows: 24 }) });
    let terminal = begin(&client, &StartRequest { pty, ..request.clone() }).await;
    let tag = Some("_system".to_owned());
    let system = begin(&client, &StartRequest { tag, ..request }).await;
    let name = base.dir.file_name().unwrap().to_str().unwrap();
    assert!(group(pipes.pid).contains(&format!("/{name}/user/{}-", daemon.pid())));
    assert!(group(terminal.pid).contains(&format!("/{name}/ptys/{}-", daemon.pid())));
    assert_eq!(group(system.pid), group(daemon.pid()));
    for running in [pipes, terminal, system] {
        signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
        assert_eq!(running.end().await.status, "signal: killed");
    }
    eventually("the groups go", || base.leaves().is_empty().then_some(()));
}

#[tokio::test]
async fn a_timeout_ends_the_children_too() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon);
        // Long enough for a slow machine to begin.
        let timeout = Duration::from_secs(2);
        // As npm: it waits for a child, which has one in a session of its own.
        let script = "sh -c 'setsid sleep 1000 & echo $!; sleep 1000' & echo $!; wait";
        let request = StartRequest { timeout: span(timeout), ..sh(script) };
        let mut running = begin(&client, &request).await;
        let children = running.pids(2).await;
        let end = running.end().await;
        match kind(&end) {
            Kind::TimedOut(out) => {
                assert_eq!((out.timeout, out.signal, out.code), (span(timeout), 15, None));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((end.exit_code, end.exited, &*end.status), (-1, false, "signal: terminated"));
        children.iter().for_each(|pid| dies(*pid));
    }
}

#[tokio::test]
async fn what_ignores_sigterm_is_killed_after_the_grace() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon);
        let times = StartRequest {
            timeout: span(Duration::from_secs(2)),
            kill_grace: span(Duration::from_millis(200)),
            ..StartRequest::default()
        };
        let deaf = "trap '' TERM; echo $$; while :; do sleep 0.05; done";
        // The process itself.
        let request = StartRequest { process: sh(deaf).process, ..times.clone() };
        let end = run(&client, &request).await;
        assert!(matches!(kind(&end), Kind::TimedOut(out) if out.signal == 9), "{end:?}");
        // A child of a process that heeds it: the grace holds for the tree.
        let script = format!("sh -c \"{}\" & trap 'exit 3' TERM; wait", deaf.replace('$', "\\$"));
        let request = StartRequest { process: sh(&script).process, ..times };
        let mut running = begin(&client, &request).await;
        let child = running.pids(1).await[0];
        let end = running.end().await;
        assert!(matches!(kind(&end), Kind::TimedOut(out) if out.code == Some(3)), "{end:?}");
        dies(child);
    }
}

#[tokio::test]
async fn the_deadline_of_the_call_kills_the_process_alone() {
    for (daemon, _base) in both_ways() {
        let client = client(&daemon).with("connect-timeout-ms", "2000");
        let mut running = begin(&client, &sh("sleep 1000 & echo $!; wait")).await;
        let child = running.pids(1).await[0];
        let failure = loop {
            match running.step().await {
                Ok(None) => {}
                Ok(Some(end)) => panic!("{end:?}"),
                Err(failure) => break failure,
            }
        };
        assert_eq!(failure.code, "deadline_exceeded");
        dies(running.pid);
        assert!(lives(child));
        kill_stranger(child);
    }
}

#[tokio::test]
async fn each_ending_is_told_apart() {
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let before = SystemTime::now();
        let end = run(&client, &sh("exit 7")).await;
        assert_eq!(kind(&end), Kind::Exited(Exited { code: 7 }));
        let exited_at: Duration = {
            let at = end.exited_at.unwrap();
            Duration::new(at.seconds.unsigned_abs(), at.nanos.unsigned_abs())
        };
        let before = before.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(exited_at >= before, "{exited_at:?} {before:?}");
        let end = run(&client, &sh("kill -KILL $$")).await;
        assert_eq!(kind(&end), signalled(9, "SIGKILL"));
        let end = run(&client, &sh("kill -40 $$")).await;
        assert_eq!((kind(&end), &*end.status), (signalled(40, "SIG40"), "signal: signal 40"));
        // With upstream's face, and the truth beside it.
        for (command, code, errno, name) in
            [("no-such-command", 127, 2, "not_found"), ("/etc", 126, 13, "permission_denied")]
        {
            let end = run(&client, &start(command, &[])).await;
            assert_eq!((end.exit_code, end.exited), (code, true));
            match kind(&end) {
                Kind::SpawnFailed(failed) => {
                    assert_eq!(
                        (failed.errno, &*failed.kind, &*failed.stage),
                        (errno, name, "exec")
                    );
                }
                other => panic!("{other:?}"),
            }
        }
        let timeout = span(Duration::from_millis(50));
        let end = run(&client, &StartRequest { timeout, ..start("sleep", &["1000"]) }).await;
        assert!(matches!(kind(&end), Kind::TimedOut(out) if out.signal == 15));
    }
}

#[tokio::test]
async fn limits_that_make_no_sense_name_their_field() {
    let daemon = Daemon::start(&["-no-cgroups"]);
    let client = client(&daemon);
    let rlimit = |name: &str, soft, hard| Limits {
        rlimits: vec![Rlimit { name: name.to_owned(), soft, hard }],
        ..Limits::default()
    };
    for (limits, words) in [
        (Limits { memory_bytes: Some(1), ..Limits::default() }, "`limits.memory_bytes` is 1"),
        (Limits { pids: Some(0), ..Limits::default() }, "`limits.pids` is 0"),
        (Limits { cpu_millis: Some(9), ..Limits::default() }, "`limits.cpu_millis` is 9"),
        (rlimit("files", None, None), "`limits.rlimits[0]` names no limit: 'files'"),
        (rlimit("core", Some(2), Some(1)), "`limits.rlimits[0]` has a soft limit of core"),
    ] {
        let failure = refused(&client, &limited(sh("true"), limits)).await;
        assert_eq!(failure.code, "invalid_argument");
        assert!(failure.message.contains(words), "{failure:?}");
    }
    for (request, field) in [
        (StartRequest { timeout: span(Duration::ZERO), ..sh("true") }, "`timeout`"),
        (
            StartRequest { kill_grace: span(Duration::from_secs(3601)), ..sh("true") },
            "`kill_grace`",
        ),
    ] {
        let failure = refused(&client, &request).await;
        assert_eq!(failure.code, "invalid_argument");
        assert!(failure.message.contains(field), "{failure:?}");
    }
    let negative = Some(pbjson_types::Duration { seconds: -1, nanos: 0 });
    let failure = refused(&client, &StartRequest { timeout: negative, ..sh("true") }).await;
    assert_eq!(failure.code, "invalid_argument");
}

#[tokio::test]
async fn limits_that_cannot_be_had_are_refused_and_say_why() {
    let memory = Limits { memory_bytes: Some(64 << 20), ..Limits::default() };
    let daemon = Daemon::start(&["-no-cgroups"]);
    let failure = refused(&client(&daemon), &limited(sh("true"), memory.clone())).await;
    assert_eq!(failure.code, "failed_precondition");
    for words in ["`limits.memory_bytes`", "-no-cgroups"] {
        assert!(failure.message.contains(words), "{failure:?}");
    }
    let daemon = Daemon::start(&["-cgroup-root", "/tmp"]);
    let pids = Limits { pids: Some(10), ..Limits::default() };
    let failure = refused(&client(&daemon), &limited(sh("true"), pids)).await;
    assert_eq!(failure.code, "failed_precondition");
    assert!(failure.message.contains("/tmp is no cgroup v2 file system"), "{failure:?}");
    let Some(base) = Base::with(&[]) else { return };
    let daemon = base.daemon();
    let system = StartRequest { tag: Some("_system".to_owned()), ..limited(sh("true"), memory) };
    let failure = refused(&client(&daemon), &system).await;
    assert_eq!(failure.code, "failed_precondition");
    assert!(failure.message.contains("_system"), "{failure:?}");
}

#[tokio::test]
async fn rlimits_hold_for_each_process_and_need_no_cgroup() {
    let daemon = Daemon::start(&["-no-cgroups"]);
    let client = client(&daemon);
    let rlimit = |name: &str, soft, hard| Rlimit { name: name.to_owned(), soft, hard };
    let rlimits = vec![
        rlimit("RLIMIT_NOFILE", Some(50), Some(60)),
        rlimit("core", Some(0), Some(0)),
        rlimit("Stack", Some(1 << 20), None),
    ];
    let limits = Limits { rlimits, ..Limits::default() };
    let hard = "ulimit -Hs";
    let script = format!("sh -c 'ulimit -n; ulimit -Hn; ulimit -c; ulimit -s; {hard}'");
    let request = limited(sh(&script), limits);
    if is_root() {
        let mut running = begin(&client, &request).await;
        assert_eq!(running.words(5).await, ["50", "60", "0", "1024", "unlimited"]);
    }
    if able_as_root() && able("the user nobody", nobody_is_there()) {
        // Set with the daemon's rights, so that a user cannot raise it again.
        let client = client.with("authorization", &basic("nobody"));
        let mut running = begin(&client, &request).await;
        assert_eq!(running.words(5).await, ["50", "60", "0", "1024", "unlimited"]);
    }
}

fn nobody_is_there() -> bool {
    nix::unistd::User::from_name("nobody").is_ok_and(|user| user.is_some())
}

#[tokio::test]
async fn what_a_process_used_is_told_at_its_end() {
    for (daemon, base) in both_ways() {
        let client = client(&daemon);
        let script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 0";
        let usage = run(&client, &sh(&format!("sh -c '{script}'; exit 0"))).await.usage.unwrap();
        let cpu = Duration::try_from(usage.cpu_user.unwrap()).unwrap();
        assert!(cpu > Duration::from_millis(5) && cpu < Duration::from_secs(60), "{cpu:?}");
        let counted = base.is_some_and(|base| base.controllers.contains("memory"));
        // Without a group of its own it is not known.
        let peak = if counted { 100_000..1 << 30 } else { 0..1 };
        assert!(peak.contains(&usage.memory_peak_bytes), "{usage:?}");
        assert_eq!(usage.whole_tree, counted);
        assert_eq!((usage.memory_bytes, usage.pids), (0, 0));
    }
}

#[tokio::test]
async fn a_memory_hog_ends_as_oom_killed_and_a_kill_does_not() {
    let Some(base) = Base::with(&["memory", "pids"]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    let limit = 48 << 20;
    let limits = Limits { memory_bytes: Some(limit), ..Limits::default() };
    // tail keeps its last line, which is all of it. It is not the process itself that eats.
    let hog = "sh -c 'head -c 400000000 /dev/zero | tail -n 1 | cat >/dev/null'; sleep 1000";
    let end = run(&client, &limited(sh(hog), limits.clone())).await;
    match kind(&end) {
        Kind::OomKilled(OomKilled { kills, memory_limit_bytes }) => {
            assert!(kills > 0);
            assert_eq!(memory_limit_bytes, Some(limit));
        }
        other => panic!("{other:?}, {end:?}"),
    }
    assert_eq!(limits_hit(&end), ["memory.max"]);
    assert_eq!((end.exit_code, end.exited, &*end.status), (-1, false, "signal: killed"));
    let usage = end.usage.unwrap();
    assert!(usage.whole_tree && usage.memory_peak_bytes <= limit + (1 << 20), "{usage:?}");
    assert!(usage.memory_peak_bytes > limit / 2, "{usage:?}");
    let end = run(&client, &limited(sh("kill -9 $$"), limits.clone())).await;
    assert_eq!(kind(&end), signalled(9, "SIGKILL"));
    let running = begin(&client, &limited(start("sleep", &["1000"]), limits)).await;
    signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
    let end = running.end().await;
    assert_eq!((kind(&end), limits_hit(&end).len()), (signalled(9, "SIGKILL"), 0));
    eventually("the groups go", || base.leaves().is_empty().then_some(()));
}

#[tokio::test]
async fn a_fork_bomb_stays_within_its_limit_and_dies_with_its_tree() {
    let Some(base) = Base::with(&["pids"]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    let limits = Limits { pids: Some(40), ..Limits::default() };
    // A shell that cannot fork any more ends.
    let bomb = "bomb() { bomb & bomb & wait; }; (bomb) 2>/dev/null & exec sleep 1000";
    let running = begin(&client, &limited(sh(bomb), limits)).await;
    let leaf = eventually("it has a group", || base.leaves().pop());
    let number = |file: &str, name: &str| {
        let text = fs::read_to_string(leaf.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    eventually("it meets the limit", || (number("pids.events", "max ") > 0).then_some(()));
    assert!(number("pids.current", "") <= 40);
    // The daemon goes on starting others.
    assert_eq!(run(&client, &sh("exit 3")).await.exit_code, 3);
    signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
    let end = running.end().await;
    assert_eq!(limits_hit(&end), ["pids.max"]);
    assert_eq!(kind(&end), signalled(9, "SIGKILL"));
    eventually("all of it goes", || base.leaves().is_empty().then_some(()));
}

#[tokio::test]
async fn a_fork_bomb_without_a_cgroup_dies_with_its_tree() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&["-no-cgroups"]);
    // Bounded by the number of processes of a user whom nobody else is, so that the machine
    // survives it.
    let user = (5_000_000 + std::process::id()).to_string();
    let client = client(&daemon).with("authorization", &basic(&user));
    let rlimits = vec![Rlimit { name: "nproc".to_owned(), soft: Some(60), hard: Some(60) }];
    // A shell that cannot fork ends, so the bomb may die out, and is started again.
    let bomb = "bomb() { sleep 0.01; bomb & bomb & wait; }; echo $$; \
                (while :; do (bomb); done) 2>/dev/null & exec sleep 1000";
    let request = limited(sh(bomb), Limits { rlimits, ..Limits::default() });
    let mut running = begin(&client, &request).await;
    let leader = running.pids(1).await[0];
    let of_session = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let stats = all.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
        let session = format!(" {leader} ");
        stats
            .filter(|stat| {
                let rest = stat.rsplit_once(')').unwrap().1;
                let fields: Vec<&str> = rest.split_whitespace().collect();
                fields[3] == session.trim() && fields[0] != "Z"
            })
            .count()
    };
    eventually("it forks", || (of_session() > 20).then_some(()));
    signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
    assert_eq!(running.end().await.status, "signal: killed");
    eventually("all of it goes", || (of_session() == 0).then_some(()));
}

#[tokio::test]
async fn processor_time_is_limited_to_a_share() {
    let Some(base) = Base::with(&["cpu"]) else { return };
    let daemon = base.daemon();
    let client = client(&daemon);
    let limits = Limits { cpu_millis: Some(100), ..Limits::default() };
    let running = begin(&client, &limited(sh("while :; do :; done"), limits)).await;
    let leaf = eventually("it has a group", || base.leaves().pop());
    assert_eq!(fs::read_to_string(leaf.join("cpu.max")).unwrap().trim(), "10000 100000");
    eventually("it is held back", || {
        let stat = fs::read_to_string(leaf.join("cpu.stat")).unwrap();
        let held = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        (held.unwrap().parse::<u64>().unwrap() > 0).then_some(())
    });
    signal(&client, running.pid, 9, SignalScope::Tree).await.unwrap();
    assert_eq!(running.end().await.status, "signal: killed");
}

#[tokio::test]
async fn the_pools_have_upstreams_weights_and_leave_memory_to_the_daemon() {
    let Some(base) = Base::with(&["cpu", "memory", "pids"]) else { return };
    let _daemon = base.daemon();
    assert_eq!(
        (base.read("user/cpu.weight"), base.read("ptys/cpu.weight")),
        ("50".into(), "200".into())
    );
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total = total.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024;
    let most = total - (total / 8).min(128 << 20);
    for pool in ["user", "ptys"] {
        // The kernel keeps whole pages.
        for file in ["memory.max", "memory.high"] {
            let limit: u64 = base.read(&format!("{pool}/{file}")).parse().unwrap();
            assert!(limit <= most && limit + 65_536 > most, "{file} of {pool}: {limit}, {most}");
        }
        assert_ne!(base.read(&format!("{pool}/pids.max")), "max");
    }
}

#[tokio::test]
async fn the_daemon_is_protected_and_its_commands_are_not() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let score = |pid: u32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    // Below 0 by itself, or what was decided for it: here, for the program that runs the tests.
    let inherited = score(std::process::id());
    let own = score(daemon.pid());
    let able_to = fs::read_to_string("/proc/self/status").unwrap();
    let able_to = able_to.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let resource = u64::from_str_radix(able_to.trim(), 16).unwrap() & (1 << 24) != 0;
    if offered("the right to lower an OOM score", resource) {
        let expected = if inherited.trim() == "0" { "-1000" } else { inherited.trim() };
        assert_eq!(own.trim(), expected);
    }
    let running = begin(&client, &start("sleep", &["1000"])).await;
    assert_eq!(score(running.pid).trim(), "100");
    signal(&client, running.pid, 9, SignalScope::Process).await.unwrap();
}

#[tokio::test]
async fn no_exit_status_is_taken_for_anothers() {
    for (daemon, _base) in both_ways() {
        let client = Client::new(&daemon, Wire::Grpc);
        let mut codes = stream::iter(0..100)
            .map(|code| {
                let client = client.clone();
                // With orphans, which somebody else waits for.
                let script = format!("(true &); (exit 9); exit {code}");
                async move { (code, run(&client, &sh(&script)).await) }
            })
            .buffer_unordered(20);
        while let Some((code, end)) = codes.next().await {
            assert_eq!(kind(&end), Kind::Exited(Exited { code }));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_at_once_leave_no_zombie_no_descriptor_and_no_cgroup() {
    // Fewer where tests are given more patience, in the emulated guests of `make vm`: `orphans` of
    // tests/vm has its thousand there.
    let processes = if common::PATIENCE.as_secs() > 60 { 200 } else { 1000 };
    for (daemon, base) in both_ways() {
        // A connection carries 256 calls.
        let clients: Vec<Client> = (0..5).map(|_| Client::new(&daemon, Wire::Grpc)).collect();
        for client in &clients {
            run(client, &sh("true")).await;
        }
        let before = daemon.descriptors();
        let running: Vec<Running> = stream::iter(0..processes)
            .map(|number| {
                let client = clients[number % clients.len()].clone();
                async move { begin(&client, &start("sleep", &["1000"])).await }
            })
            .buffer_unordered(20)
            .collect()
            .await;
        let pids: HashSet<u32> = running.iter().map(|running| running.pid).collect();
        assert_eq!(pids.len(), processes);
        if let Some(base) = &base {
            assert_eq!(base.leaves().len(), processes);
        }
        // Without a group each look at a tree is one at the whole machine.
        let scope = if base.is_some() { SignalScope::Tree } else { SignalScope::Group };
        let ends = stream::iter(running.into_iter().enumerate())
            .map(|(number, running)| {
                let client = clients[number % clients.len()].clone();
                async move {
                    signal(&client, running.pid, 9, scope).await.unwrap();
                    running.end().await
                }
            })
            .buffer_unordered(20);
        assert_eq!(
            ends.filter(|end| std::future::ready(end.status == "signal: killed")).count().await,
            processes
        );
        // A child is its thread's, and those of a pool make them.
        for task in directories(Path::new(&format!("/proc/{}/task", daemon.pid()))) {
            let children = fs::read_to_string(task.join("children")).unwrap_or_default();
            assert_eq!(children, "", "{}", task.display());
        }
        for pid in pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            assert!(!status.contains(&format!("PPid:\t{}\n", daemon.pid())), "{status}");
        }
        let listed = in_time("the list is empty", async || {
            let list: ListResponse = clients[0].unary(LIST, &ListRequest::default()).await.unwrap();
            list.processes.is_empty().then_some(())
        });
        listed.await;
        eventually("the descriptors go", || (daemon.descriptors() <= before).then_some(()));
        if let Some(base) = &base {
            eventually("the groups go", || base.leaves().is_empty().then_some(()));
        }
    }
}
