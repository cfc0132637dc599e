//! A directory that is held open while it is looked at.
//!
//! Its path can lead to another one, or nowhere, between two system calls; what was watched and what
//! was read have to be the same directory. Through `/proc/self/fd` they are. Without it, the path has
//! to do.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

/// The directory that had a name once.
#[derive(Debug)]
pub(super) struct Place {
    /// A path to it.
    pub(super) at: PathBuf,
    fd: Option<OwnedFd>,
}

impl Place {
    /// Opens a directory; `inside` does not follow a link at the end.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(super) fn open(path: &Path, inside: bool) -> Result<Self, Errno> {
        let follow = if inside { OFlag::O_NOFOLLOW } else { OFlag::empty() };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match open(path, flags | follow, Mode::empty()) {
            Ok(fd) => {
                let at = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
                match at.exists() {
                    true => Ok(Self { at, fd: Some(fd) }),
                    false => Ok(Self { at: path.to_owned(), fd: None }),
                }
            }
            Err(errno @ (Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP)) => {
                Err(errno)
            }
            // Too many open files are no reason to miss a directory.
            Err(_) => Ok(Self { at: path.to_owned(), fd: None }),
        }
    }

    /// Whether `at` is a link that has to be followed.
    pub(super) fn is_open(&self) -> bool {
        self.fd.is_some()
    }
}
