//! What the black-box tests share: the real daemon as a child, and clients for each protocol.

#![allow(dead_code, missing_docs, unreachable_pub, missing_debug_implementations)]

pub mod house;
pub mod hung_mount;
pub mod mmds;
pub mod process;
pub mod raw;
pub mod readme;
pub mod rpc;
pub mod seccomp;
pub mod skipped;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, LazyLock, Mutex},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The longest that anything in a test may take before it counts as hung. ENVD_TEST_PATIENCE sets the
/// seconds for a machine that is much slower, such as an emulated one. It is read when the test runs,
/// so that the same binaries serve the host and a guest.
pub static PATIENCE: LazyLock<Duration> = LazyLock::new(|| {
    let seconds = match std::env::var("ENVD_TEST_PATIENCE") {
        Ok(text) => text.parse().expect("ENVD_TEST_PATIENCE is a number of seconds"),
        Err(_) => 60,
    };
    Duration::from_secs(seconds)
});

/// A running daemon, killed on drop.
pub struct Daemon {
    child: Child,
    log: Arc<Log>,
    addresses: Vec<String>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<Value>>,
    news: Condvar,
}

impl Daemon {
    /// Starts it on a free TCP port of the loopback, with more arguments.
    pub fn start(args: &[&str]) -> Self {
        let mut all = vec!["--listen", "tcp://127.0.0.1:0"];
        all.extend(args);
        Self::start_with(&all)
    }

    /// Starts it with exactly these arguments and waits until it is ready.
    pub fn start_with(args: &[&str]) -> Self {
        Self::spawn(&mut Self::command(args))
    }

    /// Starts a command that is the daemon and waits until it is ready.
    pub fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon can be executed");
        let log = Arc::new(Log::default());
        let stderr = child.stderr.take().expect("stderr is a pipe");
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                    log.lines.lock().unwrap().push(value);
                    log.news.notify_all();
                }
                log.lines.lock().unwrap().push(Value::Null);
                log.news.notify_all();
            }
        });
        let mut daemon = Self { child, log, addresses: Vec::new() };
        let lines = daemon.wait_for_log("ready");
        daemon.addresses = lines
            .iter()
            .filter(|line| line["message"] == "listening")
            .map(|line| line["address"].as_str().unwrap().to_owned())
            .collect();
        daemon
    }

    /// The command, not yet started.
    pub fn command(args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        command.args(args);
        // The machine that runs the tests may have a metadata service of its own, and a clock.
        if !args.iter().any(|arg| arg.starts_with("--mmds")) {
            command.arg("--mmds=none");
        }
        command.arg("--no-clock");
        // All tests can be run behind such a filter.
        if let Some(errno) = seccomp::from_env() {
            seccomp::behind(&mut command, &seccomp::newer_than_4_18(errno));
        }
        command
    }

    /// Waits until a line with this message has been logged; gives all lines so far.
    pub fn wait_for_log(&self, message: &str) -> Vec<Value> {
        let deadline = Instant::now() + *PATIENCE;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            if lines.iter().any(|line| line["message"] == message) {
                return lines.clone();
            }
            assert!(lines.last() != Some(&Value::Null), "the daemon ended: {lines:#?}");
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("no {message:?} in {lines:#?}"));
            lines = self.log.news.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// What it has logged so far.
    pub fn log(&self) -> Vec<Value> {
        self.log.lines.lock().unwrap().clone()
    }

    /// Where it listens, as URLs.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// `127.0.0.1:PORT` of its first TCP listener.
    pub fn tcp(&self) -> String {
        let tcp = self.addresses.iter().find_map(|address| address.strip_prefix("tcp://"));
        tcp.expect("it listens on TCP").to_owned()
    }

    /// An HTTP URL on it.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.tcp())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A figure of `/proc/PID/status`, in KiB.
    pub fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// The number of its open descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// The size of the largest file that it has open below `dir` and that has no name there: what has
    /// come of an upload. None while there is no such file.
    pub fn unnamed(&self, dir: &std::path::Path) -> Option<u64> {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        fds.filter_map(|fd| {
            let fd = fd.ok()?.path();
            let target = std::fs::read_link(&fd).ok()?;
            let unnamed = target.to_str()?.ends_with(" (deleted)") && target.starts_with(dir);
            unnamed.then(|| std::fs::metadata(fd).ok())?.map(|meta| meta.len())
        })
        .max()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the daemon ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls until there is something; panics when that takes too long.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + *PATIENCE;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {:?}: {what}", *PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A future that must not hang.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(*PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("hangs: {what}"),
    }
}

/// Bytes that look random and are the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Whether a test that needs `what` can run here. Where it cannot, the skip is reported; on CI it fails.
pub fn able(what: &str, possible: bool) -> bool {
    if !possible {
        let on_ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!on_ci, "CI has to run everything, and this needs {what}");
        skipped::skip(what);
    }
    possible
}

/// As [`able`], for what no CI can install: what the kernel or the sandbox of the machine offers. In
/// the guests of `make vm` it is there.
pub fn offered(what: &str, possible: bool) -> bool {
    if !possible {
        skipped::skip(&format!("{what} (there in the guests of `make vm VM=inside`)"));
    }
    possible
}

/// Whether the tests run as root, which some need.
pub fn able_as_root() -> bool {
    able("root", is_root())
}

/// The user who runs the tests, and so the daemon.
pub fn me() -> nix::unistd::User {
    nix::unistd::User::from_uid(nix::unistd::geteuid()).unwrap().expect("in /etc/passwd")
}

/// Whether that user has a home directory to make directories in, which some tests need.
pub fn able_at_home() -> bool {
    able("a home directory that can be written to", tempfile::tempdir_in(me().dir).is_ok())
}

/// The header that makes a call another user's.
pub fn basic(user: &str) -> String {
    use base64::Engine;
    let credentials = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
    format!("Basic {credentials}")
}

/// As [`eventually`], where the check has to wait for answers itself.
pub async fn in_time<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + *PATIENCE;
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {:?}: {what}", *PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
