//! Low descriptor numbers that are reserved for the children that are being started.
//!
//! Between clone and exec a child has a copy of the daemon's descriptors, close-on-exec or not. While one
//! of them is open for writing, nobody can execute the file ("Text file busy"), though the daemon has closed
//! it and has answered its upload. So children are made without copies: a child shares the daemon's table
//! (CLONE_FILES), and its first step is `close_range(N, MAX, CLOSE_RANGE_UNSHARE)`, for which the kernel makes
//! a table of the descriptors below N alone. What a child needs has to be below N, and what the daemon opens
//! later has to be above: [`reserve`] takes the lowest numbers at the start, and [`take`] puts the stdio of
//! one child there.
//!
//! The kernel copies whole words of its bitmap of descriptors ([`WORD`]), and then closes what is not wanted.
//! A copy of a file on a FUSE mount is flushed when it is closed, which hangs if the server of the mount
//! does. So N is a multiple of that, and no file of the daemon has a number below.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use libc::c_int;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::resource::{Resource, getrlimit},
    unistd::pipe2,
};
use parking_lot::Mutex;

/// The descriptors of one word of the kernel's bitmap.
const WORD: c_int = 64;
/// The limit on descriptors from which on a whole word is kept for this. Below it some are copied.
const MIN_LIMIT: u64 = 256;
/// The children that can be between clone and their first step at a time; others wait.
const SETS: usize = 4;
/// How often a child waits for a set, and how long each time. A step of a few microseconds has to be awaited.
const MAX_WAITS: usize = 100;
const WAIT: Duration = Duration::from_micros(100);

static RESERVED: OnceLock<Reserved> = OnceLock::new();

#[derive(Debug)]
struct Reserved {
    /// What the numbers stand for while no child uses them.
    placeholder: OwnedFd,
    sets: [[OwnedFd; 3]; SETS],
    /// The rest of the word.
    _rest: Vec<OwnedFd>,
    /// Above all of them.
    above: c_int,
    users: Mutex<Users>,
}

#[derive(Debug, Default)]
struct Users {
    /// Counts the uses of all sets.
    uses: u64,
    current: [Option<User>; SETS],
}

#[derive(Debug)]
struct User {
    number: u64,
    /// Whether its child has a table of its own, so that the set is free for another.
    is_apart: Arc<AtomicBool>,
}

/// Reserves the numbers. For the start, before anything else is opened; without it, or when it fails,
/// children are made with copies.
///
/// # Errors
/// When descriptors are short.
pub fn reserve() -> io::Result<()> {
    if RESERVED.get().is_some() {
        return Ok(());
    }
    let (placeholder, other_end) = pipe2(OFlag::O_CLOEXEC)?;
    // Its number is one of the low ones.
    drop(other_end);
    let mut above = 0;
    let mut number = || {
        let fd = fcntl(&placeholder, FcntlArg::F_DUPFD_CLOEXEC(3))?;
        above = above.max(fd + 1);
        // SAFETY: fcntl has just made this descriptor for us.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let mut set = || Ok::<_, Errno>([number()?, number()?, number()?]);
    let sets = [set()?, set()?, set()?, set()?];
    let mut rest = Vec::new();
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    while limit >= MIN_LIMIT && above % WORD != 0 {
        let Ok(fd) = fcntl(&placeholder, FcntlArg::F_DUPFD_CLOEXEC(3)) else { break };
        above = above.max(fd + 1);
        // SAFETY: fcntl has just made this descriptor for us.
        rest.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let reserved = Reserved { placeholder, sets, _rest: rest, above, users: Mutex::default() };
    // Somebody else may have been faster, who has the same.
    let _ = RESERVED.set(reserved);
    Ok(())
}

/// The numbers of one child. Free again when it is dropped, or once the child has a table of its own.
#[derive(Debug)]
pub(super) struct LowFds {
    reserved: &'static Reserved,
    place: usize,
    number: u64,
    /// The numbers for stdin, stdout and stderr.
    pub(super) stdio: [c_int; 3],
    /// For the child to set.
    pub(super) is_apart: Arc<AtomicBool>,
}

/// Puts the stdio of a child on low numbers. `None` where there are none, or none is free.
pub(super) fn take(stdio: [BorrowedFd<'_>; 3]) -> Option<LowFds> {
    let reserved = RESERVED.get()?;
    for _ in 0..MAX_WAITS {
        let mut users = reserved.users.lock();
        let is_free = |user: &Option<User>| {
            user.as_ref().is_none_or(|user| user.is_apart.load(Ordering::Acquire))
        };
        let Some(place) = users.current.iter().position(is_free) else {
            drop(users);
            thread::sleep(WAIT);
            continue;
        };
        users.uses += 1;
        let (number, is_apart) = (users.uses, Arc::new(AtomicBool::new(false)));
        let user = User { number, is_apart: Arc::clone(&is_apart) };
        *users.current.get_mut(place)? = Some(user);
        drop(users);
        let numbers = reserved.sets.get(place)?.each_ref().map(AsRawFd::as_raw_fd);
        // Dropped, it puts the placeholder back.
        let taken = LowFds { reserved, place, number, stdio: numbers, is_apart };
        taken.put(stdio).ok()?;
        return Some(taken);
    }
    None
}

impl LowFds {
    /// The first number that the child does not need.
    pub(super) fn above(&self) -> c_int {
        self.reserved.above
    }

    fn put(&self, stdio: [BorrowedFd<'_>; 3]) -> io::Result<()> {
        for (to, from) in self.reserved.sets.get(self.place).into_iter().flatten().zip(stdio) {
            replace(to, from.as_raw_fd())?;
        }
        Ok(())
    }
}

impl Drop for LowFds {
    fn drop(&mut self) {
        let mut users = self.reserved.users.lock();
        let Some(user) = users.current.get_mut(self.place) else { return };
        // Another child may have it by now.
        if user.as_ref().is_none_or(|user| user.number != self.number) {
            return;
        }
        for fd in self.reserved.sets.get(self.place).into_iter().flatten() {
            // Both are open, and dup3 needs nothing else.
            let _ = replace(fd, self.reserved.placeholder.as_raw_fd());
        }
        *user = None;
    }
}

/// Makes a descriptor of ours stand for another open file.
fn replace(fd: &OwnedFd, with: c_int) -> io::Result<()> {
    loop {
        // SAFETY: the call takes integers; `fd` is ours, and nobody reads or writes through it.
        if unsafe { libc::dup3(with, fd.as_raw_fd(), libc::O_CLOEXEC) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
