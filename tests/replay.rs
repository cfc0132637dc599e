//! A client that replays what a watch tells over an empty directory knows, at the end, exactly the
//! tree that is there: whatever real programs do to it, and however much the kernel drops.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{
    Daemon, able, able_as_root, in_time,
    rpc::{Client, Messages, Wire},
};
use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EventType, FileType, FilesystemEvent,
    GetWatcherEventsRequest, GetWatcherEventsResponse, WatchDirRequest, WatchDirResponse,
    rescan_event::Reason, watch_dir_response::Event,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tempfile::TempDir;

/// The file that is made last, so that all before it has been told when it is.
const LAST: &str = "the-last-one";
/// A queue of the kernel that everything overflows.
const SMALL_QUEUE: u32 = 16;

/// Names below a directory, and of regular files the size.
type Tree = BTreeMap<PathBuf, Option<i64>>;

/// What events lead to.
#[derive(Default)]
struct Replay {
    tree: Tree,
    rescans: Vec<(Reason, bool)>,
    /// What was told, for those who look for the fault.
    told: Vec<(EventType, PathBuf)>,
}

impl Replay {
    fn apply(&mut self, event: &FilesystemEvent) {
        self.told.push((event.r#type(), PathBuf::from(&event.name)));
        let name = PathBuf::from(&event.name);
        let entry = event.entry.as_ref();
        let file = |kind| kind == FileType::File && entry.is_some_and(|entry| !entry.is_symlink);
        let size = entry.filter(|entry| file(entry.r#type())).map(|entry| entry.size);
        match event.r#type() {
            EventType::Create => {
                let known = self.tree.entry(name).or_default();
                *known = if entry.is_some() { size } else { *known };
            }
            EventType::Write => {
                if let (Some(known), Some(_)) = (self.tree.get_mut(&name), entry) {
                    *known = size;
                }
            }
            EventType::Remove | EventType::Rename => {
                let below = self.tree.range(name.clone()..);
                let below = below.map(|(path, _)| path.clone());
                let gone: Vec<_> = below.take_while(|path| path.starts_with(&name)).collect();
                gone.iter().for_each(|path| _ = self.tree.remove(path));
            }
            EventType::Chmod => {}
            EventType::Unspecified => panic!("{event:?}"),
        }
    }

    fn expect(&self, root: &Path, sizes: bool, what: &str) {
        let mut wanted = listing(root);
        let mut told = self.tree.clone();
        if !sizes {
            wanted.values_mut().chain(told.values_mut()).for_each(|size| *size = None);
        }
        let missing: Vec<_> = wanted.iter().filter(|(path, _)| !told.contains_key(*path)).collect();
        let extra: Vec<_> = told.iter().filter(|(path, _)| !wanted.contains_key(*path)).collect();
        let differ: Vec<_> = wanted
            .iter()
            .filter_map(|(path, size)| Some((path, size, told.get(path)?)))
            .filter(|(_, size, told)| size != told)
            .collect();
        let first = missing.first().or_else(|| extra.first()).map(|(path, _)| (*path).clone());
        let about = |path: &PathBuf| {
            first.as_ref().is_some_and(|first| first.starts_with(path) || path.starts_with(first))
        };
        let told: Vec<_> = self.told.iter().filter(|(_, path)| about(path)).collect();
        assert!(
            missing.is_empty() && extra.is_empty() && differ.is_empty(),
            "{what}: of {} names {} are missing, {} too many, {} of another size: {:?} {:?} {:?}; last: {:#?}",
            wanted.len(),
            missing.len(),
            extra.len(),
            differ.len(),
            &missing[..missing.len().min(5)],
            &extra[..extra.len().min(5)],
            &differ[..differ.len().min(5)],
            &told[told.len().saturating_sub(30)..],
        );
    }

    fn has_overflowed(&self) -> bool {
        self.rescans.iter().any(|(reason, _)| *reason == Reason::KernelQueue)
    }
}

fn listing(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let path = dir.join(entry.file_name());
            if meta.is_dir() {
                todo.push(path.clone());
            }
            let size = meta.is_file().then(|| i64::try_from(meta.len()).unwrap());
            tree.insert(path, size);
        }
    }
    tree
}

/// A daemon that watches a directory for a client of each sort.
struct Watched {
    _daemon: Daemon,
    client: Client,
    dir: TempDir,
    /// Asks.
    polled: (String, Replay),
    /// Listens, with cursors.
    stream: (Messages<WatchDirResponse>, Replay),
    /// Listens as E2B's clients do.
    plain: (Messages<WatchDirResponse>, Replay),
}

impl Watched {
    async fn new(queue: Option<u32>) -> Self {
        let daemon = Daemon::start(&[]);
        let client = Client::new(&daemon, Wire::Connect { json: false });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        // The kernel takes the limit over when the daemon makes its instance, so others are hardly
        // disturbed.
        let limit = queue.map(QueueLimit::lower);
        let request = CreateWatcherRequest {
            path: path.clone(),
            recursive: true,
            include_entry: true,
            cursors: true,
            ..CreateWatcherRequest::default()
        };
        let created: CreateWatcherResponse =
            client.unary("/filesystem.Filesystem/CreateWatcher", &request).await.unwrap();
        drop(limit);
        let stream = follow(&client, &path, true).await;
        let plain = follow(&client, &path, false).await;
        Self {
            _daemon: daemon,
            client,
            dir,
            polled: (created.watcher_id, Replay::default()),
            stream: (stream, Replay::default()),
            plain: (plain, Replay::default()),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs something that changes the directory while the streams are read.
    async fn run(&mut self, work: impl FnOnce() + Send + 'static) {
        let mut work = tokio::task::spawn_blocking(work);
        loop {
            let (stream, plain) = (&mut self.stream, &mut self.plain);
            tokio::select! {
                done = &mut work => return done.unwrap(),
                event = next(&mut stream.0) => note(&mut stream.1, event),
                event = next(&mut plain.0) => note(&mut plain.1, event),
            }
        }
    }

    async fn poll(&mut self) {
        let request =
            GetWatcherEventsRequest { watcher_id: self.polled.0.clone(), ..Default::default() };
        let answer: GetWatcherEventsResponse =
            self.client.unary("/filesystem.Filesystem/GetWatcherEvents", &request).await.unwrap();
        for event in &answer.events {
            assert!(event.cursor.as_ref().is_some_and(|cursor| cursor.starts_with(&self.polled.0)));
            self.polled.1.apply(event);
        }
        let rescans = answer.rescans.iter().map(|rescan| (rescan.reason(), rescan.complete));
        self.polled.1.rescans.extend(rescans);
    }

    /// Compares what all were told with what is there.
    async fn compare(&mut self, what: &str) {
        // What has to be compared is, before this is answered.
        self.poll().await;
        self.polled.1.expect(self.dir.path(), true, &format!("{what}, polled"));
        let last = self.dir.path().join(LAST);
        File::create(&last).unwrap();
        for (messages, replay) in [&mut self.stream, &mut self.plain] {
            loop {
                let event = next(messages).await;
                let is_last = matches!(&event, Event::Filesystem(event) if event.name == LAST);
                note(replay, event);
                if is_last {
                    break;
                }
            }
        }
        self.stream.1.expect(self.dir.path(), false, &format!("{what}, stream"));
        self.plain.1.expect(self.dir.path(), false, &format!("{what}, plain stream"));
        assert!(self.plain.1.rescans.is_empty(), "only those hear of rescans who asked for it");
        fs::remove_file(&last).unwrap();
        self.poll().await;
        for (messages, replay) in [&mut self.stream, &mut self.plain] {
            while replay.tree.contains_key(Path::new(LAST)) {
                let event = next(messages).await;
                note(replay, event);
            }
        }
        for replay in [&self.polled.1, &self.stream.1] {
            assert!(replay.rescans.iter().all(|(_, complete)| *complete), "{:?}", replay.rescans);
        }
    }
}

async fn follow(client: &Client, path: &str, cursors: bool) -> Messages<WatchDirResponse> {
    let request =
        WatchDirRequest { path: path.to_owned(), recursive: true, cursors, ..Default::default() };
    let mut messages: Messages<WatchDirResponse> =
        client.stream("/filesystem.Filesystem/WatchDir", &request).await.unwrap();
    let Event::Start(start) = next(&mut messages).await else {
        panic!("it begins with a start");
    };
    assert_eq!(start.cursor.is_some(), cursors);
    messages
}

async fn next(messages: &mut Messages<WatchDirResponse>) -> Event {
    messages.next().await.unwrap().expect("it goes on").event.unwrap()
}

fn note(replay: &mut Replay, event: Event) {
    match event {
        Event::Filesystem(event) => replay.apply(&event),
        Event::Rescan(rescan) => replay.rescans.push((rescan.reason(), rescan.complete)),
        Event::Keepalive(_) => {}
        Event::Start(_) => panic!("a second start"),
    }
}

/// `fs.inotify.max_queued_events`, lowered until this is dropped.
struct QueueLimit {
    before: String,
    _lock: File,
}

impl QueueLimit {
    const PATH: &'static str = "/proc/sys/fs/inotify/max_queued_events";

    fn lower(to: u32) -> Self {
        let lock = File::create(std::env::temp_dir().join("envd-test-inotify.lock")).unwrap();
        lock.lock().unwrap();
        let before = fs::read_to_string(Self::PATH).unwrap();
        fs::write(Self::PATH, to.to_string()).unwrap();
        Self { before, _lock: lock }
    }
}

impl Drop for QueueLimit {
    fn drop(&mut self) {
        fs::write(Self::PATH, self.before.trim()).unwrap();
    }
}

/// Runs a command to its end.
fn run(program: &str, args: &[&str], dir: &Path) -> bool {
    let mut command = Command::new(program);
    command.args(args).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null());
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn able_with(program: &str) -> bool {
    able(program, run(program, &["--version"], Path::new("/")))
}

/// A repository of 20,000 files in 220 directories.
fn repository(at: &Path) {
    assert!(run("git", &["init", "-q", "--bare", at.to_str().unwrap()], Path::new("/")));
    let mut import = Command::new("git")
        .args(["fast-import", "--quiet"])
        .current_dir(at)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = std::io::BufWriter::new(import.stdin.take().unwrap());
    write!(input, "commit refs/heads/master\ncommitter a <a@b> 0 +0000\ndata 1\nx\n").unwrap();
    for i in 0..20_000 {
        let content = format!("content of file {i}\n").repeat(1 + i % 5);
        let path = format!("d{}/e{}/f{i}", i % 20, i / 20 % 10);
        write!(input, "M 644 inline {path}\ndata {}\n{content}\n", content.len()).unwrap();
    }
    drop(input);
    assert!(import.wait().unwrap().success());
    let head = ["symbolic-ref", "HEAD", "refs/heads/master"];
    assert!(run("git", &head, at));
}

#[tokio::test]
async fn a_clone_an_install_and_a_removal_are_known_exactly_though_the_kernel_drops_events() {
    if !able_as_root() || !able_with("git") {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    let origin = source.path().join("origin.git");
    repository(&origin);
    let mut watched = Watched::new(Some(SMALL_QUEUE)).await;

    let dir = watched.path().to_owned();
    let from = origin.to_str().unwrap().to_owned();
    watched.run(move || assert!(run("git", &["clone", "-q", &from, "clone"], &dir))).await;
    watched.compare("a clone").await;
    assert!(watched.polled.1.tree.len() > 20_000);
    assert!(watched.polled.1.has_overflowed(), "{:?}", watched.polled.1.rescans);

    if able_with("npm") {
        let dir = watched.path().to_owned();
        let (done, installed) = std::sync::mpsc::channel();
        watched
            .run(move || {
                let install = ["install", "--no-audit", "--no-fund", "--prefix", ".", "express@4"];
                done.send(run("npm", &install, &dir)).unwrap();
            })
            .await;
        if able("a package registry", installed.recv().unwrap()) {
            watched.compare("an install").await;
        }
    }

    let dir = watched.path().to_owned();
    watched
        .run(move || {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                assert!(run("rm", &["-rf", path.to_str().unwrap()], &dir));
            }
        })
        .await;
    watched.compare("a removal").await;
    assert!(watched.polled.1.tree.is_empty());
}

/// The same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(bound).unwrap()).unwrap()
    }
}

/// Random things done to a tree, half of them to directories: made and filled, renamed, moved out
/// and in, removed, all as fast as the kernel can.
fn disturb(root: &Path, outside: &Path, random: &mut Random, steps: usize) {
    let some = |random: &mut Random| {
        let mut path = root.to_owned();
        for _ in 0..=random.below(3) {
            path.push(["a", "b", "c", "d"][random.below(4)]);
        }
        path
    };
    for step in 0..steps {
        let (one, two) = (some(random), some(random));
        // Most of it fails now and then: there is no such thing, or something else.
        let _ = match random.below(12) {
            0 | 1 => fs::create_dir_all(&one),
            2 => fs::create_dir_all(one.join("new/deep/er"))
                .and_then(|()| fs::write(one.join("new/deep/er/file"), "x")),
            3 | 4 => fs::write(&one, "y".repeat(step % 50)),
            5 => fs::rename(&one, &two),
            6 => fs::rename(&one, outside.join((step % 8).to_string())),
            7 => fs::rename(outside.join((step % 8).to_string()), &one),
            8 => fs::remove_dir_all(&one),
            9 => fs::remove_file(&one),
            10 => renameat2(AT_FDCWD, &one, AT_FDCWD, &two, RenameFlags::RENAME_EXCHANGE)
                .map_err(std::io::Error::from),
            _ => std::os::unix::fs::symlink("a", &one),
        };
    }
}

/// Plain clients cannot replay moves, so they are compared only where there is none.
async fn disturb_and_compare(queue: Option<u32>, seed: u64) {
    let mut watched = Watched::new(queue).await;
    let outside = tempfile::tempdir_in(watched.path().parent().unwrap()).unwrap();
    let mut random = Random(seed);
    for round in 0..8 {
        let (root, away) = (watched.path().to_owned(), outside.path().to_owned());
        let mut numbers = Random(random.0);
        random.below(1000);
        watched.run(move || disturb(&root, &away, &mut numbers, 400)).await;
        // What a moved directory holds is told to those who have cursors.
        watched.plain.1.tree = listing(watched.path());
        watched.poll().await;
        watched.drain_plain().await;
        watched.compare(&format!("seed {seed}, round {round}")).await;
    }
    if queue.is_some() {
        assert!(watched.polled.1.has_overflowed());
    }
}

impl Watched {
    /// Lets the plain stream come to the present, and starts its account anew.
    async fn drain_plain(&mut self) {
        let mark = self.dir.path().join("plain-mark");
        File::create(&mark).unwrap();
        while !matches!(next(&mut self.plain.0).await,
            Event::Filesystem(event) if event.name == "plain-mark")
        {}
        self.plain.1.tree = listing(self.dir.path());
        fs::remove_file(&mark).unwrap();
        self.poll().await;
        while self.plain.1.tree.contains_key(Path::new("plain-mark")) {
            let event = next(&mut self.plain.0).await;
            note(&mut self.plain.1, event);
        }
    }
}

/// These, and as many more as `ENVD_REPLAY_SEEDS` says: for a longer run by hand.
fn seeds(always: [u64; 3]) -> impl Iterator<Item = u64> {
    let more = std::env::var("ENVD_REPLAY_SEEDS").map_or(0, |more| more.parse().unwrap());
    // Numbers without a pattern, and never 0, which would stay 0.
    always
        .into_iter()
        .chain((1..=more).map(move |i| (always[0] + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
}

#[tokio::test]
async fn whatever_is_done_to_a_tree_is_known_exactly() {
    for seed in seeds([1, 13_064_056_694_810_536_063, 8_709_371_129_873_690_709]) {
        disturb_and_compare(None, seed).await;
    }
}

#[tokio::test]
async fn whatever_is_done_to_a_tree_is_known_exactly_though_the_kernel_drops_events() {
    if able_as_root() {
        for seed in seeds([2, 9_344_711_191_398_858_085, 1_270_680_123_050_334_755]) {
            disturb_and_compare(Some(SMALL_QUEUE), seed).await;
        }
    }
}

/// Lessons: a directory that lives for a millisecond, and an overflow at the same time, end nothing.
#[tokio::test]
async fn a_storm_of_short_lived_directories_with_overflows_ends_no_watch() {
    if !able_as_root() {
        return;
    }
    let mut watched = Watched::new(Some(SMALL_QUEUE)).await;
    let dir = watched.path().to_owned();
    watched
        .run(move || {
            for i in 0..3000 {
                let name = dir.join(format!("short-{}", i % 5));
                fs::create_dir_all(name.join("inner")).unwrap();
                fs::remove_dir_all(&name).unwrap();
            }
            fs::create_dir_all(dir.join("stays/inner")).unwrap();
            fs::write(dir.join("stays/inner/file"), "x").unwrap();
        })
        .await;
    watched.compare("a storm").await;
    fs::write(watched.path().join("stays/inner/later"), "y").unwrap();
    watched.compare("after the storm").await;
}

#[tokio::test]
async fn a_client_that_reads_late_is_told_the_difference() {
    let mut watched = Watched::new(None).await;
    let dir = watched.path().to_owned();
    // Nobody reads, each name is another event, and long enough to fill what lies between.
    let name = |i: usize| format!("{i}-{}", "x".repeat(200));
    let work = move || {
        for i in 0..30_000 {
            let sub = dir.join(format!("d{}", i % 30));
            if i < 30 {
                fs::create_dir(&sub).unwrap();
            }
            fs::write(sub.join(name(i)), "x").unwrap();
            if i % 3 == 0 {
                fs::remove_file(sub.join(name(i))).unwrap();
            }
        }
        fs::remove_dir_all(dir.join("d3")).unwrap();
    };
    tokio::task::spawn_blocking(work).await.unwrap();
    watched.compare("a late reader").await;
    for (replay, who) in [(&watched.polled.1, "polled"), (&watched.stream.1, "stream")] {
        let slow = replay.rescans.iter().filter(|(reason, _)| *reason == Reason::SlowClient);
        assert!(slow.count() > 0, "{who} has overflown: {:?}", replay.rescans);
    }
}

#[tokio::test]
async fn a_large_tree_that_moves_while_it_is_looked_at_is_known() {
    let mut watched = Watched::new(None).await;
    let outside = tempfile::tempdir_in(watched.path().parent().unwrap()).unwrap();
    for i in 0..5000 {
        fs::create_dir_all(outside.path().join(format!("big/{}/{i}", i % 60))).unwrap();
    }
    for i in 0..6 {
        let from = if i == 0 { outside.path().join("big") } else { watched.path().join("big") };
        fs::rename(from, watched.path().join("moved")).unwrap();
        fs::rename(watched.path().join("moved/7"), watched.path().join("seven")).unwrap();
        fs::rename(watched.path().join("seven"), watched.path().join("moved/7")).unwrap();
        fs::rename(watched.path().join("moved"), watched.path().join("big")).unwrap();
    }
    watched.poll().await;
    watched.polled.1.expect(watched.path(), true, "a moved tree");
    fs::write(watched.path().join("big/7/67/file"), "x").unwrap();
    fs::write(watched.path().join("big/59/4979/file"), "x").unwrap();
    watched.poll().await;
    watched.polled.1.expect(watched.path(), true, "files in it");
}

/// The limit is that of a user namespace, so that nobody else is disturbed.
#[tokio::test]
async fn directories_without_a_watch_are_looked_at_until_they_have_one() {
    const LIMIT: &str = "/proc/sys/user/max_inotify_watches";
    let in_namespace = ["--user", "--map-root-user", "test", "-w", LIMIT];
    if !able("unshare and user namespaces", run("unshare", &in_namespace, Path::new("/"))) {
        return;
    }
    let mut command = Command::new("unshare");
    let script = format!("echo 12 > {LIMIT}; exec \"$0\" --listen tcp://127.0.0.1:0");
    command.args(["--user", "--map-root-user", "sh", "-c", &script, env!("CARGO_BIN_EXE_envd")]);
    let daemon = Daemon::spawn(&mut command);
    let pid = daemon.pid();
    let client = Client::new(&daemon, Wire::Connect { json: true });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    let request =
        CreateWatcherRequest { path: path.clone(), recursive: true, ..Default::default() };
    let request = CreateWatcherRequest { include_entry: true, cursors: true, ..request };
    let created: CreateWatcherResponse =
        client.unary("/filesystem.Filesystem/CreateWatcher", &request).await.unwrap();
    let mut watched = Watched {
        stream: (follow(&client, &path, true).await, Replay::default()),
        plain: (follow(&client, &path, false).await, Replay::default()),
        polled: (created.watcher_id, Replay::default()),
        _daemon: daemon,
        client,
        dir,
    };
    for i in 0..40 {
        fs::create_dir_all(watched.path().join(format!("d{i}/deep"))).unwrap();
        fs::write(watched.path().join(format!("d{i}/deep/file")), "x").unwrap();
    }
    watched.compare("beyond the limit").await;
    for replay in [&watched.polled.1, &watched.stream.1] {
        assert!(replay.rescans.contains(&(Reason::WatchLimit, true)), "{:?}", replay.rescans);
    }
    fs::write(watched.path().join("d39/deep/file"), "longer").unwrap();
    fs::create_dir_all(watched.path().join("d38/deep/new/er")).unwrap();
    fs::remove_dir_all(watched.path().join("d37/deep")).unwrap();
    fs::rename(watched.path().join("d36"), watched.path().join("moved")).unwrap();
    watched.compare("changes beyond the limit").await;
    // A stream hears of it though nobody asks.
    fs::write(watched.path().join("d35/deep/unasked"), "").unwrap();
    while !watched.stream.1.tree.contains_key(Path::new("d35/deep/unasked")) {
        let event = next(&mut watched.stream.0).await;
        note(&mut watched.stream.1, event);
    }

    // With room again, life goes on as usual.
    let script = format!("echo 10000 > {LIMIT}");
    let enter = ["--user", "--preserve-credentials", "--target", &pid.to_string()];
    let enter: Vec<&str> = enter.into_iter().chain(["sh", "-c", &script]).collect();
    assert!(run("nsenter", &enter, Path::new("/")));
    watched.compare("with room").await;
    let watches = || {
        let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
        let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
        texts.map(|text| text.matches("inotify wd:").count()).sum::<usize>()
    };
    in_time("everything is watched", async || {
        let dirs = listing(watched.path()).into_iter();
        let dirs = dirs.filter(|(path, _)| watched.path().join(path).is_dir()).count();
        (watches() == dirs + 1).then_some(())
    })
    .await;
    // A watch that begins now and would need more than there is, is refused.
    let script = format!("echo 50 > {LIMIT}");
    let enter = ["--user", "--preserve-credentials", "--target", &pid.to_string()];
    let enter: Vec<&str> = enter.into_iter().chain(["sh", "-c", &script]).collect();
    assert!(run("nsenter", &enter, Path::new("/")));
    let other = tempfile::tempdir().unwrap();
    let path = other.path().to_str().unwrap().to_owned();
    let request =
        CreateWatcherRequest { path: path.clone(), recursive: true, ..Default::default() };
    let refused: Result<CreateWatcherResponse, _> =
        watched.client.unary("/filesystem.Filesystem/CreateWatcher", &request).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code, "internal");
    let wanted = format!("error adding path {path} to watcher: no space left on device");
    assert_eq!(refused.message, wanted);
}
