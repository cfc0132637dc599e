//! Something under a temporary name beside its place, which is removed unless it gets the right name.

use std::{
    ffi::{OsStr, OsString},
    os::fd::OwnedFd,
    path::Path,
};

use nix::{
    fcntl::renameat,
    unistd::{UnlinkatFlags, unlinkat},
};

use crate::{
    fs::{
        errno, leftovers::Note, remove::empty_and_remove, resolve::Place, unnamed::with_new_name,
    },
    sys::rename::rename_new_at,
};

/// It. Everything is done relative to the directory of its place, and with the rights there.
pub(super) struct Apart<'a> {
    to: &'a Place,
    name: OsString,
    /// The directory that it is; none of anything else.
    dir: Option<OwnedFd>,
    done: bool,
    _note: Note,
}

impl<'a> Apart<'a> {
    /// Makes something under a name that is free in the directory of `to`.
    pub(super) fn create(
        to: &'a Place,
        mut make: impl FnMut(&OsStr) -> nix::Result<()>,
    ) -> nix::Result<Self> {
        let ((), name, note) = with_new_name(to.dir(), to.rights(), &mut make)?;
        Ok(Self { to, name, dir: None, done: false, _note: note })
    }

    /// It is this directory, which is emptied before it is removed.
    pub(super) fn holds(&mut self, dir: OwnedFd) {
        self.dir = Some(dir);
    }

    /// Gives it its name; with `only_new` nothing may have that: `EEXIST`.
    pub(super) fn publish(mut self, only_new: bool) -> nix::Result<()> {
        let (dir, to) = (self.to.dir(), self.to.name());
        self.to.rights().act(|| match only_new {
            true => rename_new_at(dir, &self.name, dir, to),
            false => renameat(dir, self.name.as_os_str(), dir, to),
        })?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Apart<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let (to, name) = (self.to, self.name.as_os_str());
        let removed = to.rights().act(|| match self.dir.take() {
            // Not by its name: another directory may have that by now.
            Some(dir) => {
                let parent = to.dir().try_clone_to_owned().map_err(|error| errno::of(&error))?;
                let path = to.real().parent().unwrap_or_else(|| Path::new("/"));
                empty_and_remove(parent, path, name, dir).map_err(|error| error.errno)
            }
            None => unlinkat(to.dir(), name, UnlinkatFlags::NoRemoveDir),
        });
        if let Err(error) = removed {
            let path = to.real().with_file_name(name);
            tracing::warn!(path = %path.display(), %error, "could not remove an incomplete copy");
        }
    }
}
