//! What must die dies, and what is asked for is done: against programs that hide, on machines that
//! lack something, and with a daemon that is short of descriptors.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    ffi::OsStr,
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use common::{
    Daemon, PATIENCE, able, able_as_root, basic, eventually,
    house::{House, Mounted, written},
    is_root, noise, offered,
    process::{
        Running, SEND_SIGNAL, START, With, begin, close_stdin, connect_from, list, pid, refused,
        send, sh, start, state,
    },
    raw::Raw,
    rpc::{Client, Failure, Messages, Wire},
    seccomp,
};
use envd::proto::{
    filesystem::{
        ArchiveRequest, ArchiveResponse, CopyRequest, CopyResponse, WatchDirRequest,
        WatchDirResponse, watch_dir_response,
    },
    process::{
        Limits, OutputOptions, ProcessInput, ProcessSelector, Rlimit, SendSignalRequest,
        SendSignalResponse, SignalScope, StartRequest, StartResponse, process_input::Input,
        process_selector::Selector,
    },
};
use prost::Message;

const SIGKILL: i32 = 9;
const SIGUSR1: i32 = 10;
const SIGTERM: i32 = 15;
const COPY: &str = "/filesystem.Filesystem/Copy";

/// A program that writes its pid into the file that its argument names, and whose main thread exits
/// while another one runs on.
const MAIN_THREAD_EXITS: &str = "
import ctypes, os, platform, sys, threading, time
def run():
    while True:
        time.sleep(0.01)
threading.Thread(target=run).start()
with open(sys.argv[1] + '.new', 'w') as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + '.new', sys.argv[1])
ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)
";

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

async fn signal(
    client: &Client,
    process: u32,
    signal: i32,
    scope: SignalScope,
) -> Result<(), Failure> {
    let request = SendSignalRequest {
        process: pid(process),
        signal,
        scope: scope.into(),
        ..SendSignalRequest::default()
    };
    client.unary::<_, SendSignalResponse>(SEND_SIGNAL, &request).await.map(|_| ())
}

/// With this time and a short grace.
fn limited(request: StartRequest, timeout: Duration) -> StartRequest {
    let kill_grace = Some(Duration::from_millis(200).into());
    StartRequest { timeout: Some(timeout.into()), kill_grace, ..request }
}

/// The pid in a file, once it is there.
fn pid_in(file: &Path) -> u32 {
    eventually("a program has begun", || fs::read_to_string(file).ok()?.trim().parse().ok())
}

/// Whether nothing of a process runs any more: the state of its main thread says little.
fn is_dead(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| fs::read(task.path().join("stat")).ok()).all(|stat| {
        let close = stat.iter().rposition(|byte| *byte == b')').unwrap();
        matches!(stat.get(close + 2), Some(b'Z' | b'X') | None)
    })
}

fn dies(process: u32, what: &str) {
    eventually(&format!("{what} dies ({process})"), || is_dead(process).then_some(()));
}

fn kill(process: u32) {
    let process = nix::unistd::Pid::from_raw(i32::try_from(process).unwrap());
    let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
}

/// The processes of a user.
fn of_user(uid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == uid));
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| !is_dead(*pid)).collect()
}

#[tokio::test]
async fn a_name_that_is_not_utf8_hides_no_process() {
    let daemon = Daemon::start(&["-no-cgroups"]);
    let client = client(&daemon);
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("pid");
    // What is told of it in /proc is the name of the script: Latin-1, and UTF-8 that the kernel cuts
    // in the middle of a letter.
    for name in [&b"caf\xe9"[..], "überprüfungsläufer".as_bytes(), b"a) R 1 (b", b"\xff\n\xfe"] {
        let program = tmp.path().join(OsStr::from_bytes(name));
        let script = format!(
            "#!/bin/sh\necho $$ >{0}.new; mv {0}.new {0}\nwhile :; do sleep 0.01; done\n",
            file.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let dir = tmp.path().display();
        let find = format!("for f in {dir}/*; do [ -x \"$f\" ] && ");
        let leader = sh(&format!("{find} exec \"$f\"; done"));
        let child = sh(&format!("{find} \"$f\" & done; sleep 1000"));
        for (what, request, kill) in [
            ("the leader", &leader, true),
            ("the child", &child, true),
            ("the leader of a timeout", &leader, false),
            ("the child of a timeout", &child, false),
        ] {
            let _ = fs::remove_file(&file);
            let request = match kill {
                true => request.clone(),
                false => limited(request.clone(), Duration::from_secs(1)),
            };
            let running = begin(&client, &request).await;
            let hidden = pid_in(&file);
            let comm = fs::read(format!("/proc/{hidden}/comm")).unwrap();
            assert_eq!(comm[..name.len().min(15)], name[..name.len().min(15)]);
            if kill {
                signal(&client, running.pid, SIGKILL, SignalScope::Tree).await.unwrap();
            }
            running.end().await;
            dies(hidden, what);
        }
        fs::remove_file(&program).unwrap();
    }
}

#[tokio::test]
async fn a_main_thread_that_has_exited_hides_no_process() {
    if !able("python3", Command::new("python3").arg("--version").output().is_ok()) {
        return;
    }
    let daemon = Daemon::start(&["-no-cgroups"]);
    let client = client(&daemon);
    let tmp = tempfile::tempdir().unwrap();
    let (program, file) = (tmp.path().join("program.py"), tmp.path().join("pid"));
    fs::write(&program, MAIN_THREAD_EXITS).unwrap();
    let run = format!("python3 {} {}", program.display(), file.display());
    let (leader, child) = (format!("exec {run}"), format!("{run} & sleep 1000"));
    for (what, script, kill) in [
        ("the leader", &leader, true),
        ("the child", &child, true),
        ("the leader of a timeout", &leader, false),
        ("the child of a timeout", &child, false),
    ] {
        let _ = fs::remove_file(&file);
        let request = match kill {
            true => sh(script),
            false => limited(sh(script), Duration::from_secs(2)),
        };
        let running = begin(&client, &request).await;
        let hidden = pid_in(&file);
        eventually("its main thread exits", || (state(hidden) == Some('Z')).then_some(()));
        assert!(!is_dead(hidden));
        if kill {
            signal(&client, running.pid, SIGKILL, SignalScope::Tree).await.unwrap();
        }
        running.end().await;
        dies(hidden, what);
    }
}

#[tokio::test]
async fn children_that_leave_the_session_as_soon_as_they_are_forked_die_with_their_tree() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&["-no-cgroups"]);
    // Of a user whom nobody else is, to find what is left.
    let uid = 6_000_000 + std::process::id();
    let client = client(&daemon).with("authorization", &basic(&uid.to_string()));
    for round in 0..10 {
        // Each has a session of its own at once, and no parent that is known once that is killed.
        let script = "for i in $(seq 300); do setsid sleep 1000 & done; sleep 1000";
        let running = begin(&client, &sh(script)).await;
        eventually("it forks", || (of_user(uid).len() > 20).then_some(()));
        signal(&client, running.pid, SIGKILL, SignalScope::Tree).await.unwrap();
        running.end().await;
        let what = format!("nothing is left in round {round}");
        eventually(&what, || of_user(uid).is_empty().then_some(()));
    }
}

#[tokio::test]
async fn what_leaves_the_session_and_loses_its_parents_in_the_grace_dies_after_it() {
    for deaf_leader in [true, false] {
        let daemon = Daemon::start(&["-no-cgroups"]);
        let client = client(&daemon);
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("pid");
        // SIGTERM ends its parent; it ignores it and leaves only its session to be known by, in
        // which it goes on as a child of its own.
        let deaf = format!(
            "trap '' TERM; while :; do sh -c 'echo $$ >{0}.new; mv {0}.new {0}; sleep 1'; done",
            file.display()
        );
        let parent = format!("setsid sh -c \"{}\" & wait", deaf.replace('$', "\\$"));
        let leader = if deaf_leader { "trap '' TERM;" } else { "" };
        let script =
            format!("{leader} sh -c '{}' & wait; sleep 1000", parent.replace('\'', "'\\''"));
        let request = limited(sh(&script), Duration::from_secs(2));
        let running = begin(&client, &request).await;
        pid_in(&file);
        running.end().await;
        eventually("nothing is left", || {
            let text = format!("{}.new", file.display());
            let processes = fs::read_dir("/proc").unwrap().flatten();
            let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
            let found = lines.filter(|line| String::from_utf8_lossy(line).contains(&text)).count();
            (found == 0).then_some(())
        });
    }
}

#[tokio::test]
async fn without_proc_a_tree_is_not_said_to_have_finished() {
    if !able("root and unshare", is_root() && Command::new("unshare").arg("-V").output().is_ok()) {
        return;
    }
    let envd = Daemon::command(&["--listen", "tcp://127.0.0.1:0", "-no-cgroups"]);
    let mut command = Command::new("unshare");
    let script = "umount -l /proc && exec \"$@\"";
    command.args(["-m", "--propagation", "private", "sh", "-c", script, "sh"]);
    command.arg(envd.get_program()).args(envd.get_args());
    let daemon = Daemon::spawn(&mut command);
    let client = client(&daemon);
    let mut running = begin(&client, &sh("sleep 1000 & echo $!; wait")).await;
    running.until(|said| said.stdout.ends_with(b"\n")).await;
    let child: u32 = running.said.stdout().trim().parse().unwrap();
    let failure = signal(&client, running.pid, SIGKILL, SignalScope::Tree).await.unwrap_err();
    assert!(failure.message.contains("/proc"), "{failure:?}");
    assert!(failure.message.contains("process group"), "{failure:?}");
    running.end().await;
    dies(child, "a child of the group");
    // A time limit does what can be done.
    let end = begin(&client, &limited(start("sleep", &["1000"]), Duration::from_millis(50))).await;
    assert_eq!(end.end().await.1.status, "signal: terminated");
}

#[tokio::test]
async fn what_a_killed_daemon_has_stopped_goes_on_when_the_next_one_starts() {
    const TRIES: usize = 200;
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir_all(tmp.path().join("run")).unwrap();
    let root = tmp.path().to_str().unwrap();
    let args = ["-no-cgroups", "--guest-root", root];
    let count = |pids: &[u32]| pids.iter().filter(|pid| state(**pid) == Some('T')).count();
    for _ in 0..TRIES {
        let daemon = Daemon::start(&args);
        let client = client(&daemon);
        // Many, so that it takes a while until all have been stopped and go on.
        let script = "trap '' USR1; for i in $(seq 150); do sleep 1000 & echo $!; done; wait";
        let mut running = begin(&client, &sh(script)).await;
        running.until(|said| said.stdout().lines().count() == 150).await;
        let said = running.said.stdout().to_owned();
        let mut pids: Vec<u32> = said.lines().map(|line| line.parse().unwrap()).collect();
        pids.push(running.pid);
        let asked = tokio::spawn({
            let (client, leader) = (client.clone(), running.pid);
            async move { signal(&client, leader, SIGUSR1, SignalScope::Tree).await }
        });
        let pids = tokio::task::spawn_blocking(move || {
            eventually("the first is stopped", || {
                (count(&pids) > 0 || pids.iter().all(|pid| is_dead(*pid))).then_some(())
            });
            daemon.signal(nix::sys::signal::Signal::SIGKILL);
            drop(daemon);
            pids
        });
        let pids = pids.await.unwrap();
        let _ = asked.await;
        let stopped = count(&pids);
        let next = (stopped > 0).then(|| Daemon::start(&args));
        if next.is_some() {
            eventually("all go on", || (count(&pids) == 0).then_some(()));
            let notes = fs::read_dir(tmp.path().join("run/envd/stopped")).unwrap().count();
            assert_eq!(notes, 0);
        }
        pids.into_iter().for_each(kill);
        if next.is_some() {
            return;
        }
    }
    panic!("a daemon was never killed while something was stopped, in {TRIES} tries");
}

/// A place for the control groups of a daemon, emptied and removed at the end.
struct Base(String);

impl Base {
    /// None, and says so, where there is no cgroup v2 that can be written to.
    fn find() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let place = words.next()?;
            (words.next()? == "cgroup2").then(|| place.to_owned())
        });
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let base =
            mount.map(|mount| format!("{mount}/envd-faults-{}-{number}", std::process::id()));
        let base = base.filter(|base| fs::create_dir(base).is_ok());
        offered("root and a cgroup v2 that can be written to", base.is_some());
        base.map(Self)
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        fn remove(dir: &Path) {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter(|entry| entry.path().is_dir()).for_each(|entry| remove(&entry.path()));
            let _ = fs::remove_dir(dir);
        }
        let dir = Path::new(&self.0);
        let _ = fs::write(dir.join("cgroup.kill"), "1");
        eventually("the test's control groups go", || {
            remove(dir);
            (!dir.exists()).then_some(())
        });
    }
}

/// The errors with which an old kernel and a filter of a container engine refuse a system call.
const REFUSALS: [i32; 2] = [libc::ENOSYS, libc::EPERM];

/// A daemon of Linux 4.18, as far as its system calls go.
fn old_daemon(errno: i32, args: &[&str]) -> Daemon {
    let mut all = vec!["--listen", "tcp://127.0.0.1:0"];
    all.extend(args);
    let mut command = Daemon::command(&all);
    seccomp::behind(&mut command, &seccomp::newer_than_4_18(errno));
    Daemon::spawn(&mut command)
}

#[tokio::test]
async fn without_new_system_calls_processes_start_and_end_as_ever() {
    for errno in REFUSALS {
        let daemon = old_daemon(errno, &["-no-cgroups"]);
        // One connection for all, so that descriptors can be counted.
        let client = Client::new(&daemon, Wire::Grpc);
        assert!(list(&client).await.is_empty());
        let before = daemon.descriptors();
        // Codes, output and input.
        let (said, end) = begin(&client, &sh("echo out; echo err >&2; exit 7")).await.end().await;
        assert_eq!((said.stdout(), said.stderr(), end.exit_code), ("out\n", "err\n", 7));
        let running = begin(&client, &start("cat", &[])).await;
        let input = ProcessInput { input: Some(Input::Stdin(b"in".to_vec().into())) };
        send(&client, pid(running.pid), Some(input)).await.unwrap();
        close_stdin(&client, pid(running.pid)).await.unwrap();
        let (said, end) = running.end().await;
        assert_eq!((said.stdout(), end.exit_code), ("in", 0));
        let pty = start("tty", &[]).pty(80, 24);
        let (said, _) = begin(&client, &pty).await.end().await;
        assert!(said.pty.starts_with(b"/dev/pts/"), "{said:?}");
        // Only the three descriptors are the child's; the fourth is the directory's that it reads.
        let script = "for fd in /proc/self/fd/*; do echo ${fd##*/}; done";
        let (said, _) = begin(&client, &sh(script)).await.end().await;
        assert_eq!(said.stdout(), "0\n1\n2\n3\n");
        let linked = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/usr", linked.path().join("link")).unwrap();
        let link = linked.path().join("link");
        let request = sh("echo $PWD").cwd(link.to_str());
        assert_eq!(begin(&client, &request).await.end().await.0.stdout(), "/usr\n");
        // Signals.
        for scope in [SignalScope::Process, SignalScope::Group, SignalScope::Tree] {
            let mut running = begin(&client, &sh("sleep 1000 & echo $!; wait")).await;
            running.until(|said| said.stdout.ends_with(b"\n")).await;
            let child: u32 = running.said.stdout().trim().parse().unwrap();
            let leader = running.pid;
            signal(&client, leader, SIGKILL, scope).await.unwrap();
            let (_, end) = running.end().await;
            assert_eq!(end.status, "signal: killed", "{scope:?}");
            match scope {
                SignalScope::Process => kill(child),
                _ => dies(child, "the child"),
            }
            let failure = signal(&client, leader, SIGKILL, scope).await.unwrap_err();
            assert_eq!(failure.code, "not_found");
        }
        let script = "trap 'echo usr1; exit 3' USR1; echo ready; while :; do sleep 0.01; done";
        let mut running = begin(&client, &sh(script)).await;
        running.until_it_says("ready").await;
        signal(&client, running.pid, SIGUSR1, SignalScope::Tree).await.unwrap();
        assert_eq!(running.end().await.1.exit_code, 3);
        // Times.
        let deaf =
            limited(sh("trap '' TERM; sleep 1000 & wait; sleep 1000"), Duration::from_millis(500));
        assert_eq!(begin(&client, &deaf).await.end().await.1.status, "signal: killed");
        let hasty = client.clone().with("connect-timeout-ms", "500");
        let running = begin(&hasty, &start("sleep", &["1000"])).await;
        let leader = running.pid;
        assert_eq!(running.try_end().await.unwrap_err().code, "deadline_exceeded");
        dies(leader, "what has a deadline");
        // Many at a time, each with its own code, and none is left.
        let codes: Vec<_> = (0..50)
            .map(|code| {
                let client = client.clone();
                let script = format!("sleep 0.0{}; exit {code}", code % 10);
                async move { (code, begin(&client, &sh(&script)).await.end().await.1.exit_code) }
            })
            .collect();
        for (code, seen) in futures_util::future::join_all(codes).await {
            assert_eq!(code, seen);
        }
        assert!(list(&client).await.is_empty());
        eventually("the descriptors go", || (daemon.descriptors() <= before + 2).then_some(()));
    }
}

#[tokio::test]
async fn without_pidfds_a_control_group_is_signalled_all_the_same() {
    let Some(base) = Base::find() else { return };
    for errno in REFUSALS {
        let daemon = old_daemon(errno, &["-cgroup-root", &base.0]);
        let client = client(&daemon);
        for number in [SIGTERM, SIGKILL] {
            let mut running = begin(&client, &sh("setsid sleep 1000 & echo $!; wait")).await;
            running.until(|said| said.stdout.ends_with(b"\n")).await;
            let child: u32 = running.said.stdout().trim().parse().unwrap();
            let group = fs::read_to_string(format!("/proc/{child}/cgroup")).unwrap();
            assert!(group.contains("envd-faults"), "{group}");
            signal(&client, running.pid, number, SignalScope::Tree).await.unwrap();
            running.end().await;
            dies(child, "the child");
        }
    }
}

#[tokio::test]
async fn without_new_system_calls_files_are_handled_as_ever() {
    for errno in REFUSALS {
        let house = House::with(old_daemon(errno, &[]));
        let (content, more) = (noise(3 << 20), noise(100_000));
        // New, and over a file that is there; each has its body on the disk.
        for body in [&more, &content, &more] {
            written(house.upload(&house.at("a"), &[], body.clone()).await).await;
            assert_eq!(fs::read(house.dir().join("a")).unwrap(), *body);
        }
        let bytes = house.download(&house.at("a")).await.bytes().await.unwrap();
        assert_eq!(bytes, more);
        house.make_dir(&house.at("d/e/f")).await.unwrap();
        house.rename(&house.at("a"), &house.at("d/e/f/b")).await.unwrap();
        let copy = |from: &str, to: &str| CopyRequest {
            source: house.at(from),
            destination: house.at(to),
            create_only: true,
            ..CopyRequest::default()
        };
        for (from, to) in [("d", "g"), ("d/e/f/b", "h")] {
            let request = copy(from, to);
            let _: CopyResponse = house.client.unary(COPY, &request).await.unwrap();
            let failure = house.client.unary::<_, CopyResponse>(COPY, &request).await.unwrap_err();
            assert_eq!(failure.code, "already_exists");
        }
        assert_eq!(fs::read(house.dir().join("g/e/f/b")).unwrap(), more);
        assert_eq!(fs::read(house.dir().join("h")).unwrap(), more);
        let listed = house.list(&house.at(""), 10).await.unwrap();
        assert_eq!(listed.len(), 9, "{listed:?}");
        assert_eq!(house.stat(&house.at("h")).await.unwrap().size, 100_000);
        let request =
            WatchDirRequest { path: house.at("g"), recursive: true, ..Default::default() };
        let mut events: Messages<WatchDirResponse> =
            house.client.stream("/filesystem.Filesystem/WatchDir", &request).await.unwrap();
        events.next().await.unwrap();
        house.make_dir(&house.at("g/new/dir")).await.unwrap();
        house.put("g/new/dir/last", "");
        loop {
            let message = events.next().await.unwrap().expect("it goes on");
            if let Some(watch_dir_response::Event::Filesystem(event)) = message.event
                && event.name == "new/dir/last"
            {
                break;
            }
        }
        let request = ArchiveRequest { path: house.at("d"), ..ArchiveRequest::default() };
        let mut archived: Messages<ArchiveResponse> =
            house.client.stream("/filesystem.Filesystem/Archive", &request).await.unwrap();
        let mut size = 0;
        while let Some(message) = archived.next().await.unwrap() {
            size += message.encoded_len();
        }
        assert!(size > 100_000);
        house.remove(&house.at("d")).await.unwrap();
        if let Some(disk) = Mounted::tmpfs(&house.at("g/disk"), "size=1m") {
            fs::write(house.dir().join("g/disk/kept"), "x").unwrap();
            for path in [disk.path(), &house.at("g")] {
                house.remove(path).await.unwrap_err();
                assert!(house.dir().join("g/disk/kept").exists(), "{path} was emptied");
            }
        }
        house.remove(&house.at("g")).await.unwrap();
        assert_eq!(house.names(), ["h"]);
        house.is_well().await;
    }
}

#[tokio::test]
async fn a_kill_takes_the_tree_where_that_is_asked_for() {
    let tmp = tempfile::tempdir().unwrap();
    let template = tmp.path().join("template.toml");
    fs::write(&template, "kill_scope = \"tree\"\n").unwrap();
    let template = format!("--template={}", template.display());
    for (args, takes_the_tree) in [
        (&["--kill-scope", "tree"][..], true),
        (&[template.as_str()], true),
        // The command line has the last word.
        (&[template.as_str(), "--kill-scope=process"], false),
        (&[], false),
    ] {
        for groups in [&["-no-cgroups"][..], &[]] {
            let daemon = Daemon::start(&[args, groups].concat());
            let client = client(&daemon);
            let script = "setsid sleep 1000 & echo $!; wait";
            for how in ["SIGKILL", "SIGTERM", "deadline"] {
                let client = match how {
                    "deadline" => client.clone().with("connect-timeout-ms", "1000"),
                    _ => client.clone(),
                };
                let mut running = begin(&client, &sh(script)).await;
                running.until(|said| said.stdout.ends_with(b"\n")).await;
                let child: u32 = running.said.stdout().trim().parse().unwrap();
                let leader = running.pid;
                match how {
                    "SIGKILL" => {
                        signal(&client, leader, SIGKILL, SignalScope::Process).await.unwrap();
                    }
                    "SIGTERM" => {
                        signal(&client, leader, SIGTERM, SignalScope::Process).await.unwrap();
                    }
                    _ => assert_eq!(running.try_end().await.unwrap_err().code, "deadline_exceeded"),
                }
                dies(leader, how);
                match takes_the_tree && how != "SIGTERM" {
                    true => dies(child, how),
                    false => {
                        assert!(!is_dead(child), "{how} with {args:?}");
                        kill(child);
                    }
                }
            }
        }
    }
}

/// A daemon that may have so many descriptors.
fn daemon_of_few(descriptors: usize, args: &[&str]) -> Daemon {
    let mut all = vec!["--listen", "tcp://127.0.0.1:0"];
    all.extend(args);
    let envd = Daemon::command(&all);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {descriptors}; exec \"$@\""), "sh"]);
    command.arg(envd.get_program()).args(envd.get_args());
    Daemon::spawn(&mut command)
}

/// Writes so much, of which most goes to disk.
fn spilling(id: &str, bytes: usize) -> StartRequest {
    let output =
        OutputOptions { memory_bytes: 64 << 10, spill_bytes: 4 << 20, ..OutputOptions::default() };
    StartRequest {
        process_id: id.to_owned(),
        output: Some(output),
        ..start("head", &["-c", &bytes.to_string(), "/dev/zero"])
    }
}

/// How much of the output of a process is there, and how much is gone.
async fn output_of(client: &Client, id: &str) -> (usize, u64) {
    let selector = ProcessSelector { selector: Some(Selector::ProcessId(id.to_owned())) };
    let running = connect_from(client, Some(selector), Some(0)).await.unwrap();
    let mut running = running;
    while running.step().await.unwrap().is_none() {}
    let gone = running.gaps.iter().map(|(from, to)| to - from).sum();
    (running.said.stdout.len(), gone)
}

#[tokio::test]
async fn what_is_retained_on_disk_holds_no_descriptor_and_goes_with_its_process() {
    const LENGTH: usize = 2 << 20;
    let tmp = tempfile::tempdir().unwrap();
    let spill = tmp.path().join("spill");
    let args = ["--spill-dir", spill.to_str().unwrap(), "--max-retained", "30"];
    let daemon = daemon_of_few(128, &args);
    let client = client(&daemon);
    begin(&client, &spilling("first", LENGTH)).await.end().await;
    let before = daemon.descriptors();
    // Each would hold eight, and there are 128 in all.
    for number in 0..40 {
        begin(&client, &spilling(&format!("p{number}"), LENGTH)).await.end().await;
    }
    assert!(daemon.descriptors() <= before + 2, "{} after {before}", daemon.descriptors());
    for number in 10..40 {
        assert_eq!(output_of(&client, &format!("p{number}")).await, (LENGTH, 0));
    }
    let files = || {
        let own = fs::read_dir(&spill).unwrap().flatten().map(|entry| entry.path());
        own.flat_map(|own| fs::read_dir(own).unwrap().flatten()).count()
    };
    // Eight segments each, of those that are retained.
    eventually("the files of others go", || (files() <= 31 * 9).then_some(()));
    assert!(files() > 0);
    for entry in fs::read_dir(&spill).unwrap().flatten() {
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o700);
        for file in fs::read_dir(entry.path()).unwrap().flatten() {
            assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        }
    }
    // Also what one leaves that is killed: the next one removes it.
    daemon.signal(nix::sys::signal::Signal::SIGKILL);
    drop(daemon);
    assert!(fs::read_dir(&spill).unwrap().count() > 0);
    let mut next = Daemon::start(&args);
    eventually("it is removed", || (fs::read_dir(&spill).unwrap().count() == 0).then_some(()));
    // And one that is asked to end removes its own.
    begin(&Client::new(&next, Wire::Grpc), &spilling("last", LENGTH)).await.end().await;
    assert!(fs::read_dir(&spill).unwrap().count() > 0);
    next.signal(nix::sys::signal::Signal::SIGTERM);
    next.wait();
    assert_eq!(fs::read_dir(&spill).unwrap().count(), 0);
}

#[tokio::test]
async fn a_full_disk_takes_new_output_in_place_of_what_is_retained() {
    const LENGTH: usize = 3 << 20;
    let tmp = tempfile::tempdir().unwrap();
    let at = tmp.path().join("small");
    let Some(small) = Mounted::tmpfs(at.to_str().unwrap(), "size=8m,mode=700") else { return };
    let daemon = Daemon::start(&["--spill-dir", small.path()]);
    let client = client(&daemon);
    for number in 0..5 {
        let id = format!("p{number}");
        begin(&client, &spilling(&id, LENGTH)).await.end().await;
        assert_eq!(output_of(&client, &id).await, (LENGTH, 0), "{id}");
    }
    let (there, gone) = output_of(&client, "p0").await;
    assert!(there < LENGTH && gone == (LENGTH - there) as u64, "{there} {gone}");
}

/// Sends a request on a connection that stays open; the status line of the answer, which is read whole.
fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    head.lines().next().unwrap().to_owned()
}

#[test]
fn a_call_for_files_without_descriptors_closes_idle_connections() {
    const DESCRIPTORS: usize = 64;
    let daemon = daemon_of_few(DESCRIPTORS, &[]);
    let tmp = tempfile::tempdir().unwrap();
    let open = || {
        let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
        let answer = ask(&mut stream, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n");
        assert!(answer.contains(" 204 "), "{answer}");
        stream
    };
    let mut idle = Vec::new();
    // Without the last descriptor accepting would fail, and close idle connections by itself.
    while daemon.descriptors() < DESCRIPTORS - 2 {
        idle.push(open());
    }
    // The last one is the youngest, and the last to be closed.
    let mut last = open();
    assert_eq!(daemon.descriptors(), DESCRIPTORS - 1);
    for number in 0..40 {
        let upload = format!(
            "POST /files?path={}/{number} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\ncontent-length: 1\r\n\r\nx",
            tmp.path().display()
        );
        let answer = ask(&mut last, &upload);
        assert!(answer.contains(" 200 "), "{answer}");
    }
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 40);
}

#[tokio::test]
async fn a_start_without_descriptors_is_resource_exhausted() {
    let daemon = daemon_of_few(64, &["-no-cgroups"]);
    let client = Client::new(&daemon, Wire::Grpc);
    let mut all = Vec::new();
    let failure = loop {
        match client.stream::<_, StartResponse>(START, &start("sleep", &["1000"])).await {
            Ok(messages) => match Running::of(messages).await {
                Ok(running) => all.push(running),
                Err(failure) => break failure,
            },
            Err(failure) => break failure,
        }
        assert!(all.len() < 64);
    };
    assert_eq!(failure.code, "resource_exhausted", "{failure:?}");
    assert!(failure.message.contains("too many open files"), "{failure:?}");
    assert!(!all.is_empty());
    for running in all {
        kill(running.pid);
        running.end().await;
    }
    assert_eq!(begin(&client, &sh("exit 5")).await.end().await.1.exit_code, 5);
}

#[tokio::test]
async fn idle_connections_take_no_descriptor_from_a_start() {
    let daemon = daemon_of_few(96, &["-no-cgroups"]);
    let mut idle = Vec::new();
    for _ in 0..150 {
        // Beyond the descriptors the one that has been idle for longest is closed for a new one.
        let mut raw = Raw::open(&daemon).await;
        raw.send("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        assert_eq!(raw.head().await.0, 204);
        idle.push(raw);
    }
    let client = Client::new(&daemon, Wire::Grpc);
    for code in [3, 4, 5] {
        let (_, end) = begin(&client, &sh(&format!("exit {code}"))).await.end().await;
        assert_eq!(end.exit_code, code);
    }
    drop(idle);
}

#[tokio::test]
async fn a_start_without_processes_is_resource_exhausted() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&["-no-cgroups"]);
    let uid = 7_000_000 + std::process::id();
    let client = client(&daemon).with("authorization", &basic(&uid.to_string()));
    let running = begin(&client, &start("sleep", &["1000"])).await;
    let rlimits = vec![Rlimit { name: "nproc".to_owned(), soft: Some(0), hard: Some(0) }];
    let limits = Some(Limits { rlimits, ..Limits::default() });
    let request = StartRequest { limits, ..start("true", &[]) };
    let failure = refused(&client, &request).await;
    assert_eq!(failure.code, "resource_exhausted", "{failure:?}");
    kill(running.pid);
    running.end().await;
}

#[tokio::test]
async fn descendants_that_live_on_take_no_descriptor_from_a_start() {
    let Some(base) = Base::find() else { return };
    let daemon = daemon_of_few(96, &["-cgroup-root", &base.0]);
    let client = client(&daemon);
    // Each leaves a group that is watched until the last process in it ends.
    let script = "setsid sleep 1000 >/dev/null 2>&1 & exit 4";
    for number in 0..150 {
        let (_, end) = begin(&client, &sh(script)).await.end().await;
        assert_eq!(end.exit_code, 4, "{number}");
    }
    assert!(daemon.descriptors() <= 96);
}
