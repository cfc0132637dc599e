//! Another file in the place of an old one, at the end of an upload.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    sync::Arc,
};

use super::{
    Sink, Writer,
    body::{Body, copy_of},
    open_failed,
    writers::leads_to,
};
use crate::fs::{CAREFULLY, FsError, metadata, path, staged, unnamed::Unnamed};

impl Writer {
    /// Goes to the file that has taken the place of ours meanwhile, if one has: whoever finishes
    /// last has their content there.
    pub(super) fn follow(&mut self, body: Option<Body>) -> Result<Option<Body>, FsError> {
        let (Sink::New(membership) | Sink::Existing(membership, _)) = &self.sink else {
            return Ok(body);
        };
        let there = fs::metadata(&self.real);
        if !there.as_ref().is_ok_and(Metadata::is_file) || leads_to(there, membership.key) {
            return Ok(body);
        }
        let body = match body {
            Some(body) => body,
            None => copy_of(&self.file, &self.real).map_err(|error| self.write_failed(&error))?,
        };
        let file = OpenOptions::new().write(true).custom_flags(CAREFULLY).open(&self.real);
        self.file = Arc::new(file.map_err(|error| open_failed(&self.path, &error))?);
        Ok(Some(body))
    }

    /// Puts a new file in the place of the old one, where nobody could tell: one rename, and whoever
    /// reads has the old content or the new. False where that is not so, or cannot be done; nothing
    /// has changed then.
    pub(super) fn exchange(
        &self,
        body: &Body,
        metadata: &BTreeMap<String, String>,
    ) -> Result<bool, FsError> {
        let Sink::Existing(membership, _) = &self.sink else {
            return Ok(false);
        };
        let real = staged::follow(&self.real)?;
        let dir = path::dir_of(&real);
        let old = match fs::symlink_metadata(&real) {
            Ok(old) if old.is_file() && old.nlink() == 1 => old,
            _ => return Ok(false),
        };
        // Another file of that name would be told as a new one.
        if (old.dev(), old.ino()) != membership.key || membership.writers.is_watched(&dir) {
            return Ok(false);
        }
        let made = || -> io::Result<Unnamed> {
            let new = match body {
                Body::Memory(bytes) => {
                    let new = Unnamed::create(&dir, 0o600)?;
                    new.file().write_all(bytes)?;
                    new
                }
                Body::Disk(spool) => Unnamed::adopt(spool.try_clone()?, &dir),
            };
            new.file().set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
            Ok(new)
        };
        let Ok(mut new) = made() else {
            return Ok(false);
        };
        staged::change_owner(new.file(), &self.path, self.owner)?;
        staged::keep_attributes(&real, new.file());
        metadata::replace(new.file(), &self.path, metadata)?;
        // Again, since a change of the owner takes setuid bits, which the old one keeps.
        let mode = fs::Permissions::from_mode(old.mode() & 0o7777);
        if new.file().set_permissions(mode).is_err() {
            return Ok(false);
        }
        if self.fsync {
            new.file().sync_all().map_err(|error| self.write_failed(&error))?;
        }
        Ok(new.replace(&real).is_ok())
    }
}
