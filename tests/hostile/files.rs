//! Files: a program of a user plants links, hard links and set-id bits, and exchanges what a client
//! names for a link, in order to have the daemon touch with root's rights what it may not touch
//! itself. What a client acting as that user reads, writes and puts together.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use bytes::Bytes;
use envd::{
    proto::filesystem::{ReadRequest, ReadResponse, WriteRequest, WriteResponse, write_request},
    sys::fs_credentials::{FsCredentials, FsIdentity},
};
use nix::{
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    mount::{MntFlags, MsFlags, mount, umount2},
};
use serde_json::{Value, json};

use crate::common::{
    Daemon, able, basic, eventually, is_root, offered,
    rpc::{Client, Failure, Messages, Wire},
    soon,
};

/// The program's user, whom nothing else of the machine belongs to.
const UID: u32 = 54_321;
const SECRET: &str = "root's secret\n";
/// The rounds of each race.
const ROUNDS: usize = 1000;

/// Runs `work` with the rights of the program's user.
fn as_program<T>(work: impl FnOnce() -> T) -> T {
    let user = Arc::new(FsIdentity { uid: UID, gid: UID, groups: vec![UID] });
    let _rights = FsCredentials::assume(&user).unwrap();
    work()
}

/// A daemon, and a directory with a `home` of the program's user, and `etc` and `root` of root's.
struct World {
    daemon: Daemon,
    http: reqwest::Client,
    dir: PathBuf,
    _tmp: tempfile::TempDir,
    overlay: bool,
}

impl Drop for World {
    fn drop(&mut self) {
        if self.overlay {
            let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        }
    }
}

impl World {
    fn new(args: &[&str]) -> Option<Self> {
        able("root", is_root()).then(|| Self::at(args, false)).flatten()
    }

    fn at(args: &[&str], overlay: bool) -> Option<Self> {
        let tmp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(tmp.path()).unwrap();
        fs::set_permissions(&root, Permissions::from_mode(0o755)).unwrap();
        let dir = root.join("world");
        for name in ["world", "lower", "upper", "work"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        if overlay {
            // What is in the lower layer is copied up by the first change.
            Self::fill(&root.join("lower"));
            let options = ["lower", "upper", "work"]
                .map(|name| format!("{name}dir={}", root.join(name).display()))
                .join(",");
            let mounted =
                mount(Some("overlay"), &dir, Some("overlay"), MsFlags::empty(), Some(&*options));
            // Not on top of another overlay.
            let why = format!("an overlay: {mounted:?}");
            if !offered(&why, mounted.is_ok()) {
                return None;
            }
        } else {
            Self::fill(&dir);
        }
        let daemon = Daemon::start(args);
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Some(Self { daemon, http, dir, _tmp: tmp, overlay })
    }

    fn fill(dir: &Path) {
        for name in ["home", "etc", "root"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        chown(dir.join("home"), Some(UID), Some(UID)).unwrap();
        fs::set_permissions(dir.join("root"), Permissions::from_mode(0o700)).unwrap();
        for name in ["etc/shadow", "root/secret"] {
            fs::write(dir.join(name), SECRET).unwrap();
            fs::set_permissions(dir.join(name), Permissions::from_mode(0o600)).unwrap();
        }
    }

    fn at_path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    fn plant(&self, target: &str, link: &str) {
        let (target, link) = (self.dir.join(target), self.dir.join(link));
        as_program(|| symlink(target, link)).unwrap();
    }

    /// Everything outside of `home`: paths, owners, modes, sizes and contents.
    fn outside(&self) -> Vec<(PathBuf, u32, u32, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut todo = vec![self.dir.join("etc"), self.dir.join("root")];
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
        let client = Client::new(&self.daemon, Wire::Connect { json: true });
        client.with("authorization", &basic(user))
    }

    fn files(&self, path: &str, user: &str) -> reqwest::Url {
        let url = self.daemon.url("/files");
        let parameters = [("path", path), ("username", user)];
        reqwest::Url::parse_with_params(&url, parameters).unwrap()
    }

    async fn upload(&self, path: &str, user: &str, body: &[u8]) -> (u16, String) {
        let request = self.http.post(self.files(path, user)).body(body.to_vec());
        let request = request.header("content-type", "application/octet-stream");
        let answer = soon("an upload", request.send()).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    async fn download(&self, path: &str, user: &str) -> (u16, String) {
        let request = self.http.get(self.files(path, user));
        let answer = soon("a download", request.send()).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    async fn compose(&self, parts: &[String], to: &str, user: &str) -> (u16, Value) {
        let body = json!({"source_paths": parts, "destination": to, "username": user});
        let request = self.http.post(self.daemon.url("/files/compose")).json(&body);
        let answer = soon("composing", request.send()).await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn write(&self, start: write_request::Start, user: &str) -> Result<(), Failure> {
        let event = |event| WriteRequest { event: Some(event) };
        let data = Bytes::from_static(b"client's");
        let requests = [
            event(write_request::Event::Start(start)),
            event(write_request::Event::Chunk(write_request::Chunk { offset: None, data })),
            event(write_request::Event::Commit(write_request::Commit::default())),
        ];
        let call = self.client(user);
        let mut answers: Messages<WriteResponse> =
            call.streams("/filesystem.Filesystem/Write", &requests).await?;
        answers.next().await.map(drop)
    }

    async fn read(&self, path: &str, user: &str) -> Result<String, Failure> {
        let request = ReadRequest { path: path.to_owned(), ..ReadRequest::default() };
        let mut answers: Messages<ReadResponse> =
            self.client(user).stream("/filesystem.Filesystem/Read", &request).await?;
        let mut said = String::new();
        while let Some(answer) = answers.next().await? {
            said.push_str(&format!("{answer:?}"));
        }
        Ok(said)
    }
}

fn start(path: &str) -> write_request::Start {
    write_request::Start { path: path.to_owned(), ..write_request::Start::default() }
}

/// Exchanges two names for ever, with the rights of the program's user, until it is dropped.
struct Exchanging {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Exchanging {
    fn begin(a: String, b: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            as_program(|| {
                let mut done = 0;
                while !stopped.load(Ordering::Relaxed) {
                    let flags = RenameFlags::RENAME_EXCHANGE;
                    done += u64::from(
                        renameat2(AT_FDCWD, a.as_str(), AT_FDCWD, b.as_str(), flags).is_ok(),
                    );
                }
                done
            })
        });
        Self { stop, thread: Some(thread) }
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Exchanging {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Every way through something that the program planted, and what is refused.
async fn links_lead_where_the_user_may_go(world: &World) {
    let user = &format!("{UID}:{UID}");
    world.plant("etc/shadow", "home/file");
    world.plant("etc/new", "home/dangling");
    world.plant("etc", "home/dir");
    world.plant("root/secret", "home/secret");
    let before = world.outside();
    let home = |name: &str| world.at_path(&format!("home/{name}"));
    let up = world.at_path("home/../etc/shadow");
    for path in
        [home("file"), home("dangling"), home("dir/shadow"), home("dir/x"), home("dir/a/b"), up]
    {
        let (status, said) = world.upload(&path, user, b"client's").await;
        assert_eq!((status, said.contains("permission denied")), (500, true), "{path}: {said}");
        let failure = world.write(start(&path), user).await.unwrap_err();
        assert!(failure.message.contains("permission denied"), "{path}: {failure:?}");
        let part = home("part");
        fs::write(&part, "part").unwrap();
        // The link itself is replaced where it is the last name: it is in the user's directory.
        if path.contains("/dir/") || path.contains("..") {
            let (status, said) = world.compose(std::slice::from_ref(&part), &path, user).await;
            assert_eq!(status, 500, "{path}: {said}");
        }
        assert_eq!(world.outside(), before, "{path}");
    }
    for path in [home("secret"), home("file"), home("dir/shadow"), home("dir/../root/secret")] {
        let (status, said) = world.download(&path, user).await;
        assert_eq!((status, said.contains("secret\n")), (500, false), "{path}: {said}");
        let failure = world.read(&path, user).await.unwrap_err();
        assert!(failure.message.contains("permission denied"), "{path}: {failure:?}");
        let part = home("part");
        fs::write(&part, "part").unwrap();
        let (status, said) = world.compose(&[part, path.clone()], &home("whole"), user).await;
        assert_ne!(status, 200, "{path}: {said}");
        assert!(!Path::new(&home("whole")).exists());
    }
    // What the user may do, a link of theirs leads to.
    fs::create_dir(home("app")).unwrap();
    chown(home("app"), Some(UID), Some(UID)).unwrap();
    world.plant("home/app", "home/current");
    let (status, said) = world.upload(&home("current/a/b"), user, b"client's").await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(fs::metadata(home("app/a")).unwrap().uid(), UID);
    world.write(start(&home("current/a/b")), user).await.unwrap();
    assert_eq!(world.download(&home("current/a/b"), user).await, (200, "client's".into()));
    // What the client names itself is root's business, as E2B's clients rely on; so is what a caller
    // does who acts as root.
    let direct = world.at_path("root/direct/x");
    assert_eq!(world.upload(&direct, user, b"client's").await.0, 200);
    assert_eq!(world.download(&direct, user).await, (200, "client's".into()));
    assert_eq!(world.download(&home("secret"), "root").await, (200, SECRET.into()));
    let meta = fs::metadata(&direct).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (UID, UID));
    let left = fs::read_dir(home("")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(".envd")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn planted_links_lead_only_where_their_user_may_go() {
    let Some(world) = World::new(&[]) else { return };
    links_lead_where_the_user_may_go(&world).await;
}

#[tokio::test]
async fn planted_links_on_an_overlay_lead_only_where_their_user_may_go() {
    if !able("root", is_root()) {
        return;
    }
    let Some(world) = World::at(&[], true) else { return };
    links_lead_where_the_user_may_go(&world).await;
}

/// A daemon that is root in a user namespace of its own, in which ids are what they are outside. None
/// where there are no such namespaces.
fn in_user_namespace(dir: &Path) -> Option<Daemon> {
    let ready = dir.join("userns");
    fs::create_dir(&ready).unwrap();
    // Before its ids are mapped it is nobody.
    fs::set_permissions(&ready, Permissions::from_mode(0o777)).unwrap();
    let probe = Command::new("unshare").args(["--user", "true"]).output();
    let possible = probe.is_ok_and(|probe| probe.status.success());
    if !offered("unshare and user namespaces", possible) {
        return None;
    }
    let script = r#"echo $$ > "$0/pid.new"; mv "$0/pid.new" "$0/pid"
        until [ -e "$0/mapped" ]; do sleep 0.05; done
        exec "$@""#;
    let envd = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    let mut command = Command::new("unshare");
    command.args(["--user", "sh", "-c", script]).arg(&ready);
    command.arg(envd.get_program()).args(envd.get_args());
    let mapping = std::thread::spawn(move || {
        let pid = eventually("it has a namespace", || fs::read_to_string(ready.join("pid")).ok());
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{map}", pid.trim()), "0 0 65536\n").unwrap();
        }
        fs::write(ready.join("mapped"), "").unwrap();
    });
    let daemon = Daemon::spawn(&mut command);
    mapping.join().unwrap();
    Some(daemon)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_user_namespace_planted_links_lead_only_where_their_user_may_go() {
    let Some(mut world) = World::new(&[]) else { return };
    let Some(daemon) = in_user_namespace(&world.dir) else { return };
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(fs::read_link(format!("/proc/{}/ns/user", daemon.pid())).unwrap(), own);
    world.daemon = daemon;
    links_lead_where_the_user_may_go(&world).await;
}

/// fs.protected_regular as it was.
struct Protected(String);

const PROTECTED_REGULAR: &str = "/proc/sys/fs/protected_regular";

impl Protected {
    /// Sets it to 2; none where that is not possible.
    fn fully() -> Option<Self> {
        let before = fs::read_to_string(PROTECTED_REGULAR).ok();
        let set = before.is_some() && fs::write(PROTECTED_REGULAR, "2").is_ok();
        offered("fs.protected_regular, and the right to set it", set).then(|| before.map(Self))?
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        let _ = fs::write(PROTECTED_REGULAR, &self.0);
    }
}

/// The kernel then refuses `O_CREAT` of another's file in a sticky directory that all may write, to root
/// as well.
#[tokio::test]
async fn in_a_sticky_directory_files_of_others_are_written_under_protected_regular() {
    let Some(world) = World::new(&[]) else { return };
    let Some(_protected) = Protected::fully() else { return };
    let tmp = world.at_path("tmp");
    fs::create_dir(&tmp).unwrap();
    fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).unwrap();
    let user = format!("{UID}:{UID}");
    for (owner, user, may) in
        [(UID, "root", true), (UID, &*user, true), (0, "root", true), (UID + 1, &*user, true)]
    {
        let path = world.at_path("tmp/file");
        for number in 0..3 {
            fs::write(&path, "old").unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
            let done = match number {
                0 => world.upload(&path, user, b"client's").await.0 == 200,
                1 => world.write(start(&path), user).await.is_ok(),
                _ => {
                    let part = world.at_path("tmp/part");
                    fs::write(&part, "client's").unwrap();
                    world.compose(&[part], &path, user).await.0 == 200
                }
            };
            assert_eq!(done, may, "{owner} {user} {number}");
            assert_eq!(fs::read(&path).unwrap(), b"client's", "{owner} {user} {number}");
            fs::remove_file(&path).unwrap();
        }
        // A new one, and nothing else is left.
        assert_eq!(world.upload(&path, user, b"client's").await.0, 200);
        fs::remove_file(&path).unwrap();
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn nothing_in_procfs_is_reached_through_a_link_of_the_users() {
    let Some(world) = World::new(&[]) else { return };
    let user = &format!("{UID}:{UID}");
    for target in ["/proc/self/environ", "/proc/self/maps", "/proc/self/fd/0", "/proc/cpuinfo"] {
        let link = world.at_path("home/proc");
        as_program(|| symlink(target, &link)).unwrap();
        let (status, said) = world.download(&link, user).await;
        assert_eq!((status, said.contains("permission denied")), (500, true), "{target}: {said}");
        world.read(&link, user).await.unwrap_err();
        fs::remove_file(&link).unwrap();
    }
    // By its own name it is what the client asked for.
    assert_eq!(world.download("/proc/cpuinfo", user).await.0, 200);
}

#[tokio::test]
async fn a_file_of_anothers_with_several_names_is_not_the_users() {
    let Some(world) = World::new(&[]) else { return };
    let user = &format!("{UID}:{UID}");
    // As the program could itself with fs.protected_hardlinks = 0.
    let hard = world.at_path("home/hard");
    fs::hard_link(world.dir.join("etc/shadow"), &hard).unwrap();
    let before = world.outside();
    assert_eq!(world.download(&hard, user).await.0, 500);
    assert_eq!(world.upload(&hard, user, b"client's").await.0, 500);
    world.write(start(&hard), user).await.unwrap_err();
    assert_eq!(world.outside(), before);
    assert_eq!(world.download(&world.at_path("etc/shadow"), user).await, (200, SECRET.into()));
}

#[tokio::test]
async fn strict_access_is_the_users_own_always() {
    let Some(world) = World::new(&["--file-access", "strict"]) else { return };
    let user = &format!("{UID}:{UID}");
    let before = world.outside();
    let secret = world.at_path("root/secret");
    assert_eq!(world.download(&secret, user).await.0, 500);
    assert_eq!(world.upload(&world.at_path("root/x"), user, b"x").await.0, 500);
    assert_eq!(world.upload(&world.at_path("etc/x"), user, b"x").await.0, 500);
    world.write(start(&world.at_path("etc/a/b")), user).await.unwrap_err();
    assert_eq!(world.outside(), before);
    assert_eq!(world.upload(&world.at_path("home/a/x"), user, b"x").await.0, 200);
    assert_eq!(fs::metadata(world.dir.join("home/a")).unwrap().uid(), UID);
    assert_eq!(world.download(&secret, "root").await, (200, SECRET.into()));
}

/// A file of the program's with all the rights that a file can give.
fn privileged(world: &World, name: &str, mode: u32) -> String {
    let path = world.at_path(name);
    let _ = fs::remove_file(&path);
    as_program(|| {
        fs::write(&path, "the program's").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    });
    // No capability at all, and yet an attribute of a program.
    let capability = [1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let _ = xattr::set(&path, "security.capability", &capability);
    path
}

fn has_capability(path: &str) -> bool {
    xattr::get(path, "security.capability").is_ok_and(|value| value.is_some())
}

#[tokio::test]
async fn content_that_replaces_a_file_keeps_no_rights_of_a_program() {
    let Some(world) = World::new(&[]) else { return };
    let rights = |path: &str| (fs::metadata(path).unwrap().mode() & 0o7777, has_capability(path));
    for user in ["root", &format!("{UID}:{UID}")] {
        for mode in [0o4755, 0o4777, 0o6777, 0o2644] {
            let kept = (mode & 0o777, false);
            let path = privileged(&world, "home/x", mode);
            assert_eq!(world.upload(&path, user, b"client's").await.0, 200);
            assert_eq!(rights(&path), kept, "REST {mode:o}");
            let path = privileged(&world, "home/x", mode);
            world.write(start(&path), user).await.unwrap();
            assert_eq!(rights(&path), kept, "Write {mode:o}");
            // In place: a file with several names, by each of the two.
            for by_rpc in [false, true] {
                let path = privileged(&world, "home/x", mode);
                let other = world.at_path("home/other");
                fs::hard_link(&path, &other).unwrap();
                match by_rpc {
                    true => world.write(start(&path), user).await.unwrap(),
                    false => assert_eq!(world.upload(&path, user, b"client's").await.0, 200),
                }
                assert_eq!(rights(&other), kept, "in place {by_rpc} {mode:o}");
                assert_eq!(fs::read(&other).unwrap(), b"client's");
                fs::remove_file(&other).unwrap();
            }
            let path = privileged(&world, "home/x", mode);
            let part = world.at_path("home/part");
            fs::write(&part, "part").unwrap();
            assert_eq!(world.compose(&[part], &path, user).await.0, 200);
            let (mode, capability) = rights(&path);
            assert_eq!((mode & 0o7000, capability), (0, false), "compose");
        }
        // Only the request sets them.
        let path = privileged(&world, "home/x", 0o755);
        let asked = write_request::Start { mode: Some(0o4711), ..start(&path) };
        world.write(asked, user).await.unwrap();
        assert_eq!(rights(&path), (0o4711, false));
    }
}

/// An attack in many rounds: `swapped` is exchanged for a link to root's `etc` while `attempt` runs.
async fn race(attempt: impl AsyncFn(&World, &str)) {
    let Some(world) = World::new(&[]) else { return };
    let user = format!("{UID}:{UID}");
    as_program(|| {
        fs::create_dir(world.dir.join("home/p")).unwrap();
        fs::write(world.dir.join("home/p/shadow"), "mine").unwrap();
    });
    world.plant("etc", "home/l");
    let before = world.outside();
    let exchanging = Exchanging::begin(world.at_path("home/p"), world.at_path("home/l"));
    for round in 0..ROUNDS {
        attempt(&world, &user).await;
        assert_eq!(world.outside(), before, "round {round}");
    }
    let exchanged = exchanging.end();
    assert!(exchanged > 100, "only {exchanged} exchanges");
    for entry in fs::read_dir(world.dir.join("home")).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(!name.to_string_lossy().starts_with(".envd-"), "{name:?} was left behind");
    }
}

#[tokio::test]
async fn uploads_in_a_race_change_nothing_of_roots() {
    race(async |world, user| {
        for name in ["home/p/shadow", "home/p/new", "home/p/a/b"] {
            world.upload(&world.at_path(name), user, b"client's").await;
        }
        // With the program's rights: what was made of root's would stay and be seen.
        as_program(|| {
            for side in ["home/p", "home/l"] {
                let _ = fs::remove_file(world.dir.join(side).join("new"));
                let _ = fs::remove_dir_all(world.dir.join(side).join("a"));
            }
        });
    })
    .await;
}

#[tokio::test]
async fn writes_in_a_race_change_nothing_of_roots() {
    race(async |world, user| {
        let _ = world.write(start(&world.at_path("home/p/shadow")), user).await;
        let _ = world.write(start(&world.at_path("home/p/deep/x")), user).await;
    })
    .await;
}

#[tokio::test]
async fn reads_in_a_race_tell_nothing_of_roots() {
    race(async |world, user| {
        let path = world.at_path("home/p/shadow");
        let (_, said) = world.download(&path, user).await;
        assert!(!said.contains(SECRET), "{said}");
        if let Ok(said) = world.read(&path, user).await {
            assert!(!said.contains("root's secret"), "{said}");
        }
    })
    .await;
}

#[tokio::test]
async fn composing_in_a_race_takes_nothing_of_roots() {
    race(async |world, user| {
        let part = world.at_path("home/part");
        let whole = world.at_path("home/whole");
        as_program(|| fs::write(&part, "part").unwrap());
        let parts = [part, world.at_path("home/p/shadow")];
        let (status, _) = world.compose(&parts, &whole, user).await;
        if status == 200 {
            let said = fs::read_to_string(&whole).unwrap();
            assert!(!said.contains(SECRET), "{said}");
        }
        let _ = world.compose(&parts[..1], &world.at_path("home/p/composed"), user).await;
    })
    .await;
}

/// The file itself is exchanged for a link, and for another name of root's file.
#[tokio::test]
async fn a_file_that_is_exchanged_for_a_link_is_written_by_nobody_else() {
    let Some(world) = World::new(&[]) else { return };
    let user = &format!("{UID}:{UID}");
    as_program(|| fs::write(world.dir.join("home/f"), "mine").unwrap());
    world.plant("etc/shadow", "home/l");
    fs::hard_link(world.dir.join("etc/shadow"), world.dir.join("home/hard")).unwrap();
    let before = world.outside();
    let path = world.at_path("home/f");
    for with in ["home/l", "home/hard"] {
        // `shadow` itself may not be renamed over by what replaces a file.
        let exchanging = Exchanging::begin(path.clone(), world.at_path(with));
        for round in 0..ROUNDS / 2 {
            let (_, said) = world.download(&path, user).await;
            assert!(!said.contains(SECRET), "{said}");
            world.upload(&path, user, b"client's").await;
            let _ = world.write(start(&path), user).await;
            assert_eq!(world.outside(), before, "{with}, round {round}");
        }
        exchanging.end();
    }
}

/// Where everybody may write, the kernel protects what others made even from root.
#[tokio::test]
async fn a_sticky_directory_under_protection_works_as_before() {
    let Some(world) = World::new(&[]) else { return };
    let protected = fs::read_to_string("/proc/sys/fs/protected_regular").unwrap_or_default();
    let sticky = world.dir.join("tmp");
    fs::create_dir(&sticky).unwrap();
    fs::set_permissions(&sticky, Permissions::from_mode(0o1777)).unwrap();
    if !offered("fs.protected_regular = 2", protected.trim() == "2") {
        return;
    }
    let user = &format!("{UID}:{UID}");
    let path = world.at_path("tmp/mine");
    for user in [user.as_str(), "root", user] {
        assert_eq!(world.upload(&path, user, b"client's").await.0, 200, "{user}");
        world.write(start(&path), user).await.unwrap();
        assert_eq!(world.download(&path, user).await.0, 200);
    }
    // Through a link of the user's: only what the user may do there.
    let theirs = world.at_path("tmp/theirs");
    fs::write(&theirs, "root's").unwrap();
    world.plant("tmp/theirs", "home/l");
    assert_eq!(world.upload(&world.at_path("home/l"), user, b"x").await.0, 500);
    assert_eq!(fs::read(&theirs).unwrap(), b"root's");
}
