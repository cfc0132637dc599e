//! The table of docs/files.md: what is not a plain file on a willing disk, over REST and over RPC.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use common::{
    Daemon, able_as_root,
    house::{House, Mounted, failure, rest_error, set_mode, written},
    noise,
    rpc::{Client, Failure, Messages, WIRES, Wire},
};
use envd::proto::filesystem::{
    CopyRequest, CopyResponse, CreateSymlinkRequest, CreateSymlinkResponse, FileType, ReadRequest,
    ReadResponse, WriteRequest, WriteResponse, read_response, write_request,
};
use nix::{sys::stat::Mode, unistd::mkfifo};

const FULL: &str = "not enough disk space available";

async fn read_with(client: &Client, path: &str) -> Result<Vec<u8>, Failure> {
    let request = ReadRequest { path: path.to_owned(), ..Default::default() };
    let mut messages: Messages<ReadResponse> =
        client.stream("/filesystem.Filesystem/Read", &request).await?;
    let mut content = Vec::new();
    while let Some(message) = messages.next().await? {
        if let Some(read_response::Event::Data(data)) = message.event {
            content.extend_from_slice(&data);
        }
    }
    Ok(content)
}

async fn write_with(client: &Client, path: &str, content: &[u8]) -> Result<WriteResponse, Failure> {
    let event = |event| WriteRequest { event: Some(event) };
    let start = write_request::Start { path: path.into(), ..Default::default() };
    let mut requests = vec![event(write_request::Event::Start(start))];
    for part in content.chunks(500_000) {
        let data = bytes::Bytes::copy_from_slice(part);
        let chunk = write_request::Chunk { offset: None, data };
        requests.push(event(write_request::Event::Chunk(chunk)));
    }
    requests.push(event(write_request::Event::Commit(write_request::Commit::default())));
    let mut messages = client.streams("/filesystem.Filesystem/Write", &requests).await?;
    Ok(messages.next().await?.unwrap())
}

async fn read(house: &House, path: &str) -> Result<Vec<u8>, Failure> {
    read_with(&house.client, path).await
}

async fn write(house: &House, path: &str, content: &[u8]) -> Result<WriteResponse, Failure> {
    write_with(&Client::new(&house.daemon, Wire::Grpc), path, content).await
}

/// Both faces of a file: the status and text of a download and an upload, and of Read and Write.
struct Answers {
    download: (u16, &'static str),
    upload: (u16, &'static str),
    read: (&'static str, &'static str),
    write: (&'static str, &'static str),
}

impl Answers {
    /// Where `P` stands in a text, it is the path.
    async fn check(&self, house: &House, path: &str) {
        let text = |text: &str| text.replace('P', path);
        let download = rest_error(house.download(path).await, self.download.0).await;
        assert_eq!(download, text(self.download.1));
        let upload = rest_error(house.upload(path, &[], "x").await, self.upload.0).await;
        assert_eq!(upload, text(self.upload.1));
        for wire in WIRES {
            let client = Client::new(&house.daemon, wire);
            let error = read_with(&client, path).await.unwrap_err();
            assert_eq!(error, failure(self.read.0, text(self.read.1)), "{wire:?}");
            let error = write_with(&client, path, b"x").await.unwrap_err();
            assert_eq!(error, failure(self.write.0, text(self.write.1)), "{wire:?}");
        }
    }
}

#[tokio::test]
async fn a_directory() {
    let house = House::new();
    fs::create_dir(house.at("dir")).unwrap();
    let answers = Answers {
        download: (400, "path 'P' is a directory"),
        upload: (400, "path is a directory: P"),
        read: ("invalid_argument", "path 'P' is a directory"),
        write: ("invalid_argument", "path is a directory: P"),
    };
    answers.check(&house, &house.at("dir")).await;
}

#[tokio::test]
async fn a_fifo_and_a_socket_block_nobody() {
    let house = House::new();
    let (fifo, socket) = (house.at("fifo"), house.at("socket"));
    mkfifo(fifo.as_str(), Mode::S_IRWXU).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let answers = Answers {
        download: (400, "path 'P' is not a regular file"),
        upload: (400, "path 'P' is not a regular file"),
        read: ("invalid_argument", "path 'P' is not a regular file"),
        write: ("invalid_argument", "path 'P' is not a regular file"),
    };
    for path in [&fifo, &socket] {
        answers.check(&house, path).await;
        assert_eq!(house.stat(path).await.unwrap().r#type(), FileType::Unspecified);
        house.rename(path, &house.at("moved")).await.unwrap();
        house.remove(&house.at("moved")).await.unwrap();
    }
    assert_eq!(house.names(), [""; 0]);
}

#[tokio::test]
async fn a_device_takes_an_upload_and_is_as_empty_as_it_says() {
    let house = House::new();
    let not_regular = "path '/dev/null' is not a regular file";
    for device in ["/dev/null", "/dev/zero"] {
        let answer = house.download(device).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-length"], "0");
        assert_eq!(answer.bytes().await.unwrap(), "");
    }
    let told = written(house.upload("/dev/null", &[], "x").await).await;
    assert_eq!(told[0]["path"], "/dev/null");
    let expected = failure("invalid_argument", not_regular);
    assert_eq!(read(&house, "/dev/null").await.unwrap_err(), expected);
    assert_eq!(write(&house, "/dev/null", b"x").await.unwrap_err(), expected);
    let text = rest_error(house.upload("/dev/full", &[], "x").await, 507).await;
    assert_eq!(text, format!("attempted to write 1 bytes: {FULL}"));
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}

#[tokio::test]
async fn a_dangling_link_is_written_where_it_leads() {
    let house = House::new();
    symlink("new", house.at("link")).unwrap();
    symlink("no/new", house.at("lost")).unwrap();
    symlink("loop", house.at("loop")).unwrap();
    let text = rest_error(house.download(&house.at("link")).await, 404).await;
    assert_eq!(text, format!("path '{}' does not exist", house.at("link")));
    let error = read(&house, &house.at("link")).await.unwrap_err();
    assert_eq!(error, failure("not_found", text));
    written(house.upload(&house.at("link"), &[], "by HTTP").await).await;
    assert_eq!(fs::read(house.at("new")).unwrap(), b"by HTTP");
    fs::remove_file(house.at("new")).unwrap();
    write(&house, &house.at("link"), b"by RPC").await.unwrap();
    assert_eq!(fs::read(house.at("new")).unwrap(), b"by RPC");
    assert!(fs::symlink_metadata(house.at("link")).unwrap().is_symlink());
    // Directories are made above the link and not above what it leads to.
    for (name, ends, code) in [
        ("lost", "no such file or directory", "not_found"),
        ("loop", "too many levels of symbolic links", "failed_precondition"),
    ] {
        let path = house.at(name);
        let text = rest_error(house.upload(&path, &[], "x").await, 500).await;
        assert!(text.starts_with(&format!("error opening file: open {path}: ")), "{text}");
        assert!(text.ends_with(ends), "{text}");
        let error = write(&house, &path, b"x").await.unwrap_err();
        assert!(error.message.ends_with(ends), "{error:?}");
        assert_eq!(error.code, code, "{error:?}");
    }
    let path = house.at("loop");
    let text = rest_error(house.download(&path).await, 500).await;
    assert!(text.ends_with("too many levels of symbolic links"), "{text}");
    assert_eq!(read(&house, &path).await.unwrap_err(), failure("failed_precondition", text));
    assert_eq!(house.names(), ["link", "loop", "lost", "new"]);
}

#[tokio::test]
async fn names_of_any_bytes_and_of_every_length() {
    let house = House::new();
    for name in ["new\nline".to_owned(), "n".repeat(255), "\u{e4}".repeat(127)] {
        let path = house.at(&name);
        for wire in WIRES {
            let client = Client::new(&house.daemon, wire);
            write_with(&client, &path, name.as_bytes()).await.unwrap();
            assert_eq!(read_with(&client, &path).await.unwrap(), name.as_bytes(), "{wire:?}");
        }
        let response = house.download(&path).await;
        assert_eq!(response.bytes().await.unwrap(), name.as_bytes());
        let told = written(house.upload(&path, &[], "x").await).await;
        assert_eq!(
            (&told[0]["name"], &told[0]["path"]),
            (&name.as_str().into(), &path.as_str().into())
        );
        house.remove(&path).await.unwrap();
    }
    // One byte more.
    let path = house.at(&"n".repeat(256));
    let text = rest_error(house.upload(&path, &[], "x").await, 500).await;
    assert_eq!(text, format!("error opening file: open {path}: file name too long"));
    let text = rest_error(house.download(&path).await, 500).await;
    let expected =
        format!("error checking if path exists '{path}': stat {path}: file name too long");
    assert_eq!(text, expected);
    let error = read(&house, &path).await.unwrap_err();
    assert_eq!(error, failure("invalid_argument", expected));
    let error = write(&house, &path, b"x").await.unwrap_err();
    assert_eq!(error.code, "invalid_argument");
    assert!(error.message.ends_with("file name too long"), "{error:?}");
    assert_eq!(house.names(), [""; 0]);
}

#[tokio::test]
async fn paths_as_long_as_the_kernel_takes_and_longer() {
    let house = House::new();
    // PATH_MAX is 4096 with the zero at the end.
    let mut path = house.at("");
    while path.len() + 201 < 4095 {
        path += "/";
        path += &"d".repeat(200);
    }
    path += "/";
    let exact = path.clone() + &"f".repeat(4095 - path.len());
    assert_eq!(exact.len(), 4095);
    written(house.upload(&exact, &[], "x").await).await;
    write(&house, &exact, b"deep").await.unwrap();
    assert_eq!(house.download(&exact).await.text().await.unwrap(), "deep");
    assert_eq!(read(&house, &exact).await.unwrap(), b"deep");
    let longer = exact + "f";
    for text in [
        rest_error(house.upload(&longer, &[], "x").await, 400).await,
        rest_error(house.download(&longer).await, 400).await,
    ] {
        assert!(text.starts_with("error expanding and resolving path '"), "{text:.99}");
        assert!(text.ends_with("file name too long"), "{text}");
    }
    for error in [
        read(&house, &longer).await.unwrap_err(),
        write(&house, &longer, b"x").await.unwrap_err(),
        house.stat(&longer).await.unwrap_err(),
    ] {
        assert_eq!(error.code, "invalid_argument");
        assert!(error.message.ends_with("file name too long"), "{error:?}");
    }
    house.remove(&house.at(&"d".repeat(200))).await.unwrap();
}

/// A daemon of a user who may not do everything.
fn of_nobody() -> Option<House> {
    if !able_as_root() {
        return None;
    }
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("in /etc/passwd");
    let mut command = Daemon::command(&[]);
    command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    let house = House::with(Daemon::spawn(&mut command));
    std::os::unix::fs::chown(house.dir(), Some(nobody.uid.as_raw()), None).unwrap();
    Some(house)
}

#[tokio::test]
async fn a_directory_that_may_not_be_written_lets_its_files_be_replaced() {
    let Some(house) = of_nobody() else { return };
    let client =
        Client::new(&house.daemon, Wire::Grpc).with("authorization", &common::basic("nobody"));
    let upload = async |path: &str, content: &str| {
        let url = house.files(&[("path", path), ("username", "nobody")]);
        let request = house.http.post(url).header("content-type", "application/octet-stream");
        request.body(content.to_owned()).send().await.unwrap()
    };
    let dir = house.at("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(format!("{dir}/old"), "old").unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    std::os::unix::fs::chown(format!("{dir}/old"), Some(nobody), None).unwrap();
    fs::write(format!("{dir}/theirs"), "theirs").unwrap();
    set_mode(format!("{dir}/theirs"), 0o600);
    set_mode(&dir, 0o555);
    let path = format!("{dir}/new");
    let text = rest_error(upload(&path, "x").await, 500).await;
    assert_eq!(text, format!("error opening file: open {path}: permission denied"));
    let error = write_with(&client, &path, b"x").await.unwrap_err();
    assert_eq!(error.code, "permission_denied", "{error:?}");
    let error = write_with(&client, &format!("{dir}/old"), b"x").await.unwrap_err();
    assert_eq!(error.code, "permission_denied", "{error:?}");
    // In place, since nothing can be made beside it.
    written(upload(&format!("{dir}/old"), "new").await).await;
    assert_eq!(fs::read(format!("{dir}/old")).unwrap(), b"new");
    let text = rest_error(upload(&format!("{dir}/theirs"), "x").await, 500).await;
    assert!(text.ends_with("permission denied"), "{text}");
    let error = read_with(&client, &format!("{dir}/theirs")).await.unwrap_err();
    assert_eq!(error.code, "permission_denied", "{error:?}");
    let link =
        CreateSymlinkRequest { path: path.clone(), target: "x".into(), ..Default::default() };
    let error: Failure = client
        .unary::<_, CreateSymlinkResponse>("/filesystem.Filesystem/CreateSymlink", &link)
        .await
        .unwrap_err();
    assert_eq!(error.code, "permission_denied", "{error:?}");
    let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["old", "theirs"]);
    assert_eq!(fs::read(format!("{dir}/theirs")).unwrap(), b"theirs");
    // A mode that forbids writing keeps nobody's own file from having its metadata.
    set_mode(house.dir(), 0o755);
    let start = write_request::Start {
        path: house.at("own"),
        mode: Some(0o444),
        metadata: [("k".to_owned(), "v".to_owned())].into(),
        ..Default::default()
    };
    let event = |event| WriteRequest { event: Some(event) };
    let requests = [
        event(write_request::Event::Start(start)),
        event(write_request::Event::Commit(write_request::Commit::default())),
    ];
    let mut messages: Messages<WriteResponse> =
        client.streams("/filesystem.Filesystem/Write", &requests).await.unwrap();
    messages.next().await.unwrap().unwrap();
    let meta = fs::metadata(house.at("own")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o444);
    assert_eq!(meta.uid(), nobody);
}

#[tokio::test]
async fn a_read_only_disk() {
    let house = House::new();
    let Some(disk) = Mounted::tmpfs(&house.at("disk"), "size=1m") else { return };
    fs::write(format!("{}/old", disk.path()), "old").unwrap();
    disk.remount_read_only();
    let ends = "read-only file system";
    for name in ["old", "new"] {
        let path = format!("{}/{name}", disk.path());
        let text = rest_error(house.upload(&path, &[], "x").await, 500).await;
        assert_eq!(text, format!("error opening file: open {path}: {ends}"));
        let error = write(&house, &path, b"x").await.unwrap_err();
        assert_eq!(error.code, "failed_precondition", "{error:?}");
        assert!(error.message.ends_with(ends), "{error:?}");
    }
    assert_eq!(read(&house, &format!("{}/old", disk.path())).await.unwrap(), b"old");
}

/// A disk with a quota of two mebibytes, which root has to keep, too: a subvolume of btrfs.
struct Quota {
    mounted: Option<Mounted>,
    limited: String,
}

impl Quota {
    fn new(house: &House) -> Option<Self> {
        if !able_as_root() {
            return None;
        }
        let (image, at) = (house.at("image"), house.at("disk"));
        fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
        fs::create_dir(&at).unwrap();
        let limited = format!("{at}/limited");
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output();
            match output {
                Ok(output) if output.status.success() => Ok(()),
                Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
                Err(error) => Err(format!("{program}: {error}")),
            }
        };
        let made = run("mkfs.btrfs", &["-q", &image])
            .and_then(|()| run("mount", &["-o", "loop", &image, &at]))
            .map(|()| Mounted::there(&at));
        let limit = |_: &Mounted| {
            run("btrfs", &["quota", "enable", &at])?;
            run("btrfs", &["subvolume", "create", &limited])?;
            run("btrfs", &["qgroup", "limit", "2M", &limited])
        };
        let done = made.and_then(|mounted| limit(&mounted).map(|()| mounted));
        match done {
            Ok(mounted) => Some(Self { mounted: Some(mounted), limited }),
            Err(reason) => {
                let what = "btrfs, its programs and loop devices, for a real quota";
                common::skipped::skip(&format!("{what}: {reason}"));
                None
            }
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // Before the image goes.
        self.mounted.take();
    }
}

#[tokio::test]
async fn a_quota_is_507_and_leaves_the_old_file() {
    let house = House::new();
    let Some(quota) = Quota::new(&house) else { return };
    let at = |name: &str| format!("{}/{name}", quota.limited);
    fs::write(at("old"), "old").unwrap();
    let big = noise(6 << 20);
    for name in ["old", "new"] {
        let response = house.upload(&at(name), &[], big.clone()).await;
        let text = rest_error(response, 507).await;
        assert_eq!(text, format!("attempted to write {} bytes: {FULL}", big.len()), "{name}");
        let error = write(&house, &at(name), &big).await.unwrap_err();
        assert_eq!(error, failure("resource_exhausted", FULL), "{name}");
    }
    let request = CopyRequest {
        source: house.put("source", &big),
        destination: at("copied"),
        ..CopyRequest::default()
    };
    let error =
        house.client.unary::<_, CopyResponse>("/filesystem.Filesystem/Copy", &request).await;
    assert_eq!(error.unwrap_err().code, "resource_exhausted");
    let names: Vec<_> =
        fs::read_dir(&quota.limited).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["old"], "nothing half is left");
    assert_eq!(fs::read(at("old")).unwrap(), b"old");
}

#[tokio::test]
async fn a_full_disk_over_rpc_and_rest() {
    let house = House::new();
    let Some(disk) = Mounted::tmpfs(&house.at("disk"), "size=1m") else { return };
    let path = format!("{}/old", disk.path());
    fs::write(&path, "old").unwrap();
    let big = noise(2 << 20);
    let text = rest_error(house.upload(&path, &[], big.clone()).await, 507).await;
    assert_eq!(text, format!("attempted to write {} bytes: {FULL}", big.len()));
    for wire in WIRES {
        let client = Client::new(&house.daemon, wire);
        let error = write_with(&client, &path, &big).await.unwrap_err();
        assert_eq!(error, failure("resource_exhausted", FULL), "{wire:?}");
    }
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(Path::new(disk.path())).unwrap().count(), 1);
}
