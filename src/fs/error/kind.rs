//! The classes of errors: what the API layers make codes and statuses of.

use nix::errno::Errno;

use super::FsError;
use crate::{blocking::Busy, fs::compose::ComposeError};

/// What the two API layers need to know of an error: they map it to a gRPC code or HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request cannot be right.
    InvalidArgument,
    /// What the request names does not exist.
    NotFound,
    /// What the request would make exists.
    AlreadyExists,
    /// The state of the file system does not allow it.
    FailedPrecondition,
    /// The kernel refused.
    Internal,
    /// No room on the disk (HTTP 507).
    NoSpace,
    /// A bound of this daemon was reached.
    ResourceExhausted,
    /// The daemon's user may not do it.
    PermissionDenied,
    /// A place in a file that cannot be written yet.
    OutOfRange,
    /// What has come is not what was sent.
    DataLoss,
    /// Another call is in the way; it can be tried again.
    Aborted,
    /// The file system does not answer.
    Unresponsive,
}

/// The kind of a failed call of our own: of upstream's all are internal.
fn kind_of(errno: Errno) -> Kind {
    match errno {
        Errno::ENOENT => Kind::NotFound,
        Errno::EEXIST => Kind::AlreadyExists,
        Errno::ENOSPC | Errno::EDQUOT => Kind::NoSpace,
        Errno::EACCES | Errno::EPERM => Kind::PermissionDenied,
        Errno::EROFS | Errno::ENOTDIR | Errno::EISDIR | Errno::ELOOP | Errno::ETXTBSY => {
            Kind::FailedPrecondition
        }
        Errno::ENAMETOOLONG | Errno::EINVAL => Kind::InvalidArgument,
        _ => Kind::Internal,
    }
}

impl FsError {
    /// The class of the error.
    pub fn kind(&self) -> Kind {
        match self {
            Self::ExpandHome(_)
            | Self::NulByte(_)
            | Self::PathTooLong(_)
            | Self::ExistsAsFile(_)
            | Self::NotADirectory(_)
            | Self::RemoveRoot(_)
            | Self::RemoveMount(_)
            | Self::PageToken
            | Self::UnknownOwner { .. }
            | Self::BadField { .. }
            | Self::IntoItself(..)
            | Self::WrongSize { .. }
            | Self::UploadOfAnother(_)
            | Self::Escapes(_)
            | Self::BadArchive(_)
            | Self::Compose(ComposeError::Same(_) | ComposeError::NotRegular(_))
            | Self::ReadOfDirectory(_)
            | Self::NotRegular(_)
            | Self::WriteOfDirectory(_)
            | Self::InvalidMetadata(_)
            | Self::WatchNotDirectory(_)
            | Self::WatchNetwork(_)
            | Self::BadCursor(_)
            | Self::OtherCursor { .. } => Kind::InvalidArgument,
            Self::FileNotFound(_)
            | Self::Compose(ComposeError::NotFound(_))
            | Self::SourceNotFound(_)
            | Self::PathNotFound(_)
            | Self::NotThere(_)
            | Self::WatchNotFound { .. }
            | Self::WatcherNotFound(_) => Kind::NotFound,
            Self::DirectoryExists(_) | Self::Exists(_) => Kind::AlreadyExists,
            Self::SymlinkLoop(_) | Self::Changed { .. } | Self::Special(_) => {
                Kind::FailedPrecondition
            }
            Self::Doing { error, .. }
            | Self::CheckPath { error }
            | Self::OpenForReading { error }
            | Self::OpenForWriting(error) => kind_of(error.errno),
            Self::Compose(ComposeError::Failed { error, .. }) => match kind_of(error.errno) {
                Kind::NoSpace => Kind::NoSpace,
                _ => Kind::Internal,
            },
            Self::RightsRefused(_) => Kind::PermissionDenied,
            Self::Gap { .. } => Kind::OutOfRange,
            Self::WrongChecksum(_) => Kind::DataLoss,
            Self::UploadInUse(_) => Kind::Aborted,
            Self::MountBusy(_) | Self::Blocking(Busy::Mount(_)) => Kind::Unresponsive,
            Self::NoInodes(_) | Self::NoSpace(_) | Self::NoSpaceForMetadata(_) => Kind::NoSpace,
            Self::TooManyEntries { .. }
            | Self::TooDeep { .. }
            | Self::TooManyUploads(_)
            | Self::TooManyDirectories { .. }
            | Self::Blocking(Busy::Full(_) | Busy::NoThread(_))
            | Self::TooManyWatchers(_)
            | Self::TooManyNetworkWatchers(_)
            | Self::TooManyCursors(_) => Kind::ResourceExhausted,
            Self::PathIsFile(_)
            | Self::StatDirectory(_)
            | Self::CreateDirectory(_)
            | Self::ChownDirectory(_)
            | Self::EnsureDirectories(_)
            | Self::FileInfo(_)
            | Self::Rename(_)
            | Self::ResolveSymlink(_)
            | Self::ReadDirectory { .. }
            | Self::ListingAbandoned(_)
            | Self::Abandoned(_)
            | Self::Archive { .. }
            | Self::Blocking(Busy::Panicked)
            | Self::Remove(_)
            | Self::ChangeOwner(_)
            | Self::WriteFile(_)
            | Self::WriteMetadata(_)
            | Self::WatchStat { .. }
            | Self::WatchMount(_)
            | Self::WatchStart(_)
            | Self::WatchAdd { .. } => Kind::Internal,
        }
    }
}
