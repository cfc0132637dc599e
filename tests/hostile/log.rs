//! The log: nobody who fails to read it, and nobody who fills it, stalls the daemon.

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{HEALTH, TOKEN, answers, with_many_files};
use crate::common::{
    Daemon, PATIENCE, able, eventually, is_root,
    process::{run, sh},
    rpc::Client,
};

/// A daemon whose stderr is not read; killed on drop.
struct Unread(Child);

impl Unread {
    fn start(command: &mut Command, stderr: OwnedFd, socket: &Path) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let child = command.spawn().unwrap();
        eventually("it listens", || UnixStream::connect(socket).ok());
        Self(child)
    }

    fn ends_on(&mut self, signal: Signal, pid: u32) -> i32 {
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
        eventually("it ends", || self.0.try_wait().unwrap()).code().unwrap_or(-1)
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pipe that is full, so that a write blocks from the first byte on.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&writer, &[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer)
}

async fn works(socket: &Path) {
    let client = Client::unix(socket);
    for _ in 0..20 {
        let (_, end) = run(&client, &sh("true")).await;
        assert_eq!(end.exit_code, 0);
    }
    assert!(answers(UnixStream::connect(socket).unwrap()));
}

#[tokio::test]
async fn a_log_that_nobody_reads_stalls_neither_calls_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let (reader, writer) = full_pipe();
    let mut daemon = Unread::start(&mut Daemon::command(&[&listen, "-verbose"]), writer, &socket);
    works(&socket).await;
    let pid = daemon.0.id();
    assert_eq!(daemon.ends_on(Signal::SIGTERM, pid), 0);
    drop(reader);
}

#[tokio::test]
async fn a_log_whose_reader_has_gone_stalls_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let mut daemon = Unread::start(&mut Daemon::command(&[&listen]), writer, &socket);
    works(&socket).await;
    let pid = daemon.0.id();
    assert_eq!(daemon.ends_on(Signal::SIGTERM, pid), 0);
}

/// Reads everything that is in a file description; it must end.
fn all(reader: OwnedFd) -> String {
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn the_last_lines_are_written_before_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut daemon = Unread::start(&mut Daemon::command(&[&listen]), writer, &socket);
    let pid = daemon.0.id();
    assert_eq!(daemon.ends_on(Signal::SIGTERM, pid), 0);
    let log = all(reader);
    assert!(log.contains("\"ready\"") && log.contains("\"drained\""), "{log}");

    // An error at the start, too.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let status =
        Daemon::command(&[&listen, "--listen=tcp://192.0.2.1:1"]).stderr(writer).status().unwrap();
    assert!(!status.success());
    let log = all(reader);
    assert!(log.contains("192.0.2.1"), "{log}");
}

#[tokio::test]
async fn pid_1_reaps_and_ends_although_nobody_reads_its_log() {
    let unshare = ["--pid", "--mount", "--net", "--mount-proc", "--fork", "--kill-child"];
    let works_here = Command::new("unshare").args(unshare).arg("true").output();
    if !able(
        "root and unshare(1), for namespaces",
        is_root() && works_here.is_ok_and(|output| output.status.success()),
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("unix://{}", socket.display());
    let (reader, writer) = full_pipe();
    let mut command = Command::new("unshare");
    command.args(unshare).arg(env!("CARGO_BIN_EXE_envd"));
    command.args(["init", "--no-clock", "--mmds=none", "--listen", &listen]).process_group(0);
    let mut init = Unread::start(&mut command, writer, &socket);
    works(&socket).await;
    let children = |pid: u32| -> Vec<u32> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        text.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    };
    let pid_1 = children(init.0.id())[0];
    let first = children(pid_1)[0];
    // It has something to say about this, and cannot.
    kill(Pid::from_raw(i32::try_from(first).unwrap()), Signal::SIGKILL).unwrap();
    eventually("another daemon", || children(pid_1).into_iter().find(|pid| *pid != first));
    eventually("it listens", || UnixStream::connect(&socket).ok());
    works(&socket).await;
    assert_eq!(init.ends_on(Signal::SIGTERM, pid_1), 0);
    drop(reader);
}

#[test]
fn a_stranger_cannot_fill_the_log() {
    let daemon = locked();
    const TRIES: usize = 200;
    let request =
        b"POST /init HTTP/1.1\r\nhost: localhost\r\ncontent-length: 19\r\n\r\n{\"accessToken\":\"x\"}";
    for _ in 0..TRIES {
        let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
        stream.write_all(request).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 401");
    }
    let summary = "log lines of a peer without the token were suppressed";
    let log = daemon.wait_for_log(summary);
    let written = log.iter().filter(|line| line["message"] == "not initialised").count();
    let most = usize::try_from(envd::telemetry::rate_limit::MAX_PEER_LINES).unwrap();
    assert!((1..=2 * most).contains(&written), "{written} lines");
    let line = log.iter().find(|line| line["message"] == summary).unwrap();
    assert!(line["suppressed"].as_u64().unwrap() > 0, "{line}");
}

fn locked() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    Daemon::start(&[&format!("--access-token-file={}", token.display())])
}

#[test]
fn a_slow_reader_of_the_log_does_not_slow_the_calls() {
    with_many_files();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let (reader, writer) = full_pipe();
    let _daemon = Unread::start(&mut Daemon::command(&[&listen, "-verbose"]), writer, &socket);
    // As a serial console of 115200 baud.
    let mut reader = File::from(reader);
    std::thread::spawn(move || {
        let mut piece = [0; 1100];
        while reader.read(&mut piece).is_ok_and(|read| read > 0) {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    // Each logs some lines at this level; together far more than is read meanwhile.
    let begun = Instant::now();
    for _ in 0..1000 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(HEALTH).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 204");
    }
    assert!(begun.elapsed() < *PATIENCE, "{:?}", begun.elapsed());
}
