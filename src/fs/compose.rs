//! Putting a file together from parts that were uploaded one by one, as E2B's SDKs do with large
//! files.

use std::{
    fs,
    io::{self, Seek},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{FsError, PathError, errno, path, staged::change_owner, unnamed::Unnamed};
use crate::guest::users::User;

/// Why files were not put together.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// A source is what is to be written.
    #[error("source path \"{0}\" cannot be the same as destination")]
    Same(String),
    /// There is no such source.
    #[error("source file not found: {0}")]
    NotFound(String),
    /// A source is no file.
    #[error("source path is not a regular file: {0}")]
    NotRegular(String),
    /// A call failed.
    #[error("{doing}: {error}")]
    Failed {
        /// What was being done.
        doing: String,
        /// The call.
        error: PathError,
    },
}

/// A part, as the client named it and where it is.
#[derive(Debug, Clone)]
pub struct Part {
    /// For messages.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// Makes the file `to` of the contents of `parts`, one behind the other, for `user`, and removes
/// the parts. What was at `to` is replaced at once.
///
/// # Errors
/// [`FsError::Compose`], [`FsError::EnsureDirectories`], [`FsError::NoSpace`]; the parts and what was
/// at `to` are then as before.
pub fn compose(parts: &[Part], to: &Path, user: &User) -> Result<(), FsError> {
    let wrong = |error| Err(FsError::Compose(error));
    for part in parts {
        if part.path == to {
            return wrong(ComposeError::Same(part.name.clone()));
        }
        match fs::metadata(&part.path) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return wrong(ComposeError::NotRegular(part.name.clone())),
            Err(_) => return wrong(ComposeError::NotFound(part.name.clone())),
        }
    }
    let owner = (user.uid, user.gid);
    let above = path::dir_of(to);
    path::ensure_dirs(&above, owner)
        .map_err(|error| FsError::EnsureDirectories(Box::new(error)))?;
    let mut new = Unnamed::create(&above, 0o666)
        .map_err(|error| failed("error creating destination file", "open", to, &error))?;
    change_owner(new.file(), to, owner)?;
    for part in parts {
        let name = &part.name;
        let (mut from, _) = super::read::open(&part.path).map_err(|error| match error {
            FsError::OpenForReading { error } | FsError::CheckPath { error } => {
                let doing = format!("error opening source file {name}");
                FsError::Compose(ComposeError::Failed { doing, error })
            }
            _ => FsError::Compose(ComposeError::NotFound(name.clone())),
        })?;
        let mut into = new.file();
        // By copy_file_range(2), where the file system can.
        into.seek(io::SeekFrom::End(0)).and_then(|_| io::copy(&mut from, &mut into)).map_err(
            |error| failed(&format!("error composing source {name}"), "copy", to, &error),
        )?;
    }
    new.replace(to).map_err(|error| failed("error finalizing compose", "rename", to, &error))?;
    let made = new.file().metadata().map(|meta| (meta.dev(), meta.ino()));
    for part in parts {
        // A path can lead to the destination and not look like it: through `..`, or a link above.
        let there = fs::symlink_metadata(&part.path).map(|meta| (meta.dev(), meta.ino()));
        if there.is_ok_and(|there| made.as_ref().is_ok_and(|made| *made == there)) {
            continue;
        }
        if let Err(error) = fs::remove_file(&part.path) {
            tracing::debug!(part = %part.path.display(), %error, "a part of a composed file stays");
        }
    }
    Ok(())
}

fn failed(doing: &str, op: &'static str, path: &Path, error: &io::Error) -> FsError {
    match errno::of(error) {
        nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT => FsError::NoSpace(None),
        errno => FsError::Compose(ComposeError::Failed {
            doing: doing.to_owned(),
            error: PathError::new(op, path, errno),
        }),
    }
}
