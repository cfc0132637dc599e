//! Starting, listening and ending.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use common::{
    Daemon, PATIENCE, process,
    raw::Raw,
    rpc::{Client, Failure, WIRES, Wire},
};
use envd::proto::process::{WaitRequest, WaitResponse};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

/// The exit code and output of a daemon that ends by itself.
fn run(args: &[&str]) -> (i32, String, String) {
    let output = Daemon::command(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn health(mut stream: impl Read + Write) {
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
}

#[test]
fn several_listeners_serve_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let unix = format!("unix://{}", socket.display());
    let args = ["--listen", "tcp://127.0.0.1:0", "--listen", "tcp://[::1]:0", "--listen", &unix];
    let daemon = Daemon::start_with(&args);
    let addresses = daemon.addresses();
    assert_eq!(addresses.len(), 3, "{addresses:?}");
    for address in addresses {
        if let Some(tcp) = address.strip_prefix("tcp://") {
            health(TcpStream::connect(tcp).unwrap());
        } else {
            health(std::os::unix::net::UnixStream::connect(&socket).unwrap());
        }
    }
}

#[test]
fn both_wildcards_can_have_the_same_port() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (v4, v6) = (format!("tcp://0.0.0.0:{port}"), format!("tcp://[::]:{port}"));
    let daemon = Daemon::start_with(&["--listen", &v6, "--listen", &v4]);
    health(TcpStream::connect(("127.0.0.1", port)).unwrap());
    health(TcpStream::connect(("::1", port)).unwrap());
    drop(daemon);
    // Alone, the wildcard of IPv6 serves both.
    let _daemon = Daemon::start_with(&["--listen", &v6]);
    health(TcpStream::connect(("127.0.0.1", port)).unwrap());
}

#[test]
fn a_listener_that_cannot_be_had_is_named_and_ends_the_daemon() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("tcp://{}", taken.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a socket").unwrap();
    let live = dir.path().join("live");
    let _live = std::os::unix::net::UnixListener::bind(&live).unwrap();
    let file = format!("unix://{}", file.display());
    let live = format!("unix://{}", live.display());
    for address in [&tcp, &file, &live, "unix:///no/such/dir/s", "tcp://no.such.host.invalid:1"] {
        let (code, _, log) = run(&["--listen", address]);
        assert_eq!(code, 1, "{log}");
        assert!(log.contains(&format!("cannot listen on {address}")), "{log}");
    }
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"not a socket");
    // Optional ones are only warned of, unless none is left.
    let optional = format!("{tcp}?optional");
    let daemon = Daemon::start(&["--listen", &optional]);
    assert_eq!(daemon.addresses().len(), 1);
    let (code, _, log) = run(&["--listen", &optional]);
    assert_eq!(code, 1, "{log}");
}

#[test]
fn a_socket_left_by_a_killed_daemon_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let unix = format!("unix://{}", socket.display());
    drop(Daemon::start_with(&["--listen", &unix]));
    assert!(socket.exists(), "SIGKILL leaves it");
    let _daemon = Daemon::start_with(&["--listen", &unix]);
    health(std::os::unix::net::UnixStream::connect(&socket).unwrap());
}

/// With the kernel's loopback transport the listener is called through itself; without it only
/// the binding can be seen, and the kernel's own table tells whether it listens.
#[test]
fn vsock() {
    use std::os::fd::AsRawFd;
    if !Path::new("/dev/vsock").exists() {
        common::skipped::skip("/dev/vsock");
        return;
    }
    // In a guest the usual port is that of the guest's own daemon.
    let port = 100_000 + std::process::id();
    let address = format!("vsock://{port}");
    let daemon = Daemon::start(&["--listen", &address]);
    assert!(daemon.addresses().contains(&address), "{:?}", daemon.addresses());
    // A second daemon cannot have the same port: the first really is bound to it.
    let (code, _, log) = run(&["--listen", &address]);
    assert_eq!(code, 1, "{log}");
    let taken = format!("cannot listen on {address}: Address already in use");
    assert!(log.contains(&taken), "{log}");
    // VMADDR_CID_LOCAL, which never leaves this kernel.
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Vsock,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let loopback = nix::sys::socket::VsockAddr::new(1, port);
    match nix::sys::socket::connect(socket.as_raw_fd(), &loopback) {
        Ok(()) => health(std::fs::File::from(socket)),
        Err(error) => {
            common::skipped::skip(&format!("vsock's loopback in the kernel ({error})"));
        }
    }
}

/// The time that an end without a grace may take, as a test that shares its machine sees it.
const SOON: Duration = Duration::from_secs(3);

/// Ends the daemon by a signal, within the time for it and with status 0.
fn end(daemon: &mut Daemon, signal: Signal) {
    let start = Instant::now();
    daemon.signal(signal);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

fn shutting_down() -> Failure {
    process::failure("unavailable", "the daemon is shutting down")
}

/// Whether a process lives: not even as a zombie that waits for its parent.
fn lives(pid: u32) -> bool {
    process::state(pid).is_some_and(|state| state != 'Z')
}

#[tokio::test]
async fn sigterm_ends_streams_with_a_status_and_processes_by_signals() {
    // With control groups, where there are any, and without.
    for flags in [&[][..], &["-no-cgroups"]] {
        // A machine may be too slow for a shell's traps within the time before SIGKILL.
        let mut complete = false;
        for _ in 0..SIGTERM_TRIES {
            // Each signal once: to many programs a second one means to end at once.
            let received = signals_until_the_end(flags).await;
            assert!("HUP\nTERM\n".starts_with(&received), "{received}");
            complete = received == "HUP\nTERM\n";
            if complete {
                break;
            }
        }
        assert!(complete, "in none of {SIGTERM_TRIES} runs a shell had the time for both traps");
    }
}

/// How often a shell has the chance to react to SIGHUP and SIGTERM within the 500 ms before SIGKILL.
const SIGTERM_TRIES: usize = 5;

/// Ends a daemon by SIGTERM while commands, streams and a unary call run, and checks how these end. Gives
/// the signals that a shell with traps has noted.
async fn signals_until_the_end(flags: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(flags);
    let client = Client::new(&daemon, Wire::Grpc);
    // One that logs its signals, and two that ignore them: one of these is a grandchild, whose parent
    // ends by them.
    let log = dir.path().join("signals");
    let polite = format!(
        "trap 'echo HUP >> {0}' HUP; trap 'echo TERM >> {0}; exit' TERM; echo up; \
             sleep 1000 & while :; do wait; done",
        log.display()
    );
    let deaf = "trap '' HUP TERM; echo $$ up; while :; do sleep 0.05; done";
    let inner = deaf.replace("$$", "\\$\\$");
    let parent = format!("(trap '' HUP TERM; exec sh -c \"{inner}\") & wait");
    let mut polite = process::begin(&client, &process::sh(&polite)).await;
    polite.until_it_says("up").await;
    let mut pids = Vec::new();
    let mut streams = Vec::new();
    for (wire, script) in WIRES.into_iter().zip([deaf, &parent].into_iter().cycle()) {
        let client = Client::new(&daemon, wire);
        let mut running = process::begin(&client, &process::sh(script)).await;
        running.until_it_says("up").await;
        pids.push(running.pid);
        let said = running.said.stdout().split(' ').next().unwrap().to_owned();
        pids.push(said.parse().unwrap());
        streams.push((wire, running));
    }
    // Another kind of stream, and a unary call that waits.
    let request = envd::proto::filesystem::WatchDirRequest {
        path: dir.path().display().to_string(),
        ..Default::default()
    };
    let mut watch = client
        .stream::<_, envd::proto::filesystem::WatchDirResponse>(
            "/filesystem.Filesystem/WatchDir",
            &request,
        )
        .await
        .unwrap();
    watch.next().await.unwrap();
    let waiting = tokio::spawn({
        let (client, pid) = (client.clone(), pids[0]);
        async move {
            let request = WaitRequest { process: process::pid(pid), ..WaitRequest::default() };
            client.unary::<_, WaitResponse>("/process.Process/Wait", &request).await
        }
    });
    let (mut daemon, ()) = tokio::task::spawn_blocking(move || {
        end(&mut daemon, Signal::SIGTERM);
        (daemon, ())
    })
    .await
    .unwrap();
    for (wire, running) in streams {
        assert_eq!(running.try_end().await.unwrap_err(), shutting_down(), "{wire:?}");
    }
    let watched = common::soon("the watch ends", async {
        loop {
            match watch.next().await {
                Ok(Some(_)) => {}
                ended => break ended,
            }
        }
    });
    assert_eq!(watched.await.unwrap_err(), shutting_down());
    let waited = waiting.await.unwrap();
    assert!(waited.is_err(), "{waited:?}");
    common::eventually("all processes are gone", || {
        (!pids.iter().any(|pid| lives(*pid))).then_some(())
    });
    assert_eq!(daemon.wait().code(), Some(0));
    std::fs::read_to_string(&log).unwrap_or_default()
}

#[tokio::test]
async fn keep_processes_leaves_them_running() {
    let mut daemon = Daemon::start(&["--keep-processes"]);
    let client = Client::new(&daemon, Wire::Grpc);
    let running = process::begin(&client, &process::start("sleep", &["1000"])).await;
    let pid = running.pid;
    let _daemon = tokio::task::spawn_blocking(move || {
        end(&mut daemon, Signal::SIGTERM);
        daemon
    })
    .await
    .unwrap();
    assert_eq!(running.try_end().await.unwrap_err(), shutting_down());
    assert!(lives(pid));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn only_transfers_and_unary_calls_may_have_a_grace_and_only_if_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let head = format!(
        "POST /files?path={} HTTP/1.1\r\nhost: localhost\r\ncontent-type: \
         application/octet-stream\r\ncontent-length: 10\r\n\r\nhello",
        path.display()
    );
    for (flags, status) in [(&["--shutdown-grace", "60"][..], 200), (&[], 503)] {
        let mut daemon = Daemon::start(flags);
        let client = Client::new(&daemon, Wire::Grpc);
        let stream = process::begin(&client, &process::start("sleep", &["1000"])).await;
        let mut upload = Raw::open(&daemon).await;
        upload.send(&head).await;
        common::in_time("it is being written", async || daemon.unnamed(dir.path())).await;
        let start = Instant::now();
        daemon.signal(Signal::SIGTERM);
        assert_eq!(stream.try_end().await.unwrap_err(), shutting_down());
        assert!(start.elapsed() < SOON, "streams end at once");
        if status == 200 {
            daemon.wait_for_log("SIGTERM: draining");
            common::eventually("it no longer accepts", || TcpStream::connect(daemon.tcp()).err());
            upload.send("world").await;
        }
        let answer = upload.answer().await;
        let body = String::from_utf8(answer.body).unwrap();
        assert_eq!(answer.status, status, "{body}");
        assert_eq!(body.contains("the daemon is shutting down"), status == 503, "{body}");
        let code = tokio::task::spawn_blocking(move || daemon.wait().code()).await.unwrap();
        assert_eq!(code, Some(0));
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        match status {
            200 => assert_eq!(std::fs::read(&path).unwrap(), b"helloworld"),
            _ => assert_eq!(left, 0, "half a file"),
        }
        let _ = std::fs::remove_file(&path);
    }
}

#[test]
fn hanging_up_and_signals_for_logs_do_not_end_it() {
    let mut daemon = Daemon::start(&[]);
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        daemon.signal(signal);
        health(TcpStream::connect(daemon.tcp()).unwrap());
    }
    // A client that has begun a stream, and neither sends nor reads.
    let mut running = TcpStream::connect(daemon.tcp()).unwrap();
    running
        .write_all(b"POST /process.Process/StreamInput HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\ntransfer-encoding: chunked\r\n\r\n")
        .unwrap();
    health(TcpStream::connect(daemon.tcp()).unwrap());
    end(&mut daemon, Signal::SIGINT);
}

#[test]
fn flags() {
    // What an orchestrator of E2B's runs and compares, and what a person wants to know.
    let (code, version, _) = run(&["-version"]);
    assert_eq!((code, version.as_str()), (0, "0.6.2\n"));
    let (code, version, _) = run(&["--version"]);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!((code, version), (0, format!("{}\nenvd {own}\n", envd::version::E2B)));
    assert_eq!(run(&["--commit"]).0, 0);
    for help in [
        &["-h"][..],
        &["--help"],
        &["--verbose", "-help"],
        &["wait", "--help"],
        &["init", "--help"],
        &["poweroff", "--help"],
        &["reboot", "-h"],
        &["halt", "-help"],
    ] {
        let (code, usage, log) = run(help);
        assert_eq!((code, log.as_str()), (0, ""), "{help:?}");
        assert!(usage.starts_with("Usage: envd"), "{help:?}: {usage}");
    }
    assert!(run(&["--help"]).1.contains("--listen ADDRESS"));
    let missing = "--template=/nowhere/template.toml";
    for (bad, named) in [
        (&["-nope"][..], "--nope: "),
        (&["--port", "x"], "--port: 'x'"),
        (&["--listen", "x"], "--listen: 'x'"),
        (&["-isnotfc=x"], "--isnotfc: 'x'"),
        (&[missing], "--template: '/nowhere/template.toml': "),
        (&["version"], "'version' is not a subcommand; did you mean 'envd --version'?"),
        (&["help"], "'help' is not a subcommand; did you mean 'envd --help'?"),
        (&["powerof"], "'powerof' is not a subcommand; did you mean 'envd poweroff'?"),
        (&["stray", "--listen", "tcp://127.0.0.1:0"], "'stray' is not a subcommand; "),
        (&["poweroff", "--now"], "poweroff: '--now' "),
    ] {
        let (code, stdout, log) = run(bad);
        assert_eq!((code, stdout.as_str()), (2, ""), "{bad:?}: {log}");
        let mut lines = log.lines();
        let error = lines.next().unwrap();
        assert!(error.starts_with(&format!("envd: {named}")), "{bad:?}: {log}");
        assert_eq!((lines.next(), lines.next()), (Some("Try 'envd --help'"), None), "{log}");
    }
    let (code, _, log) = run(&["wait", "port:1", "--timeout", "soon"]);
    assert_eq!(code, 2);
    assert!(log.starts_with("envd wait: --timeout: 'soon': "), "{log}");
    assert!(log.ends_with("\nTry 'envd wait --help'\n") && log.lines().count() == 2, "{log}");
    let (code, _, log) = run(&["--default-user", "nobody-here", "--listen", "tcp://127.0.0.1:0"]);
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("invalid default user: 'nobody-here'"), "{log}");
    // An existing unit's command line.
    let upstream = ["-isnotfc", "-no-cgroups", "-cgroup-root", "/sys/fs/cgroup", "-verbose"];
    drop(Daemon::start(&upstream));
    // Words behind flags mean nothing, to upstream as well.
    let daemon = Daemon::start(&["-isnotfc", "stray", "word"]);
    let log = daemon.wait_for_log("words on the command line are ignored");
    let line = log.iter().find(|line| !line["words"].is_null()).unwrap();
    assert_eq!((&line["level"], &line["words"]), (&"WARN".into(), &"stray word".into()));
}

/// What a daemon prints at a terminal until it contains one of these texts.
fn at_a_terminal(args: &[&str], until: &[&str]) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let slave = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_envd"));
    command.args(args).stdin(slave()).stdout(slave()).stderr(slave());
    let mut daemon = command.spawn().unwrap();
    let mut master = std::fs::File::from(pty.master);
    let mut printed = String::new();
    let mut buffer = [0; 4096];
    while !until.iter().any(|text| printed.contains(text)) {
        let mut ready = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(*PATIENCE).unwrap();
        assert_eq!(poll(&mut ready, patience), Ok(1), "nothing more: {printed}");
        let bytes = master.read(&mut buffer).unwrap();
        printed.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    printed
}

#[test]
fn a_persons_first_run_is_on_loopback_and_leaves_the_machine_alone() {
    let dir = tempfile::tempdir().unwrap();
    let root = format!("--guest-root={}", dir.path().display());
    // Another daemon may have the port.
    let done = ["ready_us", "cannot listen on"];
    let printed = at_a_terminal(&[&root], &done);
    let first = printed.lines().next().unwrap();
    assert!(first.starts_with("envd: started at a terminal without --listen: "), "{printed}");
    assert!(
        first.contains("127.0.0.1:49983 only") && first.contains("--listen tcp://0.0.0.0:49983")
    );
    assert!(printed.contains("tcp://127.0.0.1:49983"), "{printed}");
    assert!(!printed.contains("tcp://0.0.0.0:49983\u{1b}"), "{printed}");
    assert!(!dir.path().join("run").exists());
    // What says where it is to be reached from leaves everything as it was.
    let args = ["--listen", "tcp://127.0.0.1:0", "--no-clock", &root];
    let printed = at_a_terminal(&args, &done);
    assert!(!printed.contains("started at a terminal"), "{printed}");
    assert!(dir.path().join("run/e2b/.E2B_SANDBOX").exists());
}

#[test]
fn without_root_only_the_own_user_can_be_used() {
    if !common::is_root() {
        common::skipped::skip("root, to become another user");
        return;
    }
    let nobody = 65534;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(nobody), Some(nobody)).unwrap();
    // The binary itself may lie where only root can reach it.
    let binary = dir.path().join("envd");
    std::fs::copy(env!("CARGO_BIN_EXE_envd"), &binary).unwrap();
    let mut command = std::process::Command::new(&binary);
    command.args(["--listen", "tcp://127.0.0.1:0"]).uid(nobody).gid(nobody);
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for_log("running without root: calls can act only as this user");
    let post = |user: &str, command: &str| {
        let body = format!(r#"{{"process":{{"cmd":"{command}","cwd":"/"}}}}"#);
        let body = common::rpc::envelope(0, body.as_bytes());
        let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
        let head = format!(
            "POST /process.Process/Start HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{user}content-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let own = post("", "id");
    assert!(own.contains("exit status 0"), "{own}");
    let root = post("authorization: Basic cm9vdDo=\r\n", "id");
    assert!(root.contains("invalid username: 'root'"), "{root}");
    assert!(root.contains("runs without root, as 'nobody'"), "{root}");
}
