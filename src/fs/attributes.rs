//! Mode, owner and times of an entry, and symbolic links.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{PermissionsExt, chown, lchown, symlink},
    path::Path,
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{UtimensatFlags, utimensat},
        time::TimeSpec,
    },
};

use super::{FsError, path, staged::doing, unnamed::with_new_name};
use crate::guest::users::{self, User, Users};

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

/// Sets attributes of the entry at `path`. All values are checked before the first is set.
///
/// # Errors
/// [`FsError::BadField`], [`FsError::UnknownOwner`], or the call that failed.
pub fn set(path: &Path, attributes: &Attributes, users: &Users) -> Result<(), FsError> {
    let bad = |field, why: &str| FsError::BadField { field, why: why.to_owned() };
    if attributes.mode.is_some_and(|mode| mode > ALL_BITS) {
        return Err(bad("mode", "more than the permission bits 07777"));
    }
    let failed = |op| move |error: io::Error| doing("setting attributes", path, op, &error);
    let meta = match attributes.no_follow {
        true => fs::symlink_metadata(path),
        false => fs::metadata(path),
    };
    let meta = meta.map_err(failed("stat"))?;
    if attributes.mode.is_some() && meta.is_symlink() {
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

    // The owner first: a change of it takes setuid bits away.
    if uid.is_some() || gid.is_some() {
        let changed = match attributes.no_follow {
            true => lchown(path, uid, gid),
            false => chown(path, uid, gid),
        };
        changed.map_err(failed("chown"))?;
    }
    if let Some(mode) = attributes.mode {
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("chmod"))?;
    }
    if modified.is_some() || accessed.is_some() {
        let flags = match attributes.no_follow {
            true => UtimensatFlags::NoFollowSymlink,
            false => UtimensatFlags::FollowSymlink,
        };
        let same = TimeSpec::UTIME_OMIT;
        let (accessed, modified) = (accessed.unwrap_or(same), modified.unwrap_or(same));
        utimensat(AT_FDCWD, path, &accessed, &modified, flags)
            .map_err(|errno| failed("utimes")(errno.into()))?;
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

/// Makes a symbolic link, and the missing directories above it, for `user`.
///
/// # Errors
/// [`FsError::BadField`], [`FsError::Exists`], or the call that failed.
pub fn create_symlink(
    path: &Path,
    target: &str,
    replace: bool,
    user: &User,
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
    let failed = |op, error: &io::Error| doing("creating link", path, op, error);
    let (path, above) = (path::without_trailing_slashes(path), path::dir_of(path));
    path::ensure_dirs(&above, (user.uid, user.gid))?;
    let make = |at: &Path| -> io::Result<()> {
        symlink(target, at)?;
        lchown(at, Some(user.uid), Some(user.gid))
            .or_else(|error| path::tolerate_own(error, user.uid, || fs::symlink_metadata(at)))
    };
    match make(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other.map_err(|error| failed("symlink", &error)),
    }
    if !replace || fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Err(FsError::Exists(path.to_owned()));
    }
    let ((), apart) = with_new_name(&above, make).map_err(|error| failed("symlink", &error))?;
    fs::rename(&apart, path).map_err(|error| {
        let _ = fs::remove_file(&apart);
        failed("rename", &error)
    })
}
