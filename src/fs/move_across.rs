//! Moving to another file system, where rename(2) cannot: a copy beside the destination, one rename
//! there, and then the source goes.

use std::{path::Path, sync::atomic::AtomicBool};

use nix::errno::Errno;

use super::{
    FsError, RenameError,
    actor::Actor,
    copy::{CopyOptions, copy},
    entry::{Entry, stat},
    path,
    remove::{is_mount, mount_inside, remove},
    resolve::{Found, Walk},
};
use crate::guest::users::Users;

/// Moves a file, link or directory to another file system, as [`move_entry`](super::dir::move_entry)
/// does it within one. Whoever looks at the destination sees nothing or what was there, and then all of
/// it. Owners, times and attributes are kept as far as the actor may set them.
///
/// # Errors
/// Those of [`copy`], after which nothing has changed, and those of [`remove`], after which the
/// destination is whole and the source may not be.
pub fn move_across(
    src: &Path,
    dst: &Path,
    actor: &Actor,
    users: &Users,
    stop: &AtomicBool,
) -> Result<Entry, FsError> {
    let failed =
        |errno| FsError::Rename(RenameError { from: src.to_owned(), to: dst.to_owned(), errno });
    let bare = path::without_trailing_slashes(src);
    let find = || {
        let place = Walk::new(actor).no_follow().to(bare);
        place.map_err(|error| error.or_busy(|error| failed(error.errno)))
    };
    let from = find()?;
    let source = from.found().ok_or_else(|| failed(Errno::ENOENT))?;
    // It could be copied and not be removed.
    if is_mount(&from, source) || mount_inside(source).is_some() {
        return Err(failed(Errno::EBUSY));
    }
    copy(bare, dst, actor, CopyOptions { preserve: true, create_only: false }, stop)?;
    // What somebody has put there meanwhile was not copied.
    if find()?.found().map(Found::key) != Some(source.key()) {
        return Err(failed(Errno::ESTALE));
    }
    match remove(bare, actor) {
        Err(FsError::Remove(error)) => {
            let doing = "removing the source of a move, which is at the destination by now";
            return Err(FsError::Doing { doing, error });
        }
        other => other?,
    }
    stat(dst, actor, users)
}
