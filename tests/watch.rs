//! Watching directories, as a client sees it: by a stream, and by asking.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{
    Daemon, able, in_time,
    rpc::{Client, Failure, Messages, Wire},
};
use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EventType, FileType, FilesystemEvent,
    GetWatcherEventsRequest, GetWatcherEventsResponse, MakeDirRequest, MakeDirResponse,
    RemoveWatcherRequest, RemoveWatcherResponse, RescanEvent, WatchDirRequest, WatchDirResponse,
    rescan_event::Reason, watch_dir_response::Event,
};
use tempfile::TempDir;

const WATCH: &str = "/filesystem.Filesystem/WatchDir";
const CREATE: &str = "/filesystem.Filesystem/CreateWatcher";
const EVENTS: &str = "/filesystem.Filesystem/GetWatcherEvents";
const REMOVE: &str = "/filesystem.Filesystem/RemoveWatcher";

/// The file that is made last, so that all before it has been told when it is.
const LAST: &str = "the-last-one";

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

/// A daemon, a client of it, and a directory to watch.
fn house() -> (Daemon, Client, TempDir) {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    (daemon, client, tempfile::tempdir().unwrap())
}

fn watching(path: &Path, recursive: bool) -> WatchDirRequest {
    let path = path.to_str().unwrap().to_owned();
    WatchDirRequest { path, recursive, ..WatchDirRequest::default() }
}

/// A stream of events whose start has been seen.
struct Watch {
    messages: Messages<WatchDirResponse>,
    keepalives: usize,
}

impl Watch {
    async fn try_new(client: &Client, request: &WatchDirRequest) -> Result<Self, Failure> {
        let mut messages: Messages<WatchDirResponse> = client.stream(WATCH, request).await?;
        let first = messages.next().await?.expect("a start").event.unwrap();
        assert!(matches!(first, Event::Start(_)), "first came {first:?}");
        Ok(Self { messages, keepalives: 0 })
    }

    async fn new(client: &Client, path: &Path, recursive: bool) -> Self {
        Self::try_new(client, &watching(path, recursive)).await.unwrap()
    }

    async fn next(&mut self) -> FilesystemEvent {
        loop {
            let message = self.messages.next().await.unwrap().expect("it goes on");
            match message.event.unwrap() {
                Event::Filesystem(event) => return event,
                Event::Keepalive(_) => self.keepalives += 1,
                other => panic!("not in such a stream: {other:?}"),
            }
        }
    }

    /// Makes the last file in `dir`, which is what is watched or below it, and gives all events
    /// before those of it.
    async fn all(&mut self, dir: &Path) -> Vec<FilesystemEvent> {
        fs::File::create(dir.join(LAST)).unwrap();
        let mut events = Vec::new();
        loop {
            let event = self.next().await;
            if event.name.rsplit('/').next() == Some(LAST) {
                fs::remove_file(dir.join(LAST)).unwrap();
                while self.next().await.r#type() != EventType::Remove {}
                return events;
            }
            events.push(event);
        }
    }

    async fn all_briefly(&mut self, dir: &Path) -> Vec<(String, EventType)> {
        brief(&self.all(dir).await)
    }
}

/// Names and types; what comes several times in a row, once.
fn brief(events: &[FilesystemEvent]) -> Vec<(String, EventType)> {
    let mut brief: Vec<_> =
        events.iter().map(|event| (event.name.clone(), event.r#type())).collect();
    brief.dedup();
    brief
}

fn told(expected: &[(&str, EventType)]) -> Vec<(String, EventType)> {
    expected.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

async fn create_watcher(client: &Client, path: &Path, recursive: bool) -> Result<String, Failure> {
    let path = path.to_str().unwrap().to_owned();
    let request = CreateWatcherRequest { path, recursive, ..CreateWatcherRequest::default() };
    let answer: CreateWatcherResponse = client.unary(CREATE, &request).await?;
    Ok(answer.watcher_id)
}

async fn watcher_events(client: &Client, id: &str) -> Result<Vec<FilesystemEvent>, Failure> {
    let request = GetWatcherEventsRequest { watcher_id: id.to_owned(), ..Default::default() };
    let answer: GetWatcherEventsResponse = client.unary(EVENTS, &request).await?;
    Ok(answer.events)
}

async fn remove_watcher(client: &Client, id: &str) -> Result<(), Failure> {
    let request = RemoveWatcherRequest { watcher_id: id.to_owned() };
    client.unary(REMOVE, &request).await.map(|_: RemoveWatcherResponse| ())
}

fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into() }
}

/// The daemon's inotify instances, and the watches in them.
fn inotify(daemon: &Daemon) -> (usize, usize) {
    let infos = fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid())).unwrap();
    let (mut instances, mut watches) = (0, 0);
    for info in infos {
        let path = info.unwrap().path();
        let fd = Path::new("/proc").join(daemon.pid().to_string()).join("fd");
        let target = fs::read_link(fd.join(path.file_name().unwrap())).unwrap_or_default();
        if target.to_string_lossy().contains("inotify") {
            instances += 1;
            let text = fs::read_to_string(path).unwrap_or_default();
            watches += text.lines().filter(|line| line.starts_with("inotify wd:")).count();
        }
    }
    (instances, watches)
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn what_happens_to_a_file() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    let mut watch = Watch::new(&client, dir, false).await;
    let file = dir.join("file");
    fs::write(&file, "content").unwrap();
    let (create, write) = (EventType::Create, EventType::Write);
    assert_eq!(watch.all_briefly(dir).await, told(&[("file", create), ("file", write)]));
    fs::write(&file, "again").unwrap();
    assert_eq!(watch.all_briefly(dir).await, told(&[("file", write)]));
    set_mode(&file, 0o600);
    assert_eq!(watch.all_briefly(dir).await, told(&[("file", EventType::Chmod)]));
    fs::rename(&file, dir.join("new name")).unwrap();
    let expected = told(&[("file", EventType::Rename), ("new name", create)]);
    assert_eq!(watch.all_briefly(dir).await, expected);
    fs::remove_file(dir.join("new name")).unwrap();
    let events = watch.all_briefly(dir).await;
    assert_eq!(events.last(), told(&[("new name", EventType::Remove)]).last());

    // From elsewhere, and to elsewhere.
    let other = tempfile::tempdir_in(dir.parent().unwrap()).unwrap();
    fs::write(other.path().join("x"), "").unwrap();
    fs::rename(other.path().join("x"), dir.join("x")).unwrap();
    assert_eq!(watch.all_briefly(dir).await, told(&[("x", create)]));
    fs::rename(dir.join("x"), other.path().join("x")).unwrap();
    assert_eq!(watch.all_briefly(dir).await, told(&[("x", EventType::Rename)]));
    fs::write(other.path().join("x"), "not here").unwrap();
    assert_eq!(watch.all_briefly(dir).await, []);
}

#[tokio::test]
async fn only_a_recursive_watch_sees_what_is_below() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    fs::create_dir_all(dir.join("a/b")).unwrap();
    let mut flat = Watch::new(&client, dir, false).await;
    let mut deep = Watch::new(&client, dir, true).await;
    fs::write(dir.join("a/b/file"), "x").unwrap();
    fs::create_dir_all(dir.join("c/d/e")).unwrap();
    fs::write(dir.join("c/d/e/file"), "x").unwrap();
    let last = dir.join("a");
    fs::File::create(last.join("seen-by-deep")).unwrap();

    let (create, write) = (EventType::Create, EventType::Write);
    let mut seen = Vec::new();
    loop {
        let event = deep.next().await;
        if event.name == "a/seen-by-deep" {
            break;
        }
        seen.push((event.name.clone(), event.r#type()));
    }
    for expected in [
        ("a/b/file", create),
        ("a/b/file", write),
        ("c", create),
        ("c/d", create),
        ("c/d/e", create),
        ("c/d/e/file", create),
    ] {
        let count = seen.iter().filter(|(name, kind)| (name.as_str(), *kind) == expected).count();
        assert_eq!(count, 1, "{expected:?} in {seen:?}");
    }
    assert_eq!(flat.all_briefly(dir).await, told(&[("c", create)]));
}

#[tokio::test]
async fn a_directory_that_moves_is_told_under_its_new_name() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    fs::create_dir_all(dir.join("foo/x")).unwrap();
    fs::create_dir_all(dir.join("foo2/x")).unwrap();
    let mut watch = Watch::new(&client, dir, true).await;
    fs::rename(dir.join("foo"), dir.join("bar")).unwrap();
    watch.all(dir).await;
    fs::File::create(dir.join("bar/x/1")).unwrap();
    fs::File::create(dir.join("foo2/x/2")).unwrap();
    let expected = told(&[("bar/x/1", EventType::Create), ("foo2/x/2", EventType::Create)]);
    assert_eq!(watch.all_briefly(dir).await, expected);

    // Moved out, it is watched no longer; moved in, with all that is in it.
    let other = tempfile::tempdir_in(dir.parent().unwrap()).unwrap();
    fs::rename(dir.join("bar"), other.path().join("bar")).unwrap();
    assert_eq!(watch.all_briefly(dir).await, told(&[("bar", EventType::Rename)]));
    fs::File::create(other.path().join("bar/x/3")).unwrap();
    assert_eq!(watch.all_briefly(dir).await, []);
    fs::rename(other.path().join("bar"), dir.join("back")).unwrap();
    let names: BTreeSet<_> = watch.all(dir).await.into_iter().map(|event| event.name).collect();
    assert!(names.iter().eq(["back", "back/x", "back/x/1", "back/x/3"]), "{names:?}");
}

#[tokio::test]
async fn entries_come_with_events_when_asked_for() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    let plain = Watch::new(&client, dir, false).await;
    let request = WatchDirRequest { include_entry: true, ..watching(dir, false) };
    let mut full = Watch::try_new(&client, &request).await.unwrap();
    let legacy = client.clone().with("user-agent", "connect-python");
    let legacy = Watch::try_new(&legacy, &request).await.unwrap();

    fs::write(dir.join("file"), "12345").unwrap();
    let events = full.all(dir).await;
    assert!(!events.is_empty());
    for event in events {
        let entry = event.entry.expect("an entry");
        assert_eq!((entry.name.as_str(), entry.r#type()), ("file", FileType::File));
        assert_eq!(entry.path, dir.join("file").to_str().unwrap());
        assert_eq!(entry.permissions.len(), 10);
    }
    set_mode(&dir.join("file"), 0o640);
    let events = full.all(dir).await;
    assert_eq!(events[0].entry.as_ref().unwrap().mode, 0o640);
    fs::rename(dir.join("file"), dir.join("other")).unwrap();
    let events = full.all(dir).await;
    assert_eq!(brief(&events)[0].1, EventType::Rename);
    assert_eq!(events[0].entry, None, "there is nothing to look at");
    fs::remove_file(dir.join("other")).unwrap();
    let events = full.all(dir).await;
    assert_eq!(
        (events.last().unwrap().r#type(), &events.last().unwrap().entry),
        (EventType::Remove, &None)
    );

    for mut without in [plain, legacy] {
        for event in without.all(dir).await {
            assert_eq!(event.entry, None);
        }
    }
}

/// As upstream: entries show a clean path, whatever the client wrote.
#[tokio::test]
async fn the_paths_of_entries_are_clean() {
    let (_daemon, client, dir) = house();
    let root = dir.path().join("sub");
    fs::create_dir_all(root.join("deep")).unwrap();
    for recursive in [false, true] {
        let odd = format!("{}//./sub/../sub/", dir.path().to_str().unwrap());
        let request =
            WatchDirRequest { include_entry: true, ..watching(Path::new(&odd), recursive) };
        let mut watch = Watch::try_new(&client, &request).await.unwrap();
        let name = if recursive { "deep/file" } else { "file" };
        fs::write(root.join(name), "12345").unwrap();
        let event = watch.next().await;
        assert_eq!(event.name, name);
        assert_eq!(event.entry.unwrap().path, root.join(name).to_str().unwrap());
    }
    // Errors name what the client wrote.
    let missing = format!("{}//missing/", dir.path().to_str().unwrap());
    let refused = create_watcher(&client, Path::new(&missing), false).await.unwrap_err();
    assert!(refused.message.starts_with(&format!("path {missing} not found: ")), "{refused:?}");
}

/// Images without /dev: the ids of watchers are random all the same.
#[tokio::test]
async fn a_watch_needs_no_dev_urandom() {
    let unshare = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_envd")]);
        command
    };
    let possible = unshare("mount -t tmpfs none /dev").output();
    if !able("root and unshare", possible.is_ok_and(|output| output.status.success())) {
        return;
    }
    let script = "mount -t tmpfs none /dev && \
                  exec \"$0\" --listen tcp://127.0.0.1:0 --mmds=none --no-clock";
    let daemon = Daemon::spawn(&mut unshare(script));
    let dev = fs::read_dir(format!("/proc/{}/root/dev", daemon.pid())).unwrap();
    assert_eq!(dev.count(), 0, "there is no device");
    let (client, dir) = (client(&daemon), tempfile::tempdir().unwrap());
    let id = create_watcher(&client, dir.path(), true).await.unwrap();
    let other = create_watcher(&client, dir.path(), true).await.unwrap();
    assert_ne!(id, other);
    fs::File::create(dir.path().join("file")).unwrap();
    let events = watcher_events(&client, &id).await.unwrap();
    assert_eq!(brief(&events), told(&[("file", EventType::Create)]));
}

#[tokio::test]
async fn silence_is_broken_by_keepalives() {
    let (_daemon, client, dir) = house();
    let mut checks = tokio::task::JoinSet::new();
    for interval in ["1", "0", "-1"] {
        let client = client.clone().with("keepalive-ping-interval", interval);
        let path = dir.path().to_owned();
        checks.spawn(async move {
            let mut watch = Watch::new(&client, &path, true).await;
            for _ in 0..2 {
                let message = watch.messages.next().await.unwrap().unwrap().event.unwrap();
                assert!(matches!(message, Event::Keepalive(_)), "{message:?}");
            }
        });
    }
    while let Some(check) = checks.join_next().await {
        check.unwrap();
    }
    for interval in ["abc", "9223372037"] {
        let client = client.clone().with("keepalive-ping-interval", interval);
        let mut watch = Watch::new(&client, dir.path(), true).await;
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(watch.next().await.name, "file", "{interval}");
        assert_eq!(watch.keepalives, 0);
        fs::remove_file(dir.path().join("file")).unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_watched() {
    let (_daemon, client, dir) = house();
    let missing = dir.path().join("missing");
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let shown = missing.display();
    let not_found = failure(
        "not_found",
        format!("path {shown} not found: stat {shown}: no such file or directory"),
    );
    let not_dir = format!("path {} not a directory", file.display());
    for recursive in [false, true] {
        let error = Watch::try_new(&client, &watching(&missing, recursive)).await.err().unwrap();
        assert_eq!(error, not_found);
        let error = create_watcher(&client, &missing, recursive).await.unwrap_err();
        assert_eq!(error, not_found);
        let errors = [
            Watch::try_new(&client, &watching(&file, recursive)).await.err().unwrap(),
            create_watcher(&client, &file, recursive).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.code, "invalid_argument");
            assert!(error.message.starts_with(&not_dir), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_link_to_a_directory_is_watched() {
    let (_daemon, client, dir) = house();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    fs::create_dir_all(real.join("sub")).unwrap();
    symlink("real", &link).unwrap();
    for recursive in [false, true] {
        let mut watch = Watch::new(&client, &link, recursive).await;
        fs::write(real.join("file"), "").unwrap();
        assert_eq!(watch.all_briefly(&real).await, told(&[("file", EventType::Create)]));
        fs::remove_file(real.join("file")).unwrap();
    }
}

#[tokio::test]
async fn the_watched_directory_can_go() {
    let (_daemon, client, dir) = house();
    let gone = dir.path().join("gone");
    fs::create_dir(&gone).unwrap();
    for recursive in [false, true] {
        fs::create_dir_all(&gone).unwrap();
        let client = client.clone().with("keepalive-ping-interval", "1");
        let mut watch = Watch::new(&client, &gone, recursive).await;
        fs::remove_dir(&gone).unwrap();
        loop {
            let event = watch.next().await;
            assert_eq!(event.name, ".", "{event:?}");
            if event.r#type() == EventType::Remove {
                break;
            }
        }
        // The stream stays, with nothing but signs of life.
        let message = watch.messages.next().await.unwrap().unwrap().event.unwrap();
        assert!(matches!(message, Event::Keepalive(_)), "{message:?}");
    }
}

#[tokio::test]
async fn a_polled_watcher_keeps_what_happened() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    let id = create_watcher(&client, dir, false).await.unwrap();
    assert_eq!(id.len(), 21);
    assert!(
        id.starts_with('w') && id.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
    );
    assert_eq!(watcher_events(&client, &id).await.unwrap(), []);
    // All that was done before the question is in the answer.
    for i in 0..100 {
        let name = format!("file-{i}");
        fs::File::create(dir.join(&name)).unwrap();
        let events = brief(&watcher_events(&client, &id).await.unwrap());
        assert_eq!(events, told(&[(&name, EventType::Create)]));
    }
    assert_eq!(watcher_events(&client, &id).await.unwrap(), [], "each is told once");

    remove_watcher(&client, &id).await.unwrap();
    let expected = failure("not_found", format!("watcher with id {id} not found"));
    assert_eq!(remove_watcher(&client, &id).await.unwrap_err(), expected);
    assert_eq!(watcher_events(&client, &id).await.unwrap_err(), expected);
    let expected = failure("not_found", "watcher with id w0 not found");
    assert_eq!(watcher_events(&client, "w0").await.unwrap_err(), expected);
}

#[tokio::test]
async fn an_upload_is_told_as_clients_expect_it() {
    let (daemon, client, dir) = house();
    let dir = dir.path();
    let id = create_watcher(&client, dir, false).await.unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let (create, chmod, write) = (EventType::Create, EventType::Chmod, EventType::Write);
    for expected in [
        &[("file", create), ("file", chmod), ("file", write)][..],
        &[("file", chmod), ("file", write)],
    ] {
        let path = dir.join("file");
        let url = daemon.url("/files");
        let url =
            reqwest::Url::parse_with_params(&url, [("path", path.to_str().unwrap())]).unwrap();
        let request = http.post(url).header("content-type", "application/octet-stream");
        let response = common::soon("an upload", request.body("content").send()).await.unwrap();
        assert_eq!(response.status(), 200);
        // Asked once, right after the reply.
        assert_eq!(brief(&watcher_events(&client, &id).await.unwrap()), told(expected));
    }
    let path = dir.join("made").to_str().unwrap().to_owned();
    let request = MakeDirRequest { path };
    let _: MakeDirResponse =
        client.unary("/filesystem.Filesystem/MakeDir", &request).await.unwrap();
    let events = brief(&watcher_events(&client, &id).await.unwrap());
    assert_eq!(events, told(&[("made", create), ("made", chmod)]));
}

#[tokio::test]
async fn short_lived_directories_do_not_end_a_watch() {
    let (daemon, client, dir) = house();
    let dir = dir.path();
    let mut watch = Watch::new(&client, dir, true).await;
    let id = create_watcher(&client, dir, true).await.unwrap();
    let path = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        for i in 0..1000 {
            let name = path.join(format!("short-{i}"));
            fs::create_dir(&name).unwrap();
            if i % 2 == 0 {
                fs::create_dir(name.join("inner")).unwrap();
                fs::remove_dir(name.join("inner")).unwrap();
            }
            fs::remove_dir(&name).unwrap();
        }
    })
    .await
    .unwrap();
    fs::create_dir(dir.join("stays")).unwrap();
    fs::write(dir.join("stays/file"), "x").unwrap();

    let expected = "stays/file";
    let events = watch.all(dir).await;
    assert!(events.iter().any(|event| event.name == expected), "{} events", events.len());
    let events = watcher_events(&client, &id).await.unwrap();
    assert!(events.iter().any(|event| event.name == expected), "{} events", events.len());
    // Both can be ended, and nothing is left of them: two directories are watched, once.
    in_time("only what exists is watched", async || (inotify(&daemon) == (1, 2)).then_some(()))
        .await;
    remove_watcher(&client, &id).await.unwrap();
    drop(watch);
    in_time("nothing is left", async || (inotify(&daemon) == (0, 0)).then_some(())).await;
}

#[tokio::test]
async fn a_storm_of_new_directories_loses_no_file() {
    let (_daemon, client, dir) = house();
    let dir = dir.path();
    let mut watch = Watch::new(&client, dir, true).await;
    let id = create_watcher(&client, dir, true).await.unwrap();
    let path = dir.to_owned();
    let storm = tokio::task::spawn_blocking(move || {
        let mut files = BTreeSet::new();
        for i in 0..300 {
            let inner = format!("d{i}/a/b/c");
            fs::create_dir_all(path.join(&inner)).unwrap();
            for file in [format!("{inner}/1"), format!("{inner}/2")] {
                fs::write(path.join(&file), "x").unwrap();
                files.insert(file);
            }
        }
        files
    });
    let files = storm.await.unwrap();
    let created = |events: &[FilesystemEvent]| -> Vec<String> {
        let created = events.iter().filter(|event| event.r#type() == EventType::Create);
        created.map(|event| event.name.clone()).collect()
    };
    for events in [watch.all(dir).await, watcher_events(&client, &id).await.unwrap()] {
        let names = created(&events);
        let unique: BTreeSet<_> = names.iter().cloned().collect();
        let lost: Vec<_> = files.difference(&unique).collect();
        assert!(lost.is_empty(), "{} are lost: {lost:?}", lost.len());
        let dirs = names.iter().filter(|name| name.ends_with("/a/b/c")).count();
        assert_eq!(dirs, 300);
        let known = names.len() - names.iter().filter(|name| name.contains(LAST)).count();
        let unique = unique.iter().filter(|name| !name.contains(LAST)).count();
        assert_eq!(known, unique, "none is told twice");
    }
}

/// Lessons: a watched directory was added again with each new one in it, to learn which it is, and the
/// kernel dropped what happened in that moment. An overflow of its queue would make up for that, so the
/// writers are never far ahead of what is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_directory_of_four_writers_is_missed() {
    const DIRS: usize = 25_000;
    const WRITERS: usize = 4;
    const MAX_AHEAD: usize = 2000;
    let (_daemon, client, dir) = house();
    let (_, mut messages) = with_cursors(&client, dir.path(), "").await.unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let writers = (0..WRITERS).map(|writer| {
        let (root, seen) = (dir.path().to_owned(), Arc::clone(&seen));
        tokio::task::spawn_blocking(move || {
            for i in (writer..DIRS).step_by(WRITERS) {
                while i > seen.load(Ordering::Relaxed) + MAX_AHEAD {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let path = root.join(format!("d{i}"));
                fs::create_dir(&path).unwrap();
                fs::File::create(path.join("file")).unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let last = dir.path().join(LAST);
    tokio::spawn(async move {
        for writer in writers {
            writer.await.unwrap();
        }
        fs::File::create(last).unwrap();
    });
    let names = (0..DIRS).flat_map(|i| [format!("d{i}"), format!("d{i}/file")]);
    let mut missing: BTreeSet<String> = names.chain([LAST.to_owned()]).collect();
    while missing.contains(LAST) {
        let message = messages.next().await.unwrap().expect("it goes on");
        match message.event.unwrap() {
            Event::Filesystem(event) if event.r#type() == EventType::Create => {
                let is_dir = !event.name.contains('/');
                assert!(missing.remove(&event.name), "{} is told once", event.name);
                seen.fetch_add(usize::from(is_dir), Ordering::Relaxed);
            }
            // Of the files that were made before their directory was watched.
            Event::Filesystem(_) | Event::Keepalive(_) => {}
            other => panic!("not all was told one by one: {other:?}"),
        }
    }
    assert!(missing.is_empty(), "{} were not told: {missing:?}", missing.len());
}

#[tokio::test]
async fn a_client_that_leaves_leaves_no_watch() {
    let (daemon, client, dir) = house();
    for i in 0..20 {
        fs::create_dir_all(dir.path().join(format!("{i}/a"))).unwrap();
    }
    assert_eq!(inotify(&daemon), (0, 0));
    let before = daemon.descriptors();
    let watches = [
        Watch::new(&client, dir.path(), true).await,
        Watch::new(&client, dir.path(), true).await,
        Watch::new(&client, &dir.path().join("1"), false).await,
    ];
    assert_eq!(inotify(&daemon), (1, 41), "one instance, and each directory once");
    let mut watches = watches.into_iter();
    drop(watches.next());
    let mut other = watches.next().unwrap();
    fs::write(dir.path().join("1/a/file"), "").unwrap();
    assert_eq!(other.next().await.name, "1/a/file", "the others go on");
    drop((other, watches));
    in_time("nothing is left", async || (inotify(&daemon) == (0, 0)).then_some(())).await;
    drop(client);
    in_time("no descriptor is left", async || (daemon.descriptors() <= before).then_some(())).await;
}

#[tokio::test]
async fn two_hundred_polled_watchers_work() {
    let (daemon, client, dir) = house();
    let at = |i: usize| dir.path().join(format!("dir-{i}"));
    let mut ids = Vec::new();
    for i in 0..200 {
        fs::create_dir(at(i)).unwrap();
        ids.push(create_watcher(&client, &at(i), i % 2 == 0).await.unwrap());
    }
    assert_eq!(inotify(&daemon), (1, 200));
    for i in 0..200 {
        fs::File::create(at(i).join(format!("file-{i}"))).unwrap();
    }
    for (i, id) in ids.iter().enumerate() {
        let events = brief(&watcher_events(&client, id).await.unwrap());
        assert_eq!(events, told(&[(&format!("file-{i}"), EventType::Create)]));
        remove_watcher(&client, id).await.unwrap();
    }
    in_time("nothing is left", async || (inotify(&daemon) == (0, 0)).then_some(())).await;
}

#[tokio::test]
async fn a_watcher_that_does_not_read_costs_little() {
    let (daemon, client, dir) = house();
    let dir = dir.path();
    let deaf = Watch::new(&client, dir, false).await;
    let id = create_watcher(&client, dir, false).await.unwrap();
    let path = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        fs::File::create(path.join("file")).unwrap();
        // More than a queue holds, and none of them repeats the one before.
        for _ in 0..50_000 {
            set_mode(&path, 0o700);
            set_mode(&path.join("file"), 0o600);
        }
    })
    .await
    .unwrap();
    // Both have what there is room for, and others are served.
    let mut other = Watch::new(&client, dir, false).await;
    fs::File::create(dir.join("new")).unwrap();
    while other.next().await.name != "new" {}
    assert!(!watcher_events(&client, &id).await.unwrap().is_empty());
    let peak = daemon.memory("VmHWM");
    assert!(peak < 96 << 10, "the daemon grew to {peak} KiB");
    drop(deaf);
}

#[tokio::test]
async fn content_that_is_there_before_the_watch_is_told_as_written() {
    let (_daemon, client, dir) = house();
    let outside = tempfile::tempdir().unwrap();
    let new = outside.path().join("new");
    fs::create_dir(&new).unwrap();
    fs::write(new.join("empty"), "").unwrap();
    fs::write(new.join("full"), "content").unwrap();
    let mut watch = Watch::new(&client, dir.path(), true).await;
    fs::rename(&new, dir.path().join("new")).unwrap();
    use EventType::{Create, Write};
    assert_eq!(
        watch.all_briefly(dir.path()).await,
        told(&[("new", Create), ("new/empty", Create), ("new/full", Create), ("new/full", Write)])
    );
}

/// A stream with cursors: where it began, and its messages.
async fn with_cursors(
    client: &Client,
    path: &Path,
    from: &str,
) -> Result<(String, Messages<WatchDirResponse>), Failure> {
    let request =
        WatchDirRequest { cursors: true, from_cursor: from.to_owned(), ..watching(path, true) };
    let mut messages: Messages<WatchDirResponse> = client.stream(WATCH, &request).await?;
    match messages.next().await?.expect("a start").event.unwrap() {
        Event::Start(start) => Ok((start.cursor.expect("a cursor"), messages)),
        other => panic!("first came {other:?}"),
    }
}

/// The next event of such a stream, and its cursor.
async fn next_with_cursor(
    messages: &mut Messages<WatchDirResponse>,
) -> (String, EventType, String) {
    match messages.next().await.unwrap().expect("it goes on").event.unwrap() {
        Event::Filesystem(event) => {
            let kind = event.r#type();
            (event.name, kind, event.cursor.expect("a cursor"))
        }
        other => panic!("{other:?}"),
    }
}

async fn next_rescan(messages: &mut Messages<WatchDirResponse>) -> RescanEvent {
    match messages.next().await.unwrap().expect("it goes on").event.unwrap() {
        Event::Rescan(rescan) => rescan,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_stream_goes_on_from_a_cursor_with_nothing_lost_or_doubled() {
    for wire in
        [Wire::Grpc, Wire::Connect { json: true }, Wire::GrpcWeb { text: false, json: false }]
    {
        let daemon = Daemon::start(&[]);
        let client = Client::new(&daemon, wire);
        let dir = tempfile::tempdir().unwrap();
        let make = |i: usize| fs::File::create(dir.path().join(i.to_string())).unwrap();
        let (mut cursor, mut messages) = with_cursors(&client, dir.path(), "").await.unwrap();
        let mut told = Vec::new();
        for round in 0..10 {
            (0..10).for_each(|i| drop(make(round * 20 + i)));
            // Of what was sent, the client has seen a part when its connection breaks.
            for _ in 0..round {
                let (name, kind, at) = next_with_cursor(&mut messages).await;
                assert_eq!(kind, EventType::Create);
                told.push(name);
                cursor = at;
            }
            drop(messages);
            (10..20).for_each(|i| drop(make(round * 20 + i)));
            let (start, again) = with_cursors(&client, dir.path(), &cursor).await.unwrap();
            assert_eq!(start, cursor);
            messages = again;
        }
        while told.len() < 200 {
            told.push(next_with_cursor(&mut messages).await.0);
        }
        let wanted: Vec<_> = (0..200).map(|i| i.to_string()).collect();
        assert_eq!(told, wanted, "{wire:?}");
        assert_eq!(inotify(&daemon), (1, 1), "it was one watch all the time");
    }
}

#[tokio::test]
async fn a_later_stream_takes_a_watch_over() {
    let (_daemon, client, dir) = house();
    let (cursor, mut first) = with_cursors(&client, dir.path(), "").await.unwrap();
    let (_, mut second) = with_cursors(&client, dir.path(), &cursor).await.unwrap();
    let ended = first.next().await.unwrap_err();
    assert_eq!(ended, failure("aborted", "another stream has taken this watch over"));
    fs::create_dir(dir.path().join("new")).unwrap();
    assert_eq!(next_with_cursor(&mut second).await.0, "new");

    let other = tempfile::tempdir().unwrap();
    let error = with_cursors(&client, other.path(), &cursor).await.err().unwrap();
    assert_eq!(error.code, "invalid_argument");
    assert!(error.message.starts_with(&format!("from_cursor: '{cursor}'")), "{error:?}");
    for bad in ["x", "1.2.3", "0000000000000000.1", "0000000000000000.1.-1"] {
        let error = with_cursors(&client, dir.path(), bad).await.err().unwrap();
        let wanted = format!("from_cursor: '{bad}' is no cursor of this watcher");
        assert_eq!(error, failure("invalid_argument", wanted));
    }
}

#[tokio::test]
async fn a_cursor_expires_and_that_is_told() {
    let daemon = Daemon::start(&["--cursor-retention", "1"]);
    let client = client(&daemon);
    let dir = tempfile::tempdir().unwrap();
    let (cursor, messages) = with_cursors(&client, dir.path(), "").await.unwrap();
    assert_eq!(inotify(&daemon), (1, 1));
    drop(messages);
    in_time("the watch is given up", async || (inotify(&daemon) == (0, 0)).then_some(())).await;
    fs::create_dir(dir.path().join("missed")).unwrap();
    // One of another daemon is as good as expired.
    for cursor in [cursor.as_str(), "0123456789abcdef.0.0"] {
        let (_, mut messages) = with_cursors(&client, dir.path(), cursor).await.unwrap();
        let rescan = next_rescan(&mut messages).await;
        assert_eq!((rescan.reason(), rescan.complete), (Reason::CursorExpired, false));
        fs::write(dir.path().join("missed/file"), "").unwrap();
        assert_eq!(next_with_cursor(&mut messages).await.0, "missed/file");
        fs::remove_file(dir.path().join("missed/file")).unwrap();
        // That position is as good as any.
        let (_, mut messages) = with_cursors(&client, dir.path(), &rescan.cursor).await.unwrap();
        assert_eq!(next_with_cursor(&mut messages).await.0, "missed/file");
    }
}

#[tokio::test]
async fn a_lost_answer_with_events_can_be_asked_for_again() {
    let (_daemon, client, dir) = house();
    let path = dir.path().to_str().unwrap().to_owned();
    let request = CreateWatcherRequest { path, cursors: true, ..CreateWatcherRequest::default() };
    let created: CreateWatcherResponse = client.unary(CREATE, &request).await.unwrap();
    let watcher_id = created.watcher_id;
    let ask = async |from_cursor: &str| {
        let from_cursor = from_cursor.to_owned();
        let request = GetWatcherEventsRequest { watcher_id: watcher_id.clone(), from_cursor };
        let answer: Result<GetWatcherEventsResponse, _> = client.unary(EVENTS, &request).await;
        answer.map(|answer| answer.events)
    };
    for name in ["a", "b", "c"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let events = ask("").await.unwrap();
    assert_eq!(events.len(), 3);
    let cursor = |i: usize| events[i].cursor.clone().unwrap();
    assert_eq!(ask("").await.unwrap(), []);
    assert_eq!(ask(&cursor(0)).await.unwrap(), events[1..]);
    assert_eq!(ask(&cursor(2)).await.unwrap(), []);
    fs::create_dir(dir.path().join("d")).unwrap();
    let names: Vec<_> =
        ask(&cursor(1)).await.unwrap().into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["c", "d"]);

    let error = ask("wother.1").await.unwrap_err();
    assert_eq!(error.code, "invalid_argument");
    let plain = create_watcher(&client, dir.path(), false).await.unwrap();
    let from_cursor = format!("{plain}.0");
    let request = GetWatcherEventsRequest { watcher_id: plain, from_cursor };
    let refused: Result<GetWatcherEventsResponse, _> = client.unary(EVENTS, &request).await;
    assert_eq!(refused.unwrap_err().code, "invalid_argument", "it keeps nothing");
}

#[tokio::test]
async fn a_watcher_that_nobody_polls_expires_and_one_that_is_polled_does_not() {
    let daemon = Daemon::start(&["--watcher-expiry", "3"]);
    let client = client(&daemon);
    let (kept, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let id = create_watcher(&client, kept.path(), false).await.unwrap();
    let forgotten = create_watcher(&client, left.path(), false).await.unwrap();
    assert_eq!(inotify(&daemon), (1, 2));
    in_time("the other one has expired", async || {
        watcher_events(&client, &id).await.expect("this one is polled");
        (inotify(&daemon) == (1, 1)).then_some(())
    })
    .await;
    let expected = failure("not_found", format!("watcher with id {forgotten} not found"));
    assert_eq!(watcher_events(&client, &forgotten).await.unwrap_err(), expected);
    assert_eq!(remove_watcher(&client, &forgotten).await.unwrap_err(), expected);
    fs::create_dir(kept.path().join("new")).unwrap();
    assert_eq!(watcher_events(&client, &id).await.unwrap().len(), 1);
}

#[tokio::test]
async fn clients_that_ask_for_nothing_new_are_told_nothing_new() {
    let (_daemon, client, dir) = house();
    let mut watch = Watch::new(&client, dir.path(), true).await;
    let id = create_watcher(&client, dir.path(), true).await.unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    fs::rename(dir.path().join("a"), dir.path().join("z")).unwrap();
    fs::write(dir.path().join("z/b/file"), "").unwrap();
    let polled = watcher_events(&client, &id).await.unwrap();
    let streamed = watch.all(dir.path()).await;
    for events in [&polled, &streamed] {
        assert!(events.iter().all(|event| event.cursor.is_none()), "{events:?}");
        // What is in a directory that moves inside the tree moves without a word, as upstream.
        let inner = events.iter().filter(|event| event.name == "z/b").count();
        assert!(inner <= 1, "{events:?}");
        assert!(events.iter().any(|event| event.name == "z/b/file"));
    }
}
