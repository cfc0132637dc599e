//! Where the daemon's reach ends: mounts whose server has died or serves another user only, directories
//! of other users to a daemon without root, paths that no call can name, and other file systems.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, chown, symlink},
        process::CommandExt,
    },
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use common::{
    Daemon, able, able_as_root, eventually,
    house::{House, set_mode, written},
    hung_mount::HungMount,
};
use envd::proto::filesystem::{
    CopyRequest, CopyResponse, EntryInfo, FileType, ListDirRequest, ListDirResponse,
};
use nix::{
    fcntl::{OFlag, open, openat},
    sys::stat::{Mode, mkdirat},
};

/// A daemon of a user who may not do everything, and who owns its directory.
fn of_nobody() -> Option<House> {
    if !able_as_root() {
        return None;
    }
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("in /etc/passwd");
    let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    let house = House::with(Daemon::spawn(&mut command));
    chown(house.dir(), Some(nobody.uid.as_raw()), None).unwrap();
    Some(house)
}

fn paths(entries: &[EntryInfo]) -> Vec<&str> {
    entries.iter().map(|entry| entry.path.as_str()).collect()
}

/// What `ls` shows of an entry of which only its type is known.
fn bare(name: &str, path: String, permissions: &str, kind: FileType) -> EntryInfo {
    EntryInfo {
        name: name.to_owned(),
        path,
        permissions: permissions.to_owned(),
        r#type: kind.into(),
        ..EntryInfo::default()
    }
}

/// Lesson: one dead mount in a directory hides all that is in it.
#[tokio::test]
async fn a_dead_mount_does_not_spoil_the_listing_around_it() {
    let house = House::new();
    for dir in ["dir/a", "dir/dead", "dir/z"] {
        fs::create_dir_all(house.at(dir)).unwrap();
    }
    let hung = HungMount::at(house.at("dir/dead").as_ref());
    if !able("root and /dev/fuse", hung.is_some()) {
        return;
    }
    let mut hung = hung.unwrap();
    hung.end();
    house.put("dir/z/file", "");
    let known = bare("dead", house.at("dir/dead"), "d---------", FileType::Directory);
    for (depth, expected) in [(1, &["a", "dead", "z"][..]), (9, &["a", "dead", "z", "z/file"])] {
        let listed = house.list(&house.at("dir"), depth).await.unwrap();
        let expected: Vec<_> =
            expected.iter().map(|name| house.at(&format!("dir/{name}"))).collect();
        assert_eq!(paths(&listed), expected);
        assert_eq!(listed[1], known);
    }
    // In pages, it is an entry as any other.
    let (mut token, mut names) = (String::new(), Vec::new());
    loop {
        let request =
            ListDirRequest { path: house.at("dir"), depth: 9, page_size: 1, page_token: token };
        let page: ListDirResponse =
            house.client.unary("/filesystem.Filesystem/ListDir", &request).await.unwrap();
        names.extend(page.entries.into_iter().map(|entry| entry.name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["a", "dead", "z", "file"]);
    // Only what is asked for itself fails.
    let error = house.list(&house.at("dir/dead"), 1).await.unwrap_err();
    assert!(error.message.ends_with("transport endpoint is not connected"), "{error:?}");
}

/// A FUSE mount of another user's, without allow_other, refuses root too.
#[tokio::test]
async fn a_mount_of_another_user_does_not_spoil_the_listing_around_it() {
    let house = House::new();
    for dir in ["dir/a", "dir/theirs", "dir/z"] {
        fs::create_dir_all(house.at(dir)).unwrap();
    }
    let theirs = HungMount::of_user(house.at("dir/theirs").as_ref(), 54_321);
    if !able("root and /dev/fuse", theirs.is_some()) {
        return;
    }
    let listed = house.list(&house.at("dir"), 9).await.unwrap();
    assert_eq!(paths(&listed), ["a", "theirs", "z"].map(|name| house.at(&format!("dir/{name}"))));
    let known = bare("theirs", house.at("dir/theirs"), "d---------", FileType::Directory);
    assert_eq!(listed[1], known);
    for path in [house.at("dir/theirs"), house.at("dir/theirs/x")] {
        let error = house.stat(&path).await.unwrap_err();
        assert!(error.message.ends_with("permission denied"), "{error:?}");
        house.list(&path, 1).await.unwrap_err();
        assert!(house.upload(&path, &[], "x").await.status().as_u16() >= 400);
    }
    house.is_well().await;
}

/// A daemon without root, and directories that it may not read, or not search.
#[tokio::test]
async fn an_unreadable_directory_does_not_spoil_the_listing_around_it() {
    let Some(house) = of_nobody() else { return };
    for (dir, mode) in [("dir/closed", 0o000), ("dir/names", 0o444), ("dir/open", 0o755)] {
        fs::create_dir_all(house.at(dir)).unwrap();
        house.put(&format!("{dir}/file"), "");
        set_mode(house.at(dir), mode);
    }
    let listed = house.list(&house.at("dir"), 9).await.unwrap();
    let expected = ["closed", "names", "open", "open/file"];
    assert_eq!(paths(&listed), expected.map(|name| house.at(&format!("dir/{name}"))));
    assert_eq!((listed[0].mode, listed[0].r#type()), (0, FileType::Directory));
    for path in ["dir/closed", "dir/names"] {
        let error = house.list(&house.at(path), 1).await.unwrap_err();
        assert!(error.message.ends_with("permission denied"), "{error:?}");
    }
}

/// What has a longer path than any call can name is left out.
#[tokio::test]
async fn a_path_that_gets_too_long_does_not_spoil_the_listing() {
    let house = House::new();
    house.put("zzz", "");
    let name = "d".repeat(250);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut at = open(house.dir(), flags, Mode::empty()).unwrap();
    for _ in 0..20 {
        mkdirat(&at, name.as_str(), Mode::S_IRWXU).unwrap();
        let next = openat(&at, name.as_str(), flags, Mode::empty());
        at = next.unwrap();
    }
    let listed = house.list(&house.at(""), 99).await.unwrap();
    assert!((10..20).contains(&(listed.len() - 1)), "{}", listed.len());
    assert_eq!(listed.last().unwrap().name, "zzz");
    house.remove(&house.at(&name)).await.unwrap();
}

/// A file system of its own, which any user may use; none where there is none.
fn elsewhere(house: &House) -> Option<tempfile::TempDir> {
    let other = tempfile::tempdir_in("/dev/shm").ok();
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    let other = other.filter(|other| device(other.path()) != device(house.dir()));
    able("a tmpfs at /dev/shm beside the temporary directory", other.is_some());
    other
}

#[tokio::test]
async fn a_move_to_another_file_system_takes_everything_along() {
    let house = House::new();
    let Some(other) = elsewhere(&house) else { return };
    let there = |name: &str| other.path().join(name).to_str().unwrap().to_owned();
    // A file, over another one; its mode and times go with it.
    let path = house.put("file", "content");
    set_mode(&path, 0o640);
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    fs::create_dir(there("new")).unwrap();
    fs::write(there("new/file"), "old").unwrap();
    let entry = house.rename(&path, &there("new/file")).await.unwrap();
    assert_eq!((entry.path, entry.mode, entry.size), (there("new/file"), 0o640, 7));
    assert_eq!(entry.modified_time.unwrap().seconds, 1_000_000_000);
    assert_eq!(fs::read(there("new/file")).unwrap(), b"content");
    // A tree, with a link that leads nowhere.
    fs::create_dir_all(house.at("tree/a/b")).unwrap();
    house.put("tree/a/b/file", "deep");
    symlink("nowhere", house.at("tree/link")).unwrap();
    house.rename(&house.at("tree/"), &there("x/y/tree")).await.unwrap();
    assert_eq!(fs::read(there("x/y/tree/a/b/file")).unwrap(), b"deep");
    assert_eq!(fs::read_link(there("x/y/tree/link")).unwrap(), Path::new("nowhere"));
    // A link alone is not followed.
    symlink(there("new/file"), house.at("link")).unwrap();
    house.rename(&house.at("link"), &there("link")).await.unwrap();
    assert!(fs::symlink_metadata(there("link")).unwrap().is_symlink());
    assert_eq!(house.names(), [""; 0], "the sources are gone");
    // What cannot be moved stays, and leaves nothing at the destination.
    fs::create_dir(house.at("stays")).unwrap();
    fs::create_dir(there("full")).unwrap();
    for (from, to) in [(house.at("stays"), there("full")), (house.at("stays"), there("link/x"))] {
        house.rename(&from, &to).await.unwrap_err();
    }
    assert_eq!(house.names(), ["stays"]);
    let mut left: Vec<_> =
        fs::read_dir(other.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["full", "link", "new", "x"]);
}

/// Lesson: a daemon that is killed while it copies leaves its temporary directory for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_daemon_left_unfinished_is_removed_at_the_next_start() {
    let guest = tempfile::tempdir().unwrap();
    let args = ["--guest-root", guest.path().to_str().unwrap()];
    let mut house = House::with(Daemon::start(&args));
    fs::create_dir(house.at("tree")).unwrap();
    for number in 0..4000 {
        house.put(&format!("tree/{number}"), "content");
    }
    let temporary =
        |house: &House| house.names().into_iter().find(|name| name.starts_with(".envd-new-"));
    let copying = tokio::spawn({
        let client = house.client.clone();
        let copy = CopyRequest {
            source: house.at("tree"),
            destination: house.at("copy"),
            ..CopyRequest::default()
        };
        async move { client.unary::<_, CopyResponse>("/filesystem.Filesystem/Copy", &copy).await }
    });
    eventually("it is being copied", || temporary(&house));
    house.daemon.signal(nix::sys::signal::Signal::SIGKILL);
    house.daemon.wait();
    copying.abort();
    assert!(temporary(&house).is_some(), "it was killed in the middle: {:?}", house.names());
    // What is not the daemon's stays.
    house.put(".envd-new-mine", "");
    house.daemon = Daemon::start(&args);
    eventually("what was left is removed", || (house.names().len() == 2).then_some(()));
    assert_eq!(house.names(), [".envd-new-mine", "tree"]);
    assert_eq!(fs::read_dir(house.at("tree")).unwrap().count(), 4000);
}

/// Without root too, what may be written is written: the kernel lets any program of the user do it.
#[tokio::test]
async fn a_file_of_another_that_may_be_written_is_written_without_root() {
    let Some(house) = of_nobody() else { return };
    let upload = async |path: &str| {
        let url = house.files(&[("path", path), ("username", "nobody")]);
        let request = house.http.post(url).header("content-type", "application/octet-stream");
        request.body("new").send().await.unwrap()
    };
    // Where it cannot be replaced, because only root could remove it, it stays root's.
    for (dir, mode, owner) in [("sticky", 0o1777, Some(0)), ("plain", 0o777, None)] {
        fs::create_dir(house.at(dir)).unwrap();
        set_mode(house.at(dir), mode);
        let path = house.put(&format!("{dir}/file"), "old and longer");
        set_mode(&path, 0o666);
        written(upload(&path).await).await;
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let meta = fs::metadata(&path).unwrap();
        assert!(owner.is_none_or(|owner| meta.uid() == owner), "{dir}: {}", meta.uid());
        assert_eq!(meta.mode() & 0o7777, 0o666);
        assert_eq!(fs::read_dir(house.at(dir)).unwrap().count(), 1);
        // What may not be written is refused.
        set_mode(&path, 0o644);
        chown(&path, Some(0), Some(0)).unwrap();
        assert_eq!(upload(&path).await.status(), 500, "{dir}");
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
