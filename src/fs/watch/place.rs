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
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::{below, bounded};

/// The directory that had a name once.
#[derive(Debug)]
pub(super) struct Place {
    /// A path to it.
    pub(super) at: PathBuf,
    fd: Option<OwnedFd>,
}

impl Place {
    /// Opens a directory by its path below another one, following no link below that.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    /// `ETIMEDOUT` when its file system does not answer.
    pub(super) fn open(root: &Path, rel: &Path) -> Result<Self, Errno> {
        let (top, inside) = (root.to_owned(), rel.to_owned());
        bounded::call(&below(root, rel), move || Self::open_now(&top, &inside))?
    }

    fn open_now(root: &Path, rel: &Path) -> Result<Self, Errno> {
        let path = &below(root, rel);
        let inside = !rel.as_os_str().is_empty();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = match inside {
            true => {
                open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                    .and_then(|root| {
                        let resolve =
                            ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH;
                        openat2(root, rel, OpenHow::new().flags(flags).resolve(resolve))
                    })
            }
            false => open(path, flags, Mode::empty()),
        };
        let opened = match opened {
            // Linux before 5.6, and sandboxes that know only older calls.
            Err(Errno::ENOSYS | Errno::EPERM) => {
                open(path, flags | OFlag::O_NOFOLLOW, Mode::empty())
            }
            opened => opened,
        };
        match opened {
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
