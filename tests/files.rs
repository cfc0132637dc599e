//! Files, as a client sees them: the calls of the filesystem service, and `/files` over plain HTTP.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use common::{
    Daemon, able, able_as_root, able_at_home, basic, eventually, me, noise,
    raw::{Answer, Raw},
    rpc::{Client, Failure, Messages, Wire},
};
use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, FileType, ListDirRequest,
    ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse, RemoveRequest,
    RemoveResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use reqwest::{Method, Response, StatusCode, multipart};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Beyond it, a body for a file that exists waits on the disk.
const BODY_IN_MEMORY: usize = 1 << 20;

/// A daemon, its clients, and a directory to work in.
struct House {
    daemon: Daemon,
    client: Client,
    http: reqwest::Client,
    tmp: TempDir,
}

impl House {
    fn new() -> Self {
        let daemon = Daemon::start(&[]);
        let client = Client::new(&daemon, Wire::Connect { json: true });
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let tmp = tempfile::tempdir().unwrap();
        fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { daemon, client, http, tmp }
    }

    fn dir(&self) -> &Path {
        self.tmp.path()
    }

    /// The path of a name in the directory.
    fn at(&self, name: &str) -> String {
        self.dir().join(name).to_str().unwrap().to_owned()
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.dir().join(name), content).unwrap();
        self.at(name)
    }

    async fn stat(&self, path: &str) -> Result<EntryInfo, Failure> {
        let request = StatRequest { path: path.to_owned() };
        let answer: StatResponse =
            self.client.unary("/filesystem.Filesystem/Stat", &request).await?;
        Ok(answer.entry.unwrap())
    }

    async fn make_dir(&self, path: &str) -> Result<EntryInfo, Failure> {
        let request = MakeDirRequest { path: path.to_owned() };
        let answer: MakeDirResponse =
            self.client.unary("/filesystem.Filesystem/MakeDir", &request).await?;
        Ok(answer.entry.unwrap())
    }

    async fn rename(&self, from: &str, to: &str) -> Result<EntryInfo, Failure> {
        let request = MoveRequest { source: from.to_owned(), destination: to.to_owned() };
        let answer: MoveResponse =
            self.client.unary("/filesystem.Filesystem/Move", &request).await?;
        Ok(answer.entry.unwrap())
    }

    async fn list(&self, path: &str, depth: u32) -> Result<Vec<EntryInfo>, Failure> {
        let request = ListDirRequest { path: path.to_owned(), depth };
        let answer: ListDirResponse =
            self.client.unary("/filesystem.Filesystem/ListDir", &request).await?;
        Ok(answer.entries)
    }

    async fn remove(&self, path: &str) -> Result<(), Failure> {
        let request = RemoveRequest { path: path.to_owned() };
        let answer = self.client.unary("/filesystem.Filesystem/Remove", &request).await;
        answer.map(|_: RemoveResponse| ())
    }

    /// The URL of `/files` with these parameters.
    fn files(&self, parameters: &[(&str, &str)]) -> reqwest::Url {
        let url = self.daemon.url("/files");
        reqwest::Url::parse_with_params(&url, parameters).unwrap()
    }

    async fn download(&self, path: &str) -> Response {
        let url = self.files(&[("path", path)]);
        common::soon("a download", self.http.get(url).send()).await.unwrap()
    }

    /// An upload of one body, with more parameters and headers.
    async fn upload(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) -> Response {
        let mut request = self.http.post(self.files(&[("path", path)]));
        request = request.header("content-type", "application/octet-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        common::soon("an upload", request.body(body.into()).send()).await.unwrap()
    }

    async fn upload_form(&self, parameters: &[(&str, &str)], form: multipart::Form) -> Response {
        let request = self.http.post(self.files(parameters)).multipart(form);
        common::soon("an upload", request.send()).await.unwrap()
    }

    async fn call(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = self.http.request(method, self.daemon.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        common::soon(path, request.send()).await.unwrap()
    }

    async fn is_well(&self) {
        assert_eq!(self.call(Method::GET, "/health", &[]).await.status(), 204);
        assert_eq!(self.stat("/").await.unwrap().path, "/");
    }

    /// How many of the daemon's descriptors lead to a path that `check` likes.
    fn opened(&self, check: impl Fn(&Path) -> bool) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).unwrap();
        fds.filter(|fd| {
            let target = fs::read_link(fd.as_ref().unwrap().path());
            target.is_ok_and(|target| check(&target))
        })
        .count()
    }

    /// The names in the directory.
    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Whether files here can have metadata.
    fn keeps_metadata(&self) -> bool {
        let probe = self.put("probe", "");
        let possible = xattr::set(&probe, "user.probe", b"x").is_ok();
        fs::remove_file(probe).unwrap();
        able("a file system with extended attributes under the temporary directory", possible)
    }
}

fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into() }
}

fn set_mode(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn group_name() -> String {
    let gid = nix::unistd::getegid();
    nix::unistd::Group::from_gid(gid).unwrap().map_or_else(|| gid.to_string(), |group| group.name)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The message of a REST error, once its shape has been checked.
async fn rest_error(response: Response, status: u16) -> String {
    assert_eq!(response.status(), status, "{response:?}");
    assert_eq!(response.headers()["content-type"], "application/json; charset=utf-8");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    let text = response.text().await.unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let message = value["message"].as_str().unwrap().to_owned();
    assert_eq!(value, json!({ "code": status, "message": message }));
    assert!(text.ends_with("}\n"), "{text:?}");
    message
}

async fn written(response: Response) -> Value {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

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
            modified_time: Some(pbjson_types::Timestamp {
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

// Downloads.

#[tokio::test]
async fn health_is_told_and_not_cached() {
    let house = House::new();
    let response = house.call(Method::GET, "/health", &[]).await;
    assert_eq!(response.status(), 204);
    assert_eq!(response.headers()["cache-control"], "no-store");
    assert_eq!(response.bytes().await.unwrap(), "");
}

#[tokio::test]
async fn a_file_is_downloaded_as_it_is() {
    let house = House::new();
    let bytes = noise(3 << 20);
    for (name, content, disposition) in [
        ("file.txt", &b"text"[..], "inline; filename=file.txt"),
        ("two words", &bytes, "inline; filename=\"two words\""),
        ("empty", b"", "inline; filename=empty"),
        ("\u{e4}", b"x", "inline; filename*=utf-8''%C3%A4"),
    ] {
        let path = house.put(name, content);
        let url = house.files(&[("path", &path)]);
        let request = house.http.get(url).header("accept-encoding", "gzip, deflate, br");
        let response = common::soon(name, request.send()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-length"], content.len().to_string(), "{name}");
        assert_eq!(response.headers()["content-disposition"], disposition);
        assert_eq!(response.headers()["vary"], "Accept-Encoding", "{name}");
        assert!(!response.headers().contains_key("content-encoding"));
        assert!(response.bytes().await.unwrap() == content, "{name}");
    }
    // Through links, and with `~`.
    symlink("file.txt", house.at("link")).unwrap();
    let response = house.download(&house.at("link")).await;
    assert_eq!(response.text().await.unwrap(), "text");
}

#[tokio::test]
async fn files_that_say_they_are_empty_and_are_not() {
    let house = House::new();
    let response = house.download("/proc/version").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.bytes().await.unwrap(), fs::read("/proc/version").unwrap());
}

#[tokio::test]
async fn what_cannot_be_downloaded() {
    let house = House::new();
    let missing = house.at("<missing> & gone");
    let response = house.download(&missing).await;
    assert_eq!(rest_error(response, 404).await, format!("path '{missing}' does not exist"));
    let raw = house.download(&missing).await.text().await.unwrap();
    assert!(raw.contains(r"\u003cmissing\u003e \u0026 gone"), "{raw}");

    let response = house.download(&house.at("")).await;
    assert_eq!(rest_error(response, 400).await, format!("path '{}' is a directory", house.at("")));
    let fifo = house.at("fifo");
    mkfifo(fifo.as_str(), Mode::from_bits_truncate(0o666)).unwrap();
    let response = house.download(&fifo).await;
    assert_eq!(rest_error(response, 400).await, format!("path '{fifo}' is not a regular file"));
    let response = house.download("/dev/zero").await;
    assert_eq!(rest_error(response, 400).await, "path '/dev/zero' is not a regular file");

    let below = format!("{}/x", house.put("file", ""));
    let text = rest_error(house.download(&below).await, 500).await;
    let expected =
        format!("error checking if path exists '{below}': stat {below}: not a directory");
    assert_eq!(text, expected);
    let text = rest_error(house.download("~other/x").await, 400).await;
    assert!(text.starts_with("error expanding and resolving path '~other/x': "), "{text}");
    // No path is the home directory.
    if able_at_home() {
        let response = house.call(Method::GET, "/files", &[]).await;
        let expected = format!("path '{}' is a directory", me().dir.display());
        assert_eq!(rest_error(response, 400).await, expected);
    }
}

#[tokio::test]
async fn the_query_of_files() {
    let house = House::new();
    let name = me().name;
    for (file, written) in
        [("a b", "a+b"), ("a b", "a%20b"), ("a+b", "a%2Bb"), ("\u{e4}", "%C3%A4")]
    {
        house.put(file, file);
        let path = format!("/files?path={}/{written}&username={name}", house.at(""));
        let response = house.call(Method::GET, &path, &[]).await;
        assert_eq!(response.text().await.unwrap(), file, "{written}");
    }
    let file = house.put("file", "x");
    let own = house.files(&[("path", &file), ("signature", "v1_x"), ("other", "y")]);
    assert_eq!(house.http.get(own).send().await.unwrap().status(), 200);
    for user in ["nobody-at-all", ""] {
        let url = house.files(&[("path", &file), ("username", user)]);
        let text = rest_error(house.http.get(url.clone()).send().await.unwrap(), 401).await;
        let expected = format!("error looking up user '{user}': user: unknown user {user}");
        assert_eq!(text, expected);
        let upload = house.http.post(url).header("content-type", "application/octet-stream");
        assert_eq!(rest_error(upload.body("new").send().await.unwrap(), 401).await, expected);
    }
    for twice in
        [[("path", file.as_str()), ("path", &file)], [("username", &name), ("username", &name)]]
    {
        let response = house.http.get(house.files(&twice)).send().await.unwrap();
        assert_eq!(response.status(), 400, "{twice:?}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

// Uploads.

#[tokio::test]
async fn a_body_becomes_a_file() {
    let house = House::new();
    let bytes = noise(3 << 20);
    for (name, content) in
        [("a/b/new", &bytes[..]), ("a/b/new", b"short"), ("a/b/new", &bytes), ("a/b/empty", b"")]
    {
        let path = house.at(name);
        let answer = written(house.upload(&path, &[], content).await).await;
        let base = Path::new(name).file_name().unwrap().to_str();
        assert_eq!(answer, json!([{ "name": base, "path": path, "type": "file" }]));
        assert!(fs::read(&path).unwrap() == content, "{name}");
    }
    assert_eq!(fs::metadata(house.at("a")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(house.at("a/b/new")).unwrap().mode() & 0o777 & !0o644, 0);
}

#[tokio::test]
async fn a_file_that_exists_stays_the_file_that_it_is() {
    let house = House::new();
    let path = house.put("file", "old and longer");
    set_mode(&path, 0o751);
    fs::hard_link(&path, house.at("hard")).unwrap();
    symlink("file", house.at("soft")).unwrap();
    let before = fs::metadata(&path).unwrap();
    let big = noise(BODY_IN_MEMORY + 1);
    for (target, content) in [(&path, &b"new"[..]), (&house.at("soft"), &big)] {
        written(house.upload(target, &[], content).await).await;
        assert!(fs::read(house.at("hard")).unwrap() == content);
    }
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.ino(), after.mode()), (before.ino(), before.mode()));
    assert!(fs::symlink_metadata(house.at("soft")).unwrap().is_symlink());
    // A link to nowhere leads to a new file.
    symlink("made", house.at("dangling")).unwrap();
    written(house.upload(&house.at("dangling"), &[], "x").await).await;
    assert_eq!(fs::read(house.at("made")).unwrap(), b"x");
}

#[tokio::test]
async fn uploads_belong_to_their_user() {
    if !able_as_root() {
        return;
    }
    let house = House::new();
    let uid = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    let old = house.put("old", "");
    for (path, names) in [(house.at("a/b/new"), &["a", "a/b", "a/b/new"][..]), (old, &["old"])] {
        let url = house.files(&[("path", &path), ("username", "nobody")]);
        let request = house.http.post(url).header("content-type", "application/octet-stream");
        written(request.body("x").send().await.unwrap()).await;
        for name in names {
            assert_eq!(fs::metadata(house.at(name)).unwrap().uid(), uid, "{name}");
        }
    }
    assert_eq!(fs::metadata(house.dir()).unwrap().uid(), 0, "what was there stays its owner's");
}

#[tokio::test]
async fn compressed_bodies_are_decompressed() {
    let house = House::new();
    let bytes = noise(2 << 20);
    let path = house.at("file");
    let packed = gzip(&bytes);
    written(house.upload(&path, &[("content-encoding", "gzip")], packed.clone()).await).await;
    assert!(fs::read(&path).unwrap() == bytes);
    written(house.upload(&path, &[("content-encoding", "identity")], "plain").await).await;
    assert_eq!(fs::read(&path).unwrap(), b"plain");

    let text = rest_error(house.upload(&path, &[("content-encoding", "br")], "x").await, 400).await;
    let expected =
        "error decompressing request body: unsupported Content-Encoding: br, supported: [gzip]";
    assert_eq!(text, expected);
    for broken in [&b"no gzip at all"[..], &packed[..packed.len() / 2]] {
        let response = house.upload(&path, &[("content-encoding", "gzip")], broken).await;
        assert!(response.status().as_u16() >= 400);
    }
    assert_eq!(fs::read(&path).unwrap(), b"plain", "what did not arrive has harmed nothing");

    let boundary = "the-boundary";
    let form = format!(
        "--{boundary}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{}\"\r\n\r\n",
        house.at("in-form")
    );
    let form = [form.as_bytes(), &bytes, format!("\r\n--{boundary}--\r\n").as_bytes()].concat();
    let request = house.http.post(house.files(&[]));
    let request = request
        .header("content-type", format!("multipart/form-data; boundary={boundary}"))
        .header("content-encoding", "gzip");
    let response = common::soon("a form", request.body(gzip(&form)).send()).await.unwrap();
    assert_eq!(written(response).await[0]["path"], house.at("in-form"));
    assert!(fs::read(house.at("in-form")).unwrap() == bytes);
}

fn part(content: impl Into<Vec<u8>>, name: &str) -> multipart::Part {
    multipart::Part::bytes(content.into()).file_name(name.to_owned())
}

#[tokio::test]
async fn a_form_uploads_files_under_their_full_names() {
    let house = House::new();
    let bytes = noise(2 << 20);
    let form = multipart::Form::new()
        .text("comment", "not a file")
        .part("file", part(&bytes[..], &house.at("x/one")))
        .part("other", part("not a file either", &house.at("other")))
        .part("file", part("two", &house.at("x/y/t w o")));
    let answer = written(house.upload_form(&[], form).await).await;
    assert_eq!(
        answer,
        json!([
            { "name": "one", "path": house.at("x/one"), "type": "file" },
            { "name": "t w o", "path": house.at("x/y/t w o"), "type": "file" },
        ])
    );
    assert!(fs::read(house.at("x/one")).unwrap() == bytes);
    assert_eq!(fs::read(house.at("x/y/t w o")).unwrap(), b"two");
    assert_eq!(house.names(), ["x"]);

    // The query's path wins over the name.
    let form = multipart::Form::new().part("file", part("named", "/no/such/name"));
    let answer = written(house.upload_form(&[("path", &house.at("chosen"))], form).await).await;
    assert_eq!(answer[0]["path"], house.at("chosen"));
    assert_eq!(fs::read(house.at("chosen")).unwrap(), b"named");

    let form = multipart::Form::new().text("comment", "alone");
    assert_eq!(written(house.upload_form(&[], form).await).await, json!([]));
}

#[tokio::test]
async fn forms_that_are_refused() {
    let house = House::new();
    let path = house.at("same");
    let form = multipart::Form::new()
        .part("file", part("first", &path))
        .part("file", part("second", &path));
    let text = rest_error(house.upload_form(&[], form).await, 400).await;
    let expected = format!(
        "you cannot upload multiple files to the same path '{path}' in one upload request, only \
         the first specified file was uploaded"
    );
    assert_eq!(text, expected);
    assert_eq!(fs::read(&path).unwrap(), b"first");

    let form = multipart::Form::new().part("file", multipart::Part::bytes(b"x".to_vec()));
    let text = rest_error(house.upload_form(&[], form).await, 400).await;
    let expected = "error getting multipart custom part file name: filename not found in \
                    Content-Disposition header";
    assert_eq!(text, expected);
    for content_type in ["multipart/form-data", "multipart/form-data; boundary=b"] {
        let request = house.http.post(house.files(&[])).header("content-type", content_type);
        let response = request.body("no form").send().await.unwrap();
        rest_error(response, 500).await;
    }
}

#[tokio::test]
async fn uploads_that_are_refused() {
    let house = House::new();
    let path = house.at("file");
    let post = async |parameters: &[(&str, &str)], content_type: Option<&str>| {
        let mut request = house.http.post(house.files(parameters)).body("x");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        request.send().await.unwrap()
    };
    let octets = Some("application/octet-stream");
    for content_type in [Some("text/plain"), None] {
        let text = rest_error(post(&[("path", &path)], content_type).await, 400).await;
        let shown = content_type.unwrap_or_default();
        let expected = format!(
            "unsupported content type: {shown}, expected multipart/form-data or \
             application/octet-stream"
        );
        assert_eq!(text, expected);
    }
    for parameters in [&[][..], &[("path", "")]] {
        let text = rest_error(post(parameters, octets).await, 400).await;
        assert_eq!(text, "path query parameter is required for raw body upload");
    }
    let text = rest_error(post(&[("path", &house.at(""))], octets).await, 400).await;
    assert_eq!(text, format!("path is a directory: {}", house.at("")));
    assert_eq!(house.names(), [""; 0]);
    let fifo = house.at("fifo");
    mkfifo(fifo.as_str(), Mode::from_bits_truncate(0o666)).unwrap();
    rest_error(post(&[("path", &fifo)], octets).await, 400).await;
    let below = format!("{}/x", house.put("plain", ""));
    let text = rest_error(post(&[("path", &below)], octets).await, 500).await;
    assert!(text.starts_with("error ensuring directories: path is a file: "), "{text}");
}

#[tokio::test]
async fn metadata_of_an_upload_is_kept_and_replaced() {
    let house = House::new();
    if !house.keeps_metadata() {
        return;
    }
    let path = house.at("file");
    let headers = [("X-Metadata-Purpose", "a test"), ("x-metadata-b", "2"), ("x-metadata-", "no")];
    let expected = BTreeMap::from([("purpose", "a test"), ("b", "2")]);
    let answer = written(house.upload(&path, &headers, "x").await).await;
    assert_eq!(answer[0]["metadata"], json!(expected));
    let told: BTreeMap<_, _> = house.stat(&path).await.unwrap().metadata.into_iter().collect();
    assert_eq!(json!(told), json!(expected));
    assert_eq!(xattr::get(&path, "user.e2b.b").unwrap().as_deref(), Some(&b"2"[..]));

    // The next upload's is all that stays, and a bad one is refused before anything is written.
    let long = "v".repeat(5000);
    for value in ["\u{e4}", &long] {
        let response = house.upload(&path, &[("x-metadata-c", value)], "bad").await;
        let text = rest_error(response, 400).await;
        assert!(text.starts_with("invalid metadata: "), "{text}");
    }
    let key = format!("x-metadata-{}", "k".repeat(247));
    rest_error(house.upload(&path, &[(&key, "v")], "bad").await, 400).await;
    assert_eq!(fs::read(&path).unwrap(), b"x");
    written(house.upload(&path, &[("x-metadata-b", "3")], "y").await).await;
    let told: BTreeMap<_, _> = house.stat(&path).await.unwrap().metadata.into_iter().collect();
    assert_eq!(json!(told), json!({ "b": "3" }));
    written(house.upload(&path, &[], "z").await).await;
    assert!(house.stat(&path).await.unwrap().metadata.is_empty());

    let (one, two) = (house.at("one"), house.at("two"));
    let form = multipart::Form::new().part("file", part("1", &one)).part("file", part("2", &two));
    let request = house.http.post(house.files(&[])).header("x-metadata-form", "yes");
    let answer = written(request.multipart(form).send().await.unwrap()).await;
    for entry in answer.as_array().unwrap() {
        assert_eq!(entry["metadata"], json!({ "form": "yes" }));
    }
}

/// A way to send the beginning of an upload.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Length,
    Chunked,
    Gzip,
    Form,
}

impl Cut {
    /// Sends the whole head and a part of the body.
    async fn send(self, house: &House, path: &str, body: &[u8]) -> Raw {
        let mut raw = Raw::open(&house.daemon).await;
        let mut head = format!("POST /files?path={path} HTTP/1.1\r\nhost: x\r\n");
        head += match self {
            Self::Form => "content-type: multipart/form-data; boundary=b\r\n",
            _ => "content-type: application/octet-stream\r\n",
        };
        let (packed, form);
        let body = match self {
            Self::Gzip => {
                head += "content-encoding: gzip\r\n";
                packed = gzip(body);
                &packed[..packed.len() - 4]
            }
            Self::Form => {
                let start =
                    "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
                form = [start.as_bytes(), body].concat();
                &form
            }
            _ => body,
        };
        if let Self::Chunked = self {
            raw.send(head + "transfer-encoding: chunked\r\n\r\n").await;
            raw.send_chunk(body).await;
        } else {
            raw.send(head + &format!("content-length: {}\r\n\r\n", body.len() + 1)).await;
            raw.send(body).await;
        }
        raw
    }
}

const CUTS: [Cut; 4] = [Cut::Length, Cut::Chunked, Cut::Gzip, Cut::Form];

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_the_old_file() {
    let house = House::new();
    for cut in CUTS {
        for length in [1000, BODY_IN_MEMORY + 100_000] {
            let path = house.put("old", "old");
            let raw = cut.send(&house, &path, &noise(length)).await;
            eventually("the file is open", || {
                (house.opened(|opened| opened == Path::new(&path)) > 0).then_some(())
            });
            if length > BODY_IN_MEMORY {
                // It waits in a file without a name.
                let spool = |opened: &Path| {
                    opened.starts_with(house.dir())
                        && opened.to_string_lossy().ends_with("(deleted)")
                };
                eventually("the body is spooled", || (house.opened(spool) > 0).then_some(()));
            }
            assert_eq!(fs::read(&path).unwrap(), b"old", "{cut:?} {length}: before the end");
            drop(raw);
            eventually("the upload is given up", || {
                (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
            });
            assert_eq!(fs::read(&path).unwrap(), b"old", "{cut:?} {length}");
            assert_eq!(house.names(), ["old"], "{cut:?} {length}");
        }
    }
    house.is_well().await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_no_half_file() {
    let house = House::new();
    for cut in CUTS {
        for length in [100_000, BODY_IN_MEMORY + 100_000] {
            let path = house.at("new");
            let raw = cut.send(&house, &path, &noise(length)).await;
            // A form's last bytes could be its boundary, and are held back.
            eventually("it is being written", || {
                let size = fs::metadata(&path).map_or(0, |meta| meta.len());
                (size > length as u64 / 2).then_some(())
            });
            drop(raw);
            eventually("it is gone", || (!Path::new(&path).exists()).then_some(()));
            assert_eq!(house.names(), [""; 0], "{cut:?} {length}");
        }
    }
    house.is_well().await;
}

#[tokio::test]
async fn sixty_four_mebibytes_there_and_back_in_bounded_memory() {
    let house = House::new();
    let bytes = noise(64 << 20);
    let path = house.at("big");
    // To a new file, and into one that exists.
    for _ in 0..2 {
        written(house.upload(&path, &[], bytes.clone()).await).await;
        let mut response = house.download(&path).await;
        assert_eq!(response.headers()["content-length"], bytes.len().to_string());
        let mut at = 0;
        while let Some(chunk) = common::soon("a chunk", response.chunk()).await.unwrap() {
            assert!(bytes[at..at + chunk.len()] == chunk, "changed behind {at}");
            at += chunk.len();
        }
        assert_eq!(at, bytes.len());
    }
    let peak = house.daemon.memory("VmHWM");
    assert!(peak < 48 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn a_big_form_in_bounded_memory() {
    let house = House::new();
    let path = house.at("big");
    let head = format!(
        "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{path}\"\r\n\r\n"
    );
    let form = |content: &[u8]| [head.as_bytes(), content, b"\r\n--b--\r\n"].concat();
    // What compresses well is small on the wire and as big as it is here.
    for (content, packed) in [(noise(64 << 20), false), (vec![0; 64 << 20], true)] {
        let mut request = house.http.post(house.files(&[]));
        request = request.header("content-type", "multipart/form-data; boundary=b");
        let mut body = form(&content);
        if packed {
            body = gzip(&body);
            request = request.header("content-encoding", "gzip");
        }
        let response = common::soon("a form", request.body(body).send()).await.unwrap();
        assert_eq!(written(response).await[0]["path"], path);
        assert!(fs::read(&path).unwrap() == content);
        let peak = house.daemon.memory("VmHWM");
        assert!(peak < 48 << 10, "the daemon grew to {peak} KiB");
    }
}

// What one client cannot take from the others.

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

/// As `MAX_UPLOADS`.
const UPLOADS: usize = 64;

#[tokio::test]
async fn uploads_that_stall_leave_the_threads_to_others() {
    let house = House::new();
    let mut stalled = Vec::new();
    for number in 0..UPLOADS {
        let cut = CUTS[number % CUTS.len()];
        stalled.push(cut.send(&house, &house.at(&number.to_string()), &noise(1000)).await);
    }
    eventually("all are open", || {
        (house.opened(|opened| opened.starts_with(house.dir())) == UPLOADS).then_some(())
    });
    let refused = house.upload(&house.at("one more"), &[], "x").await;
    assert_eq!(rest_error(refused, 503).await, "too many uploads: 64 are under way");
    house.is_well().await;
    assert_eq!(house.list(house.dir().to_str().unwrap(), 1).await.unwrap().len(), UPLOADS);
    // Those who leave make room.
    drop(stalled);
    common::in_time("the others have gone", async || {
        (house.upload(&house.at("late"), &[], "x").await.status() == 200).then_some(())
    })
    .await;
    eventually("nothing else is left", || (house.names() == ["late"]).then_some(()));
}

#[tokio::test]
async fn without_new_threads_calls_are_answered() {
    let house = House::new();
    // No room for another stack, which is what a thread needs first.
    let room = (house.daemon.memory("VmSize") + 1024) * 1024;
    let limited = std::process::Command::new("prlimit")
        .args(["--pid", &house.daemon.pid().to_string(), &format!("--as={room}")])
        .status();
    if !able("prlimit", limited.is_ok_and(|status| status.success())) {
        return;
    }
    for _ in 0..10 {
        let calls = (0..20).map(|_| house.stat("/"));
        for answer in futures_util::future::join_all(calls).await {
            assert_eq!(answer.unwrap().path, "/");
        }
    }
}

#[tokio::test]
async fn an_upload_survives_that_of_another_who_gives_up() {
    let house = House::new();
    for cut in CUTS {
        let path = house.at("file");
        let first = cut.send(&house, &path, &noise(100_000)).await;
        eventually("it is being written", || {
            fs::metadata(&path).is_ok_and(|meta| meta.len() > 50_000).then_some(())
        });
        written(house.upload(&path, &[], "whole").await).await;
        drop(first);
        eventually("the other is given up", || {
            (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
        });
        assert_eq!(fs::read(&path).unwrap(), b"whole", "{cut:?}");
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn the_last_of_two_uploads_is_there_and_whole() {
    let house = House::new();
    for length in [100_000, BODY_IN_MEMORY + 100_000] {
        let path = house.at("file");
        let mut body = noise(length);
        let mut first = Cut::Length.send(&house, &path, &body).await;
        eventually("it is being written", || {
            fs::metadata(&path).is_ok_and(|meta| meta.len() == length as u64).then_some(())
        });
        written(house.upload(&path, &[], noise(2 * length).split_off(length)).await).await;
        first.send("x").await;
        body.push(b'x');
        assert_eq!(first.answer().await.status, 200);
        assert!(fs::read(&path).unwrap() == body, "{length}");
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn the_end_of_the_daemon_leaves_no_half_file() {
    for cut in CUTS {
        let mut house = House { daemon: Daemon::start(&["--shutdown-grace", "0"]), ..House::new() };
        let (new, old) = (house.at("new"), house.put("old", "old"));
        let _uploads = [
            cut.send(&house, &new, &noise(100_000)).await,
            cut.send(&house, &old, &noise(100_000)).await,
        ];
        eventually("it is being written", || {
            fs::metadata(&new).is_ok_and(|meta| meta.len() > 50_000).then_some(())
        });
        house.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(house.daemon.wait().success());
        assert_eq!(house.names(), ["old"], "{cut:?}");
        assert_eq!(fs::read(&old).unwrap(), b"old", "{cut:?}");
    }
}

// Routes and headers.

#[tokio::test]
async fn routes_that_are_none() {
    let house = House::new();
    for (method, path) in [
        (Method::GET, "/"),
        (Method::GET, "/nothing"),
        (Method::GET, "/health/"),
        (Method::POST, "/filesystem.Filesystem"),
        (Method::POST, "/filesystem.Filesystem/"),
        (Method::POST, "/filesystem.Filesystem/Nothing"),
        (Method::POST, "/no.Service/Stat"),
    ] {
        let content = [("content-type", "application/json")];
        let response = house.call(method.clone(), path, &content).await;
        assert_eq!(response.status(), 404, "{method} {path}");
        assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8", "{path}");
        assert_eq!(response.text().await.unwrap(), "404 page not found\n", "{path}");
    }
    for (method, path, allowed) in [
        (Method::POST, "/health", &["GET"][..]),
        (Method::DELETE, "/files", &["GET", "POST"]),
        (Method::PUT, "/files", &["GET", "POST"]),
        (Method::GET, "/filesystem.Filesystem/Stat", &["POST"]),
        (Method::PUT, "/process.Process/Start", &["POST"]),
    ] {
        let response = house.call(method.clone(), path, &[]).await;
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow: Vec<_> = response.headers().get_all("allow").iter().collect();
        let allow = format!("{allow:?}");
        assert!(allowed.iter().all(|method| allow.contains(method)), "{path}: {allow}");
        assert_eq!(response.bytes().await.unwrap(), "", "{path}");
    }
    let text = [("content-type", "text/plain")];
    let response = house.call(Method::POST, "/filesystem.Filesystem/Stat", &text).await;
    assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let accepted = response.headers()["accept-post"].to_str().unwrap();
    let accepted: Vec<_> = accepted.split(", ").collect();
    assert!(accepted.is_sorted() && accepted.contains(&"application/json"), "{accepted:?}");
}

#[tokio::test]
async fn an_unknown_user_is_refused_everywhere() {
    let house = House::new();
    let header = [("authorization", basic("nobody-at-all"))];
    let header = header.each_ref().map(|(name, value)| (*name, value.as_str()));
    for (method, path) in [
        (Method::GET, "/health"),
        (Method::GET, "/files?path=/etc/passwd"),
        (Method::POST, "/files?path=/tmp/never"),
        (Method::GET, "/nothing"),
    ] {
        let response = house.call(method, path, &header).await;
        assert_eq!(response.status(), 401, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json", "{path}");
        let text = response.text().await.unwrap();
        let expected =
            r#"{"code":"unauthenticated","message":"invalid username: 'nobody-at-all'"}"#;
        assert_eq!(text, expected, "{path}");
    }
    let known = [("authorization", basic(&me().name))];
    let known = known.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(house.call(Method::GET, "/health", &known).await.status(), 204);
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn preflights_of_browsers() {
    let house = House::new();
    let vary = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";
    let names = "x-access-token,Content-Type, X-Odd";
    for path in ["/health", "/files", "/filesystem.Filesystem/Stat", "/nothing"] {
        let headers = [
            ("origin", "https://example.com"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", names),
            // A preflight is answered before anybody asks who it is.
            ("authorization", "Basic bm9ib2R5LWF0LWFsbDo="),
        ];
        let response = house.call(Method::OPTIONS, path, &headers).await;
        assert_eq!(response.status(), 204, "{path}");
        for (name, value) in [
            ("vary", vary),
            ("access-control-allow-origin", "*"),
            ("access-control-allow-methods", "POST"),
            ("access-control-allow-headers", names),
            ("access-control-max-age", "7200"),
        ] {
            assert_eq!(header(&response, name), Some(value), "{path}");
        }
        assert_eq!(header(&response, "access-control-allow-credentials"), None);
        assert_eq!(response.bytes().await.unwrap(), "");
    }
    let page = ("origin", "https://example.com");
    for headers in [
        &[("access-control-request-method", "POST")][..],
        &[page, ("access-control-request-method", "TRACE")],
        &[page, ("access-control-request-method", "post")],
    ] {
        let response = house.call(Method::OPTIONS, "/files", headers).await;
        assert_eq!(response.status(), 204, "{headers:?}");
        assert_eq!(header(&response, "vary"), Some(vary));
        assert_eq!(header(&response, "access-control-allow-origin"), None, "{headers:?}");
        assert_eq!(header(&response, "access-control-allow-methods"), None, "{headers:?}");
        assert_eq!(header(&response, "access-control-max-age"), None, "{headers:?}");
    }
    let headers = [page, ("access-control-request-method", "GET")];
    let response = house.call(Method::OPTIONS, "/files", &headers).await;
    assert_eq!(header(&response, "access-control-allow-methods"), Some("GET"));
    assert_eq!(header(&response, "access-control-allow-headers"), None, "none was asked for");
}

#[tokio::test]
async fn answers_that_a_page_may_read() {
    let house = House::new();
    let exposed = "Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Location, Cache-Control, \
                   X-Content-Type-Options";
    let page = ("origin", "https://example.com");
    let unknown = ("authorization", "Basic bm9ib2R5LWF0LWFsbDo=");
    for (method, path, headers, status) in [
        (Method::GET, "/health", &[page][..], 204),
        (Method::GET, "/nothing", &[page], 404),
        (Method::DELETE, "/files", &[page], 405),
        (Method::GET, "/health", &[page, unknown], 401),
        (Method::GET, "/files?path=/no/such", &[page], 404),
    ] {
        let response = house.call(method, path, headers).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(header(&response, "access-control-allow-origin"), Some("*"), "{path}");
        assert_eq!(header(&response, "access-control-expose-headers"), Some(exposed), "{path}");
        assert_eq!(header(&response, "vary"), Some("Origin"), "{path}");
    }
    let response = house.call(Method::GET, "/health", &[]).await;
    assert_eq!(header(&response, "vary"), Some("Origin"));
    assert_eq!(header(&response, "access-control-allow-origin"), None);
    assert_eq!(header(&response, "access-control-expose-headers"), None);
}

#[tokio::test]
async fn an_expected_100_comes_when_the_body_is_wanted() {
    let house = House::new();
    let path = house.at("file");
    let mut raw = Raw::open(&house.daemon).await;
    let head = format!(
        "POST /files?path={path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
         content-type: application/octet-stream\r\ncontent-length: 5\r\n\r\n"
    );
    raw.send(&head).await;
    assert_eq!(raw.head().await.0, 100);
    raw.send("hello").await;
    let Answer { status, body, .. } = raw.answer().await;
    assert_eq!(status, 200, "{body:?}");
    assert_eq!(fs::read(PathBuf::from(path)).unwrap(), b"hello");
}
