//! What content that replaces a file never inherits from it: the rights of a program.
//!
//! Somebody may make a file set-uid, wait until a client replaces its content as root, and patch the
//! new content through a mapping made before (writes to a mapping clear no bits): a set-uid program of
//! root's. So set-uid, set-gid, file capabilities and the signatures of integrity measurement end with
//! the content that they were given to. Only the request's own mode sets them again.

use std::{fs::File, os::unix::fs::MetadataExt};

use nix::{
    errno::Errno,
    sys::stat::{Mode, fchmod},
};
use xattr::FileExt;

use super::{errno, metadata};

/// The capabilities that a program gets.
const CAPABILITY: &str = "security.capability";
/// The attributes that say something of the content, or of what a program may do.
const OF_CONTENT: [&str; 3] = [CAPABILITY, "security.ima", "security.evm"];

/// The permission bits of an old file that a new content may have.
pub(super) fn kept_mode(mode: u32) -> u32 {
    mode & 0o7777 & !(libc::S_ISUID | libc::S_ISGID)
}

/// Whether an attribute belongs to the content of a file, and not to its place.
pub(super) fn is_of_content(name: &[u8]) -> bool {
    OF_CONTENT.iter().any(|of_content| name == of_content.as_bytes())
}

/// Takes them from a file whose content is about to be replaced in place. Where the thread has a
/// user's rights only and the file is another's, the kernel does it when the content is written.
pub(super) fn clear(file: &File, switched: bool) -> nix::Result<()> {
    let tolerate = |error: Errno| match error {
        Errno::EPERM | Errno::EACCES if switched => Ok(()),
        error => Err(error),
    };
    let meta = file.metadata().map_err(|error| errno::of(&error))?;
    if kept_mode(meta.mode()) != meta.mode() & 0o7777 {
        fchmod(file, Mode::from_bits_truncate(kept_mode(meta.mode()))).or_else(tolerate)?;
    }
    // A file system without attributes has none of these.
    let Ok(names) = file.list_xattr() else { return Ok(()) };
    for name in names.filter(|name| is_of_content(name.as_encoded_bytes())) {
        match file.remove_xattr(&name).map_err(|error| errno::of(&error)) {
            Ok(()) | Err(Errno::ENODATA) => {}
            // The signatures can be removed by root of the whole machine only. They are of the old
            // content and fit no other.
            Err(Errno::EPERM) if name != CAPABILITY => {}
            Err(error) => tolerate(error)?,
        }
    }
    Ok(())
}

/// Copies the attributes of a file that another takes the place of, except those of its content and
/// ours, which are replaced anyway. What the file system does not take stays out. False when a
/// security label would be lost: the content has to be written into the old file then.
pub(super) fn keep_attributes(from: &File, to: &File) -> bool {
    let Ok(names) = from.list_xattr() else {
        return true;
    };
    let mut labels_kept = true;
    for name in names {
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(metadata::PREFIX.as_bytes()) || is_of_content(bytes) {
            continue;
        }
        let Ok(Some(value)) = from.get_xattr(&name) else { continue };
        if let Err(error) = to.set_xattr(&name, &value) {
            let same = to.get_xattr(&name).is_ok_and(|has| has.as_deref() == Some(&*value));
            if bytes.starts_with(b"security.") && !same {
                labels_kept = false;
            }
            tracing::debug!(?name, %error, "could not keep an attribute of a replaced file");
        }
    }
    labels_kept
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn bits_and_capabilities_end_with_the_content() {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let path = tmp.path().join("f");
        let file = File::create(&path).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o7751)).unwrap();
        // Version 2, no capability at all.
        let capability = [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let able = file.set_xattr("security.capability", &capability).is_ok();
        if !able {
            crate::skipped::skip("root and a file system with capabilities of files");
        }
        file.set_xattr("user.mine", b"kept").unwrap();
        let new = File::create(tmp.path().join("new")).unwrap();
        assert!(keep_attributes(&file, &new));
        let names: Vec<_> = new.list_xattr().unwrap().collect();
        assert!(names.iter().any(|name| name == "user.mine"));
        assert!(!names.iter().any(|name| name == "security.capability"));
        clear(&file, false).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o1751);
        assert_eq!(file.get_xattr("security.capability").unwrap(), None);
        assert_eq!(file.get_xattr("user.mine").unwrap().as_deref(), Some(&b"kept"[..]));
    }
}
