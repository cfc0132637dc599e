//! Paths: from what a client wrote to an absolute path, as Go's `path/filepath` does it, and the
//! directories above it.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, lchown},
    },
    path::{Component, Path, PathBuf},
};

use super::{FsError, PathError};
use crate::{guest::users::User, quote};

/// The symbolic links that one path may lead through, Go's number.
pub const MAX_LINKS: usize = 255;

/// The bytes of a path that the kernel refuses, and so does [`resolve`]: it counts the NUL behind
/// the path. Without this bound, work on a path would be bounded only by the size of a message.
pub const PATH_MAX: usize = libc::PATH_MAX as usize;

/// The permissions of a directory that is made on the way.
const DIR_MODE: u32 = 0o755;

/// Makes a client's path absolute: `~` and relative paths start at the user's home directory, an
/// empty path is `workdir` or else the home directory, an absolute path stays as it is.
///
/// # Errors
/// [`FsError::ExpandHome`] for `~name`, [`FsError::NulByte`] for a path that holds one,
/// [`FsError::PathTooLong`] for one of [`PATH_MAX`] bytes or more, as written or made absolute.
pub fn resolve(
    path: impl AsRef<OsStr>,
    user: &User,
    workdir: Option<&str>,
) -> Result<PathBuf, FsError> {
    let path = path.as_ref();
    let path = if path.is_empty() { OsStr::new(workdir.unwrap_or_default()) } else { path };
    let bytes = path.as_bytes();
    if bytes.contains(&0) {
        return Err(FsError::NulByte(quote::path(Path::new(path))));
    }
    // As written, before anything is done for each part of it.
    let fits = |length: usize| match length < PATH_MAX {
        true => Ok(()),
        false => Err(FsError::PathTooLong(quote::path(Path::new(path)))),
    };
    fits(bytes.len())?;
    // login(1)'s rule for a user without a home directory.
    let home = if user.home.is_absolute() { user.home.as_path() } else { Path::new("/") };
    let resolved = match bytes.strip_prefix(b"~") {
        // Go's `~\x` keeps the backslash as part of a name.
        Some(rest) if rest.is_empty() || rest.starts_with(b"/") || rest.starts_with(b"\\") => {
            join(home, OsStr::from_bytes(rest))
        }
        Some(_) => return Err(FsError::ExpandHome(user.name.clone())),
        None if bytes.starts_with(b"/") => PathBuf::from(path),
        None => join(home, path),
    };
    fits(resolved.as_os_str().len())?;
    Ok(resolved)
}

/// Go's `filepath.Join` of two elements: an absolute second one is not taken as absolute.
fn join(base: &Path, rest: &OsStr) -> PathBuf {
    let mut joined = base.as_os_str().to_owned();
    joined.push("/");
    joined.push(rest);
    clean(Path::new(&joined))
}

/// Go's `filepath.Clean`: no `.`, no `//`, no `x/..`, no trailing slash, by text alone.
pub fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => match out.components().next_back() {
                Some(Component::Normal(_)) => {
                    out.pop();
                }
                Some(Component::RootDir) => {}
                _ => out.push(".."),
            },
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    if out.as_os_str().is_empty() {
        out.push(".");
    }
    out
}

/// Go's `filepath.Dir`: what stands before the last slash, cleaned. Of `/a/b/` it is `/a/b`.
pub(super) fn dir_of(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
    clean(Path::new(OsStr::from_bytes(bytes.get(..end).unwrap_or_default())))
}

/// Go's base name: the last part, without trailing slashes; `/` for the root.
pub fn base_name(path: &Path) -> &OsStr {
    let whole = without_trailing_slashes(path).as_os_str().as_bytes();
    let start = whole.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
    match whole.get(start..) {
        Some([]) | None => OsStr::new("/"),
        Some(name) => OsStr::from_bytes(name),
    }
}

/// The path without the slashes at its end, except the root's.
pub(super) fn without_trailing_slashes(path: &Path) -> &Path {
    let mut bytes = path.as_os_str().as_bytes();
    while let [rest @ .., b'/'] = bytes
        && !rest.is_empty()
    {
        bytes = rest;
    }
    Path::new(OsStr::from_bytes(bytes))
}

/// Makes every directory of `path` that is missing, 0755, and gives the new ones to `owner`.
/// Directories that exist stay untouched. Tells how many are new.
///
/// # Errors
/// [`FsError::PathIsFile`], or the call that failed.
pub fn ensure_dirs(path: &Path, owner: (u32, u32)) -> Result<usize, FsError> {
    // The common case in one call; everything above a directory is one.
    if fs::metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Ok(0);
    }
    let above = dir_of(path);
    let mut prefixes: Vec<&Path> = above
        .ancestors()
        .filter(|prefix| !matches!(prefix.as_os_str().as_bytes(), b"" | b"." | b"/"))
        .collect();
    prefixes.reverse();
    let all = prefixes.into_iter().chain([path]);
    all.map(|prefix| ensure_dir(prefix, owner).map(usize::from)).sum()
}

/// Whether it had to be made.
fn ensure_dir(path: &Path, owner: (u32, u32)) -> Result<bool, FsError> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Ok(false),
        Ok(_) => return Err(FsError::PathIsFile(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FsError::StatDirectory(PathError::io("stat", path, &error))),
    }
    match fs::DirBuilder::new().mode(DIR_MODE).create(path) {
        Ok(()) => {}
        // Somebody else was faster, or it is a symbolic link to nowhere, which upstream finds out
        // when it changes the owner.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::metadata(path)
                .map_err(|error| FsError::ChownDirectory(PathError::io("chown", path, &error)))?;
        }
        Err(error) => {
            return Err(FsError::CreateDirectory(PathError::io("mkdir", path, &error)));
        }
    }
    // Not through a link: a user who swaps the new directory for a link to a file of root's must
    // not be given that file.
    lchown(path, Some(owner.0), Some(owner.1))
        .or_else(|error| tolerate_own(error, owner.0, || fs::symlink_metadata(path)))
        .map_err(|error| FsError::ChownDirectory(PathError::io("chown", path, &error)))?;
    Ok(true)
}

/// Lets a daemon without root keep a file that is its own already: it may be refused the group,
/// and has nobody else to give the file to.
pub(super) fn tolerate_own(
    error: io::Error,
    uid: u32,
    meta: impl FnOnce() -> io::Result<fs::Metadata>,
) -> io::Result<()> {
    let refused = error.raw_os_error() == Some(libc::EPERM);
    if refused && !nix::unistd::geteuid().is_root() && meta()?.uid() == uid {
        return Ok(());
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn user(home: &str) -> User {
        User { name: "u".into(), uid: 0, gid: 0, home: home.into(), groups: vec![0] }
    }

    fn resolved(path: &str, workdir: Option<&str>) -> String {
        resolve(path, &user("/home/u"), workdir).unwrap().display().to_string()
    }

    #[test]
    fn resolves_as_upstream() {
        for (path, workdir, wanted) in [
            ("", None, "/home/u"),
            ("", Some("/w/./"), "/w/./"),
            ("", Some("w/.."), "/home/u"),
            ("", Some("~/w"), "/home/u/w"),
            ("~", None, "/home/u"),
            ("~/", None, "/home/u"),
            ("~/x/../y", None, "/home/u/y"),
            ("~\\x", None, "/home/u/\\x"),
            ("/a/../b//", Some("/w"), "/a/../b//"),
            ("a//b/", Some("/w"), "/home/u/a/b"),
            ("../../../x", None, "/x"),
            (".", None, "/home/u"),
            ("a~", None, "/home/u/a~"),
        ] {
            assert_eq!(resolved(path, workdir), wanted, "{path:?} {workdir:?}");
        }
        assert_eq!(resolve("~/x", &user(""), None).unwrap(), Path::new("/x"));
    }

    #[test]
    fn refuses_other_homes_and_nul_bytes() {
        let error = resolve("~bob/x", &user("/h"), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "failed to expand path '' for user 'u': cannot expand user-specific home dir"
        );
        let error = resolve("/a\0b", &user("/h"), None).unwrap_err();
        assert_eq!(error.to_string(), "path \"/a\\0b\" contains a NUL byte");
        assert_eq!(error.kind(), super::super::Kind::InvalidArgument);
    }

    #[test]
    fn a_path_longer_than_the_kernel_takes_is_refused_by_its_beginning() {
        let refused = |path: &str, home: &str| {
            let error = resolve(path, &user(home), None).unwrap_err();
            assert_eq!(error.kind(), super::super::Kind::InvalidArgument);
            error.to_string()
        };
        let long = format!("/{}", "a/".repeat(PATH_MAX / 2));
        resolve(&long[..PATH_MAX - 1], &user("/h"), None).unwrap();
        let error = refused(&long[..PATH_MAX], "/h");
        assert_eq!(error, format!("path '{}…': file name too long", &long[..quote::MAX_QUOTED]));
        // Short as written, and too long with what is put before it.
        let home = &long[..PATH_MAX - 3];
        assert!(refused("~/abc", home).starts_with("path '~/abc': "));
    }

    #[test]
    fn dir_and_base_are_gos() {
        for (path, dir, base) in
            [("/a/b", "/a", "b"), ("/a/b/", "/a/b", "b"), ("/", "/", "/"), ("/a", "/", "a")]
        {
            assert_eq!(dir_of(Path::new(path)), Path::new(dir));
            assert_eq!(base_name(Path::new(path)), base);
        }
        assert_eq!(base_name(Path::new("/a/..")), "..");
    }

    #[test]
    fn makes_missing_directories_only() {
        let tmp = tempfile::tempdir().unwrap();
        let own = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let made = |path: &str| ensure_dirs(&tmp.path().join(path), own).unwrap();
        assert_eq!([made("a/b/c"), made("a/b/c/"), made("a/b/d")], [3, 0, 1]);
        let meta = fs::metadata(tmp.path().join("a/b/c")).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o755);

        let file = tmp.path().join("f");
        fs::write(&file, "").unwrap();
        let error = ensure_dirs(&file.join("x"), own).unwrap_err();
        assert_eq!(error.to_string(), format!("path is a file: {}", file.display()));

        let link = tmp.path().join("dangling");
        symlink("nowhere", &link).unwrap();
        let error = ensure_dirs(&link, own).unwrap_err();
        let wanted = format!(
            "failed to chown directory: chown {}: no such file or directory",
            link.display()
        );
        assert_eq!(error.to_string(), wanted);

        let error = ensure_dirs(&tmp.path().join("new/../x"), own).unwrap_err();
        assert!(error.to_string().starts_with("failed to create directory: mkdir "), "{error}");
    }

    /// Clean by its definition: split, drop, join.
    fn model(path: &str) -> String {
        let mut out: Vec<&str> = Vec::new();
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." if out.last().is_some_and(|last| *last != "..") => {
                    out.pop();
                }
                ".." if path.starts_with('/') => {}
                other => out.push(other),
            }
        }
        match (path.starts_with('/'), out.join("/")) {
            (true, rest) => format!("/{rest}"),
            (false, rest) if rest.is_empty() => ".".to_owned(),
            (false, rest) => rest,
        }
    }

    proptest! {
        #[test]
        fn clean_is_the_model(path in "[a.~/]{0,12}") {
            prop_assert_eq!(clean(Path::new(&path)).display().to_string(), model(&path));
        }

        #[test]
        fn resolve_is_the_model(path in "[a.~/]{1,12}") {
            let got = resolve(&path, &user("/home/u"), None);
            let wanted = if path.starts_with('/') {
                Some(path.clone())
            } else if path == "~" || path.starts_with("~/") {
                Some(model(&format!("/home/u/{}", &path[1..])))
            } else if path.starts_with('~') {
                None
            } else {
                Some(model(&format!("/home/u/{path}")))
            };
            prop_assert_eq!(got.ok().map(|p| p.display().to_string()), wanted);
        }
    }
}
