//! Entries of an archive that are neither files nor directories: links, FIFOs and devices.

use std::{
    io::{self, Read},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{SFlag, makedev},
    unistd::{UnlinkatFlags, linkat, unlinkat},
};
use tar::{Entry, EntryType};

use super::{Unpacking, bad, inside, mtime};
use crate::fs::{FsError, actor::Rights, beneath::is_name, resolve::Place};

impl Unpacking<'_> {
    pub(super) fn hard_link<R: Read>(
        &self,
        relative: &Path,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let target = inside(&entry.link_name_bytes().unwrap_or_default())?;
        let old = self.walk().no_follow().from(&self.root, &self.real, &target);
        let old = old.map_err(|error| {
            error.or_busy(|error| match error.errno {
                Errno::EXDEV => FsError::Escapes(target.clone()),
                errno => self.failed("link", relative, errno),
            })
        })?;
        let place = self.place(relative)?;
        if target == relative {
            return Ok(());
        }
        let Some(found) = old.found().filter(|_| is_name(old.name())) else {
            return Err(self.failed("link", relative, Errno::ENOENT));
        };
        let rights = old.rights().both(place.rights());
        self.replacing(relative, &place, "link", || {
            rights.act(|| {
                let (dir, name) = (place.dir(), place.name());
                // The very file that was found. Only root's capability allows this.
                match linkat(&found.fd, "", dir, name, AtFlags::AT_EMPTY_PATH) {
                    Err(Errno::ENOENT) => {
                        linkat(old.dir(), old.name(), dir, name, AtFlags::empty())
                    }
                    other => other,
                }
            })
        })
    }

    pub(super) fn node<R: Read>(
        &self,
        kind: EntryType,
        relative: &Path,
        mode: u32,
        entry: &mut Entry<'_, R>,
    ) -> Result<(), FsError> {
        let node = match kind {
            EntryType::Fifo => SFlag::S_IFIFO,
            _ if !self.keep_owner => return Err(FsError::Special(relative.to_owned())),
            EntryType::Char => SFlag::S_IFCHR,
            _ => SFlag::S_IFBLK,
        };
        let number = |number: io::Result<Option<u32>>| {
            number.map(|number| number.unwrap_or(0).into()).map_err(|error| bad(&error))
        };
        let header = entry.header();
        let device = match node {
            SFlag::S_IFIFO => 0,
            _ => makedev(number(header.device_major())?, number(header.device_minor())?),
        };
        let place = self.place(relative)?;
        let rights = self.owning(&place, entry)?;
        self.replacing(relative, &place, "mknod", || {
            rights.node_in(&place.dir(), place.name(), node, mode, device)
        })?;
        self.finish(&rights, &place, node, relative, entry)
    }

    /// Makes something that must not exist yet, in the place of what does.
    pub(super) fn replacing<T>(
        &self,
        relative: &Path,
        place: &Place,
        op: &'static str,
        make: impl Fn() -> nix::Result<T>,
    ) -> Result<T, FsError> {
        match make() {
            Err(Errno::EEXIST) => {}
            other => return other.map_err(|errno| self.failed(op, relative, errno)),
        }
        let (dir, name) = (place.dir(), place.name());
        match place.rights().act(|| unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(Errno::EISDIR) => return Err(FsError::Exists(self.path.join(relative))),
            Err(errno) => return Err(self.failed("unlink", relative, errno)),
        }
        make().map_err(|errno| self.failed(op, relative, errno))
    }

    /// The rights of a place, under which what is created has the owner that the entry is to have.
    ///
    /// # Errors
    /// As [`Self::owner_of`].
    pub(super) fn owning<R: Read>(
        &self,
        place: &Place,
        entry: &Entry<'_, R>,
    ) -> Result<Rights, FsError> {
        let (uid, gid) = self.owner_of(entry)?;
        Ok(match self.keep_owner {
            true => place.rights().for_owner(uid, gid),
            false => place.rights().clone(),
        })
    }

    /// Group and time of what is no file or directory.
    pub(super) fn finish<R: Read>(
        &self,
        rights: &Rights,
        place: &Place,
        kind: SFlag,
        relative: &Path,
        entry: &Entry<'_, R>,
    ) -> Result<(), FsError> {
        let modified = mtime(entry);
        rights
            .finish_in(&place.dir(), place.name(), kind, Some((modified, modified)))
            .map_err(|errno| self.failed("utimes", relative, errno))
    }
}
