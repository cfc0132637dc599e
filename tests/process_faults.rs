//! What must die dies, and what is asked for is done: against programs that hide, on machines that
//! lack something, and with a daemon that is short of descriptors.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use common::{
    Daemon, able, able_as_root, basic, eventually, is_root,
    process::{SEND_SIGNAL, begin, pid, sh, start, state},
    rpc::{Client, Failure, Wire},
};
use envd::proto::process::{SendSignalRequest, SendSignalResponse, SignalScope, StartRequest};

const SIGKILL: i32 = 9;
const SIGUSR1: i32 = 10;

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
        for pid in pids {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        if next.is_some() {
            return;
        }
    }
    panic!("a daemon was never killed while something was stopped, in {TRIES} tries");
}
