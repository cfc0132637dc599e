//! Watching as its users see it, with a real kernel.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink},
    time::Duration,
};

use super::{
    WatchKind::{Chmod, Create, Remove, Rename, Write},
    tree::Tree,
    *,
};
use crate::fs::{
    resolve::own_actor,
    transfer::{Writer, Writers},
};

const RECURSIVE: WatchOptions = WatchOptions {
    recursive: true,
    include_entry: false,
    allow_network_mounts: false,
    cursors: false,
};

/// Without the rescans.
fn events(told: Vec<Told>) -> Vec<WatchEvent> {
    let events = told.into_iter().filter_map(|told| match told.item {
        Item::Event(event) => Some(event),
        Item::Rescan(_) => None,
    });
    events.collect()
}

/// Whoever runs the tests.
pub(super) fn actor() -> Actor {
    own_actor()
}

fn hub() -> Arc<Hub> {
    Hub::new(Arc::new(Users::system()), Pool::for_files(), Retention::default())
}

fn upload(hub: &Arc<Hub>, path: &Path, content: &[u8], metadata: &BTreeMap<String, String>) {
    let mut writer = Writer::create(&Writers::beside(Arc::clone(hub)), path, &own_actor()).unwrap();
    writer.write(content).unwrap();
    writer.finish(metadata).unwrap();
}

struct Fixture {
    tmp: tempfile::TempDir,
    hub: Arc<Hub>,
    ids: Vec<String>,
}

impl Fixture {
    async fn new(options: WatchOptions) -> Self {
        let tmp = tempfile::tempdir_in(".").unwrap();
        let hub = hub();
        let mut fixture = Self { tmp, hub, ids: Vec::new() };
        fs::create_dir(fixture.path("root")).unwrap();
        fixture.watch("root", options).await;
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join(name)
    }

    async fn watch(&mut self, name: &str, options: WatchOptions) {
        self.ids.push(self.hub.create_polled(&self.path(name), &actor(), options).await.unwrap());
    }

    async fn events_of(&self, watcher: usize) -> Vec<(WatchKind, String)> {
        let events = self.taken(watcher).await;
        let mut events: Vec<_> = events.into_iter().map(|e| (e.kind, e.name)).collect();
        // To truncate and to write are two events, unless the kernel joins them in its queue.
        events.dedup_by(|a, b| a == b && a.0 == Write);
        events
    }

    async fn taken(&self, watcher: usize) -> Vec<WatchEvent> {
        events(self.hub.take_events(&self.ids[watcher], None).await.unwrap().0)
    }

    async fn expect(&self, wanted: &[(WatchKind, &str)]) {
        self.expect_of(0, wanted).await;
    }

    async fn expect_of(&self, watcher: usize, wanted: &[(WatchKind, &str)]) {
        let wanted: Vec<_> =
            wanted.iter().map(|(kind, name)| (*kind, (*name).to_owned())).collect();
        assert_eq!(self.events_of(watcher).await, wanted);
    }
}

#[tokio::test]
async fn an_upload_is_told_as_clients_assert_it() {
    let f = Fixture::new(WatchOptions::default()).await;
    let none = BTreeMap::new();
    upload(&f.hub, &f.path("root/new"), b"hello", &none);
    f.expect(&[(Create, "new"), (Chmod, "new"), (Write, "new")]).await;
    upload(&f.hub, &f.path("root/new"), b"hello", &none);
    f.expect(&[(Chmod, "new"), (Write, "new")]).await;
    // A body that waits on the disk: its file without a name is not told.
    upload(&f.hub, &f.path("root/new"), &vec![7; 3 << 20], &none);
    f.expect(&[(Chmod, "new"), (Write, "new")]).await;
    upload(&f.hub, &f.path("root/new"), b"", &BTreeMap::from([("a".to_owned(), "b".to_owned())]));
    f.expect(&[(Chmod, "new"), (Write, "new"), (Chmod, "new")]).await;
    let actor = own_actor();
    super::super::dir::make_dir(&f.path("root/d"), &actor, &Users::system()).unwrap();
    f.expect(&[(Create, "d"), (Chmod, "d")]).await;
    fs::write(f.path("root/#12"), "a file with such a name").unwrap();
    f.expect(&[(Create, "#12"), (Write, "#12")]).await;
    fs::write(f.path("root/d/inside"), "not recursive").unwrap();
    fs::remove_file(f.path("root/new")).unwrap();
    f.expect(&[(Remove, "new")]).await;
}

#[tokio::test]
async fn entries_are_told_when_asked_for() {
    let options = WatchOptions { include_entry: true, ..WatchOptions::default() };
    let f = Fixture::new(options).await;
    fs::write(f.path("root/a"), "abc").unwrap();
    let events = f.taken(0).await;
    // Taken when the event is: the write may have been then, or not yet.
    let entry = events.last().unwrap().entry.as_ref().unwrap();
    assert_eq!((entry.name.as_str(), entry.size), ("a", 3));
    assert_eq!(Path::new(&entry.path), crate::fs::path::clean(&f.path("root/a")));
    fs::rename(f.path("root/a"), f.path("root/b")).unwrap();
    let events = f.taken(0).await;
    let has: Vec<_> = events.iter().map(|e| (e.kind, e.entry.is_some())).collect();
    assert_eq!(has, [(Rename, false), (Create, true)]);
}

#[tokio::test]
async fn a_burst_of_nested_directories_loses_nothing_and_tells_nothing_twice() {
    let f = Fixture::new(RECURSIVE).await;
    let mut wanted = HashSet::new();
    let mut told: HashMap<String, u32> = HashMap::new();
    let mut count = |events: Vec<(WatchKind, String)>| {
        for (_, name) in events.into_iter().filter(|(kind, _)| *kind == Create) {
            *told.entry(name).or_default() += 1;
        }
    };
    for i in 0..200 {
        fs::create_dir_all(f.path(&format!("root/{i}/a/b/c"))).unwrap();
        fs::write(f.path(&format!("root/{i}/a/b/c/file")), "x").unwrap();
        wanted.extend(["", "/a", "/a/b", "/a/b/c", "/a/b/c/file"].map(|end| format!("{i}{end}")));
        if i % 7 == 0 {
            count(f.events_of(0).await);
        }
    }
    count(f.events_of(0).await);
    assert_eq!(told.keys().cloned().collect::<HashSet<_>>(), wanted);
    let twice: Vec<_> = told.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    // And what happens there later is told.
    fs::write(f.path("root/99/a/b/c/file"), "y").unwrap();
    assert!(f.events_of(0).await.contains(&(Write, "99/a/b/c/file".to_owned())));
}

#[tokio::test]
async fn directories_that_live_for_a_moment_do_no_harm() {
    let mut f = Fixture::new(RECURSIVE).await;
    f.watch("root", RECURSIVE).await;
    for i in 0..1000 {
        fs::create_dir_all(f.path(&format!("root/{}/x", i % 3))).unwrap();
        fs::remove_dir_all(f.path(&format!("root/{}", i % 3))).unwrap();
        if i % 100 == 0 {
            f.events_of(0).await;
        }
    }
    for watcher in [0, 1] {
        let events = f.events_of(watcher).await;
        let count = |kind| events.iter().filter(|(k, n)| *k == kind && !n.contains('/')).count();
        assert_eq!(count(Create), count(Remove));
    }
    fs::create_dir(f.path("root/d")).unwrap();
    f.expect(&[(Create, "d")]).await;
    fs::write(f.path("root/d/f"), "x").unwrap();
    f.expect(&[(Create, "d/f"), (Write, "d/f")]).await;
    f.hub.remove_polled(&f.ids[0]).unwrap();
}

#[tokio::test]
async fn a_renamed_directory_goes_on_under_its_new_name() {
    let f = Fixture::new(RECURSIVE).await;
    fs::create_dir_all(f.path("root/a/b")).unwrap();
    fs::create_dir_all(f.path("root/a2/b")).unwrap();
    fs::create_dir_all(f.path("outside/x/y")).unwrap();
    f.events_of(0).await;
    fs::rename(f.path("root/a"), f.path("root/z")).unwrap();
    f.expect(&[(Rename, "a"), (Create, "z")]).await;
    fs::write(f.path("root/z/b/f"), "x").unwrap();
    fs::write(f.path("root/a2/b/f"), "").unwrap();
    f.expect(&[(Create, "z/b/f"), (Write, "z/b/f"), (Create, "a2/b/f")]).await;

    // Into a directory that is new itself.
    fs::create_dir(f.path("root/n")).unwrap();
    fs::rename(f.path("root/z"), f.path("root/n/z")).unwrap();
    f.events_of(0).await;
    fs::write(f.path("root/n/z/b/f"), "y").unwrap();
    f.expect(&[(Write, "n/z/b/f")]).await;

    // Out of the tree, and in again.
    fs::rename(f.path("root/n"), f.path("outside/n")).unwrap();
    f.expect(&[(Rename, "n")]).await;
    fs::write(f.path("outside/n/z/b/f"), "y").unwrap();
    f.expect(&[]).await;
    fs::rename(f.path("outside"), f.path("root/in")).unwrap();
    let events = f.events_of(0).await;
    for name in ["in", "in/n", "in/n/z", "in/n/z/b", "in/n/z/b/f", "in/x", "in/x/y"] {
        let times = events.iter().filter(|event| **event == (Create, name.to_owned())).count();
        assert_eq!(times, 1, "{name}: {events:?}");
    }
    fs::write(f.path("root/in/x/y/f"), "").unwrap();
    f.expect(&[(Create, "in/x/y/f")]).await;
}

#[tokio::test]
async fn exchanged_directories_are_both_watched_under_their_new_names() {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    let f = Fixture::new(RECURSIVE).await;
    fs::create_dir(f.path("root/a")).unwrap();
    fs::create_dir(f.path("root/b")).unwrap();
    fs::write(f.path("root/a/was-a"), "").unwrap();
    let (a, b) = (f.path("root/a"), f.path("root/b"));
    f.events_of(0).await;
    renameat2(AT_FDCWD, &a, AT_FDCWD, &b, RenameFlags::RENAME_EXCHANGE).unwrap();
    f.events_of(0).await;
    fs::write(f.path("root/b/was-a"), "x").unwrap();
    fs::write(f.path("root/a/new"), "").unwrap();
    f.expect(&[(Write, "b/was-a"), (Create, "a/new")]).await;
}

#[tokio::test]
async fn files_replaced_by_rename_are_told() {
    let f = Fixture::new(RECURSIVE).await;
    fs::write(f.path("root/f"), "").unwrap();
    fs::write(f.path("root/t"), "").unwrap();
    f.events_of(0).await;
    fs::rename(f.path("root/t"), f.path("root/f")).unwrap();
    f.expect(&[(Rename, "t"), (Create, "f")]).await;
}

#[tokio::test]
async fn a_root_that_goes_away_is_told_and_ends_nothing() {
    let mut f = Fixture::new(RECURSIVE).await;
    fs::create_dir(f.path("moved")).unwrap();
    f.watch("moved", RECURSIVE).await;
    fs::create_dir(f.path("root/d")).unwrap();
    fs::remove_dir_all(f.path("root")).unwrap();
    f.expect(&[(Create, "d"), (Remove, "d"), (Remove, ".")]).await;
    fs::create_dir(f.path("root")).unwrap();
    f.expect(&[]).await;

    fs::rename(f.path("moved"), f.path("elsewhere")).unwrap();
    fs::write(f.path("elsewhere/f"), "").unwrap();
    f.expect_of(1, &[(Rename, ".")]).await;
    f.hub.remove_polled(&f.ids[0]).unwrap();
}

#[tokio::test]
async fn watchers_share_directories() {
    let mut f = Fixture::new(WatchOptions::default()).await;
    fs::create_dir(f.path("root/d")).unwrap();
    symlink("root/d", f.path("link")).unwrap();
    f.watch("root/d", WatchOptions::default()).await;
    f.watch("root", RECURSIVE).await;
    f.watch("link", RECURSIVE).await;
    f.events_of(0).await;
    fs::write(f.path("root/d/f"), "").unwrap();
    f.expect_of(0, &[]).await;
    f.expect_of(1, &[(Create, "f")]).await;
    f.expect_of(2, &[(Create, "d/f")]).await;
    f.expect_of(3, &[(Create, "f")]).await;
    f.hub.remove_polled(&f.ids[2]).unwrap();
    fs::set_permissions(f.path("root/d"), fs::metadata(".").unwrap().permissions()).unwrap();
    f.expect_of(0, &[(Chmod, "d")]).await;
    f.expect_of(1, &[(Chmod, ".")]).await;
    fs::remove_dir_all(f.path("root/d")).unwrap();
    f.expect_of(0, &[(Remove, "d")]).await;
    f.expect_of(1, &[(Remove, "f"), (Remove, ".")]).await;
}

#[tokio::test]
async fn names_that_are_not_utf_8_are_told() {
    let f = Fixture::new(RECURSIVE).await;
    let dir = f.path("root").join(OsStr::from_bytes(b"\xff"));
    fs::create_dir(&dir).unwrap();
    f.expect(&[(Create, "\u{fffd}")]).await;
    fs::write(dir.join("f"), "").unwrap();
    f.expect(&[(Create, "\u{fffd}/f")]).await;
}

#[tokio::test]
async fn a_stream_waits_and_the_thread_ends_with_the_last_watcher() {
    let tmp = tempfile::tempdir_in(".").unwrap();
    let hub = hub();
    let watcher = hub.watch(tmp.path(), &actor(), WatchOptions::default()).await.unwrap();
    let late = tmp.path().join("late");
    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        fs::write(late, "").unwrap();
    });
    let event = events(vec![watcher.next().await.unwrap()]).remove(0);
    assert_eq!((event.kind, event.name.as_str()), (Create, "late"));
    writer.join().unwrap();
    assert!(hub.shared.is_running());
    drop(watcher);
    for _ in 0..500 {
        if !hub.shared.is_running() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!hub.shared.is_running());
    // And another starts with the next.
    let watcher = hub.watch(tmp.path(), &actor(), WatchOptions::default()).await.unwrap();
    fs::remove_file(tmp.path().join("late")).unwrap();
    assert_eq!(events(vec![watcher.next().await.unwrap()])[0].kind, Remove);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_that_come_and_go_at_once_start_and_end_the_thread_without_loss() {
    let tmp = tempfile::tempdir_in(".").unwrap();
    let hub = hub();
    let tasks: Vec<_> = (0..4)
        .map(|i| {
            let (hub, root) = (Arc::clone(&hub), tmp.path().to_owned());
            tokio::spawn(async move {
                for round in 0..50 {
                    let id = hub.create_polled(&root, &actor(), RECURSIVE).await.unwrap();
                    let name = format!("{i}-{round}");
                    fs::create_dir(root.join(&name)).unwrap();
                    let events = events(hub.take_events(&id, None).await.unwrap().0);
                    assert!(events.iter().any(|e| e.kind == Create && e.name == name), "{name}");
                    hub.remove_polled(&id).unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn errors_are_upstreams() {
    let tmp = tempfile::tempdir_in(".").unwrap();
    let hub = hub();
    let shown = tmp.path().display();
    fs::write(tmp.path().join("f"), "").unwrap();
    let cases = [
        ("no", format!("path {shown}/no not found: stat {shown}/no: no such file or directory")),
        ("f", format!("path {shown}/f not a directory")),
        ("f/x", format!("error statting path {shown}/f/x: stat {shown}/f/x: not a directory")),
    ];
    for (name, wanted) in cases {
        let error = hub.watch(&tmp.path().join(name), &actor(), RECURSIVE).await.unwrap_err();
        assert_eq!(error.to_string(), wanted);
    }
    let error = hub.take_events("w1", None).await.unwrap_err();
    assert_eq!(error.to_string(), "watcher with id w1 not found");
    hub.remove_polled("w1").unwrap_err();
    let id = hub.create_polled(tmp.path(), &actor(), RECURSIVE).await.unwrap();
    let rest = id.strip_prefix('w').unwrap();
    assert!(rest.len() == 20 && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
    for _ in 1..MAX_POLLED_WATCHERS {
        hub.create_polled(tmp.path(), &actor(), WatchOptions::default()).await.unwrap();
    }
    let error = hub.create_polled(tmp.path(), &actor(), RECURSIVE).await.unwrap_err();
    assert_eq!(error.kind(), crate::fs::Kind::ResourceExhausted);
}

/// The kernel's limit is the whole machine's, so the events are thrown away here instead.
#[test]
fn after_an_overflow_all_that_differs_is_told() {
    use nix::sys::inotify::{InitFlags, Inotify};
    let tmp = tempfile::tempdir_in(".").unwrap();
    let path = |name: &str| tmp.path().join("root").join(name);
    for dir in ["gone/x", "stays", "swapped/old", "moves/in"] {
        fs::create_dir_all(path(dir)).unwrap();
    }
    fs::write(path("stays/gone"), "").unwrap();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
    let mut tree = Tree::new(inotify, Arc::new(Users::system()));
    let queue = Arc::new(Queue::new(RECURSIVE));
    let (done, _added) = oneshot::channel();
    tree.add(1, (tmp.path().join("root"), actor()), RECURSIVE, Arc::clone(&queue), done);
    assert_eq!(tree.dirs.len(), 8);

    fs::remove_dir_all(path("gone")).unwrap();
    fs::remove_file(path("stays/gone")).unwrap();
    fs::write(path("stays/new"), "").unwrap();
    fs::create_dir_all(path("new/deep")).unwrap();
    fs::write(path("new/deep/f"), "").unwrap();
    fs::rename(path("moves"), path("moved")).unwrap();
    fs::rename(path("swapped"), tmp.path().join("away")).unwrap();
    fs::create_dir_all(path("swapped/young")).unwrap();
    while tree.inotify.read_events().is_ok() {}
    tree.rescan();

    let mut told: Vec<_> =
        events(queue.take_all().0).into_iter().map(|e| (e.name, e.kind)).collect();
    told.sort_by(|a, b| a.0.cmp(&b.0));
    let wanted: Vec<_> = [
        ("gone", Remove),
        ("moved", Create),
        ("moved/in", Create),
        ("moves", Remove),
        ("new", Create),
        ("new/deep", Create),
        ("new/deep/f", Create),
        ("stays/gone", Remove),
        ("stays/new", Create),
        ("swapped", Remove),
        ("swapped", Create),
        ("swapped/young", Create),
    ]
    .map(|(name, kind)| (name.to_owned(), kind))
    .into();
    assert_eq!(told, wanted);

    fs::write(path("moved/in/f"), "").unwrap();
    fs::write(path("swapped/young/f"), "").unwrap();
    fs::write(tmp.path().join("away/old/f"), "").unwrap();
    tree.drain().unwrap();
    let told: Vec<_> = events(queue.take_all().0).into_iter().map(|e| (e.name, e.kind)).collect();
    let later = ["moved/in/f", "swapped/young/f"].map(|name| (name.to_owned(), Create));
    assert_eq!(told, later);

    fs::remove_dir_all(path("")).unwrap();
    while tree.inotify.read_events().is_ok() {}
    tree.rescan();
    let told: Vec<_> = events(queue.take_all().0).into_iter().map(|e| (e.name, e.kind)).collect();
    assert!(told.contains(&(".".to_owned(), Remove)), "{told:?}");
    assert!(tree.dirs.is_empty());
    tree.remove(1);
    assert!(tree.names_are_counted_to_zero());
}
