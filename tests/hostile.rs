//! A hostile program inside the sandbox: what it cannot read, stop or change, and whom it cannot keep
//! out. docs/security.md says so, and `scripts/hostile-health.py` measures how fast `/health` is
//! meanwhile.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "hostile/directories.rs"]
mod directories;
#[path = "hostile/eviction.rs"]
mod eviction;
#[path = "hostile/files.rs"]
mod files;
#[path = "hostile/init.rs"]
mod init;
#[path = "hostile/log.rs"]
mod log;
#[path = "hostile/memory.rs"]
mod memory;
#[path = "hostile/trees.rs"]
mod trees;

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::Command,
    time::Duration,
};

use common::{
    Daemon, PATIENCE, able, eventually, is_root,
    process::{run, sh},
    rpc::{Client, Wire},
};
use envd::proto::process::StartRequest;

const TOKEN: &str = "token-of-the-sandbox";
const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// Tries everything, and tells on stdout what it could.
const ATTACK: &str = r#"
import ctypes, glob, os, platform, resource, signal, socket, sys
pid, secret = int(sys.argv[1]), sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
tried = 0

def attempt(what, action):
    global tried
    tried += 1
    try:
        result = action()
    except OSError:
        return
    print("COULD", what, result)

def call(number, *args):
    # The numbers are those of this architecture.
    if platform.machine() != "x86_64":
        raise OSError("not tried")
    # Longs, whatever they are: pointers too.
    result = libc.syscall(number, *[ctypes.c_long(arg) for arg in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def read(path):
    with open(path, "rb") as file:
        return file.read(1)

def write(path):
    with open(path, "w") as file:
        file.write("0")

own = [f"/proc/{pid}"] + glob.glob(f"/proc/{pid}/task/*")
for place in own:
    for name in ("environ", "mem", "maps", "smaps", "auxv", "io", "syscall", "stack", "pagemap",
                 "personality", "timers", "numa_maps", "patch_state"):
        if os.path.exists(f"{place}/{name}"):
            attempt(f"read {place}/{name}", lambda: read(f"{place}/{name}"))
    for name in ("fd", "map_files", "root/etc", "cwd/", "fdinfo", "ns"):
        if name != "ns":
            attempt(f"list {place}/{name}", lambda: os.listdir(f"{place}/{name}"))
    for name in ("exe", "cwd", "root", "ns/mnt"):
        attempt(f"follow {place}/{name}", lambda: os.readlink(f"{place}/{name}"))
    for name in ("oom_score_adj", "oom_adj", "autogroup", "coredump_filter", "clear_refs",
                 "timerslack_ns", "comm", "mem", "uid_map", "setgroups", "loginuid"):
        attempt(f"write {place}/{name}", lambda: write(f"{place}/{name}"))
attempt("attach", lambda: call(101, 16, pid, 0, 0))
attempt("seize", lambda: call(101, 0x4206, pid, 0, 0))
buffer = ctypes.create_string_buffer(8)
pair = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 8)
attempt("process_vm_readv", lambda: call(310, pid, ctypes.addressof(pair), 1, ctypes.addressof(pair), 1, 0))
attempt("process_vm_writev", lambda: call(311, pid, ctypes.addressof(pair), 1, ctypes.addressof(pair), 1, 0))
attempt("kcmp", lambda: call(312, pid, pid, 0, 0, 1))
for number in (0, *signal.valid_signals()):
    attempt(f"kill {number}", lambda: os.kill(pid, number))
    for thread in os.listdir(f"/proc/{pid}/task"):
        attempt(f"tgkill {number}", lambda: call(234, pid, int(thread), int(number)))
attempt("killpg", lambda: os.killpg(os.getpgid(pid), signal.SIGTERM))
pidfd = os.pidfd_open(pid)
attempt("pidfd kill", lambda: signal.pidfd_send_signal(pidfd, signal.SIGKILL))
for descriptor in range(16):
    attempt("pidfd_getfd", lambda: call(438, pidfd, descriptor, 0))
attempt("setns", lambda: call(308, pidfd, 0x20000000))
attempt("process_madvise", lambda: call(440, pidfd, ctypes.addressof(pair), 1, 21, 0))
attempt("process_mrelease", lambda: call(448, pidfd, 0))
attempt("setpriority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
attempt("affinity", lambda: os.sched_setaffinity(pid, {0}))
attempt("scheduler", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
attempt("ioprio", lambda: call(251, 1, pid, (3 << 13) | 7))
attempt("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)))
attempt("read limits of it", lambda: resource.prlimit(pid, resource.RLIMIT_CORE))
attempt("migrate_pages", lambda: call(256, pid, 64, ctypes.addressof(buffer), ctypes.addressof(buffer)))
for line in open(f"/proc/{pid}/cgroup"):
    base = "/sys/fs/cgroup" + line.rstrip().split(":", 2)[2]
    for name in ("cgroup.procs", "cgroup.freeze", "cgroup.kill", "memory.max", "cpu.max", "pids.max",
                 "cgroup.subtree_control"):
        if os.path.exists(f"{base}/{name}"):
            attempt(f"write {base}/{name}", lambda: write(f"{base}/{name}"))
for path in sys.argv[3:]:
    kind, path = path.split("=", 1)
    if kind == "connect":
        attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))
        attempt(f"unlink {path}", lambda: os.unlink(path))
    elif kind == "read":
        attempt(path, lambda: read(path))
    elif kind == "list":
        attempt(path, lambda: os.listdir(path))
    else:
        attempt(path, lambda: write(f"{path}/x"))
        attempt(f"rename {path}", lambda: os.rename(path, path + ".away"))

# What may be read of anybody has no secret in it.
for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
    try:
        text = open(path, "rb").read()
    except OSError:
        continue
    if secret.encode() in text and path.split("/")[2] != str(os.getpid()):
        print("COULD read the secret in", path)
print("tried", tried)
"#;

fn as_user(user: &str, mut request: StartRequest) -> (StartRequest, String) {
    request.process.as_mut().unwrap().cwd = Some("/".to_owned());
    (request, common::basic(user))
}

#[tokio::test]
async fn it_can_neither_read_nor_stop_nor_slow_down_nor_reach_the_daemon() {
    let nobody = matches!(nix::unistd::User::from_name("nobody"), Ok(Some(_)));
    let python = Command::new("python3").arg("--version").output().is_ok();
    if !able("root, a user nobody and python3", is_root() && nobody && python) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    for place in ["guest/etc/envd", "guest/run", "guest/etc/ssl"] {
        std::fs::create_dir_all(dir.path().join(place)).unwrap();
    }
    std::fs::write(at("token"), TOKEN).unwrap();
    std::fs::set_permissions(at("token"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(at("attack.py"), ATTACK).unwrap();
    let args = [
        format!("--access-token-file={}", at("token")),
        format!("--listen=unix://{}", at("socket")),
        format!("--guest-root={}", at("guest")),
        format!("--spill-dir={}", at("spill")),
        "-verbose".to_owned(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let daemon = Daemon::start(&args);
    let client = Client::new(&daemon, Wire::Grpc).with("x-access-token", TOKEN);
    // Root's, with its output on the disk.
    let mut secret = sh("echo secret-of-root; exec sleep 60");
    secret.output =
        Some(envd::proto::process::OutputOptions { spill_bytes: 1 << 20, ..Default::default() });
    let mut running = common::process::begin(&client, &secret).await;
    running.until_it_says("secret-of-root").await;

    let attack = format!(
        "exec python3 {} {} {TOKEN} connect={} write={} write={} list={} read={}",
        at("attack.py"),
        daemon.pid(),
        at("socket"),
        at("guest/etc/envd"),
        at("guest/run/e2b"),
        at("spill"),
        at("token"),
    );
    // Before and after the daemon has started something as this user.
    for _ in 0..2 {
        let (request, who) = as_user("nobody", sh(&attack));
        let (said, end) = run(&client.clone().with("authorization", &who), &request).await;
        assert_eq!(end.exit_code, 0, "{}", said.stderr());
        assert!(!said.stdout().contains("COULD"), "{}", said.stdout());
        assert!(said.stdout().contains("tried"), "{}", said.stdout());
    }
    assert!(Path::new(&at("guest/run/e2b")).is_dir(), "there was nothing to protect");
    assert!(answers(UnixStream::connect(at("socket")).unwrap()));
}

/// These tests hold more connections than a process may have by default.
fn with_many_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Whether `/health` answers 204 here.
fn answers(stream: impl Read + Write) -> bool {
    says(stream, HEALTH, b"HTTP/1.1 204")
}

/// Whether `/envs` is told here: unlike the other, not on a connection that is one too many.
fn serves(stream: impl Read + Write) -> bool {
    says(stream, b"GET /envs HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 200")
}

fn says(mut stream: impl Read + Write, request: &[u8], expected: &[u8; 12]) -> bool {
    let mut first = [0; 12];
    stream.write_all(request).is_ok() && stream.read_exact(&mut first).is_ok() && &first == expected
}

#[test]
fn all_the_connections_that_it_gets_keep_nobody_out_from_elsewhere() {
    with_many_files();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let daemon = Daemon::start(&["--max-connections", "64", &listen]);
    let elsewhere = || serves(UnixStream::connect(&socket).unwrap());
    // Each with a call that never ends, until there are no more; the kernel accepts them all. A connection
    // without a call would make room.
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
        let call =
            b"POST /process.Process/List HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
            content-length: 9\r\n\r\n";
        let _ = stream.write_all(call);
        held.push(stream);
    }
    eventually("programs of the sandbox are refused", || {
        (!serves(TcpStream::connect(daemon.tcp()).unwrap())).then_some(())
    });
    assert!(elsewhere());
    // Seven more, beside that one.
    let more: Vec<_> = (0..7).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert!(more.iter().all(serves));
    // When those that were refused have gone, whoever asks there whether the daemon lives hears it.
    eventually("health is answered beside the flood", || {
        answers(TcpStream::connect(daemon.tcp()).unwrap()).then_some(())
    });
    drop(held);
    eventually("their places are free again", || {
        serves(TcpStream::connect(daemon.tcp()).unwrap()).then_some(())
    });
}

#[test]
fn half_requests_to_init_do_not_keep_out_the_host() {
    with_many_files();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let daemon = Daemon::start(&["--max-connections", "2000", &listen]);
    let init = |stream: &mut dyn Write, length: usize| {
        let head =
            format!("POST /init HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
    };
    // More than there are places, and as many large ones as there may be.
    let large = vec![b' '; 100 << 10];
    let mut held: Vec<_> = (0..600)
        .map(|number| {
            let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
            init(&mut stream, 200 << 10);
            if number < envd::setup::MAX_LARGE {
                stream.write_all(&large).unwrap();
            }
            stream
        })
        .collect();
    let mut first = [0; 12];
    eventually("there is no place left for programs of the sandbox", || {
        let mut refused = TcpStream::connect(daemon.tcp()).unwrap();
        refused.set_read_timeout(Some(*PATIENCE)).unwrap();
        init(&mut refused, 2);
        let _ = refused.write_all(b"{}");
        refused.read_exact(&mut first).unwrap();
        (&first == b"HTTP/1.1 503").then_some(())
    });
    let body = format!("{{{}}}", " ".repeat(100 << 10));
    let mut host = UnixStream::connect(&socket).unwrap();
    init(&mut host, body.len());
    host.write_all(body.as_bytes()).unwrap();
    host.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 204");
    held.clear();
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[test]
fn requests_that_are_taken_back_at_once_end_the_connection_and_cost_no_memory() {
    let daemon = Daemon::start(&[]);
    let before = daemon.memory("VmRSS");
    for _ in 0..8 {
        let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        for number in 0..20_000_u32 {
            let stream = 2 * number + 1;
            // GET http /, and `authority: x`, by the static table of RFC 7541.
            bytes.extend(frame(1, 5, stream, b"\x82\x86\x84\x41\x01x"));
            // CANCEL
            bytes.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
        }
        // It is cut while it sends.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
        assert!(answers(TcpStream::connect(daemon.tcp()).unwrap()));
    }
    let grown = daemon.memory("VmRSS").saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB more");
}

#[test]
fn headers_without_end_are_refused_and_cost_no_memory() {
    with_many_files();
    let daemon = Daemon::start(&[]);
    let before = daemon.memory("VmRSS");
    let held: Vec<_> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
            let head =
                format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}", "x".repeat(1 << 20));
            // It is cut while it sends.
            stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
            let _ = stream.write_all(head.as_bytes());
            stream
        })
        .collect();
    assert!(answers(TcpStream::connect(daemon.tcp()).unwrap()));
    let grown = daemon.memory("VmRSS").saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more");
    drop(held);
}
