//! Why a path could not be resolved.

use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::{
    blocking::MountBusy,
    fs::{FsError, PathError, path},
};

/// What the walk was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Looking a name up.
    Lookup,
    /// Going into something that is no directory.
    NotADirectory,
    /// Following one link too many.
    TooManyLinks,
    /// Going through a link to nowhere, on the way to something that was to be made.
    Dangling,
    /// Making a directory.
    MakeDirectory,
    /// Giving a new directory to its user.
    Own,
}

/// Why a path could not be resolved, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", PathError::new("lstat", .at, *.errno))]
pub struct WalkError {
    /// What was being done.
    pub step: Step,
    /// The path to that point as the client wrote it.
    pub asked: PathBuf,
    /// The same without links.
    pub at: PathBuf,
    /// What the kernel said, or would have.
    pub errno: Errno,
    /// Whether it was at or behind the last component that the client wrote.
    pub at_last: bool,
    /// Whether nothing was left to walk, of no link's target either.
    pub at_end: bool,
    /// The mount that does not answer, if it is that.
    pub busy: Option<MountBusy>,
}

impl WalkError {
    pub(super) fn early(path: &Path, errno: Errno) -> Self {
        let (asked, at) = (path.to_owned(), path.to_owned());
        Self { step: Step::Lookup, asked, at, errno, at_last: false, at_end: false, busy: None }
    }

    /// The error of an operation on the whole path: what `make` makes of the errno, unless a mount
    /// does not answer.
    pub fn or_busy(self, make: impl FnOnce(Self) -> FsError) -> FsError {
        match self.busy.clone() {
            Some(busy) => FsError::from(busy),
            None => make(self),
        }
    }

    /// The error of making directories ([`Walk::make_parents`](super::Walk::make_parents)), as
    /// clients know it.
    pub fn of_making_directories(self) -> FsError {
        self.or_busy(|error| {
            let asked = path::clean(&error.asked);
            let told = |op| PathError::new(op, &asked, error.errno);
            match error.step {
                Step::NotADirectory => FsError::PathIsFile(asked),
                Step::Lookup | Step::TooManyLinks => FsError::StatDirectory(told("stat")),
                Step::MakeDirectory => FsError::CreateDirectory(told("mkdir")),
                // Upstream finds a link to nowhere when it changes the owner.
                Step::Dangling | Step::Own => FsError::ChownDirectory(told("chown")),
            }
        })
    }
}
