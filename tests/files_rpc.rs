//! Content and whole trees over RPC: Read, Write, Copy, SetAttributes, CreateSymlink, Archive,
//! Extract, and listings in pages.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use common::{
    able, able_as_root, basic, eventually,
    house::{House, failure, rest_error, set_mode, written},
    in_time, noise,
    rpc::{Client, Failure, Messages, WIRES, Wire},
    soon,
};
use envd::proto::filesystem::{
    ArchiveRequest, ArchiveResponse, Compression, CopyRequest, CopyResponse, CreateSymlinkRequest,
    CreateSymlinkResponse, EntryInfo, ExtractRequest, ExtractResponse, ListDirRequest,
    ListDirResponse, ReadRequest, ReadResponse, SetAttributesRequest, SetAttributesResponse,
    WriteRequest, WriteResponse, extract_request, read_response, write_request,
};
use sha2::{Digest, Sha256};

const READ: &str = "/filesystem.Filesystem/Read";
const WRITE: &str = "/filesystem.Filesystem/Write";
const COPY: &str = "/filesystem.Filesystem/Copy";
const SET_ATTRIBUTES: &str = "/filesystem.Filesystem/SetAttributes";
const CREATE_SYMLINK: &str = "/filesystem.Filesystem/CreateSymlink";
const ARCHIVE: &str = "/filesystem.Filesystem/Archive";
const EXTRACT: &str = "/filesystem.Filesystem/Extract";
const LIST: &str = "/filesystem.Filesystem/ListDir";

async fn read(
    client: &Client,
    request: &ReadRequest,
) -> Result<(read_response::Info, Vec<Bytes>), Failure> {
    let mut messages: Messages<ReadResponse> = client.stream(READ, request).await?;
    let first = messages.next().await?.expect("info");
    let Some(read_response::Event::Info(info)) = first.event else { panic!("no info first") };
    let mut pieces = Vec::new();
    while let Some(message) = messages.next().await? {
        let Some(read_response::Event::Data(data)) = message.event else { panic!("no data") };
        pieces.push(data);
    }
    Ok((info, pieces))
}

fn start(path: &str) -> write_request::Start {
    write_request::Start { path: path.to_owned(), ..write_request::Start::default() }
}

fn begin(start: write_request::Start) -> WriteRequest {
    WriteRequest { event: Some(write_request::Event::Start(start)) }
}

fn chunk(offset: Option<u64>, data: &[u8]) -> WriteRequest {
    let data = Bytes::copy_from_slice(data);
    WriteRequest { event: Some(write_request::Event::Chunk(write_request::Chunk { offset, data })) }
}

fn commit(size: Option<u64>, sha256: Option<&[u8]>) -> WriteRequest {
    let sha256 = sha256.map(Bytes::copy_from_slice);
    let commit = write_request::Commit { size, sha256 };
    WriteRequest { event: Some(write_request::Event::Commit(commit)) }
}

async fn write(client: &Client, requests: &[WriteRequest]) -> Result<WriteResponse, Failure> {
    let mut messages: Messages<WriteResponse> = client.streams(WRITE, requests).await?;
    let answer = messages.next().await?.expect("an answer");
    assert!(messages.next().await?.is_none());
    Ok(answer)
}

/// The content in one message.
async fn put(
    client: &Client,
    start: write_request::Start,
    content: &[u8],
) -> Result<WriteResponse, Failure> {
    write(client, &[begin(start), chunk(None, content), commit(None, None)]).await
}

async fn archive(
    client: &Client,
    path: &str,
    compression: Compression,
) -> Result<Vec<u8>, Failure> {
    let request = ArchiveRequest { path: path.to_owned(), compression: compression.into() };
    let mut messages: Messages<ArchiveResponse> = client.stream(ARCHIVE, &request).await?;
    let mut bytes = Vec::new();
    while let Some(message) = messages.next().await? {
        bytes.extend_from_slice(&message.data);
    }
    Ok(bytes)
}

async fn extract(client: &Client, path: &str, archive: &[u8]) -> Result<ExtractResponse, Failure> {
    let start =
        extract_request::Start { path: path.to_owned(), ..extract_request::Start::default() };
    extract_as(client, start, archive).await
}

async fn extract_as(
    client: &Client,
    start: extract_request::Start,
    archive: &[u8],
) -> Result<ExtractResponse, Failure> {
    let mut requests = vec![ExtractRequest { event: Some(extract_request::Event::Start(start)) }];
    requests.extend(archive.chunks(100_000).map(|data| ExtractRequest {
        event: Some(extract_request::Event::Data(Bytes::copy_from_slice(data))),
    }));
    let mut messages: Messages<ExtractResponse> = client.streams(EXTRACT, &requests).await?;
    Ok(messages.next().await?.expect("an answer"))
}

// Read.

#[tokio::test]
async fn read_streams_a_file_over_every_protocol() {
    let house = House::new();
    let bytes = noise(600_000);
    let path = house.put("file", &bytes);
    for wire in WIRES {
        let client = Client::new(&house.daemon, wire);
        let whole = ReadRequest { path: path.clone(), ..ReadRequest::default() };
        let (info, pieces) = read(&client, &whole).await.unwrap();
        assert_eq!(info.entry.unwrap(), house.stat(&path).await.unwrap(), "{wire:?}");
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [262_144, 262_144, 75_712]);
        assert!(pieces.concat() == bytes, "{wire:?}");

        let part = ReadRequest { offset: 100, length: Some(5000), chunk_bytes: 2000, ..whole };
        let (_, pieces) = read(&client, &part).await.unwrap();
        assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [2000, 2000, 1000]);
        assert!(pieces.concat() == bytes[100..5100], "{wire:?}");
    }
}

#[tokio::test]
async fn reads_of_parts_belong_together_by_their_tag() {
    let house = House::new();
    let path = house.put("file", "0123456789");
    let request = |if_match: &str| ReadRequest {
        path: path.clone(),
        offset: 8,
        length: Some(99),
        if_match: if_match.to_owned(),
        ..ReadRequest::default()
    };
    let (info, pieces) = read(&house.client, &request("")).await.unwrap();
    assert_eq!(pieces.concat(), b"89");
    read(&house.client, &request(&info.tag)).await.unwrap();
    house.put("other", "0123456789");
    fs::rename(house.at("other"), &path).unwrap();
    let error = read(&house.client, &request(&info.tag)).await.unwrap_err();
    assert_eq!(error.code, "failed_precondition");
    assert!(error.message.contains("is not as if_match says: its tag is "), "{}", error.message);

    for (offset, length) in [(10, None), (99, None), (0, Some(0))] {
        let request = ReadRequest { path: path.clone(), offset, length, ..ReadRequest::default() };
        assert_eq!(read(&house.client, &request).await.unwrap().1.len(), 0, "{offset}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_and_what_can() {
    let house = House::new();
    let fifo = house.at("fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("nowhere", house.at("dangling")).unwrap();
    for (path, code, text) in [
        (house.at("no"), "not_found", "does not exist"),
        (house.at("dangling"), "not_found", "does not exist"),
        (house.at(""), "invalid_argument", "is a directory"),
        (fifo, "invalid_argument", "is not a regular file"),
        ("/dev/zero".to_owned(), "invalid_argument", "is not a regular file"),
    ] {
        let request = ReadRequest { path: path.clone(), ..ReadRequest::default() };
        let error = read(&house.client, &request).await.unwrap_err();
        assert_eq!(error, failure(code, format!("path '{path}' {text}")));
    }
    let request = ReadRequest { path: "/proc/version".into(), ..ReadRequest::default() };
    let (_, pieces) = read(&house.client, &request).await.unwrap();
    assert_eq!(pieces.concat(), fs::read("/proc/version").unwrap());
    let request = ReadRequest { chunk_bytes: 1 << 21, ..request };
    let error = read(&house.client, &request).await.unwrap_err();
    assert_eq!(error, failure("invalid_argument", "chunk_bytes: 2097152 is more than 1048576"));
}

// Write.

#[tokio::test]
async fn write_makes_and_replaces_files_over_every_protocol() {
    let house = House::new();
    for wire in WIRES {
        // Browsers cannot stream up; the client of the tests sends all at once, as they could.
        let client = Client::new(&house.daemon, wire);
        let path = house.at("a/b/file");
        for content in [noise(300_000), b"short".to_vec(), Vec::new()] {
            let size = content.len() as u64;
            let sum = Sha256::digest(&content);
            let mut requests = vec![begin(start(&path))];
            requests.extend(content.chunks(70_000).map(|part| chunk(None, part)));
            requests.push(commit(Some(size), Some(&sum)));
            let answer = write(&client, &requests).await.unwrap();
            assert!(answer.committed && answer.received == size, "{wire:?}");
            assert_eq!(answer.sha256, sum.as_slice());
            assert_eq!(answer.entry.unwrap(), house.stat(&path).await.unwrap());
            assert!(fs::read(&path).unwrap() == content, "{wire:?}");
        }
        assert_eq!(house.names(), ["a"]);
        fs::remove_dir_all(house.at("a")).unwrap();
    }
}

#[tokio::test]
async fn a_replaced_file_keeps_what_it_had_and_readers_see_old_or_new() {
    let house = House::new();
    let path = house.put("file", vec![b'0'; 200_000]);
    set_mode(&path, 0o4751);
    let has_attributes = xattr::set(&path, "user.kept", b"yes").is_ok();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let (stop, path) = (Arc::clone(&stop), path.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                let content = fs::read(&path).unwrap();
                assert_eq!(content.len(), 200_000);
                assert!(content.iter().all(|byte| *byte == content[0]), "torn");
            }
        }
    });
    for number in 1..20_u8 {
        put(&house.client, start(&path), &vec![b'0' + number; 200_000]).await.unwrap();
        written(house.upload(&path, &[], vec![b'0' + number; 200_000]).await).await;
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    // All but the right to be root, which the old content had.
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o751);
    if has_attributes {
        assert_eq!(xattr::get(&path, "user.kept").unwrap().unwrap(), b"yes");
    }
    assert_eq!(house.names(), ["file"]);
}

#[tokio::test]
async fn writes_that_depend_on_what_is_there() {
    let house = House::new();
    let path = house.at("file");
    let client = &house.client;
    let only_new = write_request::Start { create_only: true, ..start(&path) };
    let first = put(client, only_new.clone(), b"1").await.unwrap();
    let error = put(client, only_new, b"2").await.unwrap_err();
    assert_eq!(error, failure("already_exists", format!("path already exists: {path}")));

    let known = |tag: &str| write_request::Start { if_match: tag.to_owned(), ..start(&path) };
    let second = put(client, known(&first.tag), b"2").await.unwrap();
    assert_ne!(first.tag, second.tag);
    let error = put(client, known(&first.tag), b"3").await.unwrap_err();
    assert_eq!(error.code, "failed_precondition");
    assert_eq!(fs::read(&path).unwrap(), b"2");
    fs::remove_file(&path).unwrap();
    let error = put(client, known(&second.tag), b"3").await.unwrap_err();
    assert!(error.message.ends_with("is not as if_match says: it does not exist"), "{error:?}");

    // Of two who know the same state one wins.
    let tag = put(client, start(&path), b"base").await.unwrap().tag;
    let both = (0..8).map(|_| put(client, known(&tag), b"won"));
    let both = futures_util::future::join_all(both).await;
    assert_eq!(both.iter().filter(|answer| answer.is_ok()).count(), 1, "{both:?}");
    // As do, of many who would create one file.
    fs::remove_file(&path).unwrap();
    let only_new = || write_request::Start { create_only: true, ..start(&path) };
    let both = (0..8).map(|_| put(client, only_new(), b"won"));
    let both = futures_util::future::join_all(both).await;
    assert_eq!(both.iter().filter(|answer| answer.is_ok()).count(), 1, "{both:?}");
}

#[tokio::test]
async fn links_modes_owners_and_metadata_of_a_write() {
    let house = House::new();
    let client = &house.client;
    let path = house.put("file", "old");
    fs::hard_link(&path, house.at("hard")).unwrap();
    symlink("file", house.at("soft")).unwrap();
    symlink("made", house.at("dangling")).unwrap();
    put(client, start(&house.at("soft")), b"through a link").await.unwrap();
    assert_eq!(fs::read(house.at("hard")).unwrap(), b"through a link");
    assert!(fs::symlink_metadata(house.at("soft")).unwrap().is_symlink());
    put(client, start(&house.at("dangling")), b"x").await.unwrap();
    assert_eq!(fs::read(house.at("made")).unwrap(), b"x");

    let with_mode = write_request::Start { mode: Some(0o600), fsync: true, ..start(&path) };
    put(client, with_mode, b"secret").await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    let new = put(client, start(&house.at("new")), b"").await.unwrap();
    assert_eq!(new.entry.unwrap().mode & !0o644, 0);

    if house.keeps_metadata() {
        let metadata = [("k".to_owned(), "v".to_owned())].into();
        let start = write_request::Start { metadata, ..start(&path) };
        let answer = put(client, start, b"").await.unwrap();
        assert_eq!(answer.entry.unwrap().metadata["k"], "v");
    }
    if able_as_root() {
        let client = client.clone().with("authorization", &basic("nobody"));
        let answer = put(&client, start(&house.at("theirs/file")), b"").await.unwrap();
        assert_eq!(answer.entry.unwrap().owner, "nobody");
        assert_eq!(house.stat(&house.at("theirs")).await.unwrap().owner, "nobody");
    }
}

#[tokio::test]
async fn writes_that_are_refused_leave_everything_as_it_was() {
    let house = House::new();
    let path = house.put("file", "old");
    let client = Client::new(&house.daemon, Wire::Grpc);
    let wrong = [7_u8; 32];
    let named = |id: &str| write_request::Start { upload_id: id.to_owned(), ..start(&path) };
    for (requests, code, text) in [
        (vec![], "invalid_argument", "start: "),
        (vec![commit(None, None)], "invalid_argument", "start: "),
        (vec![begin(start(&path))], "invalid_argument", "commit: "),
        (vec![begin(start(&path)), begin(start(&path))], "invalid_argument", "start: "),
        (vec![begin(start(&path)), WriteRequest::default()], "invalid_argument", "event: "),
        (
            vec![begin(start(&path)), chunk(Some(1), b"x")],
            "out_of_range",
            "chunk.offset: 1 is beyond the 0 ",
        ),
        (
            vec![begin(start(&path)), chunk(None, b"x"), commit(Some(2), None)],
            "invalid_argument",
            "commit.size: 1 bytes have come, not 2",
        ),
        (vec![begin(start(&path)), commit(None, Some(&wrong))], "data_loss", "commit.sha256: "),
        (
            vec![begin(start(&path)), commit(None, Some(b"x"))],
            "invalid_argument",
            "commit.sha256: 1 bytes",
        ),
        (vec![begin(start("")), commit(None, None)], "invalid_argument", "path is a directory: "),
        (vec![begin(start(&house.at("")))], "invalid_argument", "path is a directory: "),
        (vec![begin(start(&format!("{path}/x")))], "internal", "error ensuring directories: "),
        (vec![begin(start("/dev/null"))], "invalid_argument", "path '/dev/null' is not a regular"),
        (vec![begin(named("a b"))], "invalid_argument", "upload_id: "),
        (
            vec![begin(write_request::Start { mode: Some(0o10000), ..start(&path) })],
            "invalid_argument",
            "start.mode: ",
        ),
    ] {
        let error = write(&client, &requests).await.unwrap_err();
        assert_eq!(error.code, code, "{error:?} for {requests:?}");
        assert!(error.message.starts_with(text), "{error:?} for {requests:?}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(house.names(), ["file"]);
    }
    eventually("everything is let go", || {
        (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
    });
}

#[tokio::test]
async fn an_upload_is_continued_where_it_broke_off() {
    let house = House::new();
    let client = Client::new(&house.daemon, Wire::Grpc);
    let path = house.put("file", "old");
    let content = noise(500_000);
    let named = || write_request::Start { upload_id: "up-1".into(), ..start(&path) };

    let part = [begin(named()), chunk(Some(0), &content[..200_000])];
    let answer = write(&client, &part).await.unwrap();
    assert!(!answer.committed && answer.received == 200_000);
    assert_eq!(answer.sha256, Sha256::digest(&content[..200_000]).as_slice());
    // An error in the middle loses nothing.
    let gap = [begin(named()), chunk(Some(300_000), b"x")];
    assert_eq!(write(&client, &gap).await.unwrap_err().code, "out_of_range");
    // Nor does a connection that breaks.
    let mut raw = common::raw::Raw::open(&house.daemon).await;
    let head = "POST /filesystem.Filesystem/Write HTTP/1.1\r\nhost: localhost\r\n\
                content-type: application/connect+json\r\ntransfer-encoding: chunked\r\n\r\n";
    raw.send(head).await;
    for message in [begin(named()), chunk(Some(200_000), &content[200_000..300_000])] {
        let message = serde_json::to_vec(&message).unwrap();
        raw.send_chunk(&common::rpc::envelope(0, &message)).await;
    }
    let size = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", house.daemon.pid())).unwrap();
        let sizes = fds.filter_map(|fd| {
            let fd = fd.unwrap().path();
            let there = fs::read_link(&fd).is_ok_and(|target| target.starts_with(house.dir()));
            there.then(|| fs::metadata(&fd).map_or(0, |meta| meta.len()))
        });
        sizes.max().unwrap_or(0)
    };
    eventually("it is written", || (size() == 300_000).then_some(()));
    // While it is under way, nobody else has it. (Asked earlier, this call could have it first.)
    assert_eq!(write(&client, &[begin(named())]).await.unwrap_err().code, "aborted");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(raw);
    let answer =
        in_time("it can be continued", async || write(&client, &[begin(named())]).await.ok()).await;
    assert_eq!(answer.received, 300_000);

    let other = write_request::Start { path: house.at("other"), ..named() };
    let error = write(&client, &[begin(other)]).await.unwrap_err();
    assert_eq!(error.message, "upload_id: upload 'up-1' is of another path or user");

    // What was sent already may be sent again.
    let rest = [
        begin(named()),
        chunk(Some(250_000), &content[250_000..]),
        commit(Some(500_000), Some(&Sha256::digest(&content))),
    ];
    assert!(write(&client, &rest).await.unwrap().committed);
    assert!(fs::read(&path).unwrap() == content);
    // The name is free again.
    assert_eq!(write(&client, &[begin(named())]).await.unwrap().received, 0);
}

#[tokio::test]
async fn no_more_uploads_are_kept_than_the_bound() {
    let house = House::new();
    let named = |number: u32| {
        let path = house.at(&number.to_string());
        [begin(write_request::Start { upload_id: format!("u{number}"), ..start(&path) })]
    };
    for number in 0..32 {
        write(&house.client, &named(number)).await.unwrap();
    }
    // Further ones take the places of the oldest.
    for number in 32..40 {
        write(&house.client, &named(number)).await.unwrap();
    }
    let opened = || house.opened(|opened| opened.starts_with(house.dir()));
    // Of each a file and its directory.
    eventually("the oldest are gone", || (opened() <= 2 * 32).then_some(()));
    put(&house.client, start(&house.at("plain")), b"goes on").await.unwrap();
    assert_eq!(house.names(), ["plain"], "what waits has no name");
}

// Copy.

async fn copy(
    client: &Client,
    from: &str,
    to: &str,
    preserve: bool,
) -> Result<CopyResponse, Failure> {
    let (source, destination) = (from.to_owned(), to.to_owned());
    let request = CopyRequest { source, destination, preserve, create_only: false };
    client.unary(COPY, &request).await
}

/// A tree with one of everything.
fn plant(house: &House, top: &str) {
    fs::create_dir_all(house.at(&format!("{top}/sub/deep"))).unwrap();
    house.put(&format!("{top}/file"), noise(100_000));
    house.put(&format!("{top}/sub/empty"), "");
    house.put(&format!("{top}/sub/deep/new\nline"), "x");
    house.put(&format!("{top}/sub/{}", "n".repeat(255)), "long");
    set_mode(house.at(&format!("{top}/file")), 0o640);
    set_mode(house.at(&format!("{top}/sub")), 0o711);
    symlink("../file", house.at(&format!("{top}/sub/link"))).unwrap();
    symlink("/nowhere", house.at(&format!("{top}/dangling"))).unwrap();
    let fifo = house.at(&format!("{top}/fifo"));
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let sparse = fs::File::create(house.at(&format!("{top}/sparse"))).unwrap();
    sparse.set_len(8 << 20).unwrap();
    (&sparse).write_all(b"start").unwrap();
}

/// Every path below with its type, mode and content.
fn tree(top: &str) -> Vec<(String, u32, Vec<u8>)> {
    let mut found = Vec::new();
    let mut todo = vec![Path::new(top).to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_file() {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            let shown = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
            found.push((shown, meta.mode(), content));
            if meta.is_dir() {
                todo.push(path);
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_tree_is_copied_with_everything_in_it() {
    let house = House::new();
    plant(&house, "from");
    let from = house.at("from");
    let answer = copy(&house.client, &from, &house.at("made/to"), false).await.unwrap();
    assert_eq!(answer.entry.unwrap(), house.stat(&house.at("made/to")).await.unwrap());
    assert_eq!(tree(&from), tree(&house.at("made/to")));
    assert_eq!(answer.entries, tree(&from).len() as u64 + 1);
    let sparse = fs::metadata(house.at("made/to/sparse")).unwrap();
    assert!(sparse.len() == 8 << 20 && sparse.blocks() * 512 < 1 << 20, "holes stay holes");

    let text = format!("path already exists: {}", house.at("made/to"));
    let error = copy(&house.client, &from, &house.at("made/to"), false).await.unwrap_err();
    assert_eq!(error, failure("already_exists", text));
    let error = copy(&house.client, &from, &house.at("from/sub/x/y"), false).await.unwrap_err();
    assert_eq!(error.code, "invalid_argument");
    assert!(!Path::new(&house.at("from/sub/x")).exists());
    let error = copy(&house.client, &house.at("no"), &house.at("x"), false).await.unwrap_err();
    assert_eq!(error.code, "not_found");
    assert_eq!(house.names(), ["from", "made"]);
}

#[tokio::test]
async fn files_and_links_are_copied_over_what_is_there() {
    let house = House::new();
    let (one, two) = (house.put("one", "1"), house.put("two", "2"));
    symlink("one", house.at("link")).unwrap();
    let modified = UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    fs::File::options().write(true).open(&one).unwrap().set_modified(modified).unwrap();
    copy(&house.client, &one, &two, true).await.unwrap();
    assert_eq!(fs::read(&two).unwrap(), b"1");
    assert_eq!(fs::metadata(&two).unwrap().modified().unwrap(), modified);
    copy(&house.client, &house.at("link"), &two, false).await.unwrap();
    assert_eq!(fs::read_link(&two).unwrap(), Path::new("one"));
    let request =
        CopyRequest { source: one, destination: two, create_only: true, ..CopyRequest::default() };
    let error = house.client.unary::<_, CopyResponse>(COPY, &request).await.unwrap_err();
    assert_eq!(error.code, "already_exists");
    let socket = house.at("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [socket.as_str(), "/dev/null"] {
        let error = copy(&house.client, path, &house.at("x"), false).await.unwrap_err();
        assert_eq!(error.code, "failed_precondition", "{error:?}");
    }
    assert_eq!(house.names(), ["link", "one", "socket", "two"]);
}

#[tokio::test]
async fn a_copy_belongs_to_the_caller_unless_it_is_to_be_kept() {
    if !able_as_root() {
        return;
    }
    let house = House::new();
    plant(&house, "from");
    set_mode(house.at("from/file"), 0o4755);
    let client = house.client.clone().with("authorization", &basic("nobody"));
    copy(&client, &house.at("from"), &house.at("theirs"), false).await.unwrap();
    copy(&client, &house.at("from"), &house.at("wished"), true).await.unwrap();
    give_to_nobody(&house, "from");
    copy(&house.client, &house.at("from"), &house.at("kept"), true).await.unwrap();
    copy(&house.client, &house.at("from"), &house.at("plain"), false).await.unwrap();
    owners_are(&house, &["theirs", "wished", "kept"], "nobody").await;
    owners_are(&house, &["plain"], "root").await;
    let mode = |name: &str| fs::metadata(house.at(name)).unwrap().mode() & 0o7777;
    let modes = ["theirs/file", "wished/file", "kept/file", "plain/file"].map(mode);
    assert_eq!(modes, [0o755, 0o755, 0o4755, 0o755], "setuid is kept by root only");
    let device = house.at("device");
    for (client, code) in [(&client, Some("failed_precondition")), (&house.client, None)] {
        let copied = copy(client, "/dev/null", &device, true).await;
        assert_eq!(copied.err().map(|error| error.code), code.map(str::to_owned));
    }
}

/// Gives a planted tree to another user, with a setuid program in it.
fn give_to_nobody(house: &House, top: &str) {
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let (uid, gid) = (Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw()));
    for name in ["", "/file", "/sub", "/sub/link", "/fifo"] {
        std::os::unix::fs::lchown(house.at(&format!("{top}{name}")), uid, gid).unwrap();
    }
    set_mode(house.at(&format!("{top}/file")), 0o4755);
}

async fn owners_are(house: &House, trees: &[&str], owner: &str) {
    for tree in trees {
        for name in ["/file", "/sub", "/sub/link", "/fifo"] {
            let path = house.at(&format!("{tree}{name}"));
            assert_eq!(house.stat(&path).await.unwrap().owner, owner, "{path}");
        }
    }
}

// SetAttributes, CreateSymlink.

#[tokio::test]
async fn attributes_are_set_and_checked_before() {
    let house = House::new();
    let path = house.put("file", "");
    let time = |seconds, nanos| Some(envd::proto::Timestamp { seconds, nanos });
    let set = async |request: SetAttributesRequest| -> Result<EntryInfo, Failure> {
        let request = SetAttributesRequest { path: path.clone(), ..request };
        // JSON has no way to write wrong nanoseconds.
        let client = Client::new(&house.daemon, Wire::Grpc);
        let answer: SetAttributesResponse = client.unary(SET_ATTRIBUTES, &request).await?;
        Ok(answer.entry.unwrap())
    };
    let request = SetAttributesRequest {
        mode: Some(0o4711),
        modified_time: time(1_000_000_000, 7),
        owner: Some(common::me().name),
        group: Some(nix::unistd::getegid().to_string()),
        ..SetAttributesRequest::default()
    };
    let entry = set(request).await.unwrap();
    assert_eq!(entry.permissions, "urwx--x--x");
    assert_eq!(entry.modified_time, time(1_000_000_000, 7));
    for (request, field) in [
        (SetAttributesRequest { mode: Some(0o10000), ..Default::default() }, "mode: "),
        (
            SetAttributesRequest {
                owner: Some("no-such".into()),
                mode: Some(0),
                ..Default::default()
            },
            "owner: ",
        ),
        (SetAttributesRequest { group: Some("-1".into()), ..Default::default() }, "group: "),
        // chown(2) would take it for "no change".
        (
            SetAttributesRequest { owner: Some("4294967295".into()), ..Default::default() },
            "owner: ",
        ),
        (
            SetAttributesRequest { group: Some("4294967295".into()), ..Default::default() },
            "group: ",
        ),
        (
            SetAttributesRequest { modified_time: time(0, -1), ..Default::default() },
            "modified_time: ",
        ),
    ] {
        let error = set(request).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument");
        assert!(error.message.starts_with(field), "{error:?}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4711);
    }
    let request = SetAttributesRequest { path: house.at("no"), ..Default::default() };
    let error = house.client.unary::<_, SetAttributesResponse>(SET_ATTRIBUTES, &request).await;
    assert_eq!(error.unwrap_err().code, "not_found");
}

#[tokio::test]
async fn links_are_created_and_replaced_and_changed_themselves() {
    let house = House::new();
    let link = async |path: &str, target: &str, replace| -> Result<EntryInfo, Failure> {
        let request = CreateSymlinkRequest { path: house.at(path), target: target.into(), replace };
        let answer: CreateSymlinkResponse = house.client.unary(CREATE_SYMLINK, &request).await?;
        Ok(answer.entry.unwrap())
    };
    let entry = link("a/link", "../nowhere", false).await.unwrap();
    assert!(entry.is_symlink && entry.name == "link");
    assert_eq!(link("a/link", "x", false).await.unwrap_err().code, "already_exists");
    house.put("nowhere", "");
    link("a/link", "../nowhere", true).await.unwrap();
    link("nowhere", "a", true).await.unwrap();
    assert_eq!(fs::read_link(house.at("nowhere")).unwrap(), Path::new("a"));
    assert_eq!(link("a", "x", true).await.unwrap_err().code, "already_exists");
    for target in ["", "a\0b"] {
        let error = link("b", target, false).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument");
        assert!(error.message.starts_with("target: "), "{error:?}");
    }
    let modified_time = Some(envd::proto::Timestamp { seconds: 5, nanos: 0 });
    let request = SetAttributesRequest {
        path: house.at("nowhere"),
        no_follow: true,
        modified_time,
        ..Default::default()
    };
    let answer: SetAttributesResponse = house.client.unary(SET_ATTRIBUTES, &request).await.unwrap();
    assert_eq!(answer.entry.unwrap().modified_time, modified_time);
    assert_ne!(house.stat(&house.at("a")).await.unwrap().modified_time, modified_time);
    assert_eq!(house.names(), ["a", "nowhere"]);
}

// Archive, Extract.

#[tokio::test]
async fn a_tree_goes_through_an_archive_unchanged() {
    let house = House::new();
    plant(&house, "from");
    let attributes = xattr::set(house.at("from/file"), "user.e2b.k", b"v").is_ok();
    let from = house.at("from");
    for (number, compression) in
        [Compression::Unspecified, Compression::Gzip, Compression::Zstd].into_iter().enumerate()
    {
        let packed = archive(&house.client, &from, compression).await.unwrap();
        let compressed = compression != Compression::Unspecified;
        assert_eq!(packed.len() < 4 << 20, compressed, "{compression:?}");
        let to = house.at(&format!("to{number}/x"));
        let client = Client::new(&house.daemon, Wire::Grpc);
        let answer = extract(&client, &to, &packed).await.unwrap();
        assert_eq!(tree(&from), tree(&to), "{compression:?}");
        assert_eq!(answer.entries, tree(&from).len() as u64);
        let modified = |top: &str| fs::metadata(format!("{top}/file")).unwrap().mtime();
        assert_eq!(modified(&from), modified(&to));
        if attributes {
            assert_eq!(xattr::get(format!("{to}/file"), "user.e2b.k").unwrap().unwrap(), b"v");
        }
    }
    let one = archive(&house.client, &house.at("from/file"), Compression::None).await.unwrap();
    extract(&house.client, &house.at("one"), &one).await.unwrap();
    assert_eq!(fs::read(house.at("one/file")).unwrap(), fs::read(house.at("from/file")).unwrap());
    let error = archive(&house.client, &house.at("no"), Compression::None).await.unwrap_err();
    assert_eq!(error.code, "not_found");
    let error =
        archive(&house.client, &house.at("from/fifo"), Compression::None).await.unwrap_err();
    assert_eq!(error.code, "invalid_argument");
}

#[tokio::test]
async fn real_tar_reads_ours_and_is_read() {
    let house = House::new();
    plant(&house, "from");
    let from = house.at("from");
    let works = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !able("tar", works("tar")) {
        return;
    }
    for (compression, flag, program) in [
        (Compression::None, "", "tar"),
        (Compression::Gzip, "-z", "gzip"),
        (Compression::Zstd, "--zstd", "zstd"),
    ] {
        if !works(program) {
            common::skipped::skip(&format!("{program}, for {compression:?}"));
            continue;
        }
        let packed = archive(&house.client, &from, compression).await.unwrap();
        let file = house.put("archive", &packed);
        let to = house.at(&format!("by-tar{flag}"));
        fs::create_dir(&to).unwrap();
        let mut command = Command::new("tar");
        command.args(["-xpf", &file, "-C", &to]).args((!flag.is_empty()).then_some(flag));
        assert!(command.status().unwrap().success(), "{compression:?}");
        assert_eq!(tree(&from), tree(&to), "{compression:?}");

        let mut command = Command::new("tar");
        command.args(["-cf", &file, "-C", &from, "."]).args((!flag.is_empty()).then_some(flag));
        assert!(command.status().unwrap().success());
        let to = house.at(&format!("of-tar{flag}"));
        extract(&house.client, &to, &fs::read(&file).unwrap()).await.unwrap();
        assert_eq!(tree(&from), tree(&to), "{compression:?}");
    }
}

/// An archive with these entries: type, name, target of a link or content.
fn tar_of(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        // Names that no well-behaved archiver writes.
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

#[tokio::test]
async fn no_entry_of_an_archive_gets_out() {
    use tar::EntryType as T;
    let house = House::new();
    let outside = house.at("outside");
    fs::create_dir(&outside).unwrap();
    house.put("outside/secret", "secret");
    let up = format!("{outside}/secret");
    for (entries, escapes) in [
        (vec![(T::Regular, "../evil", "x")], true),
        (vec![(T::Regular, "a/../../evil", "x")], true),
        (vec![(T::Symlink, "l", "../outside"), (T::Regular, "l/evil", "x")], true),
        (vec![(T::Symlink, "l", outside.as_str()), (T::Regular, "l/evil", "x")], true),
        (vec![(T::Symlink, "l", outside.as_str()), (T::Directory, "l/evil", "")], true),
        (
            vec![
                (T::Symlink, "l", ".."),
                (T::Symlink, "m", "l/outside"),
                (T::Regular, "m/evil", "x"),
            ],
            true,
        ),
        (vec![(T::Link, "h", "../outside/secret")], true),
        (vec![(T::Symlink, "l", ".."), (T::Link, "h", "l/outside/secret")], true),
        // Never written through: it takes the link's place.
        (vec![(T::Symlink, "secret", up.as_str()), (T::Regular, "secret", "mine")], false),
        // As tar does it: below the target.
        (vec![(T::Regular, "/evil", "x")], false),
    ] {
        let target = house.at("target");
        let answer = extract(&house.client, &target, &tar_of(&entries)).await;
        if escapes {
            let error = answer.unwrap_err();
            assert_eq!(error.code, "invalid_argument", "{entries:?}: {error:?}");
            assert!(error.message.contains("leads out of the target"), "{entries:?}: {error:?}");
        } else {
            answer.unwrap();
        }
        assert_eq!(fs::read(&up).unwrap(), b"secret", "{entries:?}");
        assert_eq!(fs::metadata(&up).unwrap().nlink(), 1, "{entries:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{entries:?}");
        assert_eq!(house.names(), ["outside", "target"], "{entries:?}");
        fs::remove_dir_all(&target).unwrap();
    }
}

#[tokio::test]
async fn an_attacker_who_swaps_directories_gets_nothing_out_of_archives_copies_and_removals() {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    use tar::EntryType as T;
    let house = House::new();
    fs::create_dir_all(house.at("root/d/sub")).unwrap();
    fs::create_dir_all(house.at("outside/sub")).unwrap();
    house.put("outside/sub/secret", "secret");
    house.put("root/d/sub/inside", "inside");
    symlink(house.at("outside"), house.at("root/l")).unwrap();
    let packed = tar_of(&[(T::Directory, "d/sub", ""), (T::Regular, "d/sub/evil", "x")]);
    let stop = Arc::new(AtomicBool::new(false));
    let root = house.at("root");
    let attacker = std::thread::spawn({
        let (stop, a, b) = (Arc::clone(&stop), house.at("root/d"), house.at("root/l"));
        move || {
            while !stop.load(Ordering::Relaxed) {
                let flags = RenameFlags::RENAME_EXCHANGE;
                let _ = renameat2(AT_FDCWD, a.as_str(), AT_FDCWD, b.as_str(), flags);
            }
        }
    });
    let client = Client::new(&house.daemon, Wire::Grpc);
    for number in 0..60 {
        let _ = extract(&client, &root, &packed).await;
        let taken = archive(&client, &root, Compression::None).await.unwrap();
        assert!(!taken.windows(6).any(|part| part == b"secret"));
        let to = house.at("copy");
        if copy(&client, &root, &to, false).await.is_ok() {
            let names: Vec<_> = tree(&to).into_iter().map(|(name, ..)| name).collect();
            assert!(!names.iter().any(|name| name.contains("secret")), "{names:?}");
        }
        house.remove(&to).await.unwrap();
        if number % 10 == 0 {
            // Whichever of the two it is by then: the directory, or the link.
            // What was emptied may have been swapped for what was not.
            let _ = house.remove(&format!("{root}/d")).await;
            let _ = fs::create_dir_all(format!("{root}/d/sub"));
            let _ = symlink(house.at("outside"), house.at("root/l"));
        }
    }
    stop.store(true, Ordering::Relaxed);
    attacker.join().unwrap();
    let left: Vec<_> = tree(&house.at("outside")).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(left, ["sub", "sub/secret"]);
}

#[tokio::test]
async fn archives_that_are_none_or_break_off_or_are_too_much() {
    use tar::EntryType as T;
    let house = House::new();
    let whole = tar_of(&[(T::Regular, "file", &"x".repeat(2000))]);
    let mut gzip = Vec::new();
    flate2::read::GzEncoder::new(whole.as_slice(), flate2::Compression::fast())
        .read_to_end(&mut gzip)
        .unwrap();
    // A name of five megabytes.
    let mut long = tar::Header::new_gnu();
    long.set_entry_type(T::GNULongName);
    long.set_size(5 << 20);
    long.set_cksum();
    let long = [&long.as_bytes()[..], &vec![b'n'; 5 << 20]].concat();
    for (bytes, text) in [
        (&noise(5000)[..], "error extracting: "),
        (&whole[..1000], "error extracting: "),
        (&gzip[..gzip.len() - 9], "error extracting: "),
        (&[&b"\x28\xb5\x2f\xfd"[..], &noise(1000)].concat(), "error extracting: "),
        (&long, "error extracting: names and attributes of an entry are too long"),
        (&tar_of(&[(T::Char, "device", "")]), "device: a device or socket"),
        (
            &tar_of(&[(T::new(b'Q'), "odd", "")]),
            "error extracting: entry odd is of an unknown type",
        ),
    ] {
        let error = extract(&house.client, &house.at("to"), bytes).await.unwrap_err();
        assert!(error.message.starts_with(text), "{text}: {error:?}");
    }
    // Nothing at all is an empty archive, as it is to tar.
    assert_eq!(extract(&house.client, &house.at("to"), b"").await.unwrap().entries, 0);
    let over = tar_of(&[(T::Directory, "dir", ""), (T::Regular, "dir", "")]);
    let error = extract(&house.client, &house.at("to"), &over).await.unwrap_err();
    assert_eq!(
        error,
        failure("already_exists", format!("path already exists: {}", house.at("to/dir")))
    );
    let none: [ExtractRequest; 1] = Default::default();
    let mut messages: Messages<ExtractResponse> =
        Client::new(&house.daemon, Wire::Connect { json: false })
            .streams(EXTRACT, &none)
            .await
            .unwrap();
    assert!(messages.next().await.unwrap_err().message.starts_with("start: "));
    house.is_well().await;
}

#[tokio::test]
async fn what_is_unpacked_belongs_to_the_caller_unless_it_is_to_be_kept() {
    if !able_as_root() {
        return;
    }
    let house = House::new();
    plant(&house, "from");
    set_mode(house.at("from/file"), 0o4755);
    let packed = archive(&house.client, &house.at("from"), Compression::Zstd).await.unwrap();
    let client = house.client.clone().with("authorization", &basic("nobody"));
    extract(&client, &house.at("theirs"), &packed).await.unwrap();
    give_to_nobody(&house, "from");
    let packed = archive(&house.client, &house.at("from"), Compression::Zstd).await.unwrap();
    let start = |name: &str, preserve| extract_request::Start {
        path: house.at(name),
        preserve,
        ..Default::default()
    };
    extract_as(&client, start("wished", true), &packed).await.unwrap();
    extract_as(&house.client, start("kept", true), &packed).await.unwrap();
    extract_as(&house.client, start("plain", false), &packed).await.unwrap();
    owners_are(&house, &["theirs", "wished", "kept"], "nobody").await;
    owners_are(&house, &["plain"], "root").await;
    assert_eq!(house.stat(&house.at("theirs")).await.unwrap().owner, "nobody");
    let mode = |name: &str| fs::metadata(house.at(name)).unwrap().mode() & 0o7777;
    let modes = ["theirs/file", "wished/file", "kept/file", "plain/file"].map(mode);
    assert_eq!(modes, [0o755, 0o755, 0o4755, 0o755], "setuid is kept for root only");
}

#[tokio::test]
async fn a_big_archive_in_bounded_memory_and_a_client_that_leaves_frees_the_thread() {
    let house = House::new();
    fs::create_dir(house.at("from")).unwrap();
    house.put("from/big", noise(48 << 20));
    let request = ArchiveRequest { path: house.at("from"), ..ArchiveRequest::default() };
    // More than may work at a time, none of which reads on.
    for _ in 0..8 {
        let client = Client::new(&house.daemon, Wire::Connect { json: false });
        let mut messages: Messages<ArchiveResponse> =
            client.stream(ARCHIVE, &request).await.unwrap();
        messages.next().await.unwrap().unwrap();
    }
    let client = Client::new(&house.daemon, Wire::Connect { json: false });
    let mut messages: Messages<ArchiveResponse> =
        soon("a free place", client.stream(ARCHIVE, &request)).await.unwrap();
    let mut bytes = 0;
    while let Some(message) = messages.next().await.unwrap() {
        bytes += message.data.len();
    }
    assert!(bytes > 48 << 20);
    let peak = house.daemon.memory("VmHWM");
    assert!(peak < 40 << 10, "the daemon grew to {peak} KiB");
}

// Listings.

#[tokio::test]
async fn a_hundred_thousand_entries_whole_and_in_pages() {
    let house = House::new();
    fs::create_dir(house.at("d")).unwrap();
    let names: Vec<String> = (0..100_000).map(|i| format!("{i:06}")).collect();
    for name in &names {
        fs::File::create(house.dir().join("d").join(name)).unwrap();
    }
    let client = Client::new(&house.daemon, Wire::Grpc);
    let request = ListDirRequest { path: house.at("d"), ..Default::default() };
    let whole: ListDirResponse = client.unary(LIST, &request).await.unwrap();
    assert!(whole.next_page_token.is_empty());
    let whole = whole.entries;
    assert!(whole.iter().map(|entry| &entry.name).eq(&names));
    let mut request =
        ListDirRequest { path: house.at("d"), page_size: 60_000, ..Default::default() };
    let mut paged = Vec::new();
    let mut sizes = Vec::new();
    loop {
        let answer: ListDirResponse = client.unary(LIST, &request).await.unwrap();
        sizes.push(answer.entries.len());
        paged.extend(answer.entries);
        request.page_token = answer.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(sizes, [60_000, 40_000]);
    assert!(paged == whole);
    let request =
        ListDirRequest { path: house.at("d"), page_token: "../x".into(), ..Default::default() };
    let error = client.unary::<_, ListDirResponse>(LIST, &request).await.unwrap_err();
    assert_eq!(error, failure("invalid_argument", "page_token: this listing gave no such token"));
}

/// So that a failed download shows itself here too: the tag of an RPC is the one of HTTP.
#[tokio::test]
async fn the_tag_is_the_same_over_http() {
    let house = House::new();
    let path = house.put("file", "content");
    let request = ReadRequest { path: path.clone(), ..ReadRequest::default() };
    let (info, _) = read(&house.client, &request).await.unwrap();
    let response = house.download(&path).await;
    assert_eq!(response.headers()["etag"], format!("\"{}\"", info.tag));
    rest_error(house.download(&house.at("no")).await, 404).await;
}
