//! Directories: make and move. (Listing: [`super::list`], removing: [`super::remove`].)

use std::path::Path;

use nix::{errno::Errno, fcntl::renameat};

use super::{
    FsError, PathError, RenameError,
    actor::Actor,
    entry::{Entry, Owners, stat_name, stat_place},
    path,
    resolve::{Step, Walk},
};
use crate::guest::users::Users;

pub use super::{
    list::{MAX_LIST_ENTRIES, Page, list_page},
    remove::{MAX_OPEN_LEVELS, NAMES_AT_ONCE, remove},
};

/// Makes a directory, and those above it that are missing, for the actor.
///
/// # Errors
/// [`FsError::DirectoryExists`], [`FsError::ExistsAsFile`], or the call that failed.
pub fn make_dir(path: &Path, actor: &Actor, users: &Users) -> Result<Entry, FsError> {
    let place = Walk::new(actor).make_all().to(path).map_err(|error| match error.step {
        Step::Lookup | Step::NotADirectory | Step::TooManyLinks => {
            error.or_busy(|error| FsError::FileInfo(PathError::new("stat", path, error.errno)))
        }
        Step::Dangling | Step::MakeDirectory | Step::Own => error.of_making_directories(),
    })?;
    if place.last_was_made() {
        return stat_place(&place, path, &mut Owners::new(users));
    }
    match place.found() {
        Some(found) if found.is_dir() => Err(FsError::DirectoryExists(path.to_owned())),
        _ => Err(FsError::ExistsAsFile(path.to_owned())),
    }
}

/// Renames a file, link or directory, making the directories above the destination for the actor.
/// An existing file is replaced, an existing directory is not. If the rule of [`super::resolve`]
/// allows only the actor's own rights at one end, they are used for both.
///
/// # Errors
/// [`FsError::SourceNotFound`], in which case nothing was made, or the call that failed: of
/// [`is_across`] for two file systems, for [`move_across`](super::move_across::move_across).
pub fn move_entry(src: &Path, dst: &Path, actor: &Actor, users: &Users) -> Result<Entry, FsError> {
    let failed = |errno| {
        let error = RenameError { from: src.to_owned(), to: dst.to_owned(), errno };
        match errno {
            Errno::ENOENT => FsError::SourceNotFound(error),
            _ => FsError::Rename(error),
        }
    };
    let walk = Walk::new(actor).no_follow();
    // A slash at the end makes the walk follow a link, and rename(2) does not.
    let bare = path::without_trailing_slashes(src);
    let from = walk.to(bare).map_err(|error| error.or_busy(|error| failed(error.errno)))?;
    let Some(source) = from.found() else {
        return Err(failed(Errno::ENOENT));
    };
    let to = walk.make_parents().to(dst).map_err(|error| match error.step {
        Step::Lookup if error.at_last => error.or_busy(|error| failed(error.errno)),
        _ => error.of_making_directories(),
    })?;
    // rename(2) replaces an empty directory; Go, and so upstream, does not.
    if let Some(there) = to.found()
        && there.is_dir()
        && (src == dst
            || (there.stat.st_dev, there.stat.st_ino) != (source.stat.st_dev, source.stat.st_ino))
    {
        return Err(failed(Errno::EEXIST));
    }
    // As rename(2) says it.
    if from.is_nameless() || to.is_nameless() {
        return Err(failed(Errno::EBUSY));
    }
    if bare != src && !source.is_dir() {
        return Err(failed(Errno::ENOTDIR));
    }
    let rights = from.rights().both(to.rights());
    rights.act(|| renameat(from.dir(), from.name(), to.dir(), to.name())).map_err(failed)?;
    stat_name(&to, dst, users)
}

/// Whether a move failed only because source and destination are on two file systems.
pub fn is_across(error: &FsError) -> bool {
    matches!(error, FsError::Rename(error) if error.errno == Errno::EXDEV)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        fs::{Kind, actor::FileAccess, entry::EntryKind},
        guest::users::User,
    };

    fn actor() -> Actor {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
        Actor::new(&user, FileAccess::Compatible)
    }

    #[test]
    fn makes_directories_once() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("a/b");
        let made = make_dir(&dir, &actor(), &Users::system()).unwrap();
        assert_eq!((made.kind, made.permissions.as_str()), (EntryKind::Directory, "drwxr-xr-x"));
        let error = make_dir(&dir, &actor(), &Users::system()).unwrap_err();
        assert_eq!(error.kind(), Kind::AlreadyExists);
        assert_eq!(error.to_string(), format!("directory already exists: {}", dir.display()));
        fs::write(dir.join("f"), "").unwrap();
        let error = make_dir(&dir.join("f"), &actor(), &Users::system()).unwrap_err();
        assert!(error.to_string().starts_with("path already exists but it is not a directory: "));
        let error = make_dir(&dir.join("f/x"), &actor(), &Users::system()).unwrap_err();
        assert!(error.to_string().starts_with("error getting file info: stat "), "{error}");
    }

    #[test]
    fn moves_and_leaves_nothing_behind_when_there_is_nothing_to_move() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path();
        let to = |src: &str, dst: &str| {
            move_entry(&root.join(src), &root.join(dst), &actor(), &Users::system())
        };
        fs::write(root.join("a"), "1").unwrap();
        assert_eq!(to("a", "new/b").unwrap().name, "b");
        fs::write(root.join("a"), "2").unwrap();
        to("a", "new/b").unwrap();
        assert_eq!(fs::read(root.join("new/b")).unwrap(), b"2");

        let error = to("a", "other/b").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        let (a, b) = (root.join("a"), root.join("other/b"));
        assert_eq!(
            error.to_string(),
            format!(
                "source file not found: rename {} {}: no such file or directory",
                a.display(),
                b.display()
            )
        );
        assert!(!root.join("other").exists());

        fs::create_dir(root.join("empty")).unwrap();
        let error = to("new", "empty").unwrap_err().to_string();
        assert!(error.starts_with("error renaming: rename ") && error.ends_with(": file exists"));
    }
}
