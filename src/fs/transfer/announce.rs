//! What watchers see of a file that got its name with all of its content.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag, fallocate},
    sys::stat::{Mode, fchmod},
    unistd::ftruncate,
};

use crate::fs::resolve::Place;

/// Causes the events of a file that is written in place (CHMOD, WRITE, and CLOSE_WRITE for programs of
/// the sandbox), which a link or a rename does not: E2B's clients wait for them. They come from the
/// kernel, behind CREATE, to every watcher.
///
/// The file is opened by its name, because events of a descriptor without a name have none. Nothing of
/// it is changed, also when others have begun to write it. Best effort: the upload has succeeded.
pub(super) fn announce(place: &Place, new: &File) {
    let Ok(own) = new.metadata() else { return };
    let open = || place.open(OFlag::O_WRONLY | OFlag::O_NONBLOCK);
    let Ok((file, now, rights)) = open() else { return };
    if (now.st_dev, now.st_ino) != (own.dev(), own.ino()) {
        return;
    }
    let caused = rights.act(|| {
        fchmod(&file, Mode::from_bits_truncate(now.st_mode & 0o7777))?;
        match own.len() {
            0 => Ok(()),
            _ => touch(&file, now.st_size),
        }
    });
    if let Err(error) = caused {
        tracing::debug!(path = %place.real().display(), %error, "watchers are not told of a write");
    }
}

/// Has the kernel tell a write without one: the first byte is given room that it has already.
fn touch(file: &File, size: i64) -> nix::Result<()> {
    match fallocate(file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1) {
        // NFS before 4.2, 9p, some FUSE servers. A size that is set anew is a write too.
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => ftruncate(file, size),
        other => other,
    }
}
