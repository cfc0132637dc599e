//! The mounts that a start depends on: of the working directory, the command and its interpreter.
//!
//! A child is made on a thread that sleeps until it has executed its command. On a mount that does
//! not answer that is never, so the mounts are declared before ([`stand_on_path`]): a start on one of
//! which that is known fails at once, and others go on.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::StartSpec;
use crate::{
    blocking::{MountBusy, can_mounts_hang, stand_on_path, stand_on_path_also},
    sys::DEFAULT_PATH,
};

/// The interpreters of interpreters that the kernel follows.
const MAX_INTERPRETERS: usize = 4;
/// The bytes of a script that the kernel looks at.
const MAX_SHEBANG: u64 = 256;

/// Blocks: declares the mounts on which a command and its working directory are. What cannot be
/// found is left to the child, which says why.
///
/// # Errors
/// [`MountBusy`] when one of them does not answer.
pub(super) fn stand_on_command(
    spec: &StartSpec,
    env: &[(String, String)],
) -> Result<(), MountBusy> {
    if !can_mounts_hang() {
        return Ok(());
    }
    let mut file = if spec.cmd.contains('/') {
        let file = spec.cwd.join(&spec.cmd);
        stand_on_path(&file)?;
        file
    } else {
        match search(spec, env)? {
            Some(file) => file,
            None => return stand_on_path_also(&spec.cwd),
        }
    };
    stand_on_path_also(&spec.cwd)?;
    for _ in 0..MAX_INTERPRETERS {
        let Some(interpreter) = interpreter(&file) else {
            break;
        };
        file = spec.cwd.join(interpreter);
        stand_on_path_also(&file)?;
    }
    Ok(())
}

/// The first file of the command's name on the search path, as the child looks for it.
fn search(spec: &StartSpec, env: &[(String, String)]) -> Result<Option<PathBuf>, MountBusy> {
    let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.as_str());
    for dir in path.unwrap_or(DEFAULT_PATH).split(':') {
        let file = spec.cwd.join(dir).join(&spec.cmd);
        stand_on_path(&file)?;
        if fs::metadata(&file).is_ok_and(|meta| meta.is_file()) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// What a script's first line names.
fn interpreter(script: &Path) -> Option<PathBuf> {
    // Opening anything else can do things.
    if !fs::metadata(script).ok()?.is_file() {
        return None;
    }
    let mut head = Vec::new();
    File::open(script).ok()?.take(MAX_SHEBANG).read_to_end(&mut head).ok()?;
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let mut words = line.split(|byte| matches!(byte, b' ' | b'\t'));
    let name = words.find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsStr::from_bytes(name)))
}
