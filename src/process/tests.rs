//! Processes as their callers see them. Run as root.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;

use tokio::time::timeout;

use super::journal::Bounds;
use super::*;
use crate::guest::users::Users;

pub(super) fn spec(cmd: &str, args: &[&str]) -> StartSpec {
    let path = "/usr/local/bin:/usr/bin:/bin".to_owned();
    StartSpec {
        cmd: cmd.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        requested_env: BTreeMap::new(),
        requested_cwd: None,
        env: vec![("PATH".to_owned(), path), ("HOME".to_owned(), "/root".to_owned())],
        cwd: PathBuf::from("/"),
        user: Users::system().by_name("root").unwrap(),
        stdio: Stdio::Pipes { stdin: false },
        tag: None,
        id: None,
        output: Bounds { memory: options::OUTPUT_WINDOW, disk: 0, block: false },
        timeout: None,
        time_limit: None,
        limits: Limits::default(),
        charge: None,
    }
}

fn sh(script: &str) -> StartSpec {
    spec("sh", &["-c", script])
}

fn terminal(mut spec: StartSpec) -> StartSpec {
    spec.stdio = Stdio::Pty { cols: 91, rows: 33 };
    spec
}

#[derive(Debug, Default)]
struct Seen {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    pty: Vec<u8>,
    ending: Option<Ending>,
}

impl Seen {
    fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn pty(&self) -> &str {
        std::str::from_utf8(&self.pty).unwrap()
    }

    fn stderr(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }

    fn status(&self) -> &str {
        &self.ending.as_ref().unwrap().status
    }

    fn exit_code(&self) -> i32 {
        self.ending.as_ref().unwrap().exit_code
    }

    fn take(&mut self, channel: Channel, data: &Bytes) {
        match channel {
            Channel::Stdout => self.stdout.extend_from_slice(data),
            Channel::Stderr => self.stderr.extend_from_slice(data),
            Channel::Pty => self.pty.extend_from_slice(data),
        }
    }
}

/// Follows to the end.
async fn follow(mut subscription: Subscription) -> Seen {
    let mut seen = Seen::default();
    while let Some(event) = subscription.next().await {
        match event {
            Event::Output(piece) => seen.take(piece.channel, &piece.data),
            Event::End(end) => seen.ending = Some(end.ending),
            Event::Gap { .. } | Event::Detached => panic!("{event:?}"),
        }
    }
    seen
}

async fn until(subscription: &mut Subscription, text: &str) -> String {
    let mut seen = Seen::default();
    while let Some(event) = subscription.next().await {
        let Event::Output(piece) = event else { panic!("{event:?}, {seen:?}") };
        seen.take(piece.channel, &piece.data);
        let all = [&seen.stdout[..], &seen.stderr, &seen.pty].concat();
        let all = String::from_utf8_lossy(&all).into_owned();
        if all.contains(text) {
            return all;
        }
    }
    panic!("ended without {text:?}: {seen:?}");
}

async fn run(spec: StartSpec) -> Seen {
    let (_, subscription) = start(&manager(), spec).await;
    follow(subscription).await
}

fn manager() -> Arc<Manager> {
    Manager::new(Options::default())
}

async fn start(manager: &Arc<Manager>, spec: StartSpec) -> (Arc<Process>, Subscription) {
    match manager.start(spec).await.unwrap() {
        (Found::Live(process), subscription) => (process, subscription),
        (Found::Ended(_), _) => panic!("it has ended"),
    }
}

fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[tokio::test]
async fn cat_returns_every_byte() {
    let mut spec = spec("cat", &[]);
    spec.stdio = Stdio::Pipes { stdin: true };
    let (process, subscription) = start(&manager(), spec).await;
    let mut state = 1_u32;
    let data: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(64 * 1024)
    .collect();
    let reading = tokio::spawn(follow(subscription));
    process.write_stdin(data.clone().into(), None).await.unwrap();
    process.close_stdin().unwrap();
    process.close_stdin().unwrap();
    assert_eq!(process.write_stdin("x".into(), None).await, Err(InputError::Closed));
    assert_eq!(process.write_pty("x".into(), None).await, Err(InputError::NoTerminal));
    let seen = reading.await.unwrap();
    assert!(seen.stdout == data);
    assert_eq!(seen.status(), "exit status 0");
}

#[tokio::test]
async fn endings_are_told_as_upstream_tells_them() {
    let seen = run(sh("echo out; echo err >&2; exit 7")).await;
    assert_eq!((seen.stdout(), seen.stderr()), ("out\n", "err\n"));
    let ending = seen.ending.unwrap();
    assert_eq!((ending.exit_code, ending.exited), (7, true));
    assert_eq!(ending.error.as_deref(), Some("exit status 7"));
    for (signal, name) in [(9, "killed"), (15, "terminated"), (1, "hangup"), (34, "signal 34")] {
        let seen = run(sh(&format!("kill -{signal} $$"))).await;
        let ending = seen.ending.unwrap();
        assert_eq!((ending.exit_code, ending.exited), (-1, false));
        assert_eq!(ending.status, format!("signal: {name}"));
    }
}

#[tokio::test]
async fn a_terminal_has_its_size_its_user_and_an_echo() {
    let mut spec = terminal(sh("stty size; tty; stat -c %U:%a $(tty); read line; stty size"));
    spec.user = Users::system().by_name("nobody").unwrap();
    let manager = manager();
    let (process, mut subscription) = start(&manager, spec).await;
    let text = until(&mut subscription, ":620").await;
    assert!(text.contains("33 91") && text.contains("/dev/pts/"), "{text}");
    assert!(text.contains("nobody:620"), "{text}");
    assert_eq!(process.write_stdin("x".into(), None).await, Err(InputError::HasTerminal));
    assert_eq!(process.close_stdin(), Err(InputError::CannotCloseTerminal));
    process.resize(100, 40).unwrap();
    process.write_pty("typed\n".into(), None).await.unwrap();
    let seen = follow(subscription).await;
    assert!(seen.pty().contains("typed\r\n") && seen.pty().contains("40 100"), "{}", seen.pty());
    assert_eq!(process.resize(1, 1), Err(ResizeError::Finished));
    let closed = process.write_pty("x".into(), None).await.unwrap_err();
    assert_eq!(closed, InputError::TerminalClosed { pid: process.pid() });
    let (process, _) = start(&manager, super::tests::spec("true", &[])).await;
    assert_eq!(process.resize(1, 1), Err(ResizeError::NoTerminal));
}

#[tokio::test]
async fn a_background_child_does_not_delay_the_end() {
    let seen = run(sh("sleep 30 & echo $!")).await;
    let pid = seen.stdout().trim();
    assert!(is_alive(pid), "the end came only with the background child's");
    assert_eq!(seen.exit_code(), 0);
    // One that writes without end neither.
    let seen = run(sh("yes & echo $! >&2")).await;
    assert!(is_alive(seen.stderr().trim()));
    for pid in [pid, seen.stderr().trim()] {
        let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

#[tokio::test]
async fn the_last_words_of_a_process_are_not_lost() {
    let script = "trap 'head -c 50000 /dev/zero; exit 3' TERM; echo ready; sleep 30 & wait";
    let (process, mut subscription) = start(&manager(), sh(script)).await;
    until(&mut subscription, "ready").await;
    process.signal(15).unwrap();
    let seen = follow(subscription).await;
    assert_eq!((seen.stdout.len(), seen.exit_code()), (50_000, 3));
}

#[tokio::test]
async fn a_slow_subscriber_gets_everything_before_the_end() {
    let (_, mut subscription) =
        start(&manager(), spec("head", &["-c", "5000000", "/dev/zero"])).await;
    let mut total = 0;
    while let Some(Event::Output(piece)) = subscription.next().await {
        total += piece.data.len();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(total, 5_000_000);
}

#[tokio::test]
async fn kill_0_hits_that_command_alone() {
    let manager = manager();
    let (other, _other) = start(&manager, spec("sleep", &["30"])).await;
    for script in ["kill -9 0", "kill -15 0"] {
        let seen = follow(start(&manager, sh(script)).await.1).await;
        assert!(!seen.ending.unwrap().exited);
    }
    assert!(is_alive(&other.pid().to_string()));
    other.signal(9).unwrap();
}

#[tokio::test]
async fn a_blocked_write_blocks_neither_close_nor_signal() {
    let mut spec = spec("sleep", &["30"]);
    spec.stdio = Stdio::Pipes { stdin: true };
    let manager = manager();
    for close in [true, false] {
        let (process, subscription) = start(&manager, spec.clone()).await;
        let mut writing = {
            let process = Arc::clone(&process);
            tokio::spawn(async move { process.write_stdin(vec![0; 1 << 20].into(), None).await })
        };
        let moment = Duration::from_millis(20);
        timeout(moment, &mut writing).await.unwrap_err();
        // A second one waits its turn, and goes away.
        timeout(moment, process.write_stdin("x".into(), None)).await.unwrap_err();
        assert!(!writing.is_finished());
        if close {
            process.close_stdin().unwrap();
            assert_eq!(writing.await.unwrap(), Err(InputError::Closed));
            process.signal(9).unwrap();
        } else {
            process.signal(9).unwrap();
            let error = writing.await.unwrap().unwrap_err();
            let broken = InputError::BrokenPipe { pid: process.pid() };
            assert!(error == broken || error == InputError::Closed, "{error}");
        }
        assert_eq!(follow(subscription).await.status(), "signal: killed");
        assert_eq!(process.signal(9), Err(SignalError::Finished));
    }
}

#[tokio::test]
async fn a_process_outlives_its_subscribers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("done");
    let script = format!("head -c 3000000 /dev/zero; echo > {}", file.display());
    let manager = manager();
    let (process, subscription) = start(&manager, sh(&script)).await;
    drop(subscription);
    let seen = follow(process.subscribe(Attach::Now).unwrap()).await;
    assert_eq!(seen.exit_code(), 0);
    assert!(file.exists());
    // Nor does it matter that the start itself is dropped.
    let marker = dir.path().join("marker");
    let script = format!("sleep 0.1; echo > {}", marker.display());
    {
        let mut start = Box::pin(manager.start(sh(&script)));
        let waker = std::task::Waker::noop();
        let _ = start.as_mut().poll(&mut std::task::Context::from_waker(waker));
    }
    while !marker.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_tethered_start_that_nobody_waits_for_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("marker");
    let manager = manager();
    let script = format!("echo > {}; sleep 1000", marker.display());
    {
        let mut start = Box::pin(manager.start_tethered(sh(&script)));
        let waker = std::task::Waker::noop();
        let polled = start.as_mut().poll(&mut std::task::Context::from_waker(waker));
        assert!(polled.is_pending());
    }
    timeout(Duration::from_secs(60), settled(&manager, || 0)).await.unwrap();
    // Whether or not it came so far, it is known to have been.
    let [ended] = &manager.list(true)[..] else { panic!("one process was started") };
    assert_eq!(ended.ended().unwrap().ending.status, "signal: killed");
}

#[tokio::test]
async fn a_kill_after_the_grace_waits_its_turn_however_much_waits() {
    let manager = manager();
    let mut spec = sh("trap 'echo asked' TERM; while :; do sleep 0.05; done");
    let (limit, grace) = (Duration::from_millis(500), Duration::from_secs(2));
    spec.time_limit = Some(TimeLimit { timeout: limit, grace });
    let (process, mut subscription) = start(&manager, spec).await;
    until(&mut subscription, "asked").await;
    let held: Vec<_> = (0..crate::blocking::MAX_TREE_THREADS)
        .map(|_| {
            let (release, released) = std::sync::mpsc::channel::<()>();
            manager.trees.run_later(move || {
                // Without progress, others would take its place.
                let pause = Duration::from_millis(50);
                while released.recv_timeout(pause)
                    == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    crate::blocking::progress();
                }
            });
            release
        })
        .collect();
    let waits = async |enough: &(dyn Fn(usize) -> bool + Sync)| {
        while !enough(manager.trees.waiting()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    waits(&|count| count == 0).await;
    for _ in 0..crate::blocking::MAX_WAITING_JOBS {
        manager.trees.run_later(|| ());
    }
    // The kill is the one above the limit.
    let more = |count| count > crate::blocking::MAX_WAITING_JOBS;
    timeout(Duration::from_secs(60), waits(&more)).await.unwrap();
    drop(held);
    let seen = follow(subscription).await;
    assert_eq!(seen.status(), "signal: killed");
    assert!(manager.live(&Selector::Pid(process.pid())).is_none());
}

#[tokio::test]
async fn a_timeout_kills_and_says_so() {
    let mut spec = spec("sleep", &["30"]);
    spec.timeout = Some(Duration::from_millis(50));
    let ending = run(spec.clone()).await.ending.unwrap();
    assert!(ending.timed_out && ending.status == "signal: killed");
    spec.args = vec!["0".to_owned()];
    spec.timeout = Some(Duration::MAX);
    assert!(!run(spec).await.ending.unwrap().timed_out);
}

#[tokio::test]
async fn a_command_that_cannot_be_executed_ends_as_in_a_shell() {
    let seen = run(spec("no-such-command", &["x"])).await;
    assert_eq!(seen.exit_code(), 127);
    assert_eq!(seen.stderr(), "envd: 'no-such-command': No such file or directory\n");
    let seen = run(spec("/etc/passwd", &[])).await;
    assert_eq!((seen.exit_code(), seen.status()), (126, "exit status 126"));
    assert_eq!(seen.stderr(), "envd: '/etc/passwd': Permission denied\n");
    let seen = run(terminal(spec("-x", &[]))).await;
    assert_eq!(seen.exit_code(), 127);
    assert_eq!(seen.pty(), "envd: '-x': No such file or directory\r\n");
}

#[tokio::test]
async fn what_cannot_be_started_is_an_error_that_names_its_cause() {
    let manager = manager();
    let error = async |spec| manager.start(spec).await.unwrap_err().to_string();
    let mut bad = spec("echo", &["a", "b"]);
    bad.cwd = PathBuf::from("/root/secret-place");
    let missing = "cwd '/root/secret-place' does not exist";
    assert_eq!(error(bad.clone()).await, missing);
    assert_eq!(error(terminal(bad.clone())).await, missing);
    bad.cwd = PathBuf::from("/etc/passwd");
    assert_eq!(
        error(bad.clone()).await,
        "error starting process 'echo a b': chdir '/etc/passwd': not a directory"
    );
    assert_eq!(
        error(terminal(bad)).await,
        "error starting pty with command 'echo a b' in dir '/etc/passwd' with '91' cols and \
         '33' rows: chdir '/etc/passwd': not a directory"
    );
    let mut bad = spec("echo", &[]);
    bad.env.push(("A".to_owned(), "\0".to_owned()));
    assert_eq!(
        error(bad).await,
        "error starting process 'echo': exec: environment variable contains NUL: \"A\""
    );
    let long = "x".repeat(200_000);
    let text = error(spec("echo", &[&long])).await;
    assert!(text.ends_with(": fork/exec echo: argument list too long"), "{text}");
    assert_eq!((manager.len(), manager.slots.available_permits()), (0, options::MAX_PROCESSES));
}

#[tokio::test]
async fn no_more_processes_than_the_bound() {
    let manager = Manager::new(Options { max_processes: 2, ..Options::default() });
    let sleep = || spec("sleep", &["1000"]);
    let running = [start(&manager, sleep()).await, start(&manager, sleep()).await];
    let text = manager.start(sh("true")).await.unwrap_err().to_string();
    assert_eq!(text, "too many processes: 2 are running or still hold their output open");
    for (process, subscription) in running {
        process.signal(9).unwrap();
        follow(subscription).await;
    }
    // The place of a process that has ended is free again.
    while manager.slots.available_permits() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    follow(start(&manager, sh("true")).await.1).await;
}

#[tokio::test]
async fn a_user_has_exactly_their_groups_and_their_environment() {
    let mut spec = sh("id -u; id -G; env; echo again > /dev/stderr");
    spec.user = Users::system().by_name("nobody").unwrap();
    spec.cwd = PathBuf::from("/tmp");
    let seen = run(spec).await;
    assert_eq!(seen.stderr(), "again\n");
    let text = seen.stdout();
    assert!(text.starts_with("65534\n65534\n"), "{text}");
    assert!(text.contains("\nPWD=/tmp\n") && text.contains("HOME=/root\n"), "{text}");
}

#[tokio::test]
async fn the_end_is_seen_after_the_process_has_left_the_registry() {
    let manager = manager();
    let mut spec = sh("exit 5");
    spec.tag = Some("job".to_owned());
    let (process, subscription) = start(&manager, spec.clone()).await;
    let pid = Selector::Pid(process.pid());
    let tag = Selector::Tag("job".to_owned());
    follow(subscription).await;
    assert!(manager.live(&pid).is_none() && manager.list(false).is_empty());
    for selector in [&pid, &tag] {
        match manager.find(selector) {
            Some(found @ Found::Ended(_)) => {
                assert!(Arc::ptr_eq(found.record(), process.record()));
                assert_eq!(found.ended().unwrap().ending.exit_code, 5);
            }
            other => panic!("{other:?}"),
        }
    }
    // A late subscriber gets the end at once.
    assert_eq!(follow(process.subscribe(Attach::Now).unwrap()).await.exit_code(), 5);
    // Another start with the tag is what the tag means then.
    spec.args = vec!["-c".to_owned(), "sleep 30".to_owned()];
    let (next, _subscription) = start(&manager, spec).await;
    assert!(matches!(manager.find(&tag), Some(Found::Live(live)) if live.pid() == next.pid()));
    assert!(matches!(manager.find(&pid), Some(Found::Ended(_))));
    next.signal(9).unwrap();
}

#[tokio::test]
async fn a_tag_selects_the_process_started_last_whatever_other_tags_there_are() {
    let manager = manager();
    let mut subscriptions = Vec::new();
    for tag in [Some("a"), Some("b"), None, Some("a"), Some("c")] {
        let mut spec = spec("sleep", &["30"]);
        spec.tag = tag.map(str::to_owned);
        subscriptions.push(start(&manager, spec).await);
    }
    let pid = |index: usize| subscriptions[index].0.pid();
    for (tag, index) in [("a", 3), ("b", 1), ("c", 4)] {
        assert_eq!(manager.live(&Selector::Tag(tag.to_owned())).unwrap().pid(), pid(index));
    }
    assert!(manager.find(&Selector::Tag("d".to_owned())).is_none());
    let listed: Vec<u32> = manager.list(false).iter().map(|found| found.record().pid).collect();
    assert_eq!(listed, (0..5).map(pid).collect::<Vec<_>>());
    for (process, _) in &subscriptions {
        process.signal(9).unwrap();
    }
}

#[tokio::test]
async fn the_last_bytes_of_a_terminal_are_not_lost() {
    let manager = manager();
    for round in 0..50 {
        // Without a shell: the kernel hangs the terminal up when the leader of its session exits.
        let (_, subscription) = manager.start(terminal(spec("seq", &["3000"]))).await.unwrap();
        let seen = follow(subscription).await;
        let lines: Vec<&str> = seen.pty().lines().collect();
        assert_eq!((lines.len(), lines.last()), (3000, Some(&"3000")), "round {round}");
    }
}

#[tokio::test]
async fn a_slow_subscriber_gets_the_last_bytes_of_a_terminal() {
    let (_, mut subscription) = manager().start(terminal(spec("seq", &["300000"]))).await.unwrap();
    let mut all = Vec::new();
    while let Some(Event::Output(piece)) = subscription.next().await {
        all.extend_from_slice(&piece.data);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let all = String::from_utf8(all).unwrap();
    assert_eq!((all.lines().count(), all.lines().last()), (300_000, Some("300000")));
}

/// In a process of its own, because it counts what the other tests have too.
#[test]
fn many_runs_leave_nothing_behind() {
    let alone = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture"])
        .arg(format!("{}::alone", module_path!().split_once("::").unwrap().1))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&alone.stdout).into_owned();
    let errors = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(alone.status.success() && text.contains("1 passed"), "{text}{errors}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by many_runs_leave_nothing_behind"]
async fn alone() {
    let manager = manager();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..200 {
        if round == 1 {
            before = settled(&manager, descriptors).await;
        }
        let spec = spec("echo", &["hi"]);
        let (process, subscription) = manager.start(terminal(spec.clone())).await.unwrap();
        assert_eq!(follow(subscription).await.pty(), "hi\r\n", "round {round}");
        let zombie = format!("/proc/{}", process.record().pid);
        assert!(!std::path::Path::new(&zombie).exists(), "{zombie}");
        assert_eq!(follow(start(&manager, spec).await.1).await.stdout(), "hi\n");
        let mut bad = super::tests::spec("echo", &[]);
        bad.cwd = PathBuf::from("/nowhere");
        manager.start(bad).await.unwrap_err();
    }
    assert_eq!(settled(&manager, descriptors).await, before);
    // A child is its thread's, and those of the pool make them.
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let children = task.unwrap().path().join("children");
        assert_eq!(std::fs::read_to_string(children).unwrap_or_default(), "");
    }
    assert!(manager.list(false).is_empty());
}

/// Counts when the last tasks have ended.
async fn settled(manager: &Manager, count: impl Fn() -> usize) -> usize {
    while manager.slots.available_permits() < options::MAX_PROCESSES {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    count()
}

#[tokio::test]
async fn ended_processes_are_forgotten_after_their_time_and_beyond_their_number() {
    let retention = Duration::from_millis(200);
    let manager = Manager::new(Options { retention, max_retained: 3, ..Options::default() });
    let mut ids = Vec::new();
    for _ in 0..5 {
        let (process, subscription) = start(&manager, sh("seq 1000")).await;
        follow(subscription).await;
        ids.push(process.record().id.clone());
    }
    let kept = |id: &String| manager.find(&Selector::Id(id.clone())).is_some();
    assert_eq!(ids.iter().map(kept).collect::<Vec<_>>(), [false, false, true, true, true]);
    // Nobody asks for them, and their memory goes all the same.
    let used = || manager.output_in_memory();
    assert!(used() > 0);
    timeout(Duration::from_secs(10), async {
        while used() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert!(!ids.iter().any(kept));
}

#[tokio::test]
async fn output_of_ended_processes_goes_first_when_there_is_too_much() {
    let options = Options { output_total: 256 * 1024, ..Options::default() };
    let manager = Manager::new(options);
    let mut ids = Vec::new();
    for _ in 0..4 {
        let (process, subscription) =
            start(&manager, spec("head", &["-c", "200000", "/dev/zero"])).await;
        follow(subscription).await;
        ids.push(process.record().id.clone());
    }
    let ranges: Vec<_> =
        ids.iter().map(|id| manager.find(&Selector::Id(id.clone())).unwrap().range()).collect();
    assert_eq!(ranges[0], (200_000, 200_000), "the oldest has lost its output, and is still known");
    assert!(ranges[3].0 < 200_000, "{ranges:?}");
}
