//! PID 1, in a PID namespace of its own, and whom the daemon tells that it is ready.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::unix::{
        net::{UnixDatagram, UnixListener},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use common::{Daemon, PATIENCE, able, eventually, is_root, rpc::Client};
use envd::proto::process::{
    ProcessConfig, StartRequest, StartResponse, process_event::Event,
    process_event::data_event::Output as Data,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// New namespaces, so that nothing outside is touched; with its child killed, all in them die.
const UNSHARE: [&str; 7] =
    ["--pid", "--mount", "--uts", "--net", "--mount-proc", "--fork", "--kill-child"];

fn able_to_be_pid_1() -> bool {
    let works = || Command::new("unshare").args(UNSHARE).arg("true").output();
    able(
        "root and unshare(1), for namespaces",
        is_root() && works().is_ok_and(|output| output.status.success()),
    )
}

/// The binary as PID 1 of new namespaces, which listens on `socket`.
fn init(socket: &Path) -> Daemon {
    let mut command = Command::new("unshare");
    let listen = format!("unix://{}", socket.display());
    command.args(UNSHARE).arg(env!("CARGO_BIN_EXE_envd")).args(["init", "--listen", &listen]);
    Daemon::spawn(&mut command)
}

fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children.unwrap_or_default().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// PID 1 and the daemon, as they are numbered outside.
fn pid_1(daemon: &Daemon) -> u32 {
    let [pid] = children(daemon.pid())[..] else { panic!("unshare has one child") };
    pid
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// What a script prints that the daemon runs.
async fn sh(client: &Client, script: &str) -> String {
    let request = StartRequest {
        process: Some(ProcessConfig {
            cmd: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            cwd: Some("/".into()),
            ..ProcessConfig::default()
        }),
        ..StartRequest::default()
    };
    let mut events = client
        .stream::<_, StartResponse>("/process.Process/Start", &request)
        .await
        .unwrap_or_else(|failure| panic!("{script}: {failure:?}"));
    let mut printed = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        match event.event.unwrap().event.unwrap() {
            Event::Data(data) => match data.output.unwrap() {
                Data::Stdout(bytes) | Data::Stderr(bytes) => printed.extend_from_slice(&bytes),
                Data::Pty(_) => panic!("it has no terminal"),
            },
            Event::End(end) => assert_eq!(end.status, "exit status 0", "{script}"),
            _ => {}
        }
    }
    String::from_utf8(printed).unwrap()
}

#[tokio::test]
async fn pid_1_reaps_every_orphan_and_no_status_of_the_daemons() {
    if !able_to_be_pid_1() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    let _init = init(&socket);
    // Signs of life: in an emulated guest a thousand orphans take longer than an answer may.
    let client = Client::unix(&socket).with("keepalive-ping-interval", "10");
    assert_eq!(sh(&client, "cat /proc/1/comm").await, "envd-init\n");
    // In a new network namespace the loopback is down, and so has no route.
    assert!(sh(&client, "grep 127.0.0.1 /proc/net/fib_trie").await.contains("127.0.0.1"));
    let orphans = "i=0; while [ $i -lt 1000 ]; do ( (sleep 0.01; exit 3) & ); i=$((i+1)); done";
    let statuses = "for i in 1 2 3 4 5 6 7 8; do (exit $i); echo $?; done";
    let (_, seen) = tokio::join!(sh(&client, orphans), sh(&client, statuses));
    assert_eq!(seen.split_whitespace().collect::<String>(), "12345678");
    // The last ones may still sleep.
    let left = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c -e ' Z ' -e '(sleep)' || true";
    common::in_time("the orphans are gone", async || {
        (sh(&client, left).await.trim() == "0").then_some(())
    })
    .await;
    // With many commands at once, each has its own status.
    let mut many = Vec::new();
    for _ in 0..50 {
        let client = client.clone();
        many.push(tokio::spawn(async move { sh(&client, "(sleep 0.01 &); echo $$").await }));
    }
    for one in many {
        one.await.unwrap().trim().parse::<u32>().unwrap();
    }
}

#[tokio::test]
async fn pid_1_starts_a_daemon_again_that_died() {
    if !able_to_be_pid_1() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    let init = init(&socket);
    let [first] = children(pid_1(&init))[..] else { panic!("PID 1 has one child") };
    send(first, Signal::SIGKILL);
    let second = eventually("another daemon", || {
        children(pid_1(&init)).into_iter().find(|pid| *pid != first)
    });
    assert_ne!(first, second);
    eventually("it listens", || std::os::unix::net::UnixStream::connect(&socket).ok());
    let client = Client::unix(&socket);
    assert_eq!(sh(&client, "echo again").await, "again\n");
}

#[tokio::test]
async fn pid_1_ends_everything_on_sigterm() {
    if !able_to_be_pid_1() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    let mut init = init(&socket);
    let client = Client::unix(&socket);
    let (polite, stubborn) = (dir.path().join("polite"), dir.path().join("stubborn"));
    // One that ends when it is told to, and one that does not; both in sessions of their own.
    let script = format!(
        "setsid sh -c 'trap \"echo bye > {0}; exit\" TERM; : > {0}; while :; do sleep 0.1; done' &
         setsid sh -c 'trap \"\" TERM; : > {1}; while :; do sleep 0.1; done' &",
        polite.display(),
        stubborn.display()
    );
    sh(&client, &format!("{{ {script} }} >/dev/null 2>&1 </dev/null")).await;
    eventually("both run", || (polite.exists() && stubborn.exists()).then_some(()));
    let pid_1 = pid_1(&init);
    let namespace = fs::read_link(format!("/proc/{pid_1}/ns/pid")).unwrap();
    send(pid_1, Signal::SIGTERM);
    init.wait_for_log("SIGTERM: draining");
    // In a container the end is an exit.
    assert_eq!(init.wait().code(), Some(0));
    assert_eq!(fs::read_to_string(&polite).unwrap(), "bye\n");
    let left: Vec<_> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path().join("ns/pid")).ok())
        .filter(|other| *other == namespace)
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The binary as PID 1 of new namespaces, without the word `init`.
fn plain(args: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(UNSHARE).arg(env!("CARGO_BIN_EXE_envd")).args(args);
    command
}

#[tokio::test]
async fn plain_envd_as_pid_1_reaps_orphans_and_leaves_the_container_as_it_is() {
    if !able_to_be_pid_1() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    let listen = format!("--listen=unix://{}", socket.display());
    // As upstream's images start theirs; the kernel would add words of its own.
    for words in [&["-isnotfc", &listen][..], &["splash", "-isnotfc", &listen, "poweroff"]] {
        let mut command = plain(words);
        command.current_dir(dir.path());
        let mut container = Daemon::spawn(&mut command);
        let client = Client::unix(&socket);
        assert_eq!(sh(&client, "cat /proc/1/comm").await, "envd-init\n");
        let [_agent] = children(pid_1(&container))[..] else { panic!("PID 1 has one child") };
        for _ in 0..20 {
            sh(&client, "(sleep 0.02 &) ; (sh -c 'sleep 0.02 & exec sleep 0.01' &)").await;
        }
        let left = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c -e ' Z ' -e '(sleep)' || true";
        common::in_time("the orphans are gone", async || {
            (sh(&client, left).await.trim() == "0").then_some(())
        })
        .await;
        // What an engine has set up is left alone.
        let bare = Command::new("unshare").args(UNSHARE).args(["cat", "/proc/mounts"]).output();
        let mounts = |text: &str| text.lines().count();
        let bare = String::from_utf8(bare.unwrap().stdout).unwrap();
        assert_eq!(mounts(&sh(&client, "cat /proc/1/mounts").await), mounts(&bare));
        let agent = children(pid_1(&container))[0];
        assert_eq!(fs::read_link(format!("/proc/{agent}/cwd")).unwrap(), dir.path());
        // Neither ends it.
        for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
            send(pid_1(&container), signal);
            send(agent, signal);
        }
        assert_eq!(sh(&client, "echo here").await, "here\n");
        // An engine stops it, with one that does not listen inside.
        let stubborn = dir.path().join("stubborn");
        let script = format!(
            "setsid sh -c 'trap \"\" TERM HUP; : > {}; while :; do sleep 0.1; done' \
             >/dev/null 2>&1 </dev/null &",
            stubborn.display()
        );
        sh(&client, &script).await;
        eventually("it runs", || stubborn.exists().then_some(()));
        let start = Instant::now();
        send(pid_1(&container), Signal::SIGTERM);
        assert_eq!(container.wait().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
        fs::remove_file(stubborn).unwrap();
    }
}

#[test]
fn plain_envd_as_pid_1_of_a_container_prints_and_refuses_as_elsewhere() {
    if !able_to_be_pid_1() {
        return;
    }
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    for (args, code, start) in [
        (&["--help"][..], 0, "Usage: envd [flags]"),
        (&["-version"], 0, envd::version::E2B),
        (&["init", "--help"], 0, "Usage: envd [flags]"),
        (&["--nope"], 2, "envd: --nope: "),
        (&["splash", "--port", "x"], 2, "envd: --port: "),
        (&["wait", "--help"], 0, "Usage: envd wait"),
    ] {
        let output = plain(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        let said = if code == 0 { &stdout } else { &stderr };
        assert!(said.starts_with(start), "{args:?}: {stdout}{stderr}");
    }
}

fn envd(args: &[&str]) -> Output {
    Daemon::command(args).output().unwrap()
}

#[test]
fn pid_1s_duties_are_for_pid_1() {
    let output = envd(&["init"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("this is for PID 1"));
    if !able_to_be_pid_1() {
        return;
    }
    // Where PID 1 is a shell, nobody is asked for anything.
    let binary = env!("CARGO_BIN_EXE_envd");
    for word in ["poweroff", "reboot", "halt"] {
        let script = format!("{binary} {word}; echo $?");
        let output = Command::new("unshare").args(UNSHARE).args(["sh", "-c", &script]).output();
        let output = output.unwrap();
        assert_eq!(output.stdout, b"1\n");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains("PID 1 is 'sh', which is neither envd nor systemd"), "{log}");
    }
}

#[tokio::test]
async fn the_machine_can_be_ended_from_inside() {
    if !able_to_be_pid_1() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    for word in ["poweroff", "reboot", "halt"] {
        let mut init = init(&socket);
        let client = Client::unix(&socket);
        let process = ProcessConfig {
            cmd: env!("CARGO_BIN_EXE_envd").into(),
            args: vec![word.into()],
            ..ProcessConfig::default()
        };
        let request = StartRequest { process: Some(process), ..StartRequest::default() };
        let events = client.stream::<_, StartResponse>("/process.Process/Start", &request).await;
        // Its end, or that of the daemon, whichever is told first.
        if let Ok(mut events) = events {
            while let Ok(Some(_)) = events.next().await {}
        }
        let status = init.wait();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{word}");
        eventually("the socket is gone", || (!socket.exists()).then_some(()));
    }
}

fn check_ready_line(line: &str, daemon: &Daemon) {
    let message: Value = serde_json::from_str(line).unwrap();
    assert!(line.ends_with("}\n"), "{line}");
    assert_eq!(message["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(message["kernel_us"], 5);
    assert_eq!(message["init_us"], Value::Null);
    assert!(message["ready_us"].as_u64().unwrap() > 0);
    assert_eq!(message["addresses"], serde_json::json!(daemon.addresses()));
    let log = daemon.wait_for_log("the host knows that this is ready");
    let ready = log.iter().find(|line| line["message"] == "ready").unwrap();
    assert_eq!(ready["ready_us"], message["ready_us"]);
    assert_eq!(ready["kernel_us"], 5);
}

#[test]
fn the_host_is_told_once_calls_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("ready");
    let start = |address: &str| {
        let args = ["--listen", "tcp://127.0.0.1:0", "--ready", address];
        let mut command = Daemon::command(&args);
        command.env("ENVD_BOOT_KERNEL_US", "5").env("ENVD_BOOT_INIT_US", "nonsense");
        Daemon::spawn(&mut command)
    };
    let mut line = String::new();

    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let daemon = start(&format!("tcp://{}", tcp.local_addr().unwrap()));
    tcp.accept().unwrap().0.read_to_string(&mut line).unwrap();
    check_ready_line(&line, &daemon);

    // A host that comes later is told, too.
    let daemon = start(&format!("unix://{}", socket.display()));
    std::thread::sleep(Duration::from_millis(200));
    let host = UnixListener::bind(&socket).unwrap();
    line.clear();
    let mut told = BufReader::new(host.accept().unwrap().0);
    told.read_line(&mut line).unwrap();
    assert_eq!(told.read(&mut [0]).unwrap(), 0, "one line, and the end");
    check_ready_line(&line, &daemon);
}

fn next(manager: &UnixDatagram) -> String {
    let mut message = [0; 256];
    let length = manager.recv(&mut message).expect("a message in time");
    String::from_utf8(message[..length].to_vec()).unwrap()
}

#[test]
fn the_service_manager_hears_of_readiness_life_and_end() {
    use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let name = format!("envd-test-{}", std::process::id());
    let by_path = UnixDatagram::bind(&path).unwrap();
    let abstract_one = SocketAddr::from_abstract_name(&name).unwrap();
    let by_name = UnixDatagram::bind_addr(&abstract_one).unwrap();
    for (manager, address) in [(by_path, path.display().to_string()), (by_name, format!("@{name}"))]
    {
        manager.set_read_timeout(Some(*PATIENCE)).unwrap();
        let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
        command.env("NOTIFY_SOCKET", &address).env("WATCHDOG_USEC", "200000");
        let mut daemon = Daemon::spawn(&mut command);
        assert_eq!(next(&manager), "READY=1\n");
        let start = Instant::now();
        for _ in 0..4 {
            assert_eq!(next(&manager), "WATCHDOG=1\n");
        }
        // The first comes at once, and then one in every half of the time.
        assert!(start.elapsed() >= Duration::from_millis(250), "{:?}", start.elapsed());
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait().code(), Some(0));
        while next(&manager) != "STOPPING=1\n" {}
    }
}

#[test]
fn without_a_watchdog_or_a_manager_nothing_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    // Meant for another process.
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "20000").env("WATCHDOG_PID", "1");
    let mut daemon = Daemon::spawn(&mut command);
    manager.set_read_timeout(Some(*PATIENCE)).unwrap();
    assert_eq!(next(&manager), "READY=1\n");
    std::thread::sleep(Duration::from_millis(200));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(next(&manager), "STOPPING=1\n");
    daemon.wait();
    // A manager that cannot be reached is no reason not to serve.
    for address in ["/no/such/socket", "nonsense"] {
        let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
        let daemon = Daemon::spawn(command.env("NOTIFY_SOCKET", address));
        daemon.wait_for_log("the service manager cannot be notified");
    }
}
