//! What programs in the sandbox can read about it: `/run/e2b/.E2B_SANDBOX` and its siblings, and
//! variables of the same names.

use std::{fs, io, path::Path};

use super::replace::replace;

/// Whether this is a sandbox in a Firecracker VM: `true` or `false`.
pub const SANDBOX: &str = "E2B_SANDBOX";
/// The sandbox's id.
pub const SANDBOX_ID: &str = "E2B_SANDBOX_ID";
/// The id of the template that it was made from.
pub const TEMPLATE_ID: &str = "E2B_TEMPLATE_ID";
/// The URL of the host's event service.
pub const EVENTS_ADDRESS: &str = "E2B_EVENTS_ADDRESS";

const DIRECTORY: &str = "run/e2b";

/// Writes one of them below `root`, for everybody to read. Blocks.
///
/// # Errors
/// The directory or the file cannot be made.
pub fn write(root: &Path, name: &str, value: &str) -> io::Result<()> {
    let directory = root.join(DIRECTORY);
    fs::create_dir_all(&directory)?;
    replace(&directory.join(format!(".{name}")), value.as_bytes(), 0o444)
}
