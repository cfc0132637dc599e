//! Starting a process: its pipes or terminal, the spawn, and its place in the registry.

use std::{
    fmt, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::{Uid, fchown, pipe2},
};
use tokio::{io::unix::AsyncFd, sync::OwnedSemaphorePermit, time::timeout};

use super::{
    Manager, Process, StartSpec, Stdio, Subscription, Unavailable,
    cgroup::Leaf,
    child::spawn,
    exit_watch::ExitWatch,
    journal::{Attach, Channel},
    output::Source,
    record::Record,
    supervise::{Times, supervise},
    tree::Tree,
};
use crate::{
    blocking::{Busy, stand_on_path},
    quote,
    sys::{errno, pidfd, pty, ready, spawn::Child},
};

/// How long a start waits for what is only there for PWD and for a better message. Longer than it
/// takes to find out that a mount does not answer.
pub const DIRECTORY_PATIENCE: Duration = Duration::from_secs(7);

/// Why a process was not started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The daemon ends.
    #[error("the daemon is shutting down")]
    ShuttingDown,
    /// There are as many processes as there may be.
    #[error("too many processes: {max} are running or still hold their output open")]
    TooMany {
        /// How many.
        max: usize,
    },
    /// The requests of processes take too much.
    #[error("the arguments and variables of processes take more than {max} bytes together")]
    Requests {
        /// The bytes that they may take.
        max: usize,
    },
    /// There is a process of the same identity that was started with another request.
    #[error("a process with the process_id '{}' exists, and it was started with another request", quote::text(.0))]
    IdTaken(String),
    /// A NUL in something that becomes a C string.
    #[error("{attempt}: exec: {field}")]
    Nul {
        /// What was attempted.
        attempt: Attempt,
        /// Where the NUL is.
        field: String,
    },
    /// A pipe could not be made: the daemon is short of something.
    #[error("error creating {pipe} pipe for command '{command}': {reason}")]
    Pipe {
        /// `stdin`, `stdout` or `stderr`.
        pipe: &'static str,
        /// The command and its arguments.
        command: String,
        /// What the kernel said.
        reason: String,
        /// The same as a number, if it was the kernel.
        errno: Option<i32>,
    },
    /// The process or its terminal could not be made as asked for.
    #[error("{attempt}: {reason}")]
    Spawn {
        /// What was attempted.
        attempt: Attempt,
        /// What failed, with the kernel's word for it.
        reason: String,
        /// That as a number, if it was the kernel.
        errno: Option<i32>,
    },
    /// A limit cannot be set here.
    #[error("{attempt}: {unavailable}")]
    Limit {
        /// What was attempted.
        attempt: Attempt,
        /// Which limit, and why.
        unavailable: Unavailable,
    },
    /// The working directory does not exist.
    #[error("cwd '{}' does not exist", quote::path(.0))]
    NoDirectory(PathBuf),
    /// There is no thread to start it on.
    #[error("error starting process: {0}")]
    Blocking(#[from] Busy),
    /// The task that starts processes broke down; a fault of the daemon.
    #[error("error starting process: {0}")]
    Task(String),
}

impl StartError {
    /// Whether it lacked what there may be again later: descriptors, memory, processes, space.
    pub fn is_exhaustion(&self) -> bool {
        match self {
            Self::TooMany { .. }
            | Self::Requests { .. }
            | Self::Blocking(Busy::Full(_) | Busy::NoThread(_)) => true,
            _ => self.errno().is_some_and(|errno| EXHAUSTED.contains(&errno)),
        }
    }

    /// What the kernel said, if it was the kernel.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Pipe { errno, .. } | Self::Spawn { errno, .. } => *errno,
            Self::Limit { unavailable, .. } => unavailable.errno,
            _ => None,
        }
    }
}

/// The errors that say that something is used up, and nothing about the command.
const EXHAUSTED: [i32; 6] =
    [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ENOMEM, libc::ENOSPC, libc::EDQUOT];

/// What was attempted, in upstream's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// A process with pipes.
    Process {
        /// The command and its arguments.
        command: String,
    },
    /// A process with a terminal.
    Terminal {
        /// The command and its arguments.
        command: String,
        /// The working directory.
        dir: String,
        /// The terminal's columns.
        cols: u16,
        /// The terminal's rows.
        rows: u16,
    },
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { command } => write!(f, "error starting process '{command}'"),
            Self::Terminal { command, dir, cols, rows } => write!(
                f,
                "error starting pty with command '{command}' in dir '{dir}' with '{cols}' cols \
                 and '{rows}' rows"
            ),
        }
    }
}

impl Attempt {
    pub(super) fn of(spec: &StartSpec) -> Self {
        let command = spec.command_line();
        match spec.stdio {
            Stdio::Pipes { .. } => Self::Process { command },
            Stdio::Pty { cols, rows } => {
                Self::Terminal { command, dir: quote::path(&spec.cwd), cols, rows }
            }
        }
    }
}

/// The child's ends and ours.
#[derive(Debug)]
struct Ends {
    child: [OwnedFd; 3],
    input: Option<Arc<AsyncFd<OwnedFd>>>,
    sources: Vec<Source>,
}

/// Does what [`Manager::start`] says.
pub(super) async fn start(
    manager: Arc<Manager>,
    mut spec: StartSpec,
    slot: OwnedSemaphorePermit,
) -> Result<(Arc<Process>, Subscription), StartError> {
    let (cwd, at_home) = (spec.cwd.clone(), spec.starts_at_home());
    // Starts are bounded by their slots; a burst of them waits.
    let looking = manager.directories.run_next_step(move || {
        stand_on_path(&cwd).map_err(Busy::from)?;
        match shown_directory(&cwd) {
            Err(StartError::NoDirectory(_)) if at_home => Ok((PathBuf::from("/"), "/".to_owned())),
            shown => shown.map(|shown| (cwd, shown)),
        }
    });
    let pwd = match timeout(DIRECTORY_PATIENCE, looking).await {
        Ok(looked) => {
            let (cwd, shown) = looked??;
            spec.cwd = cwd;
            shown
        }
        // It hangs, or others that do are in the way: the child's own chdir decides.
        Err(_) => spec.cwd.to_string_lossy().into_owned(),
    };
    if let Some(field) = spec.field_with_nul() {
        return Err(StartError::Nul { attempt: Attempt::of(&spec), field });
    }
    let Ends { child: stdio, input, sources } = match open_ends(&spec) {
        Err(error) if error.is_exhaustion() => {
            let (relieving, errno) = (Arc::clone(&manager), error.errno());
            match manager.spawners.run_next_step(move || relieving.relieve(errno)).await? {
                true => open_ends(&spec)?,
                false => return Err(error),
            }
        }
        opened => opened?,
    };

    let making = Arc::clone(&manager);
    let spawned = manager.spawners.run_next_step(move || {
        let mut child = spawn(&making, &spec, pwd.clone(), &stdio);
        if let Err(error) = &child
            && error.is_exhaustion()
            && making.relieve(error.errno())
        {
            child = spawn(&making, &spec, pwd, &stdio);
        }
        // Our copies of the child's ends must go, or its output never ends.
        drop(stdio);
        let child =
            child.map(|(child, leaf)| Unregistered { child: Some((child, leaf)), manager: making });
        (child, spec)
    });
    let (child, spec) = spawned.await?;
    let Some((Child { pid, pidfd, exec_error }, leaf)) = child?.child.take() else {
        return Err(StartError::Task("the child has been given up".to_owned()));
    };
    let tree = Tree::new(pid, leaf, Arc::clone(&manager.stop_notes));
    let exit = ExitWatch::new(pid, pidfd).map_err(|(pidfd, error)| {
        abandon(&manager, Child { pid, pidfd, exec_error });
        tree.linger(&manager);
        refused(&spec, "pidfd", &error)
    })?;

    let kill_scope = manager.options.kill_scope;
    let times = Times { timeout: spec.timeout, time_limit: spec.time_limit, kill_scope };
    let journal = manager.journal(spec.output);
    let record = record(&manager, pid, spec);
    let tree = (tree, Arc::clone(&manager.trees));
    let process = Arc::new(Process::new(record, exit, input, journal, tree));
    // Before anything can be read, so that the first subscriber misses nothing.
    let subscription = process.subscribe(Attach::At(0));
    let subscription = subscription.map_err(|error| StartError::Task(error.to_string()))?;
    let cmd = &process.record().spec.cmd;
    if let Some(error) = exec_error {
        let (channel, end) = match process.is_pty() {
            true => (Channel::Pty, "\r\n"),
            false => (Channel::Stderr, "\n"),
        };
        let text = format!("envd: '{}': {}{end}", quote::text(cmd), errno::capitalised(error));
        process.journal.append(channel, text.into()).await;
    }
    tracing::debug!(pid, cmd = %quote::text(cmd), "process started");
    manager.register(&process);
    supervise(manager, Arc::clone(&process), sources, times, exec_error, slot);
    Ok((process, subscription))
}

/// A child that nobody knows of yet. Dropped, it ends: a start that was given up, since the mount of
/// its command did not answer, may have made it much later.
struct Unregistered {
    child: Option<(Child, Option<Leaf>)>,
    manager: Arc<Manager>,
}

impl Drop for Unregistered {
    fn drop(&mut self) {
        let Some((child, leaf)) = self.child.take() else {
            return;
        };
        let manager = Arc::clone(&self.manager);
        self.manager.directories.run_later(move || {
            let _ = pidfd::signal_child(child.as_ref(), libc::SIGKILL);
            let _ = leaf.as_ref().map(|leaf| leaf.signal(libc::SIGKILL));
            let _ = pidfd::wait_blocking(child.as_ref());
            if let Some(leaf) = leaf {
                manager.groups.miss(Arc::new(leaf));
            }
        });
    }
}

/// The record of a new process. What it was given as its environment is not kept.
fn record(manager: &Manager, pid: u32, mut spec: StartSpec) -> Record {
    let (number, own) = manager.next_number();
    spec.env = Vec::new();
    let id = spec.id.clone().unwrap_or(own);
    Record { pid, id, number, started_at: SystemTime::now(), spec }
}

/// Blocks: what a shell would put into PWD, the directory without symbolic links, if we may know
/// it. That it is missing is told before anything is started, and the same for pipes and terminals.
fn shown_directory(cwd: &Path) -> Result<String, StartError> {
    let shown = match cwd.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StartError::NoDirectory(cwd.to_owned()));
        }
        // Also where the C library asks for more than a filter permits.
        Err(_) => directory_by_descriptor(cwd).unwrap_or_else(|| cwd.to_owned()),
    };
    Ok(shown.to_string_lossy().into_owned())
}

/// Where /proc says that a directory is.
fn directory_by_descriptor(path: &Path) -> Option<PathBuf> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(path, flags, Mode::empty()).ok()?;
    let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    real.is_absolute().then_some(real)
}

fn open_ends(spec: &StartSpec) -> Result<Ends, StartError> {
    match spec.stdio {
        Stdio::Pipes { stdin } => {
            let (child_stdout, stdout) = output_pipe(spec, "stdout", Channel::Stdout)?;
            let (child_stderr, stderr) = output_pipe(spec, "stderr", Channel::Stderr)?;
            let failed = |error: io::Error| pipe_error(spec, "stdin", &error);
            let (child_stdin, input) =
                if stdin { input_pipe().map_err(failed)? } else { no_input().map_err(failed)? };
            Ok(Ends {
                child: [child_stdin, child_stdout, child_stderr],
                input,
                sources: vec![stdout, stderr],
            })
        }
        Stdio::Pty { cols, rows } => {
            let failed = |error: io::Error| refused(spec, "open terminal", &error);
            let pty = pty::open_pty(cols, rows, spec.user.uid).map_err(failed)?;
            let master = Arc::new(ready::watch(pty.master).map_err(|error| failed(error.into()))?);
            let again = || pty.slave.try_clone().map_err(failed);
            // While nobody has it open the terminal cannot be read, and a program may close it and
            // open it again.
            let held = Some(again()?);
            Ok(Ends {
                child: [again()?, again()?, pty.slave],
                input: Some(Arc::clone(&master)),
                sources: vec![Source { channel: Channel::Pty, fd: master, held }],
            })
        }
    }
}

fn output_pipe(
    spec: &StartSpec,
    name: &'static str,
    channel: Channel,
) -> Result<(OwnedFd, Source), StartError> {
    let open = || {
        let (ours, childs) = pipe2(OFlag::O_CLOEXEC)?;
        // A program that opens /dev/stdout or /dev/stderr opens the pipe again, which only its
        // owner may. Where that cannot be changed the descriptor itself still works.
        let _ = fchown(&childs, Some(Uid::from_raw(spec.user.uid)), None);
        let fd = Arc::new(nonblocking(ours)?);
        Ok((childs, Source { channel, fd, held: None }))
    };
    open().map_err(|error| pipe_error(spec, name, &error))
}

type InputEnds = (OwnedFd, Option<Arc<AsyncFd<OwnedFd>>>);

fn input_pipe() -> io::Result<InputEnds> {
    let (childs, ours) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((childs, Some(Arc::new(nonblocking(ours)?))))
}

fn no_input() -> io::Result<InputEnds> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok((nix::fcntl::open("/dev/null", flags, Mode::empty())?, None))
}

/// Our end only: the flag belongs to the open file, and programs do not expect it on theirs.
fn nonblocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(ready::watch(fd)?)
}

/// Ends a child that cannot be watched. It does not take long to die, but may.
fn abandon(manager: &Manager, child: Child) {
    let _ = pidfd::signal_child(child.as_ref(), libc::SIGKILL);
    // Not where children are made: there are few threads for that.
    manager.directories.run_later(move || {
        let _ = pidfd::wait_blocking(child.as_ref());
    });
}

fn pipe_error(spec: &StartSpec, pipe: &'static str, error: &io::Error) -> StartError {
    let (reason, errno) = (errno::text_of(error), error.raw_os_error());
    StartError::Pipe { pipe, command: spec.command_line(), reason, errno }
}

fn refused(spec: &StartSpec, what: &str, error: &io::Error) -> StartError {
    let reason = format!("{what}: {}", errno::text_of(error));
    StartError::Spawn { attempt: Attempt::of(spec), reason, errno: error.raw_os_error() }
}
