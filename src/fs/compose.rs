//! Putting a file together from parts that were uploaded one by one, as E2B's SDKs do with large
//! files.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::{
    FsError, PathError,
    actor::Actor,
    errno,
    resolve::{Found, Walk},
    staged::give_to_user,
    unnamed::Unnamed,
};
use crate::blocking::{progress, stand_on, stand_on_also};

/// The bytes that are copied between two signs of progress.
const COPY_STEP: u64 = 16 << 20;

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

/// Makes the file `to` of the contents of `parts`, one behind the other, for `actor`, and removes
/// the parts. What was at `to` is replaced at once, and with it what it was allowed to do.
///
/// # Errors
/// [`FsError::Compose`], [`FsError::EnsureDirectories`], [`FsError::NoSpace`]; the parts and what was
/// at `to` are then as before.
pub fn compose(parts: &[Part], to: &Path, actor: &Actor) -> Result<(), FsError> {
    let wrong = |error| Err(FsError::Compose(error));
    for part in parts {
        let missing = || FsError::Compose(ComposeError::NotFound(part.name.clone()));
        if part.path == to {
            return wrong(ComposeError::Same(part.name.clone()));
        }
        let place = Walk::new(actor).to(&part.path);
        let place = place.map_err(|error| error.or_busy(|_| missing()))?;
        if !place.found().ok_or_else(missing)?.is_file() {
            return wrong(ComposeError::NotRegular(part.name.clone()));
        }
    }
    let place = Walk::new(actor).no_follow().make_parents().to(to).map_err(|error| match error
        .at_last
    {
        true => error.or_busy(|error| finishing("open", to, error.errno)),
        false => FsError::ensuring(error.of_making_directories()),
    })?;
    if place.is_nameless() {
        return Err(finishing("rename", to, Errno::EISDIR));
    }
    let rights = place.rights();
    let mut new = Unnamed::create(place.dir(), rights, 0o666)
        .map_err(|error| failed("error creating destination file", "open", to, &error.into()))?;
    rights.act(|| give_to_user(new.file(), to, rights))?;
    for part in parts {
        let name = &part.name;
        let opened = super::read::open(&part.path, actor).map_err(|error| match error {
            FsError::OpenForReading { error } | FsError::CheckPath { error } => {
                let doing = format!("error opening source file {name}");
                FsError::Compose(ComposeError::Failed { doing, error })
            }
            busy @ FsError::MountBusy(_) => busy,
            _ => FsError::Compose(ComposeError::NotFound(name.clone())),
        })?;
        let (mut from, mut into) = (opened.file, new.file());
        stand_on(from.as_fd())?;
        stand_on_also(into.as_fd())?;
        // By copy_file_range(2), where the file system can.
        into.seek(io::SeekFrom::End(0)).and_then(|_| copy_in_steps(&mut from, into)).map_err(
            |error| failed(&format!("error composing source {name}"), "copy", to, &error),
        )?;
    }
    new.replace(place.dir(), rights, place.name())
        .map_err(|errno| finishing("rename", to, errno))?;
    let made = new.file().metadata().map(|meta| (meta.dev(), meta.ino()));
    for part in parts {
        // The link, if a part is one. A path can lead to the destination and not look like it:
        // through `..`, or a link above.
        let removed = Walk::new(actor).no_follow().to(&part.path).map_err(|error| error.errno);
        let removed = removed.and_then(|place| match place.found().map(Found::key) {
            Some(key) if made.as_ref().is_ok_and(|made| *made != key) => place.unlink_if(key),
            _ => Ok(()),
        });
        if let Err(error) = removed {
            tracing::debug!(part = %part.path.display(), %error, "could not remove a composed part");
        }
    }
    Ok(())
}

fn finishing(op: &'static str, to: &Path, errno: Errno) -> FsError {
    failed("error finalizing compose", op, to, &errno.into())
}

/// Copies all that is left of a file, showing progress on the way.
fn copy_in_steps(from: &mut File, mut to: &File) -> io::Result<()> {
    loop {
        progress();
        if io::copy(&mut from.take(COPY_STEP), &mut to)? < COPY_STEP {
            return Ok(());
        }
    }
}

fn failed(doing: &str, op: &'static str, path: &Path, error: &io::Error) -> FsError {
    match errno::of(error) {
        Errno::ENOSPC | Errno::EDQUOT => FsError::NoSpace(None),
        errno => FsError::Compose(ComposeError::Failed {
            doing: doing.to_owned(),
            error: PathError::new(op, path, errno),
        }),
    }
}
