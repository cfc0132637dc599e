//! A process and all that descends from it: signals for it, what it has used, what became of it.
//!
//! Where it has a control group, that is the tree, and nothing that is forked can leave it (but for
//! root, who may move processes). Without one the tree is looked for in /proc: the children of its
//! processes, and the sessions that began in it, by which orphans are found that have a new parent.
//! What has left in both ways (forked twice with a new session, its parents gone) is not found then.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::io::Interest;

use super::{
    Found, Manager, Usage,
    activity::Activity,
    cgroup::{Leaf, Verdict},
    descent::{self, Known, Member},
    stop_notes::StopNotes,
};
use crate::sys::{
    errno,
    pidfd::{self, ChildRef},
    procfs::Stat,
    ready,
};

/// A process and its descendants.
#[derive(Debug)]
pub(super) struct Tree {
    /// That of the process itself, which leads a session and a group.
    pid: u32,
    leaf: Option<Arc<Leaf>>,
    notes: Arc<StopNotes>,
    /// Whether the daemon has sent a SIGKILL that reached the process.
    killed: AtomicBool,
    /// Whether somebody has waited for the process: from then on its pid may be another's.
    reaped: Mutex<bool>,
}

/// What there is to say about a tree when its process has exited.
#[derive(Debug, Clone, Default)]
pub(super) struct Conclusion {
    pub(super) usage: Usage,
    pub(super) verdict: Verdict,
    /// Whether a SIGKILL came from the daemon.
    pub(super) killed: bool,
    /// Whether nothing of the tree is left, as far as a control group tells.
    pub(super) gone: bool,
}

impl Manager {
    /// What processes use, or have used, in their order. `None` where that cannot be found out.
    pub async fn usages(&self, found: &[Found]) -> Vec<Option<Usage>> {
        enum Known {
            Ended(Option<Usage>),
            Live(Arc<Tree>),
        }
        let known: Vec<Known> = found
            .iter()
            .map(|found| match (found.ended(), found) {
                (Some(end), _) => Known::Ended(Some(end.ending.usage)),
                (None, Found::Live(process)) => Known::Live(Arc::clone(&process.tree)),
                (None, Found::Ended(_)) => Known::Ended(None),
            })
            .collect();
        let looked = self.trees.run(move || {
            let usage = |known| match known {
                Known::Ended(usage) => usage,
                Known::Live(tree) => Some(tree.usage()),
            };
            known.into_iter().map(usage).collect()
        });
        looked.await.unwrap_or_else(|_| vec![None; found.len()])
    }
}

impl Tree {
    /// The tree of a process that was just started.
    pub(super) fn new(pid: u32, leaf: Option<Leaf>, notes: Arc<StopNotes>) -> Self {
        let leaf = leaf.map(Arc::new);
        Self { pid, leaf, notes, killed: AtomicBool::new(false), reaped: Mutex::new(false) }
    }

    /// Sends a signal to the process alone.
    ///
    /// # Errors
    /// ESRCH when it has been waited for.
    pub(super) fn signal_process(&self, child: ChildRef<'_>, signal: i32) -> io::Result<()> {
        // Without a pidfd it is known by its pid, for as long as nobody has waited for it.
        let reaped = self.reaped.lock();
        if *reaped {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        self.note(signal);
        pidfd::signal_child(child, signal)
    }

    /// Sends a signal to the process's group.
    ///
    /// # Errors
    /// ESRCH when the process has been waited for.
    pub(super) fn signal_group(&self, signal: i32) -> io::Result<()> {
        // The number is the group's for as long as nobody has waited for the process.
        let reaped = self.reaped.lock();
        if *reaped {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        self.note(signal);
        pidfd::signal_group(self.pid, signal)
    }

    /// Blocks: sends a signal to the whole tree, of which this much is known from before. Without a
    /// control group it gives what is known then.
    ///
    /// # Errors
    /// ESRCH when there is nothing left, EPERM when one of the tree must not be signalled. Without
    /// /proc only the process's group is signalled, and the error says so.
    pub(super) fn signal_all(&self, signal: i32, known: Known) -> io::Result<Known> {
        self.note(signal);
        if let Some(leaf) = &self.leaf {
            return leaf.signal(signal).map(|()| Known::default());
        }
        match self.root() {
            Ok(root) => descent::signal(known.with_root(root), signal, &self.notes),
            Err(error) => {
                self.signal_group(signal)?;
                Err(io::Error::other(format!(
                    "only its process group got the signal: its descendants cannot be looked for \
                     without /proc ({})",
                    errno::text_of(&error)
                )))
            }
        }
    }

    /// Adds its process to what is to be signalled together with others, if it has no control group.
    /// Without /proc only its process group gets the signal, and that here.
    pub(super) fn join(&self, known: Known, signal: i32) -> Known {
        self.note(signal);
        if self.leaf.is_some() {
            return known;
        }
        match self.root() {
            Ok(root) => known.with_root(root),
            Err(_) => {
                let _ = self.signal_group(signal);
                known
            }
        }
    }

    /// Blocks: kills what is left of a tree whose process has exited, given what
    /// [`Tree::signal_all`] found before.
    pub(super) fn kill_rest(&self, known: Known) -> io::Result<()> {
        let killed = match &self.leaf {
            Some(leaf) => leaf.signal(libc::SIGKILL),
            None => descent::signal(known, libc::SIGKILL, &self.notes).map(drop),
        };
        match killed {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            killed => killed,
        }
    }

    /// The process itself; `None` when it has been waited for.
    ///
    /// # Errors
    /// /proc is not mounted, or is another pid namespace's, or hides the process.
    fn root(&self) -> io::Result<Option<Member>> {
        let reaped = self.reaped.lock();
        if *reaped {
            return Ok(None);
        }
        let pid = i32::try_from(self.pid).map_err(io::Error::other)?;
        // Until it is waited for it is there, be it as a zombie.
        let stat = Stat::read(pid)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        Ok(Some(Member { pid, started: stat.started }))
    }

    /// Called before a signal is sent: the supervisor must not take its work for the kernel's.
    fn note(&self, signal: i32) {
        if signal == libc::SIGKILL {
            self.killed.store(true, Ordering::Release);
        }
    }

    /// Takes the zombie away.
    pub(super) fn reap(&self, child: ChildRef<'_>) {
        let mut reaped = self.reaped.lock();
        let _ = pidfd::wait(child);
        *reaped = true;
    }

    /// Blocks for a moment: the processes of the tree, the process itself first.
    pub(super) fn pids(&self) -> Vec<u32> {
        let found = match &self.leaf {
            Some(leaf) => leaf.pids().unwrap_or_default(),
            None => self.root().ok().flatten().map(descent::pids).unwrap_or_default(),
        };
        let others = found.into_iter().filter_map(|pid| u32::try_from(pid).ok());
        let others = others.filter(|pid| *pid != self.pid);
        let own = (!*self.reaped.lock()).then_some(self.pid);
        own.into_iter().chain(others).collect()
    }

    /// Blocks for a moment: what the tree has done until now.
    pub(super) fn activity(&self) -> Activity {
        Activity::of(&self.pids(), self.leaf.as_ref().and_then(|leaf| leaf.processor_time()))
    }

    /// Blocks for a moment: what the tree of a living process uses.
    pub(super) fn usage(&self) -> Usage {
        let counted = self.leaf.as_ref().and_then(|leaf| leaf.usage());
        counted.or_else(|| Some(descent::usage(self.root().ok()??.pid))).unwrap_or_default()
    }

    /// Blocks for a moment: what there is to say when the process has exited and nobody has waited
    /// for it. Removes its control group if nothing is left in it.
    pub(super) fn conclude(&self, child: ChildRef<'_>) -> Conclusion {
        let killed = self.killed.load(Ordering::Acquire);
        let Some(leaf) = &self.leaf else {
            let usage = self.usage_of_ended(child);
            return Conclusion { usage, killed, ..Conclusion::default() };
        };
        let counted = leaf.usage();
        let verdict = leaf.verdict();
        let gone = leaf.remove().is_ok();
        let usage = match counted {
            // What is left is cache.
            Some(usage) if gone => Usage { memory: 0, pids: 0, ..usage },
            Some(usage) => usage,
            None => self.usage_of_ended(child),
        };
        Conclusion { usage, verdict, killed, gone }
    }

    fn usage_of_ended(&self, child: ChildRef<'_>) -> Usage {
        let (io_read, io_write) = descent::io(self.pid);
        // It fails for a process that others have waited for.
        let spent = pidfd::spent(child).unwrap_or_default();
        Usage {
            cpu_user: spent.user,
            cpu_system: spent.system,
            // Not what getrusage says: the kernel counts the memory that was left behind at the exec,
            // and of a child that shared the daemon's memory that is the daemon's peak.
            memory_peak: 0,
            io_read,
            io_write,
            ..Usage::default()
        }
    }

    /// Waits until nothing is left in the control group, and removes it. Without a place to wait it
    /// is left to [`Groups::sweep_missed`](super::cgroup::Groups::sweep_missed).
    pub(super) fn linger(&self, manager: &Arc<Manager>) {
        let Some(leaf) = self.leaf.clone() else { return };
        let manager = Arc::clone(manager);
        let events = leaf.events().and_then(|events| Ok(ready::watch_priority(events)?));
        let groups = &manager.groups;
        let (Some(place), Some(mut stops), Ok(events)) =
            (groups.linger(), groups.lingering_stops(), events)
        else {
            return groups.miss(leaf);
        };
        tokio::spawn(async move {
            loop {
                // Ready at the beginning, and whenever the file has changed.
                let changed = tokio::select! {
                    changed = events.ready(Interest::PRIORITY) => changed,
                    _ = stops.changed() => break,
                };
                let Ok(mut change) = changed else { break };
                change.clear_ready();
                let again = Arc::clone(&leaf);
                if manager.trees.run_next_step(move || again.remove().is_ok()).await == Ok(true) {
                    return;
                }
            }
            manager.groups.miss(leaf);
            drop(events);
            drop(place);
        });
    }
}
