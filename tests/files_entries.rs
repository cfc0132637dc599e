//! What the filesystem service tells of files and directories, and what it does with them.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, symlink},
        net::UnixListener,
        process::CommandExt,
    },
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use common::{
    able_as_root, able_at_home, basic, eventually,
    house::{House, failure, group_name, rest_error, set_mode},
    me,
    rpc::Messages,
};
use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, FileType, WatchDirRequest,
    WatchDirResponse,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

// Stat.

#[tokio::test]
async fn stat_of_a_file_and_a_directory() {
    let house = House::new();
    let path = house.put("file", "12345");
    set_mode(&path, 0o640);
    let modified = UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(modified).unwrap();
    let entry = house.stat(&path).await.unwrap();
    assert_eq!(
        entry,
        EntryInfo {
            name: "file".into(),
            r#type: FileType::File.into(),
            path: path.clone(),
            size: 5,
            mode: 0o640,
            permissions: "-rw-r-----".into(),
            owner: me().name,
            group: group_name(),
            modified_time: Some(envd::proto::Timestamp {
                seconds: 1_234_567_890,
                nanos: 123_456_789
            }),
            ..EntryInfo::default()
        }
    );

    let dir = house.at("dir");
    fs::create_dir(&dir).unwrap();
    set_mode(&dir, 0o1777);
    let entry = house.stat(&dir).await.unwrap();
    assert_eq!(entry.r#type(), FileType::Directory);
    assert_eq!((entry.mode, entry.permissions.as_str()), (0o777, "dtrwxrwxrwx"));
    assert_eq!((entry.symlink_target, entry.is_symlink), (None, false));
}

#[tokio::test]
async fn stat_of_links() {
    let house = House::new();
    // Where a link leads is told without any other link.
    let real = fs::canonicalize(house.dir()).unwrap();
    let file = house.put("file", "12345");
    set_mode(&file, 0o604);
    fs::create_dir(house.at("dir")).unwrap();
    set_mode(house.at("dir"), 0o750);
    symlink("file", house.at("first")).unwrap();
    for (name, leads_to, kind, mode, to) in [
        ("link", "first", FileType::File, 0o604, real.join("file")),
        ("to-dir", "dir", FileType::Directory, 0o750, real.join("dir")),
        ("dangling", "nowhere", FileType::Unspecified, 0, house.dir().join("dangling")),
        ("cycle", "cycle", FileType::Unspecified, 0, house.dir().join("cycle")),
    ] {
        symlink(leads_to, house.at(name)).unwrap();
        let entry = house.stat(&house.at(name)).await.unwrap();
        assert_eq!((entry.name.as_str(), &entry.path), (name, &house.at(name)));
        assert_eq!((entry.r#type(), entry.mode), (kind, mode), "{name}");
        assert_eq!(entry.permissions, "Lrwxrwxrwx", "{name}");
        assert_eq!(entry.size, i64::try_from(leads_to.len()).unwrap(), "{name}");
        assert!(entry.is_symlink, "{name}");
        assert_eq!(entry.symlink_target.as_deref(), to.to_str(), "{name}");
    }
}

#[tokio::test]
async fn stat_of_special_files_and_of_nothing() {
    let house = House::new();
    mkfifo(house.at("fifo").as_str(), Mode::from_bits_truncate(0o600)).unwrap();
    let _socket = UnixListener::bind(house.at("socket")).unwrap();
    for (path, first) in
        [(house.at("fifo"), 'p'), (house.at("socket"), 'S'), ("/dev/null".into(), 'D')]
    {
        let entry = house.stat(&path).await.unwrap();
        assert_eq!(entry.r#type(), FileType::Unspecified, "{path}");
        assert!(entry.permissions.starts_with(first), "{path}: {}", entry.permissions);
    }
    assert_eq!(house.stat("/dev/null").await.unwrap().permissions, "Dcrw-rw-rw-");

    let missing = house.at("missing");
    let text = format!("file not found: lstat {missing}: no such file or directory");
    assert_eq!(house.stat(&missing).await.unwrap_err(), failure("not_found", text));
    let below = format!("{}/x", house.put("file", ""));
    let text = format!("error getting file info: lstat {below}: not a directory");
    assert_eq!(house.stat(&below).await.unwrap_err(), failure("internal", text));
}

#[tokio::test]
async fn stat_tells_metadata() {
    let house = House::new();
    if !house.keeps_metadata() {
        return;
    }
    let path = house.put("file", "");
    xattr::set(&path, "user.e2b.purpose", b"test").unwrap();
    xattr::set(&path, "user.e2b.binary", b"\xff").unwrap();
    xattr::set(&path, "user.other", b"x").unwrap();
    let entry = house.stat(&path).await.unwrap();
    assert_eq!(entry.metadata.into_iter().collect::<Vec<_>>(), [("purpose".into(), "test".into())]);
}

// Paths.

#[tokio::test]
async fn paths_are_resolved_from_the_users_home() {
    if !able_at_home() {
        return;
    }
    let house = House::new();
    let home = me().dir;
    let below = tempfile::tempdir_in(&home).unwrap();
    let name = below.path().file_name().unwrap().to_str().unwrap();
    let (home, below) = (home.to_str().unwrap(), below.path().to_str().unwrap());
    for (path, expected) in [
        ("", home),
        ("~", home),
        ("~/", home),
        (name, below),
        (&format!("~/{name}"), below),
        (&format!("a/../{name}/"), below),
    ] {
        assert_eq!(house.stat(path).await.unwrap().path, expected, "{path:?}");
    }
    // What is absolute stays as it was written.
    let path = format!("{below}/../{name}//.");
    assert_eq!(house.stat(&path).await.unwrap().path, path);

    let text = format!(
        "failed to expand path '' for user '{}': cannot expand user-specific home dir",
        me().name
    );
    let expected = failure("invalid_argument", text);
    assert_eq!(house.stat("~other").await.unwrap_err(), expected);
    assert_eq!(house.make_dir("~other/x").await.unwrap_err(), expected);
    assert_eq!(house.rename("~other", "/x").await.unwrap_err(), expected);
    assert_eq!(house.rename("/x", "~other").await.unwrap_err(), expected);
    assert_eq!(house.list("~other", 1).await.unwrap_err(), expected);
    assert_eq!(house.remove("~other").await.unwrap_err(), expected);
}

#[tokio::test]
async fn a_nul_in_a_path_is_an_error_of_every_call() {
    let house = House::new();
    for path in ["/a\0b", "\0", "a\0", "~/\0"] {
        let mut errors = vec![
            house.stat(path).await.unwrap_err(),
            house.make_dir(path).await.unwrap_err(),
            house.rename(path, "/tmp/x").await.unwrap_err(),
            house.rename("/tmp", path).await.unwrap_err(),
            house.list(path, 1).await.unwrap_err(),
            house.remove(path).await.unwrap_err(),
        ];
        let request = CreateWatcherRequest { path: path.into(), ..CreateWatcherRequest::default() };
        let answer = house.client.unary("/filesystem.Filesystem/CreateWatcher", &request).await;
        errors.push(answer.map(|_: CreateWatcherResponse| ()).unwrap_err());
        let request = WatchDirRequest { path: path.into(), ..WatchDirRequest::default() };
        let mut stream: Messages<WatchDirResponse> =
            house.client.stream("/filesystem.Filesystem/WatchDir", &request).await.unwrap();
        errors.push(stream.next().await.unwrap_err());
        for error in errors {
            assert_eq!(error.code, "invalid_argument", "{path:?}: {error:?}");
            assert!(error.message.contains("NUL"), "{path:?}: {error:?}");
        }
        rest_error(house.download(path).await, 400).await;
        rest_error(house.upload(path, &[], "x").await, 400).await;
    }
    house.is_well().await;
}

// MakeDir, Move, Remove.

#[tokio::test]
async fn make_dir_makes_all_that_is_missing() {
    let house = House::new();
    let path = house.at("a/b/c");
    let entry = house.make_dir(&path).await.unwrap();
    assert_eq!((entry.name.as_str(), &entry.path), ("c", &path));
    assert_eq!((entry.r#type(), entry.mode), (FileType::Directory, 0o755));
    assert_eq!(fs::metadata(house.at("a")).unwrap().mode() & 0o7777, 0o755);

    let text = format!("directory already exists: {path}");
    assert_eq!(house.make_dir(&path).await.unwrap_err(), failure("already_exists", text));
    let file = house.put("file", "");
    let text = format!("path already exists but it is not a directory: {file}");
    assert_eq!(house.make_dir(&file).await.unwrap_err(), failure("invalid_argument", text));
    assert_eq!(house.make_dir(&format!("{file}/x")).await.unwrap_err().code, "internal");
}

#[tokio::test]
async fn new_directories_belong_to_the_caller() {
    if !able_as_root() {
        return;
    }
    let mut house = House::new();
    house.client = house.client.clone().with("authorization", &basic("nobody"));
    let entry = house.make_dir(&house.at("a/b")).await.unwrap();
    assert_eq!(entry.owner, "nobody");
    house.rename(&house.put("file", ""), &house.at("c/d/file")).await.unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    for (name, uid) in [("a", nobody.uid), ("a/b", nobody.uid), ("c/d", nobody.uid)] {
        assert_eq!(fs::metadata(house.at(name)).unwrap().uid(), uid.as_raw(), "{name}");
    }
    // What is moved stays its owner's.
    assert_eq!(fs::metadata(house.at("c/d/file")).unwrap().uid(), 0);
}

#[tokio::test]
async fn move_renames_and_makes_directories() {
    let house = House::new();
    let (from, to) = (house.put("from", "content"), house.at("new/dir/to"));
    let entry = house.rename(&from, &to).await.unwrap();
    assert_eq!((entry.name.as_str(), &entry.path, entry.size), ("to", &to, 7));
    assert!(!Path::new(&from).exists());
    // A file is replaced, a link is moved as such, a directory with what is in it.
    let other = house.put("other", "other");
    house.rename(&other, &to).await.unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"other");
    symlink("nowhere", house.at("link")).unwrap();
    assert!(house.rename(&house.at("link"), &house.at("moved")).await.unwrap().is_symlink);
    let entry = house.rename(&house.at("new"), &house.at("renamed")).await.unwrap();
    assert_eq!(entry.r#type(), FileType::Directory);
    assert_eq!(fs::read(house.at("renamed/dir/to")).unwrap(), b"other");
}

#[tokio::test]
async fn a_move_that_is_refused_changes_nothing() {
    let house = House::new();
    let (from, to) = (house.at("missing"), house.at("new/dir/to"));
    let text = format!("source file not found: rename {from} {to}: no such file or directory");
    assert_eq!(house.rename(&from, &to).await.unwrap_err(), failure("not_found", text));
    assert_eq!(house.names(), [""; 0], "no directory was made for nothing");

    let (one, two) = (house.at("one"), house.at("two"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    let text = format!("error renaming: rename {one} {two}: file exists");
    assert_eq!(house.rename(&one, &two).await.unwrap_err(), failure("internal", text));
    let file = house.put("file", "x");
    assert_eq!(house.rename(&file, &one).await.unwrap_err().code, "internal");
    assert_eq!(house.rename(&one, &house.at("one/inside")).await.unwrap_err().code, "internal");
    assert_eq!(house.names(), ["file", "one", "two"]);
}

#[tokio::test]
async fn remove_takes_everything_and_needs_nothing() {
    let house = House::new();
    house.remove(&house.at("missing")).await.unwrap();
    house.remove(&house.put("file", "")).await.unwrap();
    fs::create_dir_all(house.at("a/b/c/d")).unwrap();
    house.put("a/b/file", "x");
    let outside = house.put("outside", "stays");
    symlink(&outside, house.at("a/link")).unwrap();
    symlink(house.dir(), house.at("a/b/up")).unwrap();
    house.remove(&house.at("a")).await.unwrap();
    assert_eq!(house.names(), ["outside"]);
    symlink(&outside, house.at("link")).unwrap();
    house.remove(&house.at("link")).await.unwrap();
    assert_eq!(fs::read(&outside).unwrap(), b"stays");

    // Below a file nothing can be, and saying that it was removed would be a lie.
    assert_eq!(house.remove(&format!("{outside}/x")).await.unwrap_err().code, "internal");
    assert_eq!(house.remove(&house.at(".")).await.unwrap_err().code, "internal");
    assert_eq!(house.names(), ["outside"]);
}

/// A child that goes with the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_root_directory_is_not_removed() {
    // Another root than ours, should the daemon get this wrong: without rights to remove anything.
    if !able_as_root() {
        return;
    }
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    let binary = dir.path().join("envd");
    fs::copy(env!("CARGO_BIN_EXE_envd"), &binary).unwrap();
    set_mode(&binary, 0o755);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = std::process::Command::new(&binary);
    command.args(["--listen", &format!("tcp://127.0.0.1:{port}")]);
    command.stderr(std::process::Stdio::null()).uid(nobody.uid.as_raw());
    let _daemon = Ended(command.spawn().unwrap());
    eventually("it listens", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    for path in ["/", "//", "/usr/..", "/.."] {
        let url = format!("http://127.0.0.1:{port}/filesystem.Filesystem/Remove");
        let request = http.post(url).header("content-type", "application/json");
        let response = request.body(json!({ "path": path }).to_string()).send().await.unwrap();
        assert!(!response.status().is_success(), "{path}");
        let text = response.text().await.unwrap();
        assert!(text.contains("root directory"), "{path}: {text}");
    }
}

// ListDir.

fn paths(entries: &[EntryInfo]) -> Vec<&str> {
    entries.iter().map(|entry| entry.path.as_str()).collect()
}

#[tokio::test]
async fn list_goes_as_deep_as_asked_in_order() {
    let house = House::new();
    fs::create_dir_all(house.at("root/b/c/d")).unwrap();
    for name in ["a", "B", "b.x", "b/z", "b/c/y"] {
        house.put(&format!("root/{name}"), "");
    }
    symlink("b", house.at("root/link")).unwrap();
    let root = house.at("root");
    let below =
        |names: &[&str]| names.iter().map(|name| format!("{root}/{name}")).collect::<Vec<_>>();
    let one = below(&["B", "a", "b", "b.x", "link"]);
    let two = below(&["B", "a", "b", "b/c", "b/z", "b.x", "link"]);
    let all = below(&["B", "a", "b", "b/c", "b/c/d", "b/c/y", "b/z", "b.x", "link"]);
    for (depth, expected) in [(0, &one), (1, &one), (2, &two), (99, &all), (u32::MAX, &all)] {
        assert_eq!(&paths(&house.list(&root, depth).await.unwrap()), expected, "{depth}");
    }
    let entries = house.list(&root, 1).await.unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| (entry.r#type(), entry.is_symlink)).collect();
    let (file, dir) = (FileType::File, FileType::Directory);
    assert_eq!(kinds, [(file, false), (file, false), (dir, false), (file, false), (dir, true)]);
    assert_eq!(entries[2], house.stat(&house.at("root/b")).await.unwrap(), "as Stat tells it");
}

#[tokio::test]
async fn listed_paths_are_those_that_were_asked_for() {
    let house = House::new();
    fs::create_dir(house.at("real")).unwrap();
    house.put("real/file", "");
    symlink("real", house.at("link")).unwrap();
    let expected = house.at("link/file");
    for path in ["link", "link/", "./link/.", "real/../link"] {
        assert_eq!(paths(&house.list(&house.at(path), 1).await.unwrap()), [&expected], "{path}");
    }
    fs::create_dir(house.at("empty")).unwrap();
    assert_eq!(house.list(&house.at("empty"), 1).await.unwrap(), []);
}

#[tokio::test]
async fn what_cannot_be_listed() {
    let house = House::new();
    let real = fs::canonicalize(house.dir()).unwrap();
    let text = format!("path not found: lstat {}/no: no such file or directory", real.display());
    let error = house.list(&house.at("no/x"), 1).await.unwrap_err();
    assert_eq!(error, failure("not_found", text));
    house.put("file", "");
    let text = format!("path is not a directory: {}/file", real.display());
    let error = house.list(&house.at("file"), 1).await.unwrap_err();
    assert_eq!(error, failure("invalid_argument", text));
    symlink("cycle", house.at("cycle")).unwrap();
    let error = house.list(&house.at("cycle"), 1).await.unwrap_err();
    assert_eq!(error.code, "failed_precondition");
}

#[tokio::test]
async fn directories_that_change_meanwhile_are_listed() {
    let house = House::new();
    let pid = house.daemon.pid().to_string();
    for depth in [1, 2] {
        let entries = house.list("/proc", depth).await.unwrap();
        assert!(entries.iter().any(|entry| entry.name == pid), "{depth}");
    }
}

#[tokio::test]
async fn forty_thousand_entries_are_listed() {
    let house = House::new();
    let names: Vec<String> = (0..40_000).map(|i| format!("a-rather-long-name-{i:05}")).collect();
    for name in &names {
        fs::File::create(house.dir().join(name)).unwrap();
    }
    let entries = house.list(&house.at(""), 1).await.unwrap();
    assert!(entries.iter().map(|entry| &entry.name).eq(&names));
}

/// How often paths are opened, as the kernel tells it.
struct Opens(nix::sys::inotify::Inotify);

impl Opens {
    fn of(paths: &[&str]) -> Self {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        for path in paths {
            inotify.add_watch(*path, AddWatchFlags::IN_OPEN).unwrap();
        }
        Self(inotify)
    }

    /// Since the last time.
    fn count(&self) -> usize {
        let mut count = 0;
        while let Ok(events) = self.0.read_events() {
            // A directory also tells of what is in it, by name.
            count += events.iter().filter(|event| event.name.is_none()).count();
        }
        count
    }
}

/// Lesson: /etc/passwd is parsed again for every entry.
#[tokio::test]
async fn users_are_not_looked_up_again_for_every_entry() {
    let house = House::new();
    for number in 0..4000 {
        house.put(&number.to_string(), "");
    }
    let opens = Opens::of(&["/etc/passwd", "/etc/group"]);
    let entries = house.list(&house.at(""), 1).await.unwrap();
    assert_eq!(entries.len(), 4000);
    assert!(entries.iter().all(|entry| entry.owner == me().name));
    // Other programs of the machine may open them, too.
    let count = opens.count();
    assert!(count < 400, "opened {count} times for 4000 entries");
}

#[tokio::test]
async fn no_directory_is_read_beyond_the_depth() {
    let house = House::new();
    fs::create_dir_all(house.at("a/b/c")).unwrap();
    let below: Vec<_> = ["a", "a/b", "a/b/c"].iter().map(|name| house.at(name)).collect();
    let opens = Opens::of(&below.iter().map(String::as_str).collect::<Vec<_>>());
    for (depth, opened) in [(1, 0), (2, 1), (3, 2), (9, 3)] {
        let entries = house.list(&house.at(""), depth).await.unwrap();
        assert_eq!(entries.len(), 3.min(depth as usize));
        assert_eq!(opens.count(), opened, "at depth {depth}");
    }
}

#[tokio::test]
async fn a_name_that_is_not_utf_8_does_not_spoil_the_listing() {
    let house = House::new();
    house.put("a", "");
    fs::write(house.dir().join(OsStr::from_bytes(b"b\xffc")), "").unwrap();
    house.put("d", "");
    let entries = house.list(&house.at(""), 1).await.unwrap();
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["a", "b\u{fffd}c", "d"]);
}

// Old clients.

#[tokio::test]
async fn old_clients_see_only_what_they_know() {
    let house = House::new();
    let file = house.put("file", "x");
    let expected = json!({ "name": "file", "type": "FILE_TYPE_FILE", "path": file });
    let call = async |method: &str, message: Value, agent: &str| {
        let url = house.daemon.url(&format!("/filesystem.Filesystem/{method}"));
        let request = house.http.post(url).header("content-type", "application/json");
        let request = request.header("user-agent", agent).body(message.to_string());
        common::soon(method, request.send()).await.unwrap()
    };
    for (method, message, expected) in [
        ("Stat", json!({ "path": file }), json!({ "entry": expected })),
        ("ListDir", json!({ "path": house.at("") }), json!({ "entries": [expected] })),
        ("Move", json!({ "source": file, "destination": file }), json!({ "entry": expected })),
    ] {
        let response = call(method, message.clone(), "connect-python").await;
        assert_eq!(response.headers()["x-e2b-legacy-sdk"], "true", "{method}");
        let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        assert_eq!(body, expected, "{method}");

        let response = call(method, message, "connect-python/1").await;
        assert!(!response.headers().contains_key("x-e2b-legacy-sdk"), "{method}");
        let text = response.text().await.unwrap();
        assert!(text.contains("permissions"), "{text}");
    }
    let response = call("Stat", json!({ "path": house.at("no") }), "connect-python").await;
    assert_eq!(response.status(), 404);
    assert!(!response.headers().contains_key("x-e2b-legacy-sdk"), "not with errors");
}

#[tokio::test]
async fn a_path_of_a_hundred_thousand_directories_is_refused() {
    let house = House::new();
    let path = format!("/{}x", "a/".repeat(100_000));
    for failed in [
        house.rename("/tmp", &path).await.unwrap_err(),
        house.rename(&path, "/tmp").await.unwrap_err(),
        house.make_dir(&path).await.unwrap_err(),
        house.stat(&path).await.unwrap_err(),
    ] {
        assert_eq!(failed.code, "invalid_argument", "{failed:?}");
        assert!(failed.message.starts_with("path '/a/a/a/"), "{failed:?}");
        assert!(failed.message.ends_with("…': file name too long"), "{failed:?}");
        assert!(failed.message.len() < 2000, "{}", failed.message.len());
    }
    house.is_well().await;
}
