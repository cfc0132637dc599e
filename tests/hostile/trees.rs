//! Copy, Archive, Extract, Search and watches: a program of a user plants links, hard links, set-id
//! bits and archives, and exchanges directories for links, in order to have the daemon reach with root's
//! rights what it may not reach itself.

use std::{
    fs::{self, Permissions},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use envd::proto::filesystem::{
    ArchiveRequest, ArchiveResponse, CopyRequest, CopyResponse, CreateWatcherRequest,
    CreateWatcherResponse, ExtractRequest, ExtractResponse, GetWatcherEventsRequest,
    GetWatcherEventsResponse, RemoveWatcherRequest, RemoveWatcherResponse, SearchRequest,
    SearchResponse, extract_request, search_response,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::common::{
    Daemon, able_as_root, basic,
    rpc::{Client, Failure, Messages, Wire},
};

/// The program's user, whom nothing else of the machine belongs to.
const UID: u32 = 54_322;
const SECRET: &str = "the secret of root";
/// The rounds of each race.
const ROUNDS: usize = 1000;

/// A daemon, and a directory with a `home` of the program's user, and `etc` and a private `root`, both
/// of root's.
struct World {
    daemon: Daemon,
    tmp: tempfile::TempDir,
}

impl World {
    fn new(args: &[&str]) -> Option<Self> {
        if !able_as_root() {
            return None;
        }
        let tmp = tempfile::tempdir().unwrap();
        fs::set_permissions(tmp.path(), Permissions::from_mode(0o755)).unwrap();
        let world = Self { daemon: Daemon::start(args), tmp };
        for name in ["home", "etc", "etc/bin", "root"] {
            fs::create_dir(world.path(name)).unwrap();
        }
        fs::set_permissions(world.path("root"), Permissions::from_mode(0o700)).unwrap();
        for name in ["etc/f", "etc/bin/f", "root/secret", "etc/bin/x0"] {
            fs::write(world.path(name), SECRET).unwrap();
            fs::set_permissions(world.path(name), Permissions::from_mode(0o600)).unwrap();
        }
        chown(world.path("home"), Some(UID), Some(UID)).unwrap();
        Some(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// As the program would make it.
    fn plant(&self, target: &str, link: &str) {
        symlink(self.path(target), self.path(link)).unwrap();
        lchown(self.path(link), Some(UID), Some(UID)).unwrap();
    }

    fn dir(&self, name: &str) {
        fs::create_dir(self.path(name)).unwrap();
        chown(self.path(name), Some(UID), Some(UID)).unwrap();
    }

    fn file(&self, name: &str, mode: u32) {
        fs::write(self.path(name), "the user's").unwrap();
        chown(self.path(name), Some(UID), Some(UID)).unwrap();
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    /// Paths, owners, modes and contents of all that is root's.
    fn outside(&self) -> Vec<(PathBuf, u32, u32, u32, Vec<u8>)> {
        let (mut found, mut todo) = (Vec::new(), vec![self.path("etc"), self.path("root")]);
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            found.push((path, meta.uid(), meta.gid(), meta.mode(), content));
        }
        found.sort();
        found
    }

    fn client(&self, user: &str) -> Client {
        Client::new(&self.daemon, Wire::Grpc).with("authorization", &basic(user))
    }

    fn user(&self) -> Client {
        self.client(&format!("{UID}:{UID}"))
    }

    /// Whether nothing of root's is at or below a path that nobody exchanges.
    fn is_free_of_secrets(path: &Path) -> bool {
        let mut todo = vec![path.to_owned()];
        while let Some(path) = todo.pop() {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_file() && fs::read(&path).is_ok_and(|text| text == SECRET.as_bytes()) {
                return false;
            }
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
            }
        }
        true
    }

    /// Exchanges two names all the time while `round` is called again and again; how often that
    /// succeeded.
    async fn race(&self, names: (&str, &str), round: impl AsyncFnMut(usize) -> bool) -> usize {
        self.race_with_pauses(names, Duration::ZERO, round).await
    }

    /// As [`Self::race`], with a pause after each exchange.
    async fn race_with_pauses(
        &self,
        (a, b): (&str, &str),
        pause: Duration,
        mut round: impl AsyncFnMut(usize) -> bool,
    ) -> usize {
        let before = self.outside();
        let stop = Arc::new(AtomicBool::new(false));
        let swapping = std::thread::spawn({
            let (stop, a, b) = (Arc::clone(&stop), self.at(a), self.at(b));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let flags = RenameFlags::RENAME_EXCHANGE;
                    let _ = renameat2(AT_FDCWD, a.as_str(), AT_FDCWD, b.as_str(), flags);
                    if !pause.is_zero() {
                        std::thread::sleep(pause);
                    }
                }
            }
        });
        let mut done = 0;
        for number in 0..ROUNDS {
            done += usize::from(round(number).await);
            if number % 50 == 0 {
                assert_eq!(self.outside(), before, "round {number}");
            }
        }
        stop.store(true, Ordering::Relaxed);
        swapping.join().unwrap();
        assert_eq!(self.outside(), before);
        done
    }
}

async fn copy(client: &Client, from: &str, to: &str, preserve: bool) -> Result<(), Failure> {
    let (source, destination) = (from.to_owned(), to.to_owned());
    let request = CopyRequest { source, destination, preserve, create_only: false };
    client.unary::<_, CopyResponse>("/filesystem.Filesystem/Copy", &request).await.map(drop)
}

async fn archive(client: &Client, path: &str) -> Result<Vec<u8>, Failure> {
    let request = ArchiveRequest { path: path.to_owned(), ..ArchiveRequest::default() };
    let mut messages: Messages<ArchiveResponse> =
        client.stream("/filesystem.Filesystem/Archive", &request).await?;
    let mut bytes = Vec::new();
    while let Some(message) = messages.next().await? {
        bytes.extend_from_slice(&message.data);
    }
    Ok(bytes)
}

async fn extract(client: &Client, to: &str, tar: &[u8], preserve: bool) -> Result<(), Failure> {
    let start = extract_request::Start { path: to.to_owned(), preserve, ..Default::default() };
    let event = |event| ExtractRequest { event: Some(event) };
    let requests = [
        event(extract_request::Event::Start(start)),
        event(extract_request::Event::Data(Bytes::copy_from_slice(tar))),
    ];
    let mut messages: Messages<ExtractResponse> =
        client.streams("/filesystem.Filesystem/Extract", &requests).await?;
    messages.next().await.map(drop)
}

/// All that a search tells, as text.
async fn search(client: &Client, path: &str, pattern: &str) -> Result<String, Failure> {
    let request = SearchRequest {
        path: path.to_owned(),
        pattern: pattern.to_owned(),
        gitignore: true,
        hidden: true,
        include_entry: true,
        ..SearchRequest::default()
    };
    let mut messages: Messages<SearchResponse> =
        client.stream("/filesystem.Filesystem/Search", &request).await?;
    let mut told = String::new();
    while let Some(message) = messages.next().await? {
        if let Some(search_response::Event::Match(found)) = message.event {
            told.push_str(&format!("{} {}\n", found.path, String::from_utf8_lossy(&found.line)));
        }
    }
    Ok(told)
}

async fn watch(client: &Client, path: &str) -> Result<String, Failure> {
    let request = CreateWatcherRequest {
        path: path.to_owned(),
        recursive: true,
        ..CreateWatcherRequest::default()
    };
    let made: CreateWatcherResponse =
        client.unary("/filesystem.Filesystem/CreateWatcher", &request).await?;
    Ok(made.watcher_id)
}

async fn told(client: &Client, watcher_id: &str) -> Vec<String> {
    let request =
        GetWatcherEventsRequest { watcher_id: watcher_id.to_owned(), ..Default::default() };
    let events: GetWatcherEventsResponse =
        client.unary("/filesystem.Filesystem/GetWatcherEvents", &request).await.unwrap();
    events.events.into_iter().map(|event| event.name).collect()
}

async fn unwatch(client: &Client, watcher_id: String) {
    let request = RemoveWatcherRequest { watcher_id };
    let _: RemoveWatcherResponse =
        client.unary("/filesystem.Filesystem/RemoveWatcher", &request).await.unwrap();
}

/// An entry of an archive: type, name, mode, owner, and content or target.
type Entry<'a> = (tar::EntryType, &'a str, u32, u32, &'a str);

fn tar_of(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, mode, owner, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(*mode);
        header.set_uid((*owner).into());
        header.set_gid((*owner).into());
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        let content = if kind.is_file() { text.as_bytes() } else { b"" };
        if !kind.is_file() && !text.is_empty() {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn refused<T: std::fmt::Debug>(result: Result<T, Failure>) {
    let failure = result.unwrap_err();
    assert!(failure.message.contains("permission denied"), "{failure:?}");
}

#[tokio::test]
async fn trees_behind_planted_links_are_read_and_written_with_the_users_rights() {
    let Some(world) = World::new(&[]) else { return };
    let user = world.user();
    world.plant("root", "home/data");
    world.plant("root/secret", "home/file");
    world.plant("etc", "home/etc");
    let before = world.outside();
    for from in
        ["home/data/secret", "home/data/.", "home/etc/f", "home/etc/.", "home/../root/secret"]
    {
        refused(copy(&user, &world.at(from), &world.at("home/copy"), false).await);
        assert!(!world.path("home/copy").exists(), "{from}");
        refused(archive(&user, &world.at(from)).await);
    }
    refused(archive(&user, &world.at("home/file")).await);
    refused(archive(&user, &world.at("home/data")).await);
    world.file("home/own", 0o644);
    refused(copy(&user, &world.at("home/own"), &world.at("home/etc/own"), false).await);
    refused(copy(&user, &world.at("home/own"), &world.at("home/etc/a/own"), false).await);
    let packed = tar_of(&[(tar::EntryType::Regular, "bin/new", 0o755, 0, "x")]);
    refused(extract(&user, &world.at("home/etc"), &packed, false).await);
    refused(extract(&user, &world.at("home/data/sub"), &packed, false).await);
    refused(search(&user, &world.at("home/data"), "secret").await);
    let found = search(&user, &world.at("home/etc"), "secret").await.unwrap();
    assert_eq!(found, "");
    refused(watch(&user, &world.at("home/data")).await);
    assert_eq!(world.outside(), before);

    // A link to what the user may read is as good as the path.
    let id = watch(&user, &world.at("home/etc")).await.unwrap();
    fs::write(world.path("etc/new"), "").unwrap();
    assert!(told(&user, &id).await.contains(&"new".to_owned()));
    fs::remove_file(world.path("etc/new")).unwrap();
    unwatch(&user, id).await;
    // What the client names itself is root's business, and so is what a caller does who acts as root.
    copy(&user, &world.at("root/secret"), &world.at("home/named"), false).await.unwrap();
    assert_eq!(fs::metadata(world.path("home/named")).unwrap().uid(), UID);
    copy(&world.client("root"), &world.at("home/data/secret"), &world.at("home/by-root"), false)
        .await
        .unwrap();
    archive(&user, &world.at("root")).await.unwrap();
    assert!(!search(&user, &world.at("root"), "secret").await.unwrap().is_empty());
    let id = watch(&user, &world.at("root")).await.unwrap();
    unwatch(&user, id).await;
}

#[tokio::test]
async fn a_strict_daemon_reads_no_tree_that_the_user_may_not() {
    let Some(world) = World::new(&["--file-access", "strict"]) else { return };
    let user = world.user();
    world.file("home/own", 0o644);
    let before = world.outside();
    refused(copy(&user, &world.at("root/secret"), &world.at("home/copy"), false).await);
    refused(copy(&user, &world.at("home/own"), &world.at("etc/own"), false).await);
    refused(archive(&user, &world.at("root")).await);
    refused(search(&user, &world.at("root"), "secret").await);
    refused(watch(&user, &world.at("root")).await);
    let packed = tar_of(&[(tar::EntryType::Regular, "new", 0o755, 0, "x")]);
    refused(extract(&user, &world.at("etc"), &packed, false).await);
    assert_eq!(world.outside(), before);
    copy(&user, &world.at("home/own"), &world.at("home/copy"), true).await.unwrap();
    extract(&user, &world.at("home/to/deep"), &packed, true).await.unwrap();
    for name in ["home/copy", "home/to", "home/to/deep/new"] {
        assert_eq!(fs::metadata(world.path(name)).unwrap().uid(), UID, "{name}");
    }
}

#[tokio::test]
async fn hard_links_to_files_of_root_give_nothing_away() {
    let Some(world) = World::new(&[]) else { return };
    let user = world.user();
    world.dir("home/tree");
    world.file("home/tree/own", 0o644);
    // As the program can where fs.protected_hardlinks is 0.
    fs::hard_link(world.path("root/secret"), world.path("home/tree/linked")).unwrap();
    let before = world.outside();
    refused(copy(&user, &world.at("home/tree"), &world.at("home/copy"), false).await);
    refused(copy(&user, &world.at("home/tree/linked"), &world.at("home/copy"), false).await);
    refused(archive(&user, &world.at("home/tree")).await);
    assert_eq!(search(&user, &world.at("home/tree"), "secret").await.unwrap(), "");
    // As rules of what to leave out, a line of it would tell.
    fs::write(world.path("root/rules"), "own\n").unwrap();
    fs::set_permissions(world.path("root/rules"), Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(world.path("root/rules"), world.path("home/tree/.gitignore")).unwrap();
    let found = search(&user, &world.at("home/tree"), "the user's").await.unwrap();
    assert!(found.contains("/own "), "{found}");
    fs::remove_file(world.path("home/tree/.gitignore")).unwrap();
    fs::remove_file(world.path("root/rules")).unwrap();
    // Unpacked over, the name goes and the file stays.
    let packed = tar_of(&[(tar::EntryType::Regular, "linked", 0o644, 0, "x")]);
    extract(&user, &world.at("home/tree"), &packed, false).await.unwrap();
    assert_eq!(fs::metadata(world.path("home/tree/linked")).unwrap().uid(), UID);
    assert_eq!(world.outside(), before);
    assert!(!world.path("home/copy").exists());
}

#[tokio::test]
async fn what_replaces_a_file_has_no_rights_that_the_file_had() {
    let Some(world) = World::new(&[]) else { return };
    let mode = |name: &str| fs::metadata(world.path(name)).unwrap().mode() & 0o7777;
    let packed = tar_of(&[(tar::EntryType::Regular, "x", 0o6777, 0, "new content")]);
    fs::write(world.path("source"), "new content").unwrap();
    fs::set_permissions(world.path("source"), Permissions::from_mode(0o4755)).unwrap();
    let capability = [1, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for user in [world.client("root"), world.user()] {
        for round in 0..2 {
            let _ = fs::remove_file(world.path("home/x"));
            world.file("home/x", 0o6777);
            if xattr::set(world.path("home/x"), "security.capability", &capability).is_err() {
                crate::common::skipped::skip("a file system with capabilities of files");
            }
            match round {
                0 => extract(&user, &world.at("home"), &packed, false).await.unwrap(),
                _ => copy(&user, &world.at("source"), &world.at("home/x"), false).await.unwrap(),
            }
            assert_eq!(fs::read(world.path("home/x")).unwrap(), b"new content");
            assert_eq!(mode("home/x") & 0o6000, 0, "round {round}");
            let kept = xattr::get(world.path("home/x"), "security.capability");
            assert!(kept.ok().flatten().is_none());
        }
    }
    // Only root may keep them, and whoever asks for it as another user gets the rest.
    copy(&world.user(), &world.at("source"), &world.at("home/wished"), true).await.unwrap();
    copy(&world.client("root"), &world.at("source"), &world.at("kept"), true).await.unwrap();
    assert_eq!((mode("home/wished"), mode("kept")), (0o755, 0o4755));
    if xattr::set(world.path("source"), "security.capability", &capability).is_ok() {
        copy(&world.client("root"), &world.at("source"), &world.at("kept"), true).await.unwrap();
        assert!(xattr::get(world.path("kept"), "security.capability").unwrap().is_some());
        copy(&world.client("root"), &world.at("source"), &world.at("plain"), false).await.unwrap();
        assert!(xattr::get(world.path("plain"), "security.capability").unwrap().is_none());
    }
}

#[tokio::test]
async fn an_archive_decides_neither_owners_nor_rights() {
    use tar::EntryType as T;
    let Some(world) = World::new(&[]) else { return };
    fs::create_dir(world.path("home/app")).unwrap();
    fs::write(world.path("home/app/config"), "root's").unwrap();
    let before = world.outside();
    for preserve in [false, true] {
        let packed = tar_of(&[
            (T::Regular, "shell", 0o6755, 0, "x"),
            (T::Directory, "dir", 0o2777, 0, ""),
            (T::Symlink, "link", 0o777, 0, "../etc"),
            (T::Fifo, "fifo", 0o4666, 0, ""),
            // A directory of root's that is there.
            (T::Directory, "app", 0o777, UID, ""),
        ]);
        extract(&world.user(), &world.at("home"), &packed, preserve).await.unwrap();
        for name in ["shell", "dir", "link", "fifo"] {
            let meta = fs::symlink_metadata(world.path("home").join(name)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (UID, UID), "{name}");
            assert_eq!(meta.mode() & 0o6000, 0, "{name}");
        }
        let app = fs::metadata(world.path("home/app")).unwrap();
        assert_eq!((app.uid(), app.mode() & 0o7777), (0, 0o755));
        // Through the link that it brought, and by a hard link through it.
        for entry in [(T::Regular, "link/f", 0o644, 0, "x"), (T::Link, "hard", 0, 0, "link/f")] {
            let error =
                extract(&world.user(), &world.at("home"), &tar_of(&[entry]), preserve).await;
            assert_eq!(error.unwrap_err().code, "invalid_argument");
        }
        let device = tar_of(&[(T::Char, "null", 0o666, 0, "")]);
        let error = extract(&world.user(), &world.at("home"), &device, preserve).await;
        assert_eq!(error.unwrap_err().code, "failed_precondition");
    }
    // A link that stays inside is followed with the rights of whoever made it.
    fs::set_permissions(world.path("home/app"), Permissions::from_mode(0o700)).unwrap();
    let packed = tar_of(&[
        (T::Symlink, "to-app", 0, 0, "app"),
        (T::Regular, "to-app/config", 0o644, 0, "x"),
    ]);
    refused(extract(&world.user(), &world.at("home"), &packed, false).await);
    let config = fs::read(world.path("home/app/config")).unwrap();
    assert_eq!((config.as_slice(), world.outside()), (&b"root's"[..], before));
}

#[tokio::test]
async fn nothing_of_roots_is_unpacked_into_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    world.dir("home/p");
    world.plant("etc", "home/l");
    let user = world.user();
    let names: Vec<String> = (0..4).map(|number| format!("p/bin/x{number}")).collect();
    let mut entries: Vec<Entry<'_>> = vec![(tar::EntryType::Directory, "p/bin", 0o777, 0, "")];
    entries
        .extend(names.iter().map(|name| (tar::EntryType::Regular, name.as_str(), 0o777, 0, "x")));
    let (inside, through) =
        (tar_of(&entries), tar_of(&[(tar::EntryType::Fifo, "bin/x", 0, 0, "")]));
    let done = world
        .race(("home/p", "home/l"), async |round| match round % 2 {
            0 => extract(&user, &world.at("home"), &inside, false).await.is_ok(),
            _ => extract(&user, &world.at("home/p"), &through, true).await.is_ok(),
        })
        .await;
    assert!(done > 0);
}

#[tokio::test]
async fn nothing_of_roots_is_copied_or_archived_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    for name in ["home/src", "home/src/a", "home/src/a/bin"] {
        world.dir(name);
    }
    world.file("home/src/a/f", 0o644);
    world.file("home/src/a/bin/f", 0o644);
    world.plant("etc", "home/l");
    let user = world.user();
    let secret = SECRET.as_bytes();
    // The very directory, whatever its name is.
    let held = fs::File::open(world.path("home/src/a/bin")).unwrap();
    let inside = PathBuf::from(format!("/proc/self/fd/{}/copy", held.as_raw_fd()));
    let done = world
        .race(("home/src/a", "home/l"), async |round| match round % 4 {
            // Of the whole tree, through what is exchanged, to it, and as an archive.
            3 => archive(&user, &world.at("home/src")).await.is_ok_and(|bytes| {
                assert!(!bytes.windows(secret.len()).any(|part| part == secret));
                true
            }),
            kind => {
                let (from, to) = match kind {
                    0 => ("home/src", "home/copy"),
                    1 => ("home/src/a/f", "home/copy"),
                    _ => ("home/src/a/bin/f", "home/src/a/bin/copy"),
                };
                let copied = copy(&user, &world.at(from), &world.at(to), false).await;
                for copied in [&world.path("home/copy"), &inside] {
                    assert!(World::is_free_of_secrets(copied), "round {round}");
                    let _ = fs::remove_dir_all(copied);
                    let _ = fs::remove_file(copied);
                }
                copied.is_ok()
            }
        })
        .await;
    assert!(done > 0);
    let left = fs::read_dir(world.path("home")).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.starts_with(".envd-new-")), "{left:?}");
}

/// The temporary directory of a copy exchanged for one of root's in the same place.
#[tokio::test]
async fn a_copy_that_is_exchanged_while_it_is_made_gives_no_directory_of_roots_away() {
    let Some(world) = World::new(&[]) else { return };
    world.dir("home/src");
    world.file("home/src/f", 0o644);
    fs::create_dir(world.path("home/app")).unwrap();
    fs::write(world.path("home/app/config"), "root's").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    // Held while names are looked at, or exchanged.
    let names = Arc::new(Mutex::new(()));
    let swapping = std::thread::spawn({
        let (stop, names, home) = (Arc::clone(&stop), Arc::clone(&names), world.path("home"));
        move || {
            while !stop.load(Ordering::Relaxed) {
                let _names = names.lock().unwrap();
                for entry in fs::read_dir(&home).unwrap().flatten() {
                    if entry.file_name().to_string_lossy().starts_with(".envd-new-") {
                        let (a, b) = (entry.path(), home.join("app"));
                        let flags = RenameFlags::RENAME_EXCHANGE;
                        let _ = renameat2(AT_FDCWD, &a, AT_FDCWD, &b, flags);
                    }
                }
            }
        }
    });
    let (user, root) = (world.user(), world.client("root"));
    for round in 0..ROUNDS {
        let (client, preserve) = if round % 2 == 0 { (&user, false) } else { (&root, true) };
        let _ = copy(client, &world.at("home/src"), &world.at("home/copy"), preserve).await;
        // Wherever the directory with root's file is by now, it is as it was.
        let _names = names.lock().unwrap();
        for entry in fs::read_dir(world.path("home")).unwrap().flatten() {
            if entry.path().join("config").exists() {
                let meta = fs::metadata(entry.path()).unwrap();
                assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o755), "round {round}");
                assert!(!entry.path().join("f").exists(), "round {round}");
                let _ = fs::rename(entry.path(), world.path("app-back"));
            }
        }
        for entry in fs::read_dir(world.path("home")).unwrap().flatten() {
            if entry.file_name() != "src" {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        assert!(world.path("app-back/config").exists(), "round {round}: root's file is gone");
        fs::rename(world.path("app-back"), world.path("home/app")).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    swapping.join().unwrap();
}

#[tokio::test]
async fn nothing_of_roots_is_found_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    for name in ["home/src", "home/src/a"] {
        world.dir(name);
    }
    world.file("home/src/a/f", 0o644);
    world.plant("root", "home/l");
    let user = world.user();
    let done = world
        .race(("home/src/a", "home/l"), async |round| {
            let path = world.at(["home/src", "home/src/a", "home/src/a/secret"][round % 3]);
            let pattern = if round % 2 == 0 { "secret" } else { "" };
            let found = search(&user, &path, pattern).await;
            assert!(found.iter().all(|found| !found.contains("secret")), "{found:?}");
            found.is_ok()
        })
        .await;
    assert!(done > 0);
}

#[tokio::test]
async fn no_name_of_roots_is_told_to_a_watcher_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    for name in ["home/src", "home/src/a"] {
        world.dir(name);
    }
    world.file("home/src/a/f", 0o644);
    world.plant("root", "home/l");
    let user = world.user();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = std::thread::spawn({
        let (stop, path) = (Arc::clone(&stop), world.path("root/secret"));
        move || {
            let file = fs::File::options().write(true).open(path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                // A change of its times, of which a watcher is told.
                file.set_modified(std::time::SystemTime::now()).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let done = world
        // Each exchange is an event to be looked at, and a watcher waits for those before its call.
        .race_with_pauses(("home/src/a", "home/l"), Duration::from_millis(3), async |round| {
            let path = world.at(["home/src", "home/src/a"][round % 2]);
            let Ok(id) = watch(&user, &path).await else { return false };
            for name in told(&user, &id).await {
                assert!(!name.contains("secret"), "{name}");
            }
            unwatch(&user, id).await;
            true
        })
        .await;
    stop.store(true, Ordering::Relaxed);
    writing.join().unwrap();
    assert!(done > 0);
}

/// One thread serves all watchers: the rights of one are not those of another.
#[tokio::test]
async fn watchers_of_several_users_have_the_rights_of_each() {
    let Some(world) = World::new(&[]) else { return };
    world.plant("root", "home/data");
    let (user, root) = (world.user(), world.client("root"));
    let id = watch(&root, &world.at("home/data")).await.unwrap();
    for _ in 0..100 {
        refused(watch(&user, &world.at("home/data")).await);
        fs::write(world.path("root/new"), "").unwrap();
        fs::create_dir(world.path("root/dir")).unwrap();
        fs::write(world.path("root/dir/deep"), "").unwrap();
        assert!(told(&root, &id).await.contains(&"dir/deep".to_owned()));
        fs::remove_dir_all(world.path("root/dir")).unwrap();
    }
    let path = Path::new("/proc").join(world.daemon.pid().to_string()).join("task");
    for thread in fs::read_dir(path).unwrap().flatten() {
        let status = fs::read_to_string(thread.path().join("status")).unwrap();
        let uids = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
        assert_eq!(uids, "Uid:\t0\t0\t0\t0", "{status}");
    }
}
