//! The daemon as PID 1's child: its arguments, its environment, its start, and how soon it is
//! started again after it has died.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

use super::{cgroup::Cgroups, console::say, flags};
use crate::guest::boot;

const ARGUMENTS: &str = "/etc/envd/init.args";
/// With no arguments: reachable as upstream is, and over vsock where the machine has it.
const DEFAULT_ARGUMENTS: [&str; 4] =
    ["--listen", "tcp://0.0.0.0:49983", "--listen", "vsock://49983?optional"];
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_HOME: &str = "/root";
/// The hard limit of open files that systemd gives its services.
const OPEN_FILES: u64 = 524_288;
/// This very binary, even after its file has been replaced.
const SELF: &str = "/proc/self/exe";

/// How to start the daemon.
#[derive(Debug)]
pub(super) struct Agent {
    binary: PathBuf,
    arguments: Vec<OsString>,
    kernel_us: u64,
    cgroups: Cgroups,
    whole: bool,
}

impl Agent {
    /// The daemon of this binary, with the arguments given to PID 1 or those of the file. `whole`
    /// when PID 1 does an init's work; else the engine of the container has set up what a process
    /// inherits.
    pub(super) fn new(given: &[OsString], kernel_us: u64, cgroups: Cgroups, whole: bool) -> Self {
        // Words are errors to the daemon, and the kernel's or a file's must not keep it from running.
        let arguments = match flags(given) {
            [] => flags(&from_file(whole)).to_vec(),
            given => given.to_vec(),
        };
        Self { binary: binary(), arguments, kernel_us, cgroups, whole }
    }

    /// Checks that the daemon can be started, as far as that can be known before.
    pub(super) fn check(&self) -> io::Result<()> {
        File::open(&self.binary).map(|_| ())
    }

    /// Starts it. The child is PID 1's own to wait for.
    pub(super) fn start(&self) -> io::Result<Pid> {
        if self.whole {
            allow_open_files();
        }
        let mut command = Command::new(&self.binary);
        command
            .arg0("envd")
            .args(&self.arguments)
            .stdin(Stdio::null())
            // Of its own, so that a signal for PID 1's group does not hit it.
            .process_group(0)
            .env(boot::KERNEL_US, self.kernel_us.to_string())
            .env(boot::INIT_US, boot::microseconds().to_string());
        if self.whole {
            command.current_dir("/");
            if std::env::var_os("PATH").is_none_or(|path| path.is_empty()) {
                command.env("PATH", DEFAULT_PATH);
            }
            // The kernel gives PID 1 the home "/".
            if std::env::var_os("HOME").is_none_or(|home| home.is_empty() || home == "/") {
                command.env("HOME", DEFAULT_HOME);
            }
        }
        let id = command.spawn()?.id();
        let pid = Pid::from_raw(i32::try_from(id).map_err(io::Error::other)?);
        self.cgroups.place_agent(pid);
        if self.whole {
            protect(pid);
        }
        Ok(pid)
    }
}

/// Lets what PID 1 starts raise its limit of open files to systemd's: each process of the daemon's
/// takes several, and the kernel's own limit is 4096. The soft limit stays.
fn allow_open_files() {
    let raised = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if hard < OPEN_FILES => {
            setrlimit(Resource::RLIMIT_NOFILE, soft, OPEN_FILES)
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    // Without the right to (in a container, say) the daemon runs all the same.
    if let Err(error) = raised {
        say!("raising the limit of open files: {error}");
    }
}

/// Keeps the kernel from killing the daemon for want of memory, as upstream's unit does: it is what
/// tells the host that something else was killed. Its processes get a score of their own.
fn protect(pid: Pid) {
    // Without the right to (in a container, say) the daemon runs all the same.
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000") {
        say!("protecting the daemon from the kernel's OOM killer: {error}");
    }
}

/// The arguments of the file, else the default ones, which an engine's container does without: its
/// daemon listens where upstream's does.
fn from_file(whole: bool) -> Vec<OsString> {
    match fs::read_to_string(ARGUMENTS) {
        Ok(text) => words(&text),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                say!("reading {ARGUMENTS}: {error}");
            }
            let default: &[&str] = if whole { &DEFAULT_ARGUMENTS } else { &[] };
            default.iter().map(OsString::from).collect()
        }
    }
}

/// Words between white space; `#` begins a comment where a word could begin.
fn words(text: &str) -> Vec<OsString> {
    text.lines()
        .flat_map(|line| line.split_whitespace().take_while(|word| !word.starts_with('#')))
        .map(OsString::from)
        .collect()
}

/// The binary's own path, so that the daemon is called by its name in lists of processes; the link
/// in /proc where the path is no longer this binary's.
fn binary() -> PathBuf {
    let identity = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    match std::env::current_exe() {
        Ok(path) if identity(&path).is_some() && identity(&path) == identity(Path::new(SELF)) => {
            path
        }
        _ => PathBuf::from(SELF),
    }
}

/// The pause before a daemon that died is started again: longer each time it dies soon.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(30);
    /// A daemon that has lived for so long is not one that cannot start.
    const HEALTHY: Duration = Duration::from_secs(60);

    /// Nothing has died yet.
    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    /// The pause after a life of this length.
    pub(super) fn after(&mut self, life: Duration) -> Duration {
        if life >= Self::HEALTHY {
            self.0 = Self::FIRST;
        }
        let pause = self.0;
        self.0 = (pause * 2).min(Self::LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_to_a_limit_and_starts_again_after_a_healthy_life() {
        let mut backoff = Backoff::new();
        let pauses: Vec<u64> =
            (0..7).map(|_| backoff.after(Duration::from_secs(1)).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(backoff.after(Duration::from_secs(60)).as_secs(), 1);
        assert_eq!(backoff.after(Duration::ZERO).as_secs(), 2);
    }

    #[test]
    fn arguments_of_the_file_are_words() {
        let text = "# where\n--listen tcp://0.0.0.0:1 # not this\n\n\t--verbose\n";
        assert_eq!(words(text), ["--listen", "tcp://0.0.0.0:1", "--verbose"]);
    }
}
