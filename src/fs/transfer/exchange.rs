//! Another file in the place of an old one, at the end of an upload.

use std::{
    collections::BTreeMap,
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use nix::fcntl::OFlag;

use super::{Done, WRITING, Writer, announce::announce, body::Body};
use crate::fs::{
    FsError,
    actor::Rights,
    metadata, privileges,
    resolve::{Found, Place},
    staged,
    unnamed::Unnamed,
};

impl Writer {
    /// Puts a new file in the place of the old one, where nobody could tell: one rename, and whoever
    /// reads has the old content or the new. None where that is not so, or cannot be done; nothing
    /// has changed then. What is `busy` cannot be written, and is replaced wherever that is possible.
    pub(super) fn exchange(
        &self,
        body: &mut Body,
        place: &Place,
        metadata: &BTreeMap<String, String>,
        busy: bool,
    ) -> Result<Option<Done>, FsError> {
        let Some(old) = place.found().map(|found| found.stat) else { return Ok(None) };
        let dir = place.real().parent().unwrap_or_else(|| Path::new("/"));
        // Another file of that name would be told as a new one.
        let watched = self.writers.is_watched(dir);
        if !busy && (old.st_nlink != 1 || watched) {
            return Ok(None);
        }
        // To read, where that is allowed: nobody can execute what is open to be written.
        let opened =
            place.open(OFlag::O_RDONLY | OFlag::O_NONBLOCK).or_else(|_| place.open(WRITING));
        let Ok((from, now, rights)) = opened else { return Ok(None) };
        if place.found().map(Found::key) != Some((now.st_dev, now.st_ino)) {
            return Ok(None);
        }
        // What the user may not do in the directory is done in the file that they may write.
        let rights = place.rights().both(&rights);
        let mut made = None;
        let new = match body {
            Body::New(new) => new,
            other => match new_beside(other, place, &rights) {
                Ok(new) => made.insert(new),
                Err(_) => return Ok(None),
            },
        };
        let file: &File = new.file();
        let kept = rights.act(|| {
            staged::give_to_user(file, &self.path, &rights)?;
            if !privileges::keep_attributes(&from, file) {
                return Ok::<_, FsError>(false);
            }
            metadata::replace(file, &self.path, metadata)?;
            // Last: it may forbid attributes to all but root.
            let mode = Permissions::from_mode(privileges::kept_mode(old.st_mode));
            Ok(file.set_permissions(mode).is_ok())
        })?;
        if !kept {
            return Ok(None);
        }
        if self.fsync {
            file.sync_all().map_err(|error| self.write_failed(&error))?;
        }
        if new.replace(place.dir(), &rights, place.name()).is_err() {
            return Ok(None);
        }
        if watched {
            announce(place, new.file());
        }
        let file = new.file().try_clone().map_err(|error| self.write_failed(&error))?;
        Ok(Some((file, rights)))
    }

    /// Takes from the old file what a new content must not have, and gives it to the user.
    pub(super) fn prepare_in_place(&self, file: &File, rights: &Rights) -> Result<(), FsError> {
        rights.act(|| {
            staged::give_existing_to_user(file, &self.path, rights)?;
            privileges::clear(file, rights.switched() || !nix::unistd::geteuid().is_root())
                .map_err(|errno| staged::doing("writing file", &self.path, "chmod", &errno.into()))
        })
    }
}

/// A file without a name, or with one for the time being, that has the content of the body.
fn new_beside(body: &mut Body, place: &Place, rights: &Rights) -> std::io::Result<Unnamed> {
    match body {
        Body::Disk(spool) => Ok(Unnamed::adopt(spool.try_clone()?, place.dir(), rights)?),
        body => {
            let new = Unnamed::create(place.dir(), rights, 0o600)?;
            body.copy_to(&mut new.file())?;
            Ok(new)
        }
    }
}
