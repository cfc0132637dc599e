//! Mode, owner and times of an entry, and symbolic links.

use std::{ffi::OsStr, os::fd::AsFd, path::Path};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, renameat},
    sys::{
        stat::{Mode, fstat},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, symlinkat, unlinkat},
};

use super::{
    FsError, PathError,
    actor::Actor,
    path,
    resolve::{Place, Step, Walk},
    unnamed::with_new_name,
};
use crate::{
    guest::users::{self, Users},
    sys::path_fd,
};

/// What to set; what is none stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Change a symbolic link itself.
    pub no_follow: bool,
    /// Permission bits.
    pub mode: Option<u32>,
    /// A user's name or number.
    pub owner: Option<String>,
    /// A group's name or number.
    pub group: Option<String>,
    /// Time of the last change of the content: seconds and nanoseconds since 1970.
    pub modified: Option<(i64, i32)>,
    /// Time of the last access.
    pub accessed: Option<(i64, i32)>,
}

/// The permission bits that there are.
const ALL_BITS: u32 = 0o7777;
/// Set-uid and set-gid.
const SET_ID_BITS: u32 = libc::S_ISUID | libc::S_ISGID;

/// Sets attributes of the entry at `path`. All values are checked before the first is set. The path is
/// walked once, and everything is set on what the walk has found, whatever is at the path by then.
///
/// The owner is set first, and set-id bits do not survive that: a file that its former owner has
/// prepared never is set-uid of the new one. Only `mode` sets these bits.
///
/// # Errors
/// [`FsError::BadField`], [`FsError::UnknownOwner`], or the call that failed.
pub fn set(
    path: &Path,
    attributes: &Attributes,
    actor: &Actor,
    users: &Users,
) -> Result<(), FsError> {
    let bad = |field, why: &str| FsError::BadField { field, why: why.to_owned() };
    if attributes.mode.is_some_and(|mode| mode > ALL_BITS) {
        return Err(bad("mode", "more than the permission bits 07777"));
    }
    let failed = |op| {
        move |errno| FsError::Doing {
            doing: "setting attributes",
            error: PathError::new(op, path, errno),
        }
    };
    let walk = Walk::new(actor);
    let walk = if attributes.no_follow { walk.no_follow() } else { walk };
    let place =
        walk.to(path).map_err(|error| error.or_busy(|error| failed("stat")(error.errno)))?;
    let found = place.found().ok_or_else(|| failed("stat")(Errno::ENOENT))?;
    if attributes.mode.is_some() && found.is_link() {
        return Err(bad("mode", "a symbolic link has none"));
    }
    let uid = attributes.owner.as_deref().map(|name| {
        let known = users.by_name(name).ok().map(|user| user.uid);
        number(name, known).ok_or_else(|| unknown("owner", name))
    });
    let gid = attributes
        .group
        .as_deref()
        .map(|name| number(name, users.gid_of(name)).ok_or_else(|| unknown("group", name)));
    let (uid, gid) = (uid.transpose()?, gid.transpose()?);
    let modified = time("modified_time", attributes.modified)?;
    let accessed = time("accessed_time", attributes.accessed)?;

    let (fd, rights) = (&found.fd, place.rights());
    if uid.is_some() || gid.is_some() {
        rights.act(|| path_fd::chown(fd, uid, gid)).map_err(failed("chown"))?;
        // chown(2) takes the set-id bits away in the same step; some file systems that others serve
        // do not.
        let mode = fstat(fd).map_err(failed("stat"))?.st_mode;
        if found.is_file() && attributes.mode.is_none() && mode & SET_ID_BITS != 0 {
            let mode = mode & ALL_BITS & !SET_ID_BITS;
            rights.act(|| path_fd::chmod(fd, mode)).map_err(failed("chmod"))?;
        }
    }
    if let Some(mode) = attributes.mode {
        rights.act(|| path_fd::chmod(fd, mode)).map_err(failed("chmod"))?;
    }
    if modified.is_some() || accessed.is_some() {
        let same = TimeSpec::UTIME_OMIT;
        let (accessed, modified) = (accessed.unwrap_or(same), modified.unwrap_or(same));
        rights.act(|| path_fd::set_times(fd, accessed, modified)).map_err(failed("utimes"))?;
    }
    Ok(())
}

/// A name that is known, or a number as it is.
fn number(name: &str, known: Option<u32>) -> Option<u32> {
    known.or_else(|| users::id(name))
}

fn unknown(field: &'static str, name: &str) -> FsError {
    FsError::UnknownOwner { field, name: name.to_owned() }
}

fn time(field: &'static str, time: Option<(i64, i32)>) -> Result<Option<TimeSpec>, FsError> {
    match time {
        None => Ok(None),
        Some((seconds, nanos)) if (0..1_000_000_000).contains(&nanos) => {
            Ok(Some(TimeSpec::new(seconds, nanos.into())))
        }
        Some(_) => {
            let why = "the nanoseconds are not between 0 and 999,999,999".to_owned();
            Err(FsError::BadField { field, why })
        }
    }
}

/// Makes a symbolic link, and the missing directories above it, for the actor.
///
/// # Errors
/// [`FsError::BadField`], [`FsError::Exists`], or the call that failed.
pub fn create_symlink(
    path: &Path,
    target: &str,
    replace: bool,
    actor: &Actor,
) -> Result<(), FsError> {
    let why = match target {
        "" => Some("empty"),
        _ if target.contains('\0') => Some("contains a NUL byte"),
        _ if target.len() >= path::PATH_MAX => Some("longer than a path can be"),
        _ => None,
    };
    if let Some(why) = why {
        return Err(FsError::BadField { field: "target", why: why.to_owned() });
    }
    let path = path::without_trailing_slashes(path);
    let failed = |op, errno| FsError::Doing {
        doing: "creating link",
        error: PathError::new(op, path, errno),
    };
    let place = Walk::new(actor).no_follow().make_parents().to(path);
    let place = place.map_err(|error| match error.step {
        Step::Lookup if error.at_last => error.or_busy(|error| failed("symlink", error.errno)),
        _ => error.of_making_directories(),
    })?;
    let exists = || FsError::Exists(path.to_owned());
    if place.is_nameless() {
        return Err(exists());
    }
    match make_link(&place, target, place.name()) {
        Err(Errno::EEXIST) => {}
        other => return other.map_err(|errno| failed("symlink", errno)),
    }
    if !replace || place.found().is_some_and(|found| found.is_dir()) {
        return Err(exists());
    }
    let make = |name: &OsStr| make_link(&place, target, name);
    let made = with_new_name(place.dir(), place.rights(), make);
    let ((), name, _note) = made.map_err(|errno| failed("symlink", errno))?;
    place
        .rights()
        .act(|| {
            renameat(place.dir(), name.as_os_str(), place.dir(), place.name()).inspect_err(|_| {
                let _ = unlinkat(place.dir(), name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            })
        })
        .map_err(|errno| match errno {
            // A directory that has come meanwhile.
            Errno::EISDIR => exists(),
            errno => failed("rename", errno),
        })
}

/// Makes a link beside the place, which belongs to the actor from its first moment.
fn make_link(place: &Place, target: &str, name: &OsStr) -> nix::Result<()> {
    place.rights().create(|| symlinkat(target, place.dir(), name))?;
    // In a directory with the set-gid bit it has another group. And watchers were always told of a
    // change of attributes.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let (uid, gid) = place.actor().owner();
    place.rights().act(|| {
        let fd = match openat(place.dir(), name, flags, Mode::empty()) {
            Ok(fd) => fd,
            // Taken away again.
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let stat = fstat(&fd)?;
        // Somebody has put something else there: that is not ours to change.
        if stat.st_mode & libc::S_IFMT != libc::S_IFLNK || stat.st_uid != uid {
            return Ok(());
        }
        match path_fd::chown(&fd.as_fd(), Some(uid), Some(gid)) {
            // Without root, or with the user's own rights, the group may be refused.
            Err(Errno::EPERM) => Ok(()),
            other => other,
        }
    })
}
