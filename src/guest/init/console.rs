//! Messages of PID 1: on stderr, which is the console when the kernel started it and the
//! container's log otherwise.
//!
//! PID 1 has one thread, which reaps, restarts the daemon and ends the machine, so a message must never
//! block: a pipe that nobody reads or a stopped terminal would hold all of that up. What stderr does not
//! take at once is dropped, and the next message that it takes says how many were lost.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout},
};

const CONSOLE: &str = "/dev/console";
const STDERR: &str = "/proc/self/fd/2";
/// The longest message, in bytes: what poll(2) promises for a pipe is room for this much (`PIPE_BUF`).
const MAX_MESSAGE: usize = 4096;

/// Messages that stderr has not taken since the last one that it took.
static DROPPED: AtomicU32 = AtomicU32::new(0);

/// What [`say!`] does.
pub(super) fn write(message: std::fmt::Arguments<'_>) {
    let dropped = DROPPED.load(Ordering::Relaxed);
    let lost = match dropped {
        0 => String::new(),
        lost => format!("envd init: {lost} messages were dropped: stderr did not take them\n"),
    };
    // One write, so that the daemon's lines do not come in between.
    let mut text = format!("{lost}envd init: {message}\n").into_bytes();
    if text.len() > MAX_MESSAGE {
        text.truncate(MAX_MESSAGE - 1);
        text.push(b'\n');
    }
    match write_now(&text) {
        true => DROPPED.store(0, Ordering::Relaxed),
        false => DROPPED.store(dropped.saturating_add(1), Ordering::Relaxed),
    }
}

/// Writes without waiting; false when stderr does not take it.
fn write_now(text: &[u8]) -> bool {
    let stderr = io::stderr();
    let mut wanted = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let ready = poll(&mut wanted, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
    if !ready {
        return false;
    }
    // A terminal may be ready and have less room than this, so a file description of its own is made
    // non-blocking; the shared one belongs to others too. A socket cannot be opened again, nor can
    // anything without /proc: there poll(2) has to do.
    let own = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(STDERR);
    match own {
        Ok(mut own) => own.write_all(text).is_ok(),
        Err(_) => nix::unistd::write(&stderr, text).is_ok(),
    }
}

/// Says one line, with arguments as `format!` takes them.
macro_rules! say {
    ($($message:tt)*) => { $crate::guest::init::console::write(format_args!($($message)*)) };
}
pub(super) use say;

/// Takes the console for stdin, stdout and stderr when PID 1 was started without: the kernel had
/// no /dev/console yet, and the language's runtime put /dev/null there.
pub(super) fn take_if_mute() {
    let is_null = |meta: std::fs::Metadata| {
        meta.file_type().is_char_device()
            && (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev())) == (1, 3)
    };
    if !std::fs::metadata(STDERR).is_ok_and(is_null) {
        return;
    }
    if let Ok(console) = OpenOptions::new().read(true).write(true).open(CONSOLE) {
        let _ = dup2_stdin(&console);
        let _ = dup2_stdout(&console);
        let _ = dup2_stderr(&console);
    }
}
