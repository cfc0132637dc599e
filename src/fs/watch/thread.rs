//! The watching thread. It starts with the first watcher and ends with the last, so that an idle
//! daemon has no thread and no open inotify instance for it.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        inotify::{InitFlags, Inotify},
    },
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{WatchOptions, queue::Queue, tree::Tree};
use crate::{
    fs::{FsError, actor::Actor, errno},
    guest::users::Users,
    sys::fs_credentials,
};

/// What the thread is asked for.
#[derive(Debug)]
pub(super) enum Command {
    Add {
        id: u64,
        path: PathBuf,
        actor: Actor,
        options: WatchOptions,
        queue: Arc<Queue>,
        done: oneshot::Sender<Result<(), FsError>>,
    },
    Remove(u64),
    /// Turns merged changes of a watcher into events.
    Refill(u64),
    /// Answers when all that happened before is in the watcher's queue.
    Flush(u64, oneshot::Sender<()>),
}

/// A flush that waits.
struct Waiting {
    watcher: u64,
    last_job: u64,
    done: oneshot::Sender<()>,
}

/// What the thread and its callers share.
#[derive(Debug)]
pub(super) struct Shared {
    users: Arc<Users>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Wakes the thread; none while there is no thread.
    wake: Option<Arc<EventFd>>,
    /// One for each caller who waits and each watcher that was dropped, hence bounded by those.
    commands: Vec<Command>,
    last_id: u64,
}

impl Shared {
    pub(super) fn new(users: Arc<Users>) -> Self {
        Self { users, state: Mutex::default() }
    }

    pub(super) fn next_id(&self) -> u64 {
        let mut state = self.state.lock();
        state.last_id += 1;
        state.last_id
    }

    /// Sends a command to the thread, if there is one: there is nothing to remove or flush without.
    pub(super) fn send(&self, command: Command) {
        let mut state = self.state.lock();
        let Some(wake) = state.wake.clone() else {
            return;
        };
        state.commands.push(command);
        drop(state);
        wake_up(&wake);
    }

    /// Sends a command to the thread, which is started if there is none.
    pub(super) fn send_or_start(self: &Arc<Self>, command: Command) -> Result<(), FsError> {
        let mut state = self.state.lock();
        if let Some(wake) = state.wake.clone() {
            state.commands.push(command);
            drop(state);
            wake_up(&wake);
            return Ok(());
        }
        let failed = |errno| FsError::WatchStart(errno::text(errno));
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags).map_err(failed)?);
        let tree = Tree::new(inotify, Arc::clone(&self.users));
        let (shared, theirs) = (Arc::clone(self), Arc::clone(&wake));
        std::thread::Builder::new()
            .name("envd-watch".to_owned())
            .spawn(move || run(tree, &shared, &theirs))
            .map_err(|error| failed(errno::of(&error)))?;
        // The thread looks at its commands before it waits.
        state.commands.push(command);
        state.wake = Some(wake);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        self.state.lock().wake.is_some()
    }

    fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut self.state.lock().commands)
    }

    /// Whether the thread may end: nobody can have sent it a command that is not handled.
    fn end_if_unused(&self) -> bool {
        let mut state = self.state.lock();
        if state.commands.is_empty() {
            state.wake = None;
        }
        state.wake.is_none()
    }
}

fn wake_up(wake: &EventFd) {
    // Fails only when 2^64 wake-ups are pending, which wake as well.
    let _ = wake.write(1);
}

/// Says that there is no thread any more, however it ended: what waits for it gets an error, and
/// the next watcher starts another.
struct Ending<'a>(&'a Shared, &'a Arc<EventFd>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        // Another thread can have been started since this one found that it may end.
        if state.wake.as_ref().is_some_and(|wake| Arc::ptr_eq(wake, self.1)) {
            state.wake = None;
            let unanswered = std::mem::take(&mut state.commands);
            drop(state);
            drop(unanswered);
        }
    }
}

fn run(mut tree: Tree, shared: &Shared, wake: &Arc<EventFd>) {
    let _ending = Ending(shared, wake);
    let mut waiting: Vec<Waiting> = Vec::new();
    // A thread inherits the credentials of the one that starts it.
    let _ = fs_credentials::begin_thread();
    loop {
        // It acts for all watchers, and so must not keep the rights of one.
        if fs_credentials::thread_is_broken() {
            tracing::error!(
                "the watching thread could not restore its credentials; all watchers end"
            );
            return;
        }
        // In this order: what happened before a command was sent is told before it is answered.
        let commands = shared.take_commands();
        if let Err(errno) = tree.drain() {
            tracing::error!(%errno, "the inotify queue cannot be read; all watchers end");
            return;
        }
        let flush = commands.iter().any(|command| matches!(command, Command::Flush(..)));
        tree.resolve_doubts(flush);
        if tree.overflowed && (flush || Instant::now() >= tree.rescan_at) {
            tree.rescan();
        }
        if tree.is_look_due() {
            tree.look_at_unwatched();
        }
        for command in commands {
            match command {
                Command::Add { id, path, actor, options, queue, done } => {
                    tree.add(id, (path, actor), options, queue, done);
                }
                Command::Remove(id) => tree.remove(id),
                Command::Refill(id) => tree.refill(id),
                Command::Flush(id, done) => {
                    if tree.has_unwatched(id) {
                        tree.look_at_unwatched();
                    }
                    waiting.push(Waiting { watcher: id, last_job: tree.last_job, done });
                }
            }
        }
        tree.work();
        for flush in waiting.extract_if(.., |w| tree.has_adopted(w.watcher, w.last_job)) {
            tree.refill(flush.watcher);
            let _ = flush.done.send(());
        }
        if tree.watchers.is_empty() {
            if shared.end_if_unused() {
                return;
            }
            continue;
        }
        tree.forget_resolved();
        let timeout = pause(&tree);
        let mut fds = [
            PollFd::new(tree.inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "cannot wait for events; all watchers end");
                return;
            }
        }
        // Empties it; EAGAIN when it was the other one.
        let _ = wake.read();
    }
}

/// How long there is nothing to do, unless something happens.
fn pause(tree: &Tree) -> PollTimeout {
    let rescan = tree.overflowed.then(|| tree.rescan_at.saturating_duration_since(Instant::now()));
    let look = tree.look_at().map(|at| at.saturating_duration_since(Instant::now()));
    let work = (!tree.jobs.is_empty()).then_some(Duration::ZERO);
    match [rescan, look, work].into_iter().flatten().min() {
        None => PollTimeout::NONE,
        // Rounded up: poll counts in milliseconds.
        Some(time) if time.is_zero() => PollTimeout::ZERO,
        Some(time) => (time + Duration::from_millis(1)).try_into().unwrap_or(PollTimeout::MAX),
    }
}
