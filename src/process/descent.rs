//! Descendants as /proc shows them, for trees without a control group.
//!
//! A list of processes is old when it is read. So it is read again until it holds nothing new though
//! nobody has forked meanwhile, and before a tree is signalled each of its processes is stopped: what
//! is stopped can neither fork nor exit, and so hides nobody. One whose session is known is stopped as
//! soon as it is read: a shell that does nothing but fork may live for less time than the rest of the
//! list takes, and its child, which is not in the list, for as little. Then all get
//! the signal, and those that were not stopped before go on with it, the children first: a shell that
//! goes on before its job would take that for stopped.
//! Signals that ask a process to stop are sent without that, since one that goes on has lost them.
//! A process is known by its pid and its start time, and is signalled through a pidfd that was
//! opened before the start time was compared.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::fd::AsFd,
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, SysconfVar, sysconf},
};

use super::Usage;
use crate::sys::pidfd;

/// How often the list is read for what was forked meanwhile.
const MAX_ROUNDS: usize = 64;
/// How often in a row it may hold nothing new while somebody forks, who may be of the tree or not.
const MAX_QUIET_ROUNDS: usize = 8;
/// How long in all to wait for processes to stop that were told to: one that a file system holds
/// does not.
const STOPPING: Duration = Duration::from_millis(100);
/// How often it is looked whether one has stopped.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
/// Ticks a second in /proc where the system does not say: every Linux has this.
const TICKS: i64 = 100;

/// The states of interest, as proc_pid_stat(5) has them.
const STOPPED: char = 'T';
const ZOMBIE: char = 'Z';

/// A process that is known to belong to a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) pid: i32,
    /// In ticks since boot.
    started: u64,
}

/// A line of `/proc/PID/stat`, as far as it is of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stat {
    member: Member,
    parent: i32,
    session: i32,
    state: char,
    user_ticks: u64,
    system_ticks: u64,
    threads: u64,
}

impl Member {
    /// Whatever has this pid now.
    pub(super) fn of(pid: i32) -> Option<Self> {
        Some(Stat::of(pid)?.member)
    }

    /// Sends it a signal, if it still lives.
    fn signal(self, signal: i32) -> io::Result<()> {
        let pidfd = match pidfd::open(self.pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            opened => opened?,
        };
        if Stat::read(self.pid)?.map(|stat| stat.member) != Some(self) {
            return Ok(());
        }
        match pidfd::send_signal(pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Blocks until it has stopped, or is no more, as far as the patience goes.
    fn until_it_stops(self, patience: &mut Duration) {
        let runs = |stat: Stat| stat.member == self && !matches!(stat.state, STOPPED | ZOMBIE);
        while !patience.is_zero() && Stat::of(self.pid).is_some_and(runs) {
            let pause = LOOK_AGAIN.min(*patience);
            thread::sleep(pause);
            *patience -= pause;
        }
    }

    /// Lets it go on that was stopped here, also without a descriptor to be had: if its pid is
    /// another's by now, that one is hardly stopped, and dies of nothing.
    fn go_on(self) -> io::Result<()> {
        match self.signal(libc::SIGCONT) {
            Err(error) if is_ours(&error) => {
                let sent = kill(Pid::from_raw(self.pid), Signal::SIGCONT);
                sent.or_else(|errno| if errno == Errno::ESRCH { Ok(()) } else { Err(errno.into()) })
            }
            result => result,
        }
    }
}

/// Whether an error tells of what the daemon lacks, and nothing about a process.
fn is_ours(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        Self::read(pid).ok().flatten()
    }

    /// `None` when there is no such process.
    fn read(pid: i32) -> io::Result<Option<Self>> {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(line) => Ok(Self::parse(&line)),
            Err(error) if is_ours(&error) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// `PID (NAME) STATE PPID PGRP SESSION ...`, proc_pid_stat(5); the name may hold anything.
    fn parse(line: &str) -> Option<Self> {
        let (pid, rest) = line.split_once(' ')?;
        let fields: Vec<&str> = rest.rsplit_once(')')?.1.split_whitespace().collect();
        // The state is the third field of the line and the first of these.
        let field = |place: usize| fields.get(place - 3).copied();
        let number = |place| field(place)?.parse::<u64>().ok();
        Some(Self {
            member: Member { pid: pid.parse().ok()?, started: number(22)? },
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
            state: field(3)?.chars().next()?,
            // With those of the children that it has waited for.
            user_ticks: number(14)? + number(16)?,
            system_ticks: number(15)? + number(17)?,
            threads: number(20)?,
        })
    }

    /// Whether it is neither of PID 1, the daemon and the kernel.
    fn may_be_of_a_tree(&self) -> bool {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        self.member.pid > 1 && self.member.pid != own && self.session > 0
    }

    /// All processes; each is shown to `look` when it has been read.
    fn all(look: &mut dyn FnMut(&Self)) -> io::Result<Vec<Self>> {
        let entries = fs::read_dir("/proc")?;
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let stats = pids.filter_map(|pid| Self::read(pid).transpose());
        stats.inspect(|stat| stat.iter().for_each(&mut *look)).collect()
    }
}

/// Sends a signal to the trees of `roots`; gives all that were found.
///
/// # Errors
/// ESRCH when there are no roots (one that is a zombie is fine), else the last error of those that
/// could not be signalled, or why no more could be looked for.
pub(super) fn signal(roots: &[Member], signal: i32) -> io::Result<Vec<Member>> {
    signal_among(roots, signal, Stat::all)
}

/// As [`signal`], given what lists all processes.
fn signal_among(
    roots: &[Member],
    signal: i32,
    mut list: impl FnMut(&mut dyn FnMut(&Stat)) -> io::Result<Vec<Stat>>,
) -> io::Result<Vec<Member>> {
    if roots.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let mut hunt = Hunt::new(signal);
    let mut quiet_rounds = 0;
    for _ in 0..MAX_ROUNDS {
        let newest = newest_pid();
        let seeds: Vec<Member> = roots.iter().chain(&hunt.found).copied().collect();
        let before = hunt.found.len();
        let all = match list(&mut |stat| hunt.see(stat)) {
            Ok(all) => all,
            Err(error) => {
                // Those that were found are stopped, and must not stay so.
                hunt.refused = Some(error);
                break;
            }
        };
        for stat in tree(&seeds, &all) {
            hunt.take(stat);
        }
        quiet_rounds = if hunt.found.len() == before { quiet_rounds + 1 } else { 0 };
        let nobody_forked = newest.is_some() && newest == newest_pid();
        if quiet_rounds == MAX_QUIET_ROUNDS || (quiet_rounds > 0 && nobody_forked) {
            break;
        }
    }
    hunt.end()
}

/// The pid that was given last in this pid namespace, proc_loadavg(5): another one as soon as
/// somebody forks.
fn newest_pid() -> Option<u64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().last()?.parse().ok()
}

/// One search for all of a tree, for the sake of a signal.
struct Hunt {
    signal: i32,
    /// Parents come before their children.
    found: Vec<Member>,
    known: HashSet<Member>,
    /// The sessions of those that were stopped, which keep them: none is another's meanwhile.
    sessions: HashSet<i32>,
    stopped: Vec<Member>,
    refused: Option<io::Error>,
    patience: Duration,
}

impl Hunt {
    fn new(signal: i32) -> Self {
        Self {
            signal,
            found: Vec::new(),
            known: HashSet::new(),
            sessions: HashSet::new(),
            stopped: Vec::new(),
            refused: None,
            // Who is killed has no time to look at its children.
            patience: if signal == libc::SIGKILL { Duration::ZERO } else { STOPPING },
        }
    }

    fn asks_to_stop(&self) -> bool {
        matches!(self.signal, libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU)
    }

    /// Any process.
    fn see(&mut self, stat: &Stat) {
        if stat.state != ZOMBIE && stat.may_be_of_a_tree() && self.sessions.contains(&stat.session)
        {
            self.take(stat);
        }
    }

    /// One of the tree.
    fn take(&mut self, stat: &Stat) {
        if !self.known.insert(stat.member) {
            return;
        }
        self.found.push(stat.member);
        if self.asks_to_stop() {
            let earlier = self.refused.take();
            self.refused = stat.member.signal(self.signal).err().or(earlier);
        } else if stat.state != STOPPED && stat.member.signal(libc::SIGSTOP).is_ok() {
            self.stopped.push(stat.member);
            self.sessions.insert(stat.session);
            // A parent on its way to stop still sees that its child has stopped.
            stat.member.until_it_stops(&mut self.patience);
        }
    }

    /// When there is nobody else.
    fn end(mut self) -> io::Result<Vec<Member>> {
        if !self.asks_to_stop() {
            for member in self.found.iter().rev() {
                self.refused = member.signal(self.signal).err().or(self.refused);
            }
        }
        if self.signal != libc::SIGSTOP && self.signal != libc::SIGKILL {
            for member in self.stopped.iter().rev() {
                self.refused = member.go_on().err().or(self.refused);
            }
        }
        self.refused.map_or(Ok(self.found), Err)
    }
}

/// The processes of a tree.
pub(super) fn pids(root: Member) -> Vec<i32> {
    let all = Stat::all(&mut |_| {}).unwrap_or_default();
    tree(&[root], &all).into_iter().map(|stat| stat.member.pid).collect()
}

/// Those of `all` that descend from `seeds`, and the seeds that still live. Every session of a
/// member began in the tree, since its root began one, so whoever is in such a session is a member.
fn tree<'a>(seeds: &[Member], all: &'a [Stat]) -> Vec<&'a Stat> {
    let may_be = |stat: &&'a Stat| stat.may_be_of_a_tree();
    let mut children: HashMap<i32, Vec<&Stat>> = HashMap::new();
    let mut of_session: HashMap<i32, Vec<&Stat>> = HashMap::new();
    for stat in all.iter().filter(may_be) {
        children.entry(stat.parent).or_default().push(stat);
        of_session.entry(stat.session).or_default().push(stat);
    }
    let seeds: HashSet<&Member> = seeds.iter().collect();
    let mut left: Vec<&Stat> =
        all.iter().filter(may_be).filter(|stat| seeds.contains(&stat.member)).collect();
    let mut members: HashSet<Member> = left.iter().map(|stat| stat.member).collect();
    let mut tree = Vec::new();
    while let Some(stat) = left.pop() {
        if stat.state != ZOMBIE {
            tree.push(stat);
        }
        let related = children
            .remove(&stat.member.pid)
            .into_iter()
            .chain(of_session.remove(&stat.session))
            .flatten();
        left.extend(related.filter(|stat| members.insert(stat.member)));
    }
    tree
}

/// What a process uses, with those of its children that it has waited for.
pub(super) fn usage(pid: i32) -> Usage {
    let Some(stat) = Stat::of(pid) else { return Usage::default() };
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(TICKS).max(1);
    let span = |used: u64| {
        let nanos = u128::from(used) * 1_000_000_000 / u128::from(ticks.unsigned_abs());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let memory = |name| kib(&status, name).unwrap_or_default();
    let (io_read, io_write) = io(pid.unsigned_abs());
    Usage {
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

fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes read from and written to block devices by a process that nobody has waited for, and by
/// those of its children that it has waited for. Zeros where the kernel does not count them.
pub(super) fn io(pid: u32) -> (u64, u64) {
    let path = Path::new("/proc").join(pid.to_string()).join("io");
    let text = fs::read_to_string(path).unwrap_or_default();
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
    };
    (number("read_bytes:"), number("write_bytes:"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn stat(pid: i32, parent: i32, session: i32) -> Stat {
        Stat {
            member: Member { pid, started: 1 },
            parent,
            session,
            state: 'S',
            user_ticks: 0,
            system_ticks: 0,
            threads: 1,
        }
    }

    fn found(seeds: &[i32], all: &[Stat]) -> Vec<i32> {
        let seeds: Vec<Member> = seeds.iter().map(|&pid| Member { pid, started: 1 }).collect();
        let mut pids: Vec<i32> = tree(&seeds, all).iter().map(|stat| stat.member.pid).collect();
        pids.sort_unstable();
        pids
    }

    #[test]
    fn a_tree_is_children_and_sessions_that_began_in_it() {
        let all = [
            stat(1, 0, 1),
            stat(2, 0, 0),
            stat(10_000_010, 1, 10_000_010),
            // A child, its child in a session of its own, and an orphan of that session.
            stat(10_000_011, 10_000_010, 10_000_010),
            stat(10_000_012, 10_000_011, 10_000_012),
            stat(10_000_013, 1, 10_000_012),
            // An orphan of the first session.
            stat(10_000_014, 1, 10_000_010),
            // Strangers.
            stat(10_000_020, 1, 10_000_020),
            stat(10_000_021, 10_000_020, 10_000_020),
        ];
        let whole = [10_000_010, 10_000_011, 10_000_012, 10_000_013, 10_000_014];
        assert_eq!(found(&[10_000_010], &all), whole);
        assert_eq!(found(&[], &all), [0; 0]);
        // A pid that is another's by now is no seed.
        let reused = Member { pid: 10_000_010, started: 2 };
        assert!(tree(&[reused], &all).is_empty());
    }

    #[test]
    fn an_error_in_the_middle_leaves_nobody_stopped() {
        let mut child = Command::new("setsid").args(["sleep", "1000"]).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Before, it is in the session of this test.
        while Stat::of(pid).unwrap().session != pid {
            thread::yield_now();
        }
        let root = Member::of(pid).unwrap();
        let mut rounds = 0;
        let list = |look: &mut dyn FnMut(&Stat)| {
            rounds += 1;
            match rounds {
                1 => Stat::all(look),
                _ => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            }
        };
        // What it ignores.
        let error = signal_among(&[root], libc::SIGWINCH, list).unwrap_err();
        let state = Stat::of(pid).unwrap().state;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((error.raw_os_error(), rounds), (Some(libc::EMFILE), 2));
        assert_ne!(state, STOPPED);
    }

    #[test]
    fn a_list_that_misses_one_is_not_the_last_while_somebody_forks() {
        let mut parent = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = |of: &std::process::Child| i32::try_from(of.id()).unwrap();
        let root = Member::of(pid(&parent)).unwrap();
        let mut rounds = 0;
        let list = |_: &mut dyn FnMut(&Stat)| {
            rounds += 1;
            // What a chain of short-lived shells does.
            Command::new("true").status()?;
            let session = pid(&parent);
            let parent = Stat { session, ..Stat::of(session).unwrap() };
            let child = Stat { parent: session, session, ..Stat::of(pid(&child)).unwrap() };
            Ok(if rounds < 4 { vec![parent] } else { vec![parent, child] })
        };
        let found = signal_among(&[root], libc::SIGKILL, list).unwrap();
        let ended = [&mut parent, &mut child].map(|process| {
            process.kill().unwrap();
            process.wait().unwrap()
        });
        assert_eq!(found.len(), 2, "{ended:?}");
    }

    #[test]
    fn neither_the_first_process_nor_the_kernel_nor_we_are_in_any_tree() {
        let own = i32::try_from(std::process::id()).unwrap();
        let all = [stat(1, 0, 5), stat(own, 5, 5), stat(5, 1, 5), stat(6, 2, 0), stat(2, 0, 0)];
        assert_eq!(found(&[5, 1, 2, own], &all), [5]);
    }

    #[test]
    fn a_name_may_hold_anything() {
        let line = "7 (a) S 1 (b) R 3 4 5 0 -1 0 0 0 0 0 11 12 13 14 20 0 3 0 99 0 0\n";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.member, stat.parent), (Member { pid: 7, started: 99 }, 3));
        assert_eq!((stat.session, stat.threads), (5, 3));
        assert_eq!((stat.user_ticks, stat.system_ticks), (24, 26));
        assert!(Stat::parse("7 (x").is_none() && Stat::parse("").is_none());
        assert!(Stat::of(1).is_some());
    }
}
