//! What `.gitignore` and `.ignore` files say.

use std::{
    ffi::OsStr,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use ignore::{
    Match,
    gitignore::{Gitignore, GitignoreBuilder},
};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag},
    sys::stat::fstatat,
};

use crate::fs::actor::Rights;

/// The longest file of rules that is obeyed.
pub const MAX_IGNORE_FILE_BYTES: u64 = 256 << 10;

/// The rules of one directory, about what is below it.
#[derive(Debug)]
pub(super) struct Rules {
    dir: PathBuf,
    git: Option<Gitignore>,
    /// Of `.ignore`, which counts more.
    own: Option<Gitignore>,
    /// Rules of git end where a repository begins.
    is_repository: bool,
}

/// A file of rules that is not obeyed.
#[derive(Debug)]
pub(super) struct Unusable;

impl Rules {
    /// The rules of a directory that is open, and how many files of them are not usable.
    pub(super) fn read(rights: &Rights, fd: &OwnedFd, dir: &Path) -> (Self, u64) {
        let mut unusable = 0;
        let mut of = |name: &str| match rules_in(rights, fd, name) {
            Ok(rules) => rules,
            Err(Unusable) => {
                unusable += 1;
                None
            }
        };
        let (git, own) = (of(".gitignore"), of(".ignore"));
        let is_repository =
            rights.act(|| fstatat(fd, ".git", AtFlags::AT_SYMLINK_NOFOLLOW)).is_ok();
        (Self { dir: dir.to_owned(), git, own, is_repository }, unusable)
    }
}

/// Whether the rules of the directories above a name, uppermost first, leave it out.
pub(super) fn leave_out<'a>(
    rules: impl DoubleEndedIterator<Item = &'a Rules> + Clone,
    rel: &Path,
    is_dir: bool,
) -> bool {
    let said = |rules: &Rules, matcher: &Option<Gitignore>| {
        let below = rel.strip_prefix(&rules.dir).ok()?;
        match matcher.as_ref()?.matched(below, is_dir) {
            Match::None => None,
            Match::Ignore(_) => Some(true),
            Match::Whitelist(_) => Some(false),
        }
    };
    // What is said further down counts more.
    if let Some(out) = rules.clone().rev().find_map(|rules| said(rules, &rules.own)) {
        return out;
    }
    for rules in rules.rev() {
        if let Some(out) = said(rules, &rules.git) {
            return out;
        }
        if rules.is_repository {
            break;
        }
    }
    false
}

fn rules_in(rights: &Rights, dir: &OwnedFd, name: &str) -> Result<Option<Gitignore>, Unusable> {
    // What others may have linked there is read with the user's rights, as any content.
    let file = match rights.open_in(dir, OsStr::new(name), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Ok((file, ..)) => file,
        Err(Errno::ENOENT) => return Ok(None),
        Err(_) => return Err(Unusable),
    };
    let read = || -> io::Result<String> {
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = Vec::new();
        let length = (&file).take(MAX_IGNORE_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        if length as u64 > MAX_IGNORE_FILE_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().map_err(|_| Unusable)?;
    let mut builder = GitignoreBuilder::new("");
    for line in text.trim_start_matches('\u{feff}').lines() {
        // As git does: one line that is no glob does not spoil the others.
        let _ = builder.add_line(None, line);
    }
    builder.build().map(Some).map_err(|_| Unusable)
}
