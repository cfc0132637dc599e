//! Pseudo-terminals.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::{
    fcntl::{OFlag, open},
    pty::{posix_openpt, ptsname_r, unlockpt},
    sys::stat::{Mode, fchmod},
    unistd::{Uid, fchown},
};

/// Who may open a terminal again: its user, and the group for `write(1)`; as login does it.
const MODE: u32 = 0o620;

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    /// Our end; does not block.
    pub master: OwnedFd,
    /// The command's end.
    pub slave: OwnedFd,
}

/// Opens a pseudo-terminal of this size whose device belongs to `uid`. Programs open their
/// terminal again by name (`/dev/tty`, `$(tty)`), which fails when it belongs to root.
///
/// # Errors
/// What the kernel says: no /dev/ptmx, no free terminal, no descriptor.
pub fn open_pty(cols: u16, rows: u16, uid: u32) -> io::Result<Pty> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags | OFlag::O_NONBLOCK)?;
    unlockpt(&master)?;
    let slave = open(ptsname_r(&master)?.as_str(), flags, Mode::empty())?;
    let slave = File::from(slave);
    fchmod(&slave, Mode::from_bits_truncate(MODE))?;
    if slave.metadata()?.uid() != uid {
        fchown(&slave, Some(Uid::from_raw(uid)), None)?;
    }
    // SAFETY: the descriptor comes from `into_raw_fd`, which gave up its ownership.
    let master = unsafe { OwnedFd::from_raw_fd(master.into_raw_fd()) };
    set_size(master.as_fd(), cols, rows)?;
    Ok(Pty { master, slave: slave.into() })
}

/// Sets the size of a terminal; its foreground programs get SIGWINCH when it has changed.
///
/// # Errors
/// ENOTTY when this is no terminal, EIO when it is gone.
pub fn set_size(terminal: BorrowedFd<'_>, cols: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
