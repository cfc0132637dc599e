//! /proc/PID/stat, proc_pid_stat(5).

use std::{fs, io};

use super::{number, words};

/// A line of `/proc/PID/stat`, as far as it is of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// The process.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// The session that it is in, 0 for those of the kernel.
    pub session: i32,
    /// The state of its main thread, a letter; other threads may have another one.
    pub state: u8,
    /// Ticks in user mode, with those of the children that it has waited for.
    pub user_ticks: u64,
    /// Ticks in the kernel, with those of the children that it has waited for.
    pub system_ticks: u64,
    /// Its threads, one that has exited and that nobody has waited for included.
    pub threads: u64,
    /// When it was started, in ticks since boot.
    pub started: u64,
}

/// What all threads of a process do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// One of them can run.
    Runs,
    /// None can run before somebody continues it.
    Stopped,
    /// All have exited.
    Dead,
}

impl Stat {
    /// Reads the line of a process; `None` when there is no such process.
    ///
    /// # Errors
    /// What the daemon lacks (descriptors, memory, /proc itself): nothing is known then.
    pub fn read(pid: i32) -> io::Result<Option<Self>> {
        match fs::read(format!("/proc/{pid}/stat")) {
            Ok(line) => Ok(Self::parse(&line)),
            Err(error) => match error.raw_os_error() {
                // ESRCH: it ended between opening and reading.
                Some(libc::ENOENT | libc::ESRCH) if super::is_mounted() => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// As [`Stat::read`], where nothing can be done about errors.
    pub fn of(pid: i32) -> Option<Self> {
        Self::read(pid).ok().flatten()
    }

    /// `PID (NAME) STATE PPID PGRP SESSION ...`; the name may hold any byte but NUL.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let open = line.iter().position(|byte| *byte == b'(')?;
        let close = line.iter().rposition(|byte| *byte == b')')?;
        let pid = line.get(..open)?.trim_ascii();
        let fields: Vec<&[u8]> = words(line.get(close + 1..)?).collect();
        // The state is the third field of the line and the first of these.
        let field = |place: usize| fields.get(place - 3).copied();
        let positive = |place| number(field(place)?);
        Some(Self {
            pid: signed(pid)?,
            parent: signed(field(4)?)?,
            session: signed(field(6)?)?,
            state: *field(3)?.first()?,
            user_ticks: positive(14)?.saturating_add(positive(16)?),
            system_ticks: positive(15)?.saturating_add(positive(17)?),
            threads: positive(20)?,
            started: positive(22)?,
        })
    }

    /// Whether the process can still do something: its main thread may have exited (a zombie, as it
    /// looks) while others run.
    pub fn is_alive(&self) -> bool {
        !self.main_thread_is_dead() || (self.threads > 1 && self.group() != Group::Dead)
    }

    /// What its threads do. Of a process with one thread this is known already; else it is read.
    pub fn group(&self) -> Group {
        let alone = match self.state {
            _ if self.main_thread_is_dead() => Group::Dead,
            b'T' | b't' => Group::Stopped,
            _ => return Group::Runs,
        };
        if self.threads <= 1 {
            return alone;
        }
        let tasks = match fs::read_dir(format!("/proc/{}/task", self.pid)) {
            Ok(tasks) => tasks,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Group::Dead,
            // Nothing is known: as if it could run.
            Err(_) => return Group::Runs,
        };
        let mut group = Group::Dead;
        for task in tasks {
            let Ok(line) = task.and_then(|task| fs::read(task.path().join("stat"))) else {
                continue;
            };
            match Self::parse(&line).map(|thread| thread.state) {
                Some(b'Z' | b'X' | b'x') => {}
                Some(b'T' | b't') => group = Group::Stopped,
                _ => return Group::Runs,
            }
        }
        group
    }

    fn main_thread_is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

fn signed(text: &[u8]) -> Option<i32> {
    // tpgid may be -1, and a parent of another pid namespace is 0.
    match text.strip_prefix(b"-") {
        Some(digits) => i32::try_from(number(digits)?).ok().map(|number| -number),
        None => i32::try_from(number(text)?).ok(),
    }
}
