//! The path resolver: component by component over descriptors, with the rights that the path allows.
//!
//! The daemon is root, and its clients act on behalf of users in whose directories programs run that
//! nobody trusts. A check of a path before its use does not help: a symlink or a directory can be
//! swapped in between (race). So the daemon follows symlinks itself and the kernel follows none: each
//! component is opened with `O_PATH | O_NOFOLLOW` relative to the descriptor of the one before; the
//! owner and the target of a link are read from the link's own descriptor.
//!
//! **The rule.** An operation of a non-root user begins with the daemon's rights, because E2B's
//! clients rely on them: root creates what the client named and gives it to the user. From the moment
//! on in which the walk
//!
//! * (a) follows a symlink that is not owned by root,
//! * (b) takes `..` out of a directory that is not owned by root, or
//! * (c) ends at a file with several hard links that is not the user's, in a directory that is not
//!   owned by root, or that all may write (`/tmp`),
//!
//! the walk, and everything that is done at its end, has the user's own file-system credentials
//! ([`Rights`]): the kernel decides. Directories alone switch nothing. A root-owned link with several
//! names in a directory that is not root's counts as not owned by root, because anybody may have put
//! it there; so does what the server of a FUSE mount of another user claims to be root's. After a
//! switch nothing in procfs is opened and so no magic link is followed: /proc/self is the daemon.
//! A caller who acts as root never switches; with `--file-access strict` all others are switched from
//! the start. A daemon without root has nothing to switch.
//!
//! Missing directories are made during the same walk, owned by the user from their first moment, and
//! never by path.

use std::{
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, fstat, mkdirat},
    unistd::{Gid, Uid},
};

use super::actor::{Actor, Rights};
use crate::{
    blocking::{self, MountBusy},
    sys::{fs_credentials::FsCredentials, path_fd},
};

mod error;
mod place;
mod step;
#[cfg(test)]
mod tests;
mod trust;

#[cfg(test)]
pub(crate) use tests::own_actor;

pub use error::{Step, WalkError};
pub use place::{Found, Place};
use trust::{is_dir, is_link};

/// The symbolic links that one path may lead through: the kernel's number.
pub const MAX_SYMLINKS: usize = 40;
/// The levels that a confined walk descends, each with an open directory.
const MAX_CONFINED_LEVELS: usize = 512;
/// How often a name is looked up again because others changed it meanwhile.
const MAX_TRIES: usize = 64;
/// The permissions of a directory that is made on the way.
const DIR_MODE: Mode = Mode::from_bits_truncate(0o755);

const STEP: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
const INTO: OFlag = STEP.union(OFlag::O_DIRECTORY);

/// Which missing directories are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Make {
    Nothing,
    /// Those above the last name.
    Parents,
    /// All, the last name included.
    All,
}

/// A resolution of one path, before it starts.
#[derive(Debug, Clone)]
pub struct Walk<'a> {
    actor: &'a Actor,
    follow_last: bool,
    make: Make,
    max_links: usize,
    switched: bool,
    look_only: bool,
    confined: bool,
}

impl<'a> Walk<'a> {
    /// On behalf of `actor`: links are followed, and nothing is made.
    #[must_use]
    pub fn new(actor: &'a Actor) -> Self {
        let switched = actor.is_strict();
        Self {
            actor,
            follow_last: true,
            make: Make::Nothing,
            max_links: MAX_SYMLINKS,
            switched,
            look_only: false,
            confined: false,
        }
    }

    /// A link at the end is the result. (With a slash behind it, it is followed all the same.)
    #[must_use]
    pub fn no_follow(self) -> Self {
        Self { follow_last: false, ..self }
    }

    /// Makes the missing directories above the last name.
    #[must_use]
    pub fn make_parents(self) -> Self {
        Self { make: Make::Parents, ..self }
    }

    /// Makes every missing directory, the last name's included.
    #[must_use]
    pub fn make_all(self) -> Self {
        Self { make: Make::All, ..self }
    }

    /// Follows another number of links than [`MAX_SYMLINKS`].
    #[must_use]
    pub fn max_links(self, max_links: usize) -> Self {
        Self { max_links, ..self }
    }

    /// Walks on with the daemon's rights where the rule switches, for the type and the mode of what a
    /// link leads to: a listing reports these to users who cannot go there. Nothing in procfs is opened
    /// all the same, and what is done at the end of such a walk has the user's own rights.
    #[must_use]
    pub fn look_only(self) -> Self {
        Self { look_only: true, make: Make::Nothing, ..self }
    }

    /// Has the user's own rights from the start if `rights` has: for a walk that goes on from where
    /// another has ended.
    #[must_use]
    pub fn with_rights_of(self, rights: &Rights) -> Self {
        Self { switched: self.switched || rights.switched(), ..self }
    }

    /// Stays below the directory from which it starts: `..` and links that lead out of it, and absolute
    /// paths, are `EXDEV`. `..` leads back to where the walk came from, whatever is renamed meanwhile.
    #[must_use]
    pub fn confined(self) -> Self {
        Self { confined: true, ..self }
    }

    /// Resolves an absolute path, verbatim.
    ///
    /// # Errors
    /// [`WalkError`].
    pub fn to(&self, path: &Path) -> Result<Place, WalkError> {
        let root = openat(AT_FDCWD, "/", INTO, Mode::empty());
        let start = root.map_err(|errno| WalkError::early(Path::new("/"), errno))?;
        self.run(start, PathBuf::from("/"), path)
    }

    /// Resolves a path relative to a directory, of which `real` is the path without links. The rights
    /// with which the directory was reached go on: see [`Self::with_rights_of`].
    ///
    /// # Errors
    /// [`WalkError`].
    pub fn from(&self, dir: &impl AsFd, real: &Path, path: &Path) -> Result<Place, WalkError> {
        let start = dir.as_fd().try_clone_to_owned();
        let start = start.map_err(|error| WalkError::early(real, super::errno::of(&error)))?;
        self.run(start, real.to_owned(), path)
    }

    fn run(&self, start: OwnedFd, real: PathBuf, path: &Path) -> Result<Place, WalkError> {
        let mut parts = parts_of(path, false);
        parts.reverse();
        let mut state = State {
            walk: self,
            switched: false,
            rights: None,
            at: start,
            above: Vec::new(),
            real,
            todo: parts,
            asked: PathBuf::new(),
            links: 0,
            made: 0,
            last_made: false,
            last_device: None,
        };
        if path.is_absolute() {
            state.asked.push("/");
        }
        state.run()
    }
}

/// One component that is still to be walked.
#[derive(Debug)]
struct Part {
    name: OsString,
    /// It stands in the target of a link, and not in the path that the client wrote.
    of_link: bool,
}

/// The components of a path in their order. A slash at the end is a last component `.`, because what
/// is before it has to be a directory then.
fn parts_of(path: &Path, of_link: bool) -> Vec<Part> {
    let bytes = path.as_os_str().as_bytes();
    let part = |name: &[u8]| Part { name: OsString::from_vec(name.to_vec()), of_link };
    let names = bytes.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    let mut parts: Vec<Part> = names.map(part).collect();
    if bytes.ends_with(b"/") {
        parts.push(part(b"."));
    }
    parts
}

/// A walk under way.
struct State<'a> {
    walk: &'a Walk<'a>,
    /// Others may have decided where it leads.
    switched: bool,
    /// While this is there the thread has the user's own rights: from the switch on, except for a walk
    /// that only looks.
    rights: Option<FsCredentials>,
    /// The directory on which the walk stands.
    at: OwnedFd,
    /// Of a confined walk: the directories above it, the uppermost first.
    above: Vec<OwnedFd>,
    /// Its path, without links.
    real: PathBuf,
    /// The last first.
    todo: Vec<Part>,
    /// What has been walked of the path that the client wrote.
    asked: PathBuf,
    links: usize,
    made: usize,
    /// The last name was made by this walk.
    last_made: bool,
    /// The device of the last descriptor that was found not to be in procfs.
    last_device: Option<u64>,
}

/// What is done with a component.
enum Next {
    /// The walk goes on.
    On,
    /// It ends.
    End(OsString, Option<Found>),
    /// It ends at a link of procfs, which the kernel follows.
    Magic(OsString, Found),
}

impl State<'_> {
    fn run(mut self) -> Result<Place, WalkError> {
        if self.walk.switched {
            self.switch()?;
        }
        self.stand()?;
        loop {
            let Some(part) = self.todo.pop() else {
                // Of no component: the directory itself.
                let found = self.itself()?;
                return Ok(self.end(OsString::from("."), Some(found), false));
            };
            if !part.of_link {
                self.asked.push(&part.name);
            }
            let next = match part.name.as_bytes() {
                b"." => self.stay()?,
                b".." => self.up()?,
                _ => self.name(part)?,
            };
            match next {
                Next::On => {}
                Next::End(name, found) => {
                    let found = self.check_end(found)?;
                    return Ok(self.end(name, found, false));
                }
                Next::Magic(name, found) => return Ok(self.end(name, Some(found), true)),
            }
        }
    }

    fn end(self, name: OsString, found: Option<Found>, magic: bool) -> Place {
        let rights = Rights::new(self.walk.actor.clone(), self.switched);
        let real = match name.as_bytes() {
            b"." => self.real,
            _ => self.real.join(&name),
        };
        Place {
            rights,
            dir: self.at,
            name,
            found,
            real,
            magic,
            made: self.made,
            last_made: self.last_made,
        }
    }

    fn error(&self, step: Step, name: &OsStr, errno: Errno) -> WalkError {
        WalkError {
            step,
            asked: self.asked.clone(),
            at: self.real.join(name),
            errno,
            at_last: self.todo.iter().all(|part| part.of_link),
            at_end: self.todo.is_empty(),
            busy: None,
        }
    }

    /// The error of a call on a name in the directory on which the walk stands.
    fn at_name<T>(&self, name: &OsStr, result: nix::Result<T>) -> Result<T, WalkError> {
        result.map_err(|errno| self.error(Step::Lookup, name, errno))
    }

    /// The same on that directory.
    fn here<T>(&self, result: nix::Result<T>) -> Result<T, WalkError> {
        self.at_name(OsStr::new(""), result)
    }

    /// Whether nothing comes any more that needs a name: a slash at the end is a component `.`.
    fn is_trailing(&self) -> bool {
        self.todo.iter().all(|part| part.name == ".")
    }

    /// From here on the user's own rights.
    fn switch(&mut self) -> Result<(), WalkError> {
        if self.switched || !self.walk.actor.may_switch() {
            return Ok(());
        }
        self.switched = true;
        if self.walk.look_only {
            return Ok(());
        }
        match self.walk.actor.assume() {
            Ok(rights) => {
                self.rights = Some(rights);
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "could not act with a user's rights: the call is refused");
                Err(self.error(Step::Lookup, OsStr::new(""), Errno::EPERM))
            }
        }
    }

    /// Whether something can still switch this walk.
    fn watches(&self) -> bool {
        !self.switched && self.walk.actor.may_switch()
    }

    /// Looks at the directory on which the walk stands now, before anything is looked up in it.
    fn stand(&mut self) -> Result<(), WalkError> {
        self.stand_on(&self.at)?;
        if self.switched {
            let stat = self.here(fstat(&self.at))?;
            self.refuse_proc(None, &stat, OsStr::new(""))?;
        }
        Ok(())
    }

    /// Declares the mount of what is looked at next. What the path ends at may be the root of a mount,
    /// and its attributes are already its server's to tell.
    fn stand_on(&self, fd: &OwnedFd) -> Result<(), WalkError> {
        blocking::stand_on(fd.as_fd()).map_err(|busy| self.busy(busy))
    }

    fn busy(&self, busy: MountBusy) -> WalkError {
        WalkError { busy: Some(busy), ..self.error(Step::Lookup, OsStr::new(""), Errno::EBUSY) }
    }

    /// Refuses what lies in procfs to one who has switched. `fd` is what is looked at, else where the
    /// walk stands.
    fn refuse_proc(
        &mut self,
        fd: Option<&OwnedFd>,
        stat: &FileStat,
        name: &OsStr,
    ) -> Result<(), WalkError> {
        if !self.switched || self.last_device == Some(stat.st_dev) {
            return Ok(());
        }
        match trust::is_proc(fd.unwrap_or(&self.at)) {
            Ok(false) => {
                self.last_device = Some(stat.st_dev);
                Ok(())
            }
            Ok(true) => Err(self.error(Step::Lookup, name, Errno::EACCES)),
            Err(errno) => Err(self.error(Step::Lookup, name, errno)),
        }
    }

    /// The directory on which the walk stands, as what was found.
    fn itself(&self) -> Result<Found, WalkError> {
        let fd = self.here(openat(&self.at, ".", INTO, Mode::empty()))?;
        let stat = self.here(fstat(&fd))?;
        Ok(Found { fd, stat })
    }

    fn stay(&self) -> Result<Next, WalkError> {
        if !self.todo.is_empty() {
            return Ok(Next::On);
        }
        Ok(Next::End(OsString::from("."), Some(self.itself()?)))
    }

    fn up(&mut self) -> Result<Next, WalkError> {
        let dots = OsStr::new("..");
        if self.watches() {
            let stat = self.at_name(dots, fstat(&self.at))?;
            if !self.at_name(dots, trust::is_roots(&self.at, &stat))? {
                self.switch()?;
            }
        }
        let above = match self.walk.confined {
            true => self.above.pop().ok_or(Errno::EXDEV),
            false => openat(&self.at, "..", INTO, Mode::empty()),
        };
        self.at = self.at_name(dots, above)?;
        self.real.pop();
        self.stand()?;
        self.stay()
    }

    fn name(&mut self, part: Part) -> Result<Next, WalkError> {
        let last = self.todo.is_empty();
        let name = &part.name;
        for _ in 0..MAX_TRIES {
            // Nearly all are directories to go into, and then this is all it takes.
            if !last {
                match openat(&self.at, name.as_os_str(), INTO, Mode::empty()) {
                    Ok(fd) => return self.enter(fd, name).map(|()| Next::On),
                    Err(Errno::ENOTDIR | Errno::ELOOP | Errno::ENOENT) => {}
                    Err(errno) => return self.at_name(name, Err(errno)),
                }
            }
            let fd = match openat(&self.at, name.as_os_str(), STEP, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) => match self.missing(&part)? {
                    Missing::Again => continue,
                    Missing::Is => return Ok(Next::End(part.name, None)),
                    Missing::Made(fd) if last => {
                        let stat = self.at_name(name, fstat(&fd))?;
                        return Ok(Next::End(part.name, Some(Found { fd, stat })));
                    }
                    Missing::Made(fd) => return self.enter(fd, name).map(|()| Next::On),
                },
                Err(errno) => return self.at_name(name, Err(errno)),
            };
            self.stand_on(&fd)?;
            let stat = self.at_name(name, fstat(&fd))?;
            if is_link(&stat) && (!last || self.walk.follow_last) {
                return self.follow(&part, &fd, &stat);
            }
            self.refuse_proc(Some(&fd), &stat, name)?;
            if last {
                return Ok(Next::End(part.name, Some(Found { fd, stat })));
            }
            if is_dir(&stat) {
                return self.enter(fd, name).map(|()| Next::On);
            }
            return Err(self.error(Step::NotADirectory, name, Errno::ENOTDIR));
        }
        self.at_name(&part.name, Err(Errno::EBUSY))
    }

    fn enter(&mut self, dir: OwnedFd, name: &OsStr) -> Result<(), WalkError> {
        let above = std::mem::replace(&mut self.at, dir);
        if self.walk.confined {
            if self.above.len() >= MAX_CONFINED_LEVELS {
                return self.at_name(name, Err(Errno::ENAMETOOLONG));
            }
            self.above.push(above);
        }
        self.real.push(name);
        self.stand()
    }

    /// Follows the link `fd`, which is the component `part` of the directory on which the walk stands.
    fn follow(&mut self, part: &Part, fd: &OwnedFd, stat: &FileStat) -> Result<Next, WalkError> {
        let name = part.name.as_os_str();
        self.links += 1;
        if self.links > self.walk.max_links {
            return Err(self.error(Step::TooManyLinks, name, Errno::ELOOP));
        }
        let directory = self.at_name(name, fstat(&self.at))?;
        if self.watches() {
            let mut roots = self.at_name(name, trust::is_roots(fd, stat))?;
            if roots && stat.st_nlink > 1 {
                roots = self.at_name(name, trust::is_only_roots(&self.at, &directory))?;
            }
            if !roots {
                self.switch()?;
            }
        }
        self.refuse_proc(Some(fd), stat, name)?;
        if self.is_trailing() {
            let uid = match self.switched {
                true => self.walk.actor.uid(),
                false => nix::unistd::geteuid().as_raw(),
            };
            self.at_name(name, trust::may_follow(&directory, stat, uid))?;
        }
        let target = self.at_name(name, readlinkat(fd, ""))?;
        // Before a switch only: the targets of some links there are no paths.
        if !self.switched && self.at_name(name, trust::is_proc(fd))? {
            return self.follow_in_proc(name, Path::new(&target));
        }
        let target = Path::new(&target);
        if target.as_os_str().is_empty() {
            return self.at_name(name, Err(Errno::ENOENT));
        }
        if target.is_absolute() {
            if self.walk.confined {
                return self.at_name(name, Err(Errno::EXDEV));
            }
            self.at = self.at_name(name, openat(AT_FDCWD, "/", INTO, Mode::empty()))?;
            self.real = PathBuf::from("/");
            self.stand()?;
        }
        self.todo.extend(parts_of(target, true).into_iter().rev());
        Ok(Next::On)
    }

    /// Lets the kernel follow a link of procfs, such as /dev/stdin's /proc/self/fd/0.
    fn follow_in_proc(&mut self, name: &OsStr, target: &Path) -> Result<Next, WalkError> {
        if self.walk.confined {
            return self.at_name(name, Err(Errno::EXDEV));
        }
        let last = self.todo.is_empty();
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let fd = self.at_name(name, openat(&self.at, name, flags, Mode::empty()))?;
        self.stand_on(&fd)?;
        let stat = self.at_name(name, fstat(&fd))?;
        if last {
            return Ok(Next::Magic(name.to_owned(), Found { fd, stat }));
        }
        if !is_dir(&stat) {
            return Err(self.error(Step::NotADirectory, name, Errno::ENOTDIR));
        }
        self.at = fd;
        self.real = self.real.join(target);
        self.stand().map(|()| Next::On)
    }

    /// Makes the directory of a missing component, where that is wanted.
    fn missing(&mut self, part: &Part) -> Result<Missing, WalkError> {
        let (name, last) = (part.name.as_os_str(), self.todo.is_empty());
        let make = match self.walk.make {
            Make::Nothing => false,
            Make::Parents => !last,
            Make::All => true,
        };
        if !make {
            return match last {
                true => Ok(Missing::Is),
                false => self.at_name(name, Err(Errno::ENOENT)),
            };
        }
        if part.of_link {
            return Err(self.error(Step::Dangling, name, Errno::ENOENT));
        }
        // `new/../x` is not made: it would leave a directory that nobody asked for.
        if self.todo.iter().any(|part| part.name == "..") {
            return Err(self.error(Step::MakeDirectory, name, Errno::ENOENT));
        }
        let rights = Rights::new(self.walk.actor.clone(), self.switched);
        match rights.create(|| mkdirat(&self.at, name, DIR_MODE)) {
            Ok(()) => {}
            // Somebody else was faster.
            Err(Errno::EEXIST) => return Ok(Missing::Again),
            Err(errno) => return Err(self.error(Step::MakeDirectory, name, errno)),
        }
        let fd = match openat(&self.at, name, INTO, Mode::empty()) {
            Ok(fd) => fd,
            // Taken away, or replaced, at once.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Missing::Again),
            Err(errno) => return Err(self.error(Step::Own, name, errno)),
        };
        self.made += 1;
        self.last_made = self.is_trailing();
        own(&fd, self.walk.actor).map_err(|errno| self.error(Step::Own, name, errno))?;
        Ok(Missing::Made(fd))
    }

    /// Trigger (c), and procfs.
    fn check_end(&mut self, found: Option<Found>) -> Result<Option<Found>, WalkError> {
        let Some(found) = found else { return Ok(None) };
        if self.watches() {
            let others = is_others(&self.at, &found.stat, self.walk.actor);
            if self.here(others)? {
                self.switch()?;
            }
        }
        Ok(Some(found))
    }
}

/// What became of a missing component.
enum Missing {
    /// It is missing.
    Is,
    /// It was made.
    Made(OwnedFd),
    /// It may be there by now.
    Again,
}

/// Trigger (c): whether what lies in `dir` is a file with several names that is not the user's, which
/// anybody who may write the directory can have linked there.
pub(super) fn is_others(dir: &impl AsFd, stat: &FileStat, actor: &Actor) -> nix::Result<bool> {
    if is_dir(stat) || stat.st_nlink < 2 || stat.st_uid == actor.uid() {
        return Ok(false);
    }
    let directory = fstat(dir)?;
    Ok(!trust::is_only_roots(dir, &directory)?)
}

/// Gives a directory that was just made its group, and whoever watches it a change of attributes.
/// Its user it has from the start; another directory that somebody renamed to its name has another
/// owner, and is refused, or is the user's own.
fn own(dir: &OwnedFd, actor: &Actor) -> nix::Result<()> {
    let (uid, gid) = actor.owner();
    let stat = fstat(dir)?;
    if stat.st_uid != uid {
        return Err(Errno::EPERM);
    }
    let (uid, gid) = (Uid::from_raw(uid).as_raw(), Gid::from_raw(gid).as_raw());
    match path_fd::chown(dir, Some(uid), Some(gid)) {
        // Without root the daemon may be refused the group, and has nobody else to give it to.
        Err(Errno::EPERM) if !nix::unistd::geteuid().is_root() || stat.st_gid == gid => Ok(()),
        other => other,
    }
}
