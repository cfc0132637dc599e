//! Files where things go wrong: full and read-only disks, odd names, mounts, slow clients and ones
//! that leave; and a random sequence of operations, compared with a plain model of a file system.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
};

use common::{
    able, able_as_root, eventually,
    house::{Cut, House, Mounted, failure, rest_error, written},
    noise,
    raw::Raw,
};
use envd::proto::filesystem::{
    CopyRequest, CopyResponse, FileType, WriteRequest, WriteResponse, write_request,
};
use nix::mount::{MsFlags, mount};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};
use reqwest::StatusCode;
use serde_json::json;

async fn put(
    house: &House,
    path: &str,
    content: &[u8],
) -> Result<WriteResponse, common::rpc::Failure> {
    let event = |event| WriteRequest { event: Some(event) };
    let start = write_request::Start { path: path.into(), ..Default::default() };
    let mut requests = vec![event(write_request::Event::Start(start))];
    for part in content.chunks(500_000) {
        let data = bytes::Bytes::copy_from_slice(part);
        requests
            .push(event(write_request::Event::Chunk(write_request::Chunk { offset: None, data })));
    }
    requests.push(event(write_request::Event::Commit(write_request::Commit::default())));
    let client = common::rpc::Client::new(&house.daemon, common::rpc::Wire::Grpc);
    let mut messages = client.streams("/filesystem.Filesystem/Write", &requests).await?;
    Ok(messages.next().await?.unwrap())
}

// Disks.

#[tokio::test]
async fn a_full_disk_is_507_and_leaves_the_old_file() {
    let house = House::new();
    let Some(disk) = Mounted::tmpfs(&house.at("disk"), "size=2m,nr_inodes=20") else { return };
    let at = |name: &str| format!("{}/{name}", disk.path());
    fs::write(at("old"), "old").unwrap();
    let big = noise(3 << 20);
    for (name, shown) in [
        ("old", "attempted to write 3145728 bytes: "),
        ("new", "attempted to write 3145728 bytes: "),
    ] {
        let response = house.upload(&at(name), &[], big.clone()).await;
        let text = rest_error(response, StatusCode::INSUFFICIENT_STORAGE.as_u16()).await;
        assert_eq!(text, format!("{shown}not enough disk space available"), "{name}");
        let error = put(&house, &at(name), &big).await.unwrap_err();
        assert_eq!(error, failure("resource_exhausted", "not enough disk space available"));
    }
    let request = CopyRequest {
        source: house.put("source", &big),
        destination: at("copied"),
        ..CopyRequest::default()
    };
    let error =
        house.client.unary::<_, CopyResponse>("/filesystem.Filesystem/Copy", &request).await;
    assert_eq!(error.unwrap_err().code, "resource_exhausted");
    let sources = json!({ "source_paths": [house.at("source")], "destination": at("composed") });
    let response = house.compose(&sources).await;
    assert_eq!(rest_error(response, 507).await, "not enough disk space available");
    assert!(Path::new(&house.at("source")).exists());
    assert_eq!(fs::read(at("old")).unwrap(), b"old");
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 1, "nothing half is left");

    // No inodes are left.
    for number in 0..40 {
        let _ = fs::write(at(&number.to_string()), "");
    }
    let text = rest_error(house.upload(&at("one-more"), &[], "x").await, 507).await;
    assert!(text.starts_with("not enough inodes available: open "), "{text}");
    // What is there can still be replaced.
    written(house.upload(&at("old"), &[], "new").await).await;
    assert_eq!(fs::read(at("old")).unwrap(), b"new");
}

#[tokio::test]
async fn a_read_only_disk_is_told_and_nothing_changes() {
    let house = House::new();
    let Some(disk) = Mounted::tmpfs(&house.at("disk"), "size=1m") else { return };
    let at = |name: &str| format!("{}/{name}", disk.path());
    fs::write(at("old"), "old").unwrap();
    disk.remount_read_only();
    for name in ["old", "new"] {
        let text = rest_error(house.upload(&at(name), &[], "x").await, 500).await;
        assert_eq!(text, format!("error opening file: open {}: read-only file system", at(name)));
        let error = put(&house, &at(name), b"x").await.unwrap_err();
        assert_eq!(error.code, "failed_precondition", "{error:?}");
        assert!(error.message.ends_with("read-only file system"), "{error:?}");
    }
    let error = house.make_dir(&at("dir")).await.unwrap_err();
    assert_eq!(
        error.message,
        format!("failed to create directory: mkdir {}: read-only file system", at("dir"))
    );
    let error = house.rename(&at("old"), &at("moved")).await.unwrap_err();
    assert!(error.message.ends_with("read-only file system"), "{error:?}");
    let error = house.remove(&at("old")).await.unwrap_err();
    assert!(error.message.ends_with("read-only file system"), "{error:?}");
    let text = rest_error(house.upload(&at("d/new"), &[], "x").await, 500).await;
    assert!(text.starts_with("error ensuring directories: failed to create directory: "), "{text}");
    assert_eq!(house.download(&at("old")).await.text().await.unwrap(), "old");
}

#[tokio::test]
async fn mounts_are_not_removed_nor_emptied() {
    let house = House::new();
    let Some(disk) = Mounted::tmpfs(&house.at("top/mid/disk"), "size=1m") else { return };
    fs::write(format!("{}/kept", disk.path()), "x").unwrap();
    // Whatever the order of the names, some come before the mount.
    let others: Vec<String> = (0..20).map(|n| format!("top/{n}")).collect();
    for other in &others {
        fs::write(house.at(other), "x").unwrap();
    }
    let error = house.remove(disk.path()).await.unwrap_err();
    let text = format!(
        "error removing file or directory: {}: refusing to remove a mount point",
        disk.path()
    );
    assert_eq!(error, failure("invalid_argument", text));
    let error = house.remove(&house.at("top")).await.unwrap_err();
    assert!(error.message.ends_with("device or resource busy"), "{error:?}");
    let shown = format!("unlinkat {}: device or resource busy", disk.path());
    assert!(error.message.ends_with(&shown), "{error:?}");
    assert_eq!(fs::read(format!("{}/kept", disk.path())).unwrap(), b"x");
    for other in &others {
        assert!(fs::exists(house.at(other)).unwrap(), "{other} was removed before the refusal");
    }
    // A name that the mount point's only begins with is another directory.
    fs::create_dir(house.at("top/mid/dis")).unwrap();
    house.remove(&house.at("top/mid/dis")).await.unwrap();
    drop(disk);
    house.remove(&house.at("top")).await.unwrap();
    assert!(!fs::exists(house.at("top")).unwrap());
}

#[tokio::test]
async fn a_file_that_is_a_mount_point_keeps_its_place() {
    let house = House::new();
    if !able_as_root() {
        return;
    }
    let (over, real) = (house.put("over", "over"), house.put("real", "real"));
    let none = None::<&str>;
    let bound = mount(Some(real.as_str()), over.as_str(), none, MsFlags::MS_BIND, none);
    if !able("the right to mount", bound.is_ok()) {
        return;
    }
    let _mounted = Mounted::there(&over);
    put(&house, &over, b"by RPC").await.unwrap();
    assert_eq!(fs::read(&real).unwrap(), b"by RPC");
    written(house.upload(&over, &[], "by HTTP").await).await;
    assert_eq!(fs::read(&real).unwrap(), b"by HTTP");
}

#[tokio::test]
async fn a_directory_that_may_not_be_written() {
    let house = House::new();
    let dir = house.at("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(format!("{dir}/old"), "old").unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o555)).unwrap();
    let path = format!("{dir}/new");
    let response = house.upload(&path, &[], "x").await;
    if common::is_root() {
        // As upstream, the daemon acts with its own rights.
        written(response).await;
    } else {
        let text = rest_error(response, 500).await;
        assert_eq!(text, format!("error opening file: open {path}: permission denied"));
        let error = put(&house, &path, b"x").await.unwrap_err();
        assert_eq!(error.code, "permission_denied");
        // In place, since nothing can be made beside it.
        written(house.upload(&format!("{dir}/old"), &[], "new").await).await;
        assert_eq!(fs::read(format!("{dir}/old")).unwrap(), b"new");
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
}

// Names.

#[tokio::test]
async fn odd_names_are_names() {
    let house = House::new();
    for name in [
        "new\nline".to_owned(),
        "n".repeat(255),
        "-rf".to_owned(),
        "quote\"'\\ %41 + & ? #".to_owned(),
        "\u{202e}gpj.exe".to_owned(),
        " ".to_owned(),
        "~".to_owned(),
        ".envd-new-1".to_owned(),
    ] {
        let path = house.at(&name);
        written(house.upload(&path, &[], name.clone()).await).await;
        written(house.upload(&path, &[], name.clone()).await).await;
        assert_eq!(house.download(&path).await.text().await.unwrap(), name, "{name:?}");
        assert_eq!(house.stat(&path).await.unwrap().name, name);
        assert_eq!(house.list(&house.at(""), 1).await.unwrap()[0].name, name);
        put(&house, &path, b"again").await.unwrap();
        house.rename(&path, &house.at("moved")).await.unwrap();
        house.rename(&house.at("moved"), &path).await.unwrap();
        house.remove(&path).await.unwrap();
        assert_eq!(house.names(), [""; 0]);
    }
}

#[tokio::test]
async fn names_and_paths_that_are_too_long() {
    let house = House::new();
    let name = house.at(&"n".repeat(256));
    let too_long = "file name too long";
    for error in [
        house.stat(&name).await.unwrap_err(),
        house.make_dir(&name).await.unwrap_err(),
        house.rename(&house.put("x", ""), &name).await.unwrap_err(),
        put(&house, &name, b"x").await.unwrap_err(),
    ] {
        assert!(error.message.ends_with(too_long), "{error:?}");
    }
    let text = rest_error(house.upload(&name, &[], "x").await, 500).await;
    assert!(text.starts_with("error opening file: open ") && text.ends_with(too_long), "{text}");
    let path = house.at(&"d/".repeat(2100));
    assert_eq!(put(&house, &path, b"x").await.unwrap_err().code, "invalid_argument");
    let text = rest_error(house.upload(&path, &[], "x").await, 400).await;
    assert!(text.ends_with(too_long), "{text}");
    let text = rest_error(house.download(&path).await, 400).await;
    assert!(text.ends_with(too_long), "{text}");
}

#[tokio::test]
async fn a_link_to_nowhere() {
    let house = House::new();
    symlink("nowhere/at-all", house.at("link")).unwrap();
    let path = house.at("link");
    let text = rest_error(house.download(&path).await, 404).await;
    assert_eq!(text, format!("path '{path}' does not exist"));
    assert_eq!(house.stat(&path).await.unwrap().r#type(), FileType::Unspecified);
    let text = rest_error(house.upload(&path, &[], "x").await, 500).await;
    assert!(text.starts_with("error opening file: open "), "{text}");
    house.remove(&path).await.unwrap();
    assert_eq!(house.names(), [""; 0]);
}

// Clients that are slow, or leave.

/// Lesson: "done" was told before the bytes had arrived.
#[tokio::test]
async fn a_slow_reader_gets_every_byte() {
    let house = House::new();
    let content = noise(2 << 20);
    let path = house.put("file", &content);
    let mut raw = Raw::open(&house.daemon).await;
    raw.at_once = 4 << 10;
    raw.send(format!("GET /files?path={path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
    let answer = raw.answer().await;
    assert!(answer.body == content);
}

/// Lesson: an upload truncates the file first and leaves half of one when the client goes away.
#[tokio::test]
async fn a_client_that_leaves_in_the_middle_leaves_the_previous_file() {
    let house = House::new();
    let path = house.put("file", "previous");
    let raw = Cut::Length.send(&house, &path, &noise(5 << 20)).await;
    drop(raw);
    eventually("it is given up", || {
        (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
    });
    assert_eq!(fs::read(&path).unwrap(), b"previous");
    assert_eq!(house.names(), ["file"]);
}

// Compose.

impl House {
    async fn compose(&self, request: &serde_json::Value) -> reqwest::Response {
        let request = self.http.post(self.daemon.url("/files/compose")).body(request.to_string());
        common::soon("a composition", request.send()).await.unwrap()
    }
}

#[tokio::test]
async fn parts_become_one_file() {
    let house = House::new();
    let parts = [noise(300_000), b"middle".to_vec(), Vec::new()];
    let names: Vec<String> =
        parts.iter().enumerate().map(|(i, part)| house.put(&format!("part{i}"), part)).collect();
    let to = house.at("made/whole");
    let response =
        house.compose(&json!({ "source_paths": names, "destination": to, "x": 1 })).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let text = response.text().await.unwrap();
    assert_eq!(text, format!("{}\n", json!({ "name": "whole", "path": to, "type": "file" })));
    assert!(fs::read(&to).unwrap() == parts.concat());
    assert_eq!(house.names(), ["made"]);

    // Over what is there.
    let part = house.put("part", "new");
    house.compose(&json!({ "source_paths": [part], "destination": to })).await;
    assert_eq!(fs::read(&to).unwrap(), b"new");
    assert_eq!(fs::read_dir(house.at("made")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_part_that_is_the_destination_by_another_name_is_not_removed() {
    let house = House::new();
    let (to, part) = (house.put("to", "old "), house.put("part", "new"));
    fs::create_dir(house.at("dir")).unwrap();
    let same = house.at("dir/../to");
    let response = house.compose(&json!({ "source_paths": [same, part], "destination": to })).await;
    assert_eq!(response.status(), 200);
    assert_eq!(fs::read(&to).unwrap(), b"old new");
    assert_eq!(house.names(), ["dir", "to"]);
}

#[tokio::test]
async fn compositions_that_are_refused_leave_everything_as_it_was() {
    let house = House::new();
    let (part, to) = (house.put("part", "part"), house.put("to", "old"));
    fs::create_dir(house.at("dir")).unwrap();
    let below = format!("{part}/x");
    for (request, status, text) in [
        (json!({}), 400, "source_paths must not be empty".to_owned()),
        (
            json!({ "source_paths": [] , "destination": to }),
            400,
            "source_paths must not be empty".into(),
        ),
        (json!({ "source_paths": [part] }), 400, "destination is required".into()),
        (
            json!({ "source_paths": [part, to], "destination": to }),
            400,
            format!("source path \"{to}\" cannot be the same as destination"),
        ),
        (
            json!({ "source_paths": [part, house.at("no")], "destination": to }),
            404,
            format!("source file not found: {}", house.at("no")),
        ),
        (
            json!({ "source_paths": [house.at("dir")], "destination": to }),
            400,
            format!("source path is not a regular file: {}", house.at("dir")),
        ),
        (
            json!({ "source_paths": [part], "destination": below }),
            500,
            format!("error ensuring directories: path is a file: {part}"),
        ),
        (
            json!({ "source_paths": [part], "destination": house.at("dir") }),
            500,
            format!("error finalizing compose: rename {}: is a directory", house.at("dir")),
        ),
        (
            json!({ "source_paths": [part], "destination": to, "username": "nobody-at-all" }),
            401,
            "error looking up user 'nobody-at-all': user: unknown user nobody-at-all".into(),
        ),
    ] {
        let response = house.compose(&request).await;
        assert_eq!(rest_error(response, status).await, text);
        assert_eq!(fs::read(&part).unwrap(), b"part");
        assert_eq!(fs::read(&to).unwrap(), b"old");
        assert_eq!(house.names(), ["dir", "part", "to"]);
    }
    for body in ["", "[1", "null[", "\"x\""] {
        let request = house.http.post(house.daemon.url("/files/compose")).body(body);
        let text = rest_error(request.send().await.unwrap(), 400).await;
        assert!(text.starts_with("invalid request body: ") || body == "null[", "{body}: {text}");
    }
}

// A model.

/// What is done; paths are numbers of places.
#[derive(Debug, Clone)]
enum Op {
    Upload(usize, Vec<u8>),
    Write(usize, Vec<u8>),
    MakeDir(usize),
    Move(usize, usize),
    Copy(usize, usize),
    Remove(usize),
}

/// The places: directories and files at two levels.
const PLACES: [&str; 8] = ["a", "b", "a/x", "a/y", "b/x", "b/y/z", "c", "a/x/w"];

fn op() -> impl Strategy<Value = Op> {
    let place = 0..PLACES.len();
    let content = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        (any::<u8>(), 1_000_000_usize..1_200_000).prop_map(|(byte, size)| vec![byte; size]),
    ];
    prop_oneof![
        (place.clone(), content.clone()).prop_map(|(p, c)| Op::Upload(p, c)),
        (place.clone(), content).prop_map(|(p, c)| Op::Write(p, c)),
        place.clone().prop_map(Op::MakeDir),
        (place.clone(), place.clone()).prop_map(|(a, b)| Op::Move(a, b)),
        (place.clone(), place.clone()).prop_map(|(a, b)| Op::Copy(a, b)),
        place.prop_map(Op::Remove),
    ]
}

/// A file system: what is at each path; none for a directory.
#[derive(Debug, Default, Clone, PartialEq)]
struct Model(BTreeMap<String, Option<Vec<u8>>>);

impl Model {
    fn is_dir(&self, path: &str) -> bool {
        self.0.get(path).is_some_and(Option::is_none)
    }

    /// Makes the directories above a path; false when a file is in the way.
    fn above(&mut self, path: &str) -> bool {
        let mut made = self.clone();
        for (slash, _) in path.match_indices('/') {
            match made.0.get(&path[..slash]) {
                Some(Some(_)) => {
                    *self = made;
                    return false;
                }
                Some(None) => {}
                None => {
                    made.0.insert(path[..slash].to_owned(), None);
                }
            }
        }
        *self = made;
        true
    }

    fn below(&self, path: &str) -> Vec<(String, Option<Vec<u8>>)> {
        let inside = format!("{path}/");
        let all = self.0.iter().filter(|(at, _)| *at == path || at.starts_with(&inside));
        all.map(|(at, content)| (at[path.len()..].to_owned(), content.clone())).collect()
    }

    /// Does it; whether it worked.
    fn apply(&mut self, op: &Op) -> bool {
        match op {
            Op::Upload(place, content) | Op::Write(place, content) => {
                let path = PLACES[*place];
                if !self.above(path) || self.is_dir(path) {
                    return false;
                }
                self.0.insert(path.to_owned(), Some(content.clone()));
            }
            Op::MakeDir(place) => {
                let path = PLACES[*place];
                // What is in the way is found before anything is made.
                if self.0.contains_key(path) || self.blocked(path) || !self.above(path) {
                    return false;
                }
                self.0.insert(path.to_owned(), None);
            }
            Op::Move(from, to) | Op::Copy(from, to) => {
                let (from, to) = (PLACES[*from], PLACES[*to]);
                let copied = matches!(op, Op::Copy(..));
                if !self.0.contains_key(from) || self.blocked(from) {
                    return false;
                }
                let into_itself = to.starts_with(&format!("{from}/")) || (copied && from == to);
                let dir = self.is_dir(from);
                if copied && dir && into_itself {
                    return false;
                }
                if !self.above(to) {
                    return false;
                }
                if self.is_dir(to) || (dir && (self.0.contains_key(to) || into_itself)) {
                    return false;
                }
                if from == to {
                    return true;
                }
                let moved = self.below(from);
                if !copied {
                    for (rest, _) in &moved {
                        self.0.remove(&format!("{from}{rest}"));
                    }
                }
                for (rest, content) in moved {
                    self.0.insert(format!("{to}{rest}"), content);
                }
            }
            Op::Remove(place) => {
                let path = PLACES[*place];
                if self.blocked(path) {
                    return false;
                }
                for (rest, _) in self.below(path) {
                    self.0.remove(&format!("{path}{rest}"));
                }
            }
        }
        true
    }

    /// Whether a file lies where the path needs a directory.
    fn blocked(&self, path: &str) -> bool {
        path.match_indices('/')
            .any(|(slash, _)| self.0.get(&path[..slash]).is_some_and(Option::is_some))
    }
}

async fn run(house: &House, op: &Op) -> bool {
    match op {
        Op::Upload(place, content) => {
            let path = house.at(PLACES[*place]);
            house.upload(&path, &[], content.clone()).await.status() == 200
        }
        Op::Write(place, content) => put(house, &house.at(PLACES[*place]), content).await.is_ok(),
        Op::MakeDir(place) => house.make_dir(&house.at(PLACES[*place])).await.is_ok(),
        Op::Move(from, to) => {
            house.rename(&house.at(PLACES[*from]), &house.at(PLACES[*to])).await.is_ok()
        }
        Op::Copy(from, to) => {
            let (source, destination) = (house.at(PLACES[*from]), house.at(PLACES[*to]));
            let request = CopyRequest { source, destination, ..Default::default() };
            let answer = house.client.unary("/filesystem.Filesystem/Copy", &request).await;
            answer.map(|_: CopyResponse| ()).is_ok()
        }
        Op::Remove(place) => house.remove(&house.at(PLACES[*place])).await.is_ok(),
    }
}

/// What is really there.
async fn state(house: &House) -> Model {
    let mut model = Model::default();
    for entry in house.list(&house.at(""), 99).await.unwrap() {
        let content = match entry.r#type() {
            FileType::Directory => None,
            _ => {
                let response = house.download(&entry.path).await;
                Some(response.bytes().await.unwrap().to_vec())
            }
        };
        let path = entry.path.strip_prefix(&house.at("")).unwrap();
        model.0.insert(path.trim_start_matches('/').to_owned(), content);
    }
    model
}

#[tokio::test]
async fn any_sequence_of_operations_does_what_the_model_does() {
    let house = House::new();
    let mut runner = TestRunner::new(Config::default());
    for _ in 0..6 {
        let ops = prop::collection::vec(op(), 1..20).new_tree(&mut runner).unwrap().current();
        let mut model = Model::default();
        for (number, op) in ops.iter().enumerate() {
            let shown = format!("{number} of {ops:.80?}");
            assert_eq!(run(&house, op).await, model.apply(op), "{op:.80?}: {shown:.3000}");
            let now = state(&house).await;
            let brief = |model: &Model| {
                let sizes =
                    model.0.iter().map(|(path, c)| (path.clone(), c.as_ref().map(Vec::len)));
                sizes.collect::<Vec<_>>()
            };
            assert_eq!(brief(&now), brief(&model), "after {op:.80?}: {shown:.3000}");
            assert!(now == model, "contents after {op:.80?}");
        }
        for name in house.names() {
            house.remove(&house.at(&name)).await.unwrap();
        }
    }
}

// curl.

#[tokio::test]
async fn curl_does_ranges_conditions_and_forms() {
    let house = House::new();
    if !able("curl", Command::new("curl").arg("--version").output().is_ok()) {
        return;
    }
    let path = house.put("file.txt", "0123456789");
    let url = house.files(&[("path", &path)]).to_string();
    let curl = async |args: Vec<String>| {
        tokio::task::spawn_blocking(move || {
            let output =
                Command::new("curl").args(["-sS", "--noproxy", "*"]).args(args).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
        .await
        .unwrap()
    };
    let args = |args: &[&str]| args.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(curl(args(&["-r", "2-4", &url])).await, "234");
    let told = curl(args(&["-r", "0-0,-1", "-w", "%{http_code} %{content_type}", &url])).await;
    assert!(told.contains("206 multipart/byteranges; boundary="), "{told}");
    let head = curl(args(&["-I", &url])).await;
    let tag =
        head.lines().find_map(|line| line.strip_prefix("etag: ")).expect("an etag").to_owned();
    let condition = format!("If-None-Match: {tag}");
    assert_eq!(curl(args(&["-H", &condition, "-w", "%{http_code}", &url])).await, "304");
    // Continues a download that broke off.
    let partial = house.put("partial", "01234");
    curl(args(&["-C", "-", "-o", &partial, &url])).await;
    assert_eq!(fs::read(&partial).unwrap(), b"0123456789");
    let form = format!("file=@{path};filename={}", house.at("by-form"));
    let told = curl(args(&["-F", &form, &house.daemon.url("/files")])).await;
    assert_eq!(
        told,
        json!([{ "name": "by-form", "path": house.at("by-form"), "type": "file" }]).to_string()
    );
    let to = house.files(&[("path", &house.at("by-body")), ("fsync", "true")]).to_string();
    let body = format!("@{path}");
    let kind = "content-type: application/octet-stream";
    curl(args(&["--data-binary", &body, "-H", kind, &to])).await;
    for name in ["by-form", "by-body"] {
        assert_eq!(fs::read(house.at(name)).unwrap(), b"0123456789");
    }
}
