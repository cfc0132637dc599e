//! Descendants as /proc shows them, for trees without a control group.
//!
//! A list of processes is old when it is read. So it is read again until it holds nothing new though
//! nobody has forked meanwhile. Two ways lead from a process to others of its tree: the children of a
//! member are members, and so is whoever is in a session that a member is in, since each session of a
//! member began in the tree. A process is known by its pid and its start time, and is signalled
//! through a pidfd that was opened before the start time was compared.
//!
//! * **SIGKILL** is sent at first sight: nothing can undo it, whatever becomes of the daemon. The
//!   children of a process lose their parent with it, so they are listed right before the signal and
//!   again right behind it, when it can fork no more. After the last one the tree is looked at again.
//!   A fork bomb may fork faster than that, most of all below a limit on processes, where each kill lets
//!   another one fork. After [`KILL_ROUNDS`] looks its processes are stopped first and killed at the end.
//! * **Other signals**: each process is stopped at first sight, as what is stopped can neither fork nor
//!   exit, and so hides nobody. Then all get the signal, and those that were not stopped before go on
//!   with it, the children first: a shell that goes on before its job would take that for stopped. Who
//!   is stopped meanwhile is noted ([`super::stop_notes`]), for a daemon that dies in between.
//! * **Signals that ask a process to stop** are sent without that, since one that goes on has lost
//!   them.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::AsFd,
    thread,
    time::Duration,
};

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{Pid, SysconfVar, getsid, sysconf},
};

use super::stop_notes::{Note, StopNotes};
use crate::sys::{
    pidfd,
    procfs::{self, Children, Group, Stat},
};

/// How often the list is read for what was forked meanwhile.
const MAX_ROUNDS: usize = 1024;
/// The rounds in which SIGKILL is sent at first sight. On one slow processor a fork bomb of 60 processes
/// survived 64 of them; stopped processes keep their places below the limit and cannot fork.
const KILL_ROUNDS: usize = 16;
/// How often in a row it may hold nothing new while somebody forks, who may be of the tree or not.
const MAX_QUIET_ROUNDS: usize = 8;
/// How long in all to wait for processes to stop that were told to: one that a file system holds
/// does not.
const STOPPING: Duration = Duration::from_millis(100);
/// How often it is looked whether one has stopped.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// The threads of one process whose children are listed when it is killed; those of more are found by
/// their session.
const MAX_THREADS: usize = 64;
/// Ticks a second in /proc where the system does not say: every Linux has this.
const TICKS: i64 = 100;

/// A process that is known to belong to a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) pid: i32,
    /// In ticks since boot.
    pub(super) started: u64,
}

/// What is known of a tree from one look to the next.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// Parents come before their children.
    pub(super) members: Vec<Member>,
    /// The sessions of members, each with the time (in ticks since boot) when one was seen in it.
    sessions: HashMap<i32, u64>,
}

impl Known {
    /// A tree of which the root is known.
    pub(super) fn root(root: Member) -> Self {
        Self { members: vec![root], ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// As far as it is known, with its root.
    pub(super) fn with_root(mut self, root: Option<Member>) -> Self {
        self.members.extend(root.filter(|root| !self.members.contains(root)));
        self
    }

    /// Whether a process is in a session of the tree. The number of a session whose last process is
    /// gone may be given again: then its leader is younger than the look.
    fn has_session_of(&mut self, stat: &Stat) -> bool {
        let Some(seen) = self.sessions.get(&stat.session) else { return false };
        let is_new = stat.pid == stat.session && stat.started > seen.saturating_add(1);
        if is_new {
            self.sessions.remove(&stat.session);
        }
        !is_new
    }
}

impl Member {
    /// Whatever has this pid now.
    #[cfg(test)]
    pub(super) fn of(pid: i32) -> Option<Self> {
        Stat::of(pid).as_ref().map(member)
    }

    /// Sends it a signal, if it still lives.
    ///
    /// # Errors
    /// EPERM, or what the daemon lacks.
    pub(super) fn signal(self, signal: i32) -> io::Result<()> {
        let sent = match pidfd::open(self.pid) {
            Ok(pidfd) if self.is_there()? => {
                pidfd::signal_by(Some(pidfd.as_fd()), self.pid, signal)
            }
            // Without pidfds, or descriptors for one: another process could get the pid between the
            // look and the signal, in the microsecond that is between them.
            Err(error) if pidfd::is_refusal(&error) || is_ours(&error) => match self.is_there()? {
                true => pidfd::kill(self.pid, signal),
                false => Ok(()),
            },
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match sent {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            sent => sent,
        }
    }

    fn is_there(self) -> io::Result<bool> {
        match Stat::read(self.pid) {
            // A descriptor that lacks for the look must not keep it stopped, or alive.
            Err(error) if is_ours(&error) => Ok(true),
            read => Ok(read?.as_ref().map(member) == Some(self)),
        }
    }

    /// What it does; dead once its pid is another's.
    pub(super) fn group(self) -> Group {
        let stat = Stat::of(self.pid).filter(|stat| member(stat) == self);
        stat.map_or(Group::Dead, |stat| stat.group())
    }

    /// Blocks until it has stopped, or is no more, as far as the patience goes.
    fn until_it_stops(self, patience: &mut Duration) {
        while !patience.is_zero() && self.group() == Group::Runs {
            let pause = LOOK_AGAIN.min(*patience);
            thread::sleep(pause);
            *patience -= pause;
        }
    }
}

fn member(stat: &Stat) -> Member {
    Member { pid: stat.pid, started: stat.started }
}

/// Whether an error tells of what the daemon lacks, and nothing about a process.
fn is_ours(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Whether it is neither of PID 1, the daemon and the kernel.
fn may_be_of_a_tree(stat: &Stat) -> bool {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    stat.pid > 1 && stat.pid != own && stat.session > 0
}

/// All processes; each is shown to `look` when it has been read.
fn all(look: &mut dyn FnMut(&Stat)) -> io::Result<Vec<Stat>> {
    let mut all = Vec::new();
    for pid in procfs::pids()? {
        match Stat::read(pid) {
            Ok(Some(stat)) => {
                look(&stat);
                all.push(stat);
            }
            Err(error) if is_ours(&error) => return Err(error),
            // It has ended, or /proc hides it from this user, who then could not signal it either.
            Ok(None) | Err(_) => {}
        }
    }
    Ok(all)
}

/// Sends a signal to the tree of which this is known; gives all that is known then.
///
/// # Errors
/// ESRCH when nothing is known of it (a root that is a zombie is fine), else the last error of those
/// that could not be signalled, or why no more could be looked for.
pub(super) fn signal(known: Known, signal: i32, notes: &StopNotes) -> io::Result<Known> {
    signal_among(known, signal, notes, all)
}

/// As [`signal`], given what lists all processes.
fn signal_among(
    known: Known,
    signal: i32,
    notes: &StopNotes,
    mut list: impl FnMut(&mut dyn FnMut(&Stat)) -> io::Result<Vec<Stat>>,
) -> io::Result<Known> {
    if known.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let mut pass = SignalPass::new(known, signal, notes.begin());
    let mut quiet_rounds = 0;
    for round in 1.. {
        pass.kills_at_once = round <= KILL_ROUNDS;
        let newest = newest_pid();
        let before = pass.reached.len();
        match list(&mut |stat| pass.see(stat)) {
            Ok(all) => tree(&mut pass.known, &all).into_iter().for_each(|stat| pass.take(stat)),
            Err(error) => {
                // Those that were found are stopped, and must not stay so.
                pass.refused = Some(error);
                break;
            }
        }
        quiet_rounds = if pass.reached.len() == before { quiet_rounds + 1 } else { 0 };
        let nobody_forked = newest.is_some() && newest == newest_pid();
        if quiet_rounds == MAX_QUIET_ROUNDS || (quiet_rounds > 0 && nobody_forked) {
            break;
        }
        if round == MAX_ROUNDS {
            let why = format!("there were new processes at each of {MAX_ROUNDS} looks");
            pass.refused = Some(io::Error::other(why));
            break;
        }
    }
    pass.end()
}

fn own_session() -> Option<i32> {
    getsid(None).ok().map(Pid::as_raw)
}

fn newest_pid() -> Option<u64> {
    procfs::newest_pid(&std::fs::read("/proc/loadavg").ok()?)
}

/// The time since boot in the ticks of /proc.
fn now() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return u64::MAX };
    let since_boot = Duration::from(now);
    let ticks = since_boot.as_millis() * u128::from(ticks_per_second()) / 1000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn ticks_per_second() -> u64 {
    sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(TICKS).max(1).unsigned_abs()
}

/// One search for all of a tree, for the sake of a signal. Dropped, it lets those go on that it has
/// stopped.
struct SignalPass<'a> {
    signal: i32,
    known: Known,
    /// The members of `known`.
    listed: HashSet<Member>,
    /// Those that were stopped or killed, or asked to stop.
    reached: HashSet<Member>,
    stopped: Vec<Member>,
    note: Note<'a>,
    refused: Option<io::Error>,
    patience: Duration,
    own_session: Option<i32>,
    /// Whether SIGKILL is sent at first sight.
    kills_at_once: bool,
}

impl<'a> SignalPass<'a> {
    fn new(known: Known, signal: i32, note: Note<'a>) -> Self {
        Self {
            signal,
            listed: known.members.iter().copied().collect(),
            known,
            reached: HashSet::new(),
            stopped: Vec::new(),
            note,
            refused: None,
            patience: STOPPING,
            own_session: own_session(),
            kills_at_once: true,
        }
    }

    /// Any process.
    fn see(&mut self, stat: &Stat) {
        if may_be_of_a_tree(stat) && self.known.has_session_of(stat) && stat.is_alive() {
            self.take(stat);
        }
    }

    /// One of the tree.
    fn take(&mut self, stat: &Stat) {
        if !self.reached.insert(member(stat)) {
            return;
        }
        self.learn(stat);
        match self.signal {
            libc::SIGKILL if self.kills_at_once => self.kill(stat),
            libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => {
                self.send(member(stat), self.signal);
            }
            _ => self.stop(stat),
        }
    }

    fn learn(&mut self, stat: &Stat) {
        if self.listed.insert(member(stat)) {
            self.known.members.push(member(stat));
        }
        if self.own_session != Some(stat.session) {
            self.known.sessions.insert(stat.session, now());
        }
    }

    fn send(&mut self, to: Member, signal: i32) {
        let earlier = self.refused.take();
        self.refused = to.signal(signal).err().or(earlier);
    }

    /// Kills a process, then its children that it had when it died, and theirs.
    fn kill(&mut self, stat: &Stat) {
        let mut left = vec![stat.clone()];
        while let Some(parent) = left.pop() {
            let lists = Children::open(parent.pid, MAX_THREADS);
            let mut children = lists.read();
            self.send(member(&parent), libc::SIGKILL);
            children.extend(lists.read());
            for pid in children {
                let Some(child) = Stat::of(pid) else { continue };
                // Whoever has that pid by now and is no child was not one when it was listed.
                let is_child = child.started >= parent.started && may_be_of_a_tree(&child);
                if is_child && child.is_alive() && self.reached.insert(member(&child)) {
                    self.learn(&child);
                    left.push(child);
                }
            }
        }
    }

    fn stop(&mut self, stat: &Stat) {
        // One that is traced may be let go on by who traces it.
        if stat.state == b'T' && stat.group() == Group::Stopped {
            return;
        }
        let stopped = member(stat);
        if self.signal != libc::SIGSTOP {
            self.note.add(stopped);
        }
        if stopped.signal(libc::SIGSTOP).is_ok() {
            self.stopped.push(stopped);
            // A parent on its way to stop still sees that its child has stopped.
            stopped.until_it_stops(&mut self.patience);
        }
    }

    /// When there is nobody else.
    fn end(mut self) -> io::Result<Known> {
        let is_sent = match self.signal {
            libc::SIGKILL => self.kills_at_once,
            signal => matches!(signal, libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU),
        };
        if !is_sent {
            let reached: Vec<Member> = self.known.members.clone();
            for member in reached.into_iter().rev() {
                self.send(member, self.signal);
            }
        }
        self.go_on();
        let known = std::mem::take(&mut self.known);
        self.refused.take().map_or(Ok(known), Err)
    }

    fn go_on(&mut self) {
        let stopped = std::mem::take(&mut self.stopped);
        if self.signal != libc::SIGSTOP {
            for member in stopped.into_iter().rev() {
                self.send(member, libc::SIGCONT);
            }
        }
    }
}

impl Drop for SignalPass<'_> {
    fn drop(&mut self) {
        self.go_on();
    }
}

/// The processes of the tree of this root.
pub(super) fn pids(root: Member) -> Vec<i32> {
    let all = all(&mut |_| {}).unwrap_or_default();
    tree(&mut Known::root(root), &all).into_iter().map(|stat| stat.pid).collect()
}

/// Those of `all` that descend from what is known of a tree or are in one of its sessions, and still
/// live; parents first.
fn tree<'a>(known: &mut Known, all: &'a [Stat]) -> Vec<&'a Stat> {
    let candidates = || all.iter().filter(|stat| may_be_of_a_tree(stat));
    let mut children: HashMap<i32, Vec<&Stat>> = HashMap::new();
    let mut of_session: HashMap<i32, Vec<&Stat>> = HashMap::new();
    for stat in candidates() {
        children.entry(stat.parent).or_default().push(stat);
        of_session.entry(stat.session).or_default().push(stat);
    }
    let seeds: HashSet<Member> = known.members.iter().copied().collect();
    let mut left: Vec<&Stat> = candidates()
        .filter(|stat| seeds.contains(&member(stat)) || known.has_session_of(stat))
        .collect();
    // Of the daemon's own session may be a child that has not begun its own yet, and strangers.
    own_session().map(|session| of_session.remove(&session));
    let mut members: HashSet<Member> = left.iter().map(|stat| member(stat)).collect();
    let mut tree = Vec::new();
    while let Some(stat) = left.pop() {
        if stat.is_alive() {
            tree.push(stat);
        }
        let related =
            children.remove(&stat.pid).into_iter().chain(of_session.remove(&stat.session));
        left.extend(related.flatten().filter(|stat| members.insert(member(stat))));
    }
    tree
}

/// What a process uses, with those of its children that it has waited for.
pub(super) fn usage(pid: i32) -> super::Usage {
    let Some(stat) = Stat::of(pid) else { return super::Usage::default() };
    let span = |used: u64| {
        let nanos = u128::from(used) * 1_000_000_000 / u128::from(ticks_per_second());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    };
    let status = std::fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    let memory = |name: &str| procfs::entry_bytes(&status, name.as_bytes()).unwrap_or_default();
    let (io_read, io_write) = io(pid.unsigned_abs());
    super::Usage {
        cpu_user: span(stat.user_ticks),
        cpu_system: span(stat.system_ticks),
        memory_peak: memory("VmHWM:"),
        memory: memory("VmRSS:"),
        io_read,
        io_write,
        pids: stat.threads,
        whole_tree: false,
    }
}

/// Bytes read from and written to block devices by a process that nobody has waited for, and by
/// those of its children that it has waited for. Zeros where the kernel does not count them.
pub(super) fn io(pid: u32) -> (u64, u64) {
    let text = std::fs::read(format!("/proc/{pid}/io")).unwrap_or_default();
    let number = |name: &str| procfs::entry_number(&text, name.as_bytes()).unwrap_or_default();
    (number("read_bytes:"), number("write_bytes:"))
}

#[cfg(test)]
mod tests;
