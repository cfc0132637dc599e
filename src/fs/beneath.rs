//! Names in directories.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

/// Whether a name is one name, and none that means another directory.
pub(super) fn is_name(name: &OsStr) -> bool {
    !matches!(name.as_bytes(), b"" | b"." | b"..") && !name.as_bytes().contains(&b'/')
}
