//! Another file in the place of an old one, at the end of an upload.

use std::{
    collections::BTreeMap,
    fs::{File, Permissions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

use super::{
    Sink, WRITING, Writer,
    body::{Body, copy_of},
    open_failed,
};
use crate::fs::{FsError, metadata, privileges, resolve::Walk, staged, unnamed::Unnamed};

impl Writer {
    /// Goes to the file that has taken the place of ours meanwhile, if one has: whoever finishes
    /// last has their content there.
    pub(super) fn follow(&mut self, body: Option<Body>) -> Result<Option<Body>, FsError> {
        let (Sink::New(membership) | Sink::Existing(membership, _)) = &self.sink else {
            return Ok(body);
        };
        // The path as it leads now, by the same rule.
        let Ok(place) = Walk::new(self.place.actor()).to(&self.path) else {
            return Ok(body);
        };
        match place.found() {
            Some(found) if found.is_file() && found.key() != membership.key => {}
            _ => return Ok(body),
        }
        let body = match body {
            Some(body) => body,
            None => copy_of(&self.file, &self.place).map_err(|error| self.write_failed(&error))?,
        };
        let (file, _, rights) =
            place.open(WRITING).map_err(|errno| open_failed(&self.path, errno))?;
        self.file = Arc::new(file);
        self.rights = rights;
        self.place = Arc::new(place.without_found());
        Ok(Some(body))
    }

    /// Puts a new file in the place of the old one, where nobody could tell: one rename, and whoever
    /// reads has the old content or the new. False where that is not so, or cannot be done; nothing
    /// has changed then.
    pub(super) fn exchange(
        &mut self,
        body: &Body,
        metadata: &BTreeMap<String, String>,
    ) -> Result<bool, FsError> {
        let Sink::Existing(membership, _) = &self.sink else {
            return Ok(false);
        };
        let place = Arc::clone(&self.place);
        let old = match place.stat_now() {
            Ok(old) if old.st_mode & libc::S_IFMT == libc::S_IFREG && old.st_nlink == 1 => old,
            _ => return Ok(false),
        };
        let dir = place.real().parent().unwrap_or_else(|| Path::new("/"));
        // Another file of that name would be told as a new one.
        if (old.st_dev, old.st_ino) != membership.key || membership.writers.is_watched(dir) {
            return Ok(false);
        }
        // What the user may not do in the directory is done in the file that they may write.
        let rights = place.rights().both(&self.rights);
        let mode = Permissions::from_mode(privileges::kept_mode(old.st_mode));
        let made = || -> std::io::Result<Unnamed> {
            let new = match body {
                Body::Memory(bytes) => {
                    let new = Unnamed::create(place.dir(), &rights, 0o600)?;
                    new.file().write_all(bytes)?;
                    new
                }
                Body::Disk(spool) => Unnamed::adopt(spool.try_clone()?, place.dir(), &rights)?,
            };
            Ok(new)
        };
        let Ok(mut new) = made() else {
            return Ok(false);
        };
        let file: &File = new.file();
        let kept = rights.act(|| {
            staged::give_to_user(file, &self.path, &rights)?;
            if !privileges::keep_attributes(&self.file, file) {
                return Ok::<_, FsError>(false);
            }
            metadata::replace(file, &self.path, metadata)?;
            // Last: it may forbid attributes to all but root.
            Ok(file.set_permissions(mode.clone()).is_ok())
        })?;
        if !kept {
            return Ok(false);
        }
        if self.fsync {
            file.sync_all().map_err(|error| self.write_failed(&error))?;
        }
        if new.replace(place.dir(), &rights, place.name()).is_err() {
            return Ok(false);
        }
        self.file = Arc::new(new.into_file());
        Ok(true)
    }

    /// Takes from the old file what a new content must not have, and gives it to the user.
    pub(super) fn prepare_in_place(&self) -> Result<(), FsError> {
        let rights = &self.rights;
        rights.act(|| {
            staged::give_to_user(&self.file, &self.path, rights)?;
            privileges::clear(&self.file, rights.switched())
                .map_err(|errno| staged::doing("writing file", &self.path, "chmod", &errno.into()))
        })
    }
}
