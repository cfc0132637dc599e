//! The attributes that clients attach to a file: extended attributes `user.e2b.*`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::Path,
};

use nix::errno::Errno;
use xattr::FileExt;

use super::{FsError, PathError, errno};
use crate::sys::path_fd;

/// What every name of ours begins with in the file system.
pub const PREFIX: &str = "user.e2b.";
/// The longest key, so that the name with its prefix fits the kernel's 255 bytes.
pub const MAX_KEY_BYTES: usize = 246;
/// The most bytes of all names and values of one file: what ext4 gives in one block.
pub const MAX_TOTAL_BYTES: usize = 4096;

/// The bytes of attribute names that [`is_surely_without`] looks at.
const NAMES_BUFFER: usize = 1024;

const _: () = assert!(PREFIX.len() + MAX_KEY_BYTES == 255);

/// Checks metadata before anything is written.
///
/// # Errors
/// [`FsError::InvalidMetadata`] that names the key.
pub fn validate_metadata(metadata: &BTreeMap<String, String>) -> Result<(), FsError> {
    let printable = |text: &str| text.bytes().all(|b| (0x20..=0x7e).contains(&b));
    let mut total = 0;
    for (key, value) in metadata {
        let problem = if key.is_empty() {
            "a key is empty".to_owned()
        } else if key.len() > MAX_KEY_BYTES {
            format!("key {key:?} is longer than {MAX_KEY_BYTES} bytes")
        } else if !printable(key) {
            format!("key {key:?} is not printable ASCII")
        } else if !printable(value) {
            format!("the value of key {key:?} is not printable ASCII")
        } else {
            total += PREFIX.len() + key.len() + value.len();
            continue;
        };
        return Err(FsError::InvalidMetadata(problem));
    }
    if total > MAX_TOTAL_BYTES {
        let problem = format!("{total} bytes in all, more than {MAX_TOTAL_BYTES}");
        return Err(FsError::InvalidMetadata(problem));
    }
    Ok(())
}

/// The metadata of a file or directory, through symbolic links. What cannot be read, or is not
/// UTF-8, is not there.
pub(super) fn read(path: &Path) -> BTreeMap<String, String> {
    let Ok(names) = xattr::list_deref(path) else {
        return BTreeMap::new();
    };
    let ours = names.filter_map(|name| {
        let key = name.to_str()?.strip_prefix(PREFIX)?.to_owned();
        let value = xattr::get_deref(path, &name).ok()??;
        Some((key, String::from_utf8(value).ok()?))
    });
    ours.collect()
}

/// As [`read`], of the regular file or directory that `fd` (`O_PATH`) stands for, whatever has its
/// name by now. The kernel takes no such descriptor for these calls, but its own path in /proc.
pub(super) fn read_fd(fd: &impl AsFd) -> BTreeMap<String, String> {
    read(&path_fd::proc_path(fd))
}

/// Whether what has a name in a directory has no metadata for sure. It spares the listing of files
/// without any the way through /proc.
pub(super) fn is_surely_without(dir: &impl AsFd, name: &OsStr) -> bool {
    let mut buffer = [0; NAMES_BUFFER];
    match path_fd::list_xattrs_at(dir, name, &mut buffer) {
        Ok(names) => {
            !names.split(|byte| *byte == 0).any(|name| name.starts_with(PREFIX.as_bytes()))
        }
        Err(errno) => errno == Errno::EOPNOTSUPP,
    }
}

/// As [`read`], of a file that is open.
pub(super) fn read_open(file: &File) -> BTreeMap<String, String> {
    let Ok(names) = file.list_xattr() else {
        return BTreeMap::new();
    };
    let ours = names.filter_map(|name| {
        let key = name.to_str()?.strip_prefix(PREFIX)?.to_owned();
        let value = file.get_xattr(&name).ok()??;
        Some((key, String::from_utf8(value).ok()?))
    });
    ours.collect()
}

/// Replaces all metadata of a file.
///
/// # Errors
/// [`FsError::NoSpaceForMetadata`] or [`FsError::WriteMetadata`]. A file system without extended
/// attributes is no error: the metadata is not kept.
pub fn set_metadata(path: &Path, metadata: &BTreeMap<String, String>) -> Result<(), FsError> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| FsError::WriteMetadata(PathError::io("open", path, &error)))?;
    replace(&file, path, metadata)
}

/// As [`set_metadata`], on a file that is open; `path` is for the messages.
pub(super) fn replace(
    file: &File,
    path: &Path,
    metadata: &BTreeMap<String, String>,
) -> Result<(), FsError> {
    let Err((op, error)) = try_replace(file, metadata) else {
        return Ok(());
    };
    let error = PathError::new(op, path, errno::of(&error));
    match error.errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS => {
            tracing::debug!(%error, "metadata is not kept: no extended attributes here");
            Ok(())
        }
        Errno::ENOSPC | Errno::EDQUOT => Err(FsError::NoSpaceForMetadata(error)),
        _ => Err(FsError::WriteMetadata(error)),
    }
}

fn try_replace(
    file: &File,
    metadata: &BTreeMap<String, String>,
) -> Result<(), (&'static str, io::Error)> {
    let names = file.list_xattr().map_err(|error| ("listxattr", error))?;
    let old: BTreeSet<_> =
        names.filter(|name| name.as_bytes().starts_with(PREFIX.as_bytes())).collect();
    for name in &old {
        let key = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if key.is_none_or(|key| !metadata.contains_key(key)) {
            file.remove_xattr(name).map_err(|error| ("removexattr", error))?;
        }
    }
    for (key, value) in metadata {
        let set = file.set_xattr(format!("{PREFIX}{key}"), value.as_bytes());
        set.map_err(|error| ("setxattr", error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn limits_are_exact() {
        let key = "k".repeat(MAX_KEY_BYTES);
        validate_metadata(&map(&[(&key, "v")])).unwrap();
        let full = "v".repeat(MAX_TOTAL_BYTES - PREFIX.len() - 1);
        validate_metadata(&map(&[("k", &full)])).unwrap();
        for bad in [
            map(&[("", "v")]),
            map(&[(&format!("{key}k"), "v")]),
            map(&[("ä", "v")]),
            map(&[("k", "a\nb")]),
            map(&[("k", &format!("{full}v"))]),
        ] {
            let error = validate_metadata(&bad).unwrap_err();
            assert!(error.to_string().starts_with("invalid metadata: "), "{error}");
        }
    }

    #[test]
    fn replaces_everything_of_ours_and_nothing_else() {
        let file = tempfile::NamedTempFile::new_in(".").unwrap();
        xattr::set(file.path(), "user.other", b"1").unwrap();
        xattr::set(file.path(), "user.e2b.bad", b"\xff").unwrap();
        set_metadata(file.path(), &map(&[("a", "1"), ("b", "2")])).unwrap();
        set_metadata(file.path(), &map(&[("b", "3")])).unwrap();
        assert_eq!(read(file.path()), map(&[("b", "3")]));
        assert_eq!(xattr::get(file.path(), "user.e2b.bad").unwrap(), None);
        assert!(xattr::get(file.path(), "user.other").unwrap().is_some());
        set_metadata(file.path(), &map(&[])).unwrap();
        assert!(read(file.path()).is_empty());
    }
}
