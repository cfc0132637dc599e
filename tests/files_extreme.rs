//! Metadata that disks hold and that dates, sums and formats do not expect: times before the year 1 and
//! after 9999, files of 8 EiB, every mode, the largest ids. Every RPC and route answers all of them.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, os::unix::fs::symlink};

use common::{
    able,
    house::{House, set_mode},
    is_root,
    rpc::{Client, Failure, Messages, Msg, Wire},
    soon,
};
use envd::proto::filesystem::{
    ArchiveRequest, ArchiveResponse, CopyRequest, CopyResponse, CreateSymlinkRequest,
    CreateSymlinkResponse, CreateWatcherRequest, CreateWatcherResponse, EntryInfo, ExtractRequest,
    ExtractResponse, GetWatcherEventsRequest, GetWatcherEventsResponse, ListDirRequest,
    ListDirResponse, MoveRequest, MoveResponse, ReadRequest, ReadResponse, RemoveRequest,
    RemoveResponse, SearchRequest, SearchResponse, SetAttributesRequest, SetAttributesResponse,
    StatRequest, StatResponse, WatchDirRequest, WatchDirResponse, WriteRequest, WriteResponse,
    extract_request, watch_dir_response, write_request,
};
use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{UtimensatFlags, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid},
};
use reqwest::Method;

/// The seconds of the years 1 and 9999, and what a `Timestamp` holds of all times.
const FIRST: i64 = -62_135_596_800;
const LAST: i64 = 253_402_300_799;

const TIMES: [i64; 12] = [
    i64::MIN,
    -99_999_999_999,
    FIRST - 1,
    FIRST,
    -2_208_988_800,
    -1,
    0,
    1,
    LAST,
    LAST + 1,
    999_999_999_999,
    i64::MAX,
];
const NANOS: [i64; 2] = [0, 999_999_999];
const SIZES: [u64; 4] = [0, 1, 1 << 40, i64::MAX as u64];
const MODES: [u32; 7] = [0, 0o1, 0o111, 0o1777, 0o2755, 0o4755, 0o7777];
const IDS: [u32; 4] = [0, 65_534, 1 << 31, u32::MAX - 1];

const WIRES: [Wire; 3] = [Wire::Connect { json: true }, Wire::Connect { json: false }, Wire::Grpc];

/// A directory of tmpfs, which keeps whatever it is given.
fn house() -> Option<House> {
    let tmp = tempfile::tempdir_in("/dev/shm").ok();
    if !able("a tmpfs at /dev/shm", tmp.is_some()) {
        return None;
    }
    let tmp = tmp?;
    set_mode(tmp.path(), 0o755);
    Some(House { tmp, ..House::new() })
}

/// Sets the times of a file or link, and gives what the file system made of them.
fn set_times(path: &str, seconds: i64, nanos: i64) -> (i64, i64) {
    let time = TimeSpec::new(seconds, nanos);
    utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
    let stat = nix::sys::stat::lstat(path).unwrap();
    (stat.st_mtime, stat.st_mtime_nsec)
}

/// What is to be told of a time.
fn told(entry: &EntryInfo) -> (i64, i64) {
    let time = entry.modified_time.unwrap_or_default();
    (time.seconds, time.nanos.into())
}

fn clamped((seconds, nanos): (i64, i64)) -> (i64, i64) {
    match seconds {
        _ if seconds < FIRST => (FIRST, 0),
        _ if seconds > LAST => (LAST, 999_999_999),
        _ => (seconds, nanos),
    }
}

/// Files and directories with everything extreme, below `all`; gives their paths.
fn plant(house: &House) -> Vec<String> {
    fs::create_dir(house.at("all")).unwrap();
    let mut paths = Vec::new();
    for (number, seconds) in TIMES.into_iter().enumerate() {
        let (file, dir, link) =
            (format!("all/t{number}"), format!("all/d{number}"), format!("all/l{number}"));
        house.put(&file, "content");
        fs::create_dir(house.at(&dir)).unwrap();
        symlink(format!("t{number}"), house.at(&link)).unwrap();
        for name in [file, dir, link] {
            set_times(&house.at(&name), seconds, NANOS[number % 2]);
            paths.push(house.at(&name));
        }
    }
    for (number, size) in SIZES.into_iter().enumerate() {
        let path = house.put(&format!("all/s{number}"), "");
        fs::File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        paths.push(path);
    }
    for mode in MODES {
        for (name, is_dir) in [(format!("all/m{mode:o}"), false), (format!("all/n{mode:o}"), true)]
        {
            match is_dir {
                true => fs::create_dir(house.at(&name)).unwrap(),
                false => fs::write(house.at(&name), "content").unwrap(),
            }
            set_mode(house.at(&name), mode);
            paths.push(house.at(&name));
        }
    }
    if is_root() {
        for id in IDS {
            let path = house.put(&format!("all/u{id}"), "content");
            let (uid, gid) = (Some(Uid::from_raw(id)), Some(Gid::from_raw(id)));
            nix::unistd::chown(path.as_str(), uid, gid).unwrap();
            paths.push(path);
        }
    }
    paths
}

/// That nothing has panicked, and everything still answers.
async fn is_well(house: &House) {
    house.is_well().await;
    let panicked: Vec<_> = house
        .daemon
        .wait_for_log("ready")
        .into_iter()
        .filter(|line| line.to_string().contains("panicked"))
        .collect();
    assert!(panicked.is_empty(), "{panicked:#?}");
}

async fn call<Q: Msg, R: Msg>(client: &Client, method: &str, request: &Q) -> Result<R, Failure> {
    client.unary(&format!("/filesystem.Filesystem/{method}"), request).await
}

/// All messages of a stream, or those before its error.
async fn all<Q: Msg, R: Msg>(
    client: &Client,
    method: &str,
    requests: &[Q],
) -> (Vec<R>, Option<Failure>) {
    let mut messages = Vec::new();
    let stream = client.streams(&format!("/filesystem.Filesystem/{method}"), requests).await;
    let mut stream: Messages<R> = match stream {
        Ok(stream) => stream,
        Err(failure) => return (messages, Some(failure)),
    };
    loop {
        match soon(method, stream.next()).await {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => return (messages, None),
            Err(failure) => return (messages, Some(failure)),
        }
    }
}

#[tokio::test]
async fn times_are_told_as_near_as_messages_and_dates_hold_them() {
    let Some(house) = house() else { return };
    let mut expected = Vec::new();
    for (number, seconds) in TIMES.into_iter().enumerate() {
        for nanos in NANOS {
            let name = format!("{number:02}-{nanos}");
            let kept = set_times(&house.put(&name, "content"), seconds, nanos);
            expected.push((name, kept));
        }
    }
    expected.sort();
    for wire in WIRES {
        let client = Client::new(&house.daemon, wire);
        let list = ListDirRequest { path: house.at(""), depth: 1, ..Default::default() };
        let listed: ListDirResponse = call(&client, "ListDir", &list).await.unwrap();
        let listed: Vec<_> =
            listed.entries.iter().map(|entry| (entry.name.clone(), told(entry))).collect();
        let wanted: Vec<_> =
            expected.iter().map(|(name, kept)| (name.clone(), clamped(*kept))).collect();
        assert_eq!(listed, wanted, "{wire:?}");
        for (name, kept) in &expected {
            let stat = StatRequest { path: house.at(name) };
            let stat: StatResponse = call(&client, "Stat", &stat).await.unwrap();
            assert_eq!(told(&stat.entry.unwrap()), clamped(*kept), "{wire:?} {name}");
        }
    }
    let now = httpdate::fmt_http_date(std::time::SystemTime::now());
    for (name, (seconds, _)) in &expected {
        let plain = house.download(&house.at(name)).await;
        assert_eq!(plain.status(), 200, "{name}");
        let date =
            plain.headers().get("last-modified").map(|date| date.to_str().unwrap().to_owned());
        assert!(plain.headers().contains_key("etag"));
        assert_eq!(plain.text().await.unwrap(), "content", "{name}");
        let known = (0..=LAST).contains(seconds);
        assert_eq!(date.is_some(), known, "{name}: {date:?}");
        if let Some(date) = date {
            let since = httpdate::parse_http_date(&date).unwrap();
            let since = since.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            assert_eq!(since, u64::try_from(*seconds).unwrap(), "{name}");
        }
        // Conditions on a date are for files that have one.
        let later = *seconds > 2_000_000_000;
        for (header, met, unmet) in
            [("if-modified-since", 200, 304), ("if-unmodified-since", 412, 200)]
        {
            let path = format!("/files?path={}", house.at(name));
            let answer = house.call(Method::GET, &path, &[(header, &now)]).await;
            let wanted = match (known, later) {
                (false, _) => 200,
                (true, true) => met,
                (true, false) => unmet,
            };
            assert_eq!(answer.status(), wanted, "{name} {header}");
        }
    }
    is_well(&house).await;
}

#[tokio::test]
async fn every_unary_call_answers_extreme_entries() {
    let Some(house) = house() else { return };
    let paths = plant(&house);
    for wire in WIRES {
        let client = Client::new(&house.daemon, wire);
        let list = ListDirRequest { path: house.at("all"), depth: 9, ..Default::default() };
        let listed: Result<ListDirResponse, _> = call(&client, "ListDir", &list).await;
        assert_eq!(listed.unwrap().entries.len(), paths.len(), "{wire:?}");
        for path in &paths {
            let stat = StatRequest { path: path.clone() };
            let stat: StatResponse = call(&client, "Stat", &stat).await.unwrap();
            let meta = fs::symlink_metadata(path).unwrap();
            assert_eq!(stat.entry.unwrap().size, i64::try_from(meta.len()).unwrap(), "{path}");
            let moved = MoveRequest { source: path.clone(), destination: house.at("moved") };
            let back = MoveRequest { source: house.at("moved"), destination: path.clone() };
            for request in [moved, back] {
                let moved: MoveResponse = call(&client, "Move", &request).await.unwrap();
                assert!(moved.entry.is_some());
            }
            let link = CreateSymlinkRequest {
                path: house.at("link"),
                target: path.clone(),
                replace: true,
            };
            let link: CreateSymlinkResponse = call(&client, "CreateSymlink", &link).await.unwrap();
            assert!(link.entry.is_some());
            for preserve in [false, true] {
                let copy = CopyRequest {
                    source: path.clone(),
                    destination: house.at("copy"),
                    preserve,
                    ..CopyRequest::default()
                };
                // Without root a file without rights cannot be read.
                match call::<_, CopyResponse>(&client, "Copy", &copy).await {
                    Ok(copied) => assert!(copied.entry.is_some()),
                    Err(failure) => assert!(!is_root(), "{path}: {failure:?}"),
                }
                let remove = RemoveRequest { path: house.at("copy") };
                let _: RemoveResponse = call(&client, "Remove", &remove).await.unwrap();
            }
        }
    }
    is_well(&house).await;
}

#[tokio::test]
async fn extreme_attributes_are_set_or_refused() {
    let Some(house) = house() else { return };
    let path = house.put("file", "content");
    let times = TIMES.map(|seconds| [-1, 0, 999_999_999, i32::MAX].map(|nanos| (seconds, nanos)));
    for wire in [Wire::Connect { json: false }, Wire::Grpc] {
        let client = Client::new(&house.daemon, wire);
        for (seconds, nanos) in times.into_iter().flatten() {
            let time = Some(envd::proto::Timestamp { seconds, nanos });
            let request = SetAttributesRequest {
                path: path.clone(),
                modified_time: time,
                accessed_time: time,
                ..SetAttributesRequest::default()
            };
            let answer: Result<SetAttributesResponse, _> =
                call(&client, "SetAttributes", &request).await;
            match (0..1_000_000_000).contains(&nanos) {
                true => {
                    let wanted = clamped((seconds, nanos.into()));
                    assert_eq!(told(&answer.unwrap().entry.unwrap()), wanted, "{seconds} {nanos}");
                }
                false => assert_eq!(answer.unwrap_err().code, "invalid_argument"),
            }
        }
        for mode in [0, 0o7777, 0o10000, u32::MAX] {
            let request = SetAttributesRequest {
                path: path.clone(),
                mode: Some(mode),
                ..SetAttributesRequest::default()
            };
            let answer: Result<SetAttributesResponse, _> =
                call(&client, "SetAttributes", &request).await;
            match mode <= 0o7777 {
                true => assert_eq!(answer.unwrap().entry.unwrap().mode, mode & 0o777),
                false => assert_eq!(answer.unwrap_err().code, "invalid_argument"),
            }
        }
        for id in ["0", "4294967294", "4294967295", "4294967296", "-1", "99999999999999999999"] {
            let request = SetAttributesRequest {
                path: path.clone(),
                owner: Some(id.to_owned()),
                group: Some(id.to_owned()),
                ..SetAttributesRequest::default()
            };
            let answer: Result<SetAttributesResponse, _> =
                call(&client, "SetAttributes", &request).await;
            let valid = id.parse::<u32>().is_ok_and(|id| id < u32::MAX);
            assert_eq!(answer.is_ok(), valid && is_root(), "{id}: {answer:?}");
        }
    }
    is_well(&house).await;
}

#[tokio::test]
async fn every_stream_answers_extreme_entries() {
    let Some(house) = house() else { return };
    let paths = plant(&house);
    let huge = house.at(&format!("all/s{}", SIZES.len() - 1));
    for wire in WIRES {
        let client = Client::new(&house.daemon, wire);
        for path in paths.iter().filter(|path| fs::metadata(path).unwrap().is_file()) {
            let size = fs::metadata(path).unwrap().len();
            for offset in [0, size.saturating_sub(1), size, u64::MAX] {
                let read = ReadRequest {
                    path: path.clone(),
                    offset,
                    length: Some(1),
                    ..ReadRequest::default()
                };
                let (messages, failure): (Vec<ReadResponse>, _) =
                    all(&client, "Read", &[read]).await;
                match offset < size {
                    true => assert!(messages.len() == 2 || !is_root(), "{path} {offset}"),
                    false => assert!(messages.len() <= 1, "{path} {offset} {failure:?}"),
                }
            }
        }
        let search = SearchRequest {
            path: house.at("all"),
            pattern: "content".to_owned(),
            max_file_bytes: 1 << 20,
            include_entry: true,
            ..SearchRequest::default()
        };
        let names = SearchRequest { pattern: String::new(), ..search.clone() };
        for search in [search, names] {
            let (messages, failure): (Vec<SearchResponse>, _) =
                all(&client, "Search", &[search]).await;
            assert!(messages.len() > TIMES.len() && failure.is_none(), "{failure:?}");
        }
    }
    // What is left goes through an archive, and its times too; holes of an exabyte would take too long.
    for size in [huge, house.at("all/s2")] {
        fs::remove_file(size).unwrap();
    }
    for mode in MODES.into_iter().filter(|_| !is_root()) {
        for name in ["m", "n"] {
            set_mode(house.at(&format!("all/{name}{mode:o}")), mode | 0o700);
        }
    }
    let client = Client::new(&house.daemon, Wire::Grpc);
    let archive = ArchiveRequest { path: house.at("all"), ..ArchiveRequest::default() };
    let (messages, failure): (Vec<ArchiveResponse>, _) = all(&client, "Archive", &[archive]).await;
    assert_eq!(failure, None);
    for preserve in [false, true] {
        let start =
            extract_request::Start { path: house.at("out"), preserve, ..Default::default() };
        let events = std::iter::once(extract_request::Event::Start(start)).chain(
            messages.iter().map(|message| extract_request::Event::Data(message.data.clone())),
        );
        let requests: Vec<_> = events.map(|event| ExtractRequest { event: Some(event) }).collect();
        let (answers, failure): (Vec<ExtractResponse>, _) =
            all(&client, "Extract", &requests).await;
        assert!(answers.len() == 1 && failure.is_none(), "{failure:?}");
        for (number, seconds) in TIMES.into_iter().enumerate() {
            let mtime = |dir: &str| {
                nix::sys::stat::stat(house.at(&format!("{dir}/t{number}")).as_str())
                    .unwrap()
                    .st_mtime
            };
            assert_eq!(mtime("out"), mtime("all"), "{seconds}");
        }
    }
    is_well(&house).await;
}

#[tokio::test]
async fn events_with_entries_are_told_of_extreme_files() {
    let Some(house) = house() else { return };
    let stream = WatchDirRequest {
        path: house.at(""),
        recursive: true,
        include_entry: true,
        ..WatchDirRequest::default()
    };
    let path = "/filesystem.Filesystem/WatchDir";
    let mut events: Messages<WatchDirResponse> = house.client.stream(path, &stream).await.unwrap();
    soon("a start", events.next()).await.unwrap();
    let create = CreateWatcherRequest {
        path: house.at(""),
        recursive: true,
        include_entry: true,
        ..CreateWatcherRequest::default()
    };
    let watcher: CreateWatcherResponse =
        call(&house.client, "CreateWatcher", &create).await.unwrap();
    plant(&house);
    house.put("last", "");
    loop {
        let message = soon("an event", events.next()).await.unwrap().expect("it goes on");
        if let Some(watch_dir_response::Event::Filesystem(event)) = message.event
            && event.name == "last"
        {
            break;
        }
    }
    let get = GetWatcherEventsRequest { watcher_id: watcher.watcher_id, ..Default::default() };
    let told: GetWatcherEventsResponse =
        call(&house.client, "GetWatcherEvents", &get).await.unwrap();
    assert!(told.events.len() > TIMES.len());
    is_well(&house).await;
}

#[tokio::test]
async fn every_route_answers_extreme_files() {
    let Some(house) = house() else { return };
    let paths = plant(&house);
    for path in paths.iter().filter(|path| fs::metadata(path).unwrap().is_file()) {
        let size = fs::metadata(path).unwrap().len();
        let route = format!("/files?path={path}");
        let last = size.saturating_sub(1);
        let (first, end, far) = ("bytes=0-0", format!("bytes={last}-"), format!("bytes={size}-"));
        let max = format!("bytes=0-0,{}-{}", last.saturating_sub(1), u64::MAX);
        for range in [first, &end, &far, &max, "bytes=-1", "bytes=18446744073709551615-"] {
            for method in [Method::GET, Method::HEAD] {
                let answer = house.call(method.clone(), &route, &[("range", range)]).await;
                let status = answer.status().as_u16();
                // A file of no byte is answered as a whole.
                let whole = size == 0 && status == 200;
                let allowed = matches!(status, 206 | 416) || whole || (status >= 500 && !is_root());
                assert!(allowed || size == 1, "{method} {path} {range}: {status}");
            }
        }
        let head = house.call(Method::HEAD, &route, &[]).await;
        assert!(head.status() == 200 || !is_root(), "{path}");
        if size <= 7 {
            let replaced = house.upload(path, &[], "content").await;
            assert!(replaced.status() == 200 || !is_root(), "{path}");
        }
    }
    for number in 0..TIMES.len() {
        let body = serde_json::json!({
            "source_paths": [house.at(&format!("all/t{number}"))],
            "destination": house.at("composed"),
        });
        let compose = house.http.post(house.daemon.url("/files/compose")).json(&body);
        assert_eq!(soon("compose", compose.send()).await.unwrap().status(), 200);
    }
    assert_eq!(house.call(Method::GET, "/metrics", &[]).await.status(), 200);
    is_well(&house).await;
}

#[tokio::test]
async fn files_with_extreme_metadata_are_written_over() {
    let Some(house) = house() else { return };
    let client = Client::new(&house.daemon, Wire::Grpc);
    for path in plant(&house).iter().filter(|path| fs::metadata(path).unwrap().is_file()) {
        let start = write_request::Start { path: path.clone(), ..write_request::Start::default() };
        let events = [
            write_request::Event::Start(start),
            write_request::Event::Chunk(write_request::Chunk {
                data: bytes::Bytes::from_static(b"new"),
                ..write_request::Chunk::default()
            }),
            write_request::Event::Commit(write_request::Commit::default()),
        ];
        let requests = events.map(|event| WriteRequest { event: Some(event) });
        let (answers, failure): (Vec<WriteResponse>, _) = all(&client, "Write", &requests).await;
        assert!(answers.iter().any(|answer| answer.committed), "{path}: {failure:?}");
        assert_eq!(fs::metadata(path).unwrap().len(), 3, "{path}");
    }
    is_well(&house).await;
}
