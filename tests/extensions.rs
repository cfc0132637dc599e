//! Extension fields go to callers that ask for them, and to nobody else.
//!
//! What a plain Connect client of upstream gets is compared byte by byte, in JSON and in protobuf,
//! with what is written down here: nothing in it is computed from our protos.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};

use common::{
    Daemon, in_time,
    rpc::{Client, WIRES, Wire},
    soon,
};
use envd::{
    proto::{
        filesystem::{StatRequest, StatResponse},
        process::{
            ListRequest, ListResponse, ProcessConfig, StartRequest, StartResponse,
            process_event::Event,
        },
    },
    wire::extensions::Extensible,
};
use serde_json::{Value, json};

const START: &str = "/process.Process/Start";

/// A client that knows nothing but HTTP and the framing of Connect.
struct Plain {
    daemon: Daemon,
    http: reqwest::Client,
    asks: bool,
}

impl Plain {
    fn new() -> Self {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { daemon: Daemon::start(&[]), http, asks: false }
    }

    async fn post(&self, path: &str, kind: &str, body: Vec<u8>) -> reqwest::Response {
        let mut request = self.http.post(self.daemon.url(path)).header("content-type", kind);
        if self.asks {
            request = request.header("Envd-Extensions", "1");
        }
        let response = soon(path, request.body(body).send()).await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response
    }

    /// The body of the answer to a unary call in JSON.
    async fn unary(&self, path: &str, request: Value) -> String {
        let response = self.post(path, "application/json", request.to_string().into_bytes()).await;
        soon(path, response.text()).await.unwrap()
    }

    /// As [`Self::unary`], read.
    async fn json(&self, path: &str, request: Value) -> Value {
        serde_json::from_str(&self.unary(path, request).await).unwrap()
    }

    /// A call with envelopes.
    async fn stream(&self, path: &str, kind: &str, requests: &[&[u8]]) -> Envelopes {
        let mut body = Vec::new();
        for request in requests {
            body.push(0);
            body.extend_from_slice(&u32::try_from(request.len()).unwrap().to_be_bytes());
            body.extend_from_slice(request);
        }
        Envelopes { response: self.post(path, kind, body).await, buffer: Vec::new() }
    }

    async fn stream_json(&self, path: &str, request: Value) -> Envelopes {
        let request = request.to_string();
        self.stream(path, "application/connect+json", &[request.as_bytes()]).await
    }
}

struct Envelopes {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Envelopes {
    /// The next envelope: its flags and its bytes.
    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let [flags, a, b, c, d, rest @ ..] = self.buffer.as_slice() {
                let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
                if rest.len() >= length {
                    let envelope = (*flags, rest[..length].to_vec());
                    self.buffer.drain(..5 + length);
                    return Some(envelope);
                }
            }
            let chunk = soon("the next bytes", self.response.chunk()).await.unwrap();
            self.buffer.extend_from_slice(&chunk?);
        }
    }

    async fn next_text(&mut self) -> String {
        String::from_utf8(self.next().await.expect("one more envelope").1).unwrap()
    }

    /// The rest, as text.
    async fn rest(mut self) -> Vec<String> {
        let mut rest = Vec::new();
        while let Some((_, message)) = self.next().await {
            rest.push(String::from_utf8(message).unwrap());
        }
        rest
    }
}

/// The number behind `"pid":`.
fn pid_of(text: &str) -> u32 {
    let digits = text.split("\"pid\":").nth(1).unwrap();
    digits.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

/// A message inside a field of another, whose number is below 16: both are short.
fn field(number: u8, message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(message.len()).unwrap()];
    bytes.extend_from_slice(message);
    bytes
}

fn varint(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap());
    bytes
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test]
async fn a_command_in_json_is_upstreams_byte_by_byte() {
    let plain = Plain::new();
    let script = "echo out; echo err >&2; exit 3";
    let request = json!({ "process": { "cmd": "sh", "args": ["-c", script] } });
    let mut events = plain.stream_json(START, request).await;
    assert_eq!(events.response.headers()["x-accel-buffering"], "no");
    let first = events.next_text().await;
    assert_eq!(first, format!(r#"{{"event":{{"start":{{"pid":{}}}}}}}"#, pid_of(&first)));
    let mut rest = events.rest().await;
    // The two channels are read independently.
    rest[..2].sort();
    assert_eq!(
        rest,
        [
            r#"{"event":{"data":{"stderr":"ZXJyCg=="}}}"#,
            r#"{"event":{"data":{"stdout":"b3V0Cg=="}}}"#,
            r#"{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3","error":"exit status 3"}}}"#,
            "{}",
        ]
    );
}

#[tokio::test]
async fn a_command_in_protobuf_is_upstreams_byte_by_byte() {
    let plain = Plain::new();
    // StartRequest { process: { cmd: "sh", args: ["-c", "echo out"] } }
    let process = [field(1, b"sh"), field(2, b"-c"), field(2, b"echo out")].concat();
    let request = field(1, &process);
    let mut events = plain.stream(START, "application/connect+proto", &[&request]).await;
    let (_, first) = events.next().await.unwrap();
    // StartResponse { event: { start: { pid } } }
    let pid = first[5..].iter().rev().fold(0, |pid, byte| pid << 7 | u32::from(byte & 0x7f));
    assert_eq!(first, field(1, &field(1, &[vec![0x08], varint(pid)].concat())));
    // { event: { data: { stdout } } }
    let (_, data) = events.next().await.unwrap();
    assert_eq!(data, field(1, &field(2, &field(1, b"out\n"))));
    // { event: { end: { exited: true, status } } }
    let (_, end) = events.next().await.unwrap();
    let end_event = [vec![0x10, 1], field(3, b"exit status 0")].concat();
    assert_eq!(end, field(1, &field(3, &end_event)));
    assert_eq!(events.next().await.unwrap(), (2, b"{}".to_vec()));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn every_other_answer_about_processes_is_upstreams() {
    let plain = Plain::new();
    let request = json!({ "process": { "cmd": "cat", "cwd": "/" }, "tag": "mine", "pty": { "size": { "cols": 80, "rows": 24 } } });
    let mut events = plain.stream_json(START, request).await;
    let pid = pid_of(&events.next_text().await);
    let list = plain.unary("/process.Process/List", json!({})).await;
    assert_eq!(
        list,
        format!(
            r#"{{"processes":[{{"config":{{"cmd":"cat","cwd":"/"}},"pid":{pid},"tag":"mine"}}]}}"#
        )
    );
    let selector = json!({ "pid": pid });
    let mut follower =
        plain.stream_json("/process.Process/Connect", json!({ "process": selector })).await;
    let start = format!(r#"{{"event":{{"start":{{"pid":{pid}}}}}}}"#);
    assert_eq!(follower.next_text().await, start);
    let resize = json!({ "process": selector, "pty": { "size": { "cols": 9, "rows": 9 } } });
    assert_eq!(plain.unary("/process.Process/Update", resize).await, "{}");
    let input = json!({ "process": selector, "input": { "pty": "YQo=" } });
    assert_eq!(plain.unary("/process.Process/SendInput", input).await, "{}");
    let messages = [
        json!({ "start": { "process": selector } }).to_string(),
        json!({ "data": { "input": { "pty": "YgoE" } } }).to_string(),
    ];
    let messages: Vec<_> = messages.iter().map(String::as_bytes).collect();
    let kind = "application/connect+json";
    let input = plain.stream("/process.Process/StreamInput", kind, &messages).await;
    assert_eq!(input.rest().await, ["{}", "{}"]);
    // The end of the terminal's input ended `cat`.
    for stream in [events, follower] {
        let rest = stream.rest().await;
        let (data, end) = rest.split_at(rest.len() - 2);
        assert_eq!(end, [r#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#, "{}"]);
        assert!(!data.is_empty());
        for event in data {
            let event: Value = serde_json::from_str(event).unwrap();
            assert_eq!(keys(&event["event"]["data"]), ["pty"], "{event}");
        }
    }
    let request = json!({ "process": { "cmd": "sleep", "args": ["1000"] } });
    let mut events = plain.stream_json(START, request).await;
    let selector = json!({ "pid": pid_of(&events.next_text().await) });
    let close = json!({ "process": selector });
    assert_eq!(plain.unary("/process.Process/CloseStdin", close).await, "{}");
    let kill = json!({ "process": selector, "signal": "SIGNAL_SIGKILL" });
    assert_eq!(plain.unary("/process.Process/SendSignal", kill).await, "{}");
    let end =
        r#"{"event":{"end":{"exitCode":-1,"status":"signal: killed","error":"signal: killed"}}}"#;
    assert_eq!(events.rest().await, [end, "{}"]);
}

/// Upstream's fields of an entry, and no other; every time as proto3 JSON has it.
fn check_entry(entry: &Value, link: bool) {
    let mut expected =
        vec!["group", "mode", "modifiedTime", "name", "owner", "path", "permissions"];
    if entry.get("size").is_some() {
        expected.push("size");
    }
    if link {
        expected.push("symlinkTarget");
    }
    expected.push("type");
    let mut found = keys(entry);
    found.sort_unstable();
    assert_eq!(found, expected, "{entry}");
    check_time(entry["modifiedTime"].as_str().unwrap());
}

/// `YYYY-MM-DDTHH:MM:SS`, then nothing or 3, 6 or 9 digits, then `Z`.
fn check_time(text: &str) {
    let (date, rest) = text.split_at(19);
    assert!(date.as_bytes()[10] == b'T' && date.starts_with("20"), "{text}");
    let fraction = rest.strip_suffix('Z').unwrap_or_else(|| panic!("no Z: {text}"));
    let digits = fraction.strip_prefix('.').unwrap_or_default();
    assert!([0, 3, 6, 9].contains(&digits.len()), "{text}");
    assert!(digits.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
}

/// A directory with a file and a link in it.
fn tree(dir: &Path) {
    fs::write(dir.join("file"), "content").unwrap();
    symlink("file", dir.join("link")).unwrap();
}

#[tokio::test]
async fn every_answer_about_files_is_upstreams() {
    let plain = Plain::new();
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let call = async |method: &str, request| {
        plain.json(&format!("/filesystem.Filesystem/{method}"), request).await
    };

    let stat = call("Stat", json!({ "path": at("link") })).await;
    assert_eq!(keys(&stat), ["entry"]);
    check_entry(&stat["entry"], true);
    let list = call("ListDir", json!({ "path": at("") })).await;
    assert_eq!(keys(&list), ["entries"]);
    let entries = list["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    for entry in entries {
        check_entry(entry, entry["name"] == "link");
    }
    let made = call("MakeDir", json!({ "path": at("new") })).await;
    assert_eq!(keys(&made), ["entry"]);
    check_entry(&made["entry"], false);
    let moved = call("Move", json!({ "source": at("link"), "destination": at("new/link") })).await;
    assert_eq!(keys(&moved), ["entry"]);
    // It leads nowhere from there, and has no type.
    assert_eq!(moved["entry"].get("isSymlink"), None, "{moved}");
    assert_eq!(call("Remove", json!({ "path": at("new") })).await, json!({}));

    // What asks by a field of its own, by a method of its own and by the header.
    let page = json!({ "path": at(""), "pageSize": 1 });
    symlink("file", at("a-link")).unwrap();
    let list = call("ListDir", page).await;
    assert!(list["nextPageToken"].is_string(), "{list}");
    assert_eq!(list["entries"][0]["isSymlink"], true, "{list}");
    let link = call("CreateSymlink", json!({ "path": at("b-link"), "target": "file" })).await;
    assert_eq!(link["entry"]["isSymlink"], true, "{link}");
    let asking = Plain { asks: true, ..plain };
    let stat = asking.json("/filesystem.Filesystem/Stat", json!({ "path": at("a-link") })).await;
    assert_eq!(stat["entry"]["isSymlink"], true, "{stat}");
}

#[tokio::test]
async fn every_answer_of_watches_is_upstreams() {
    let plain = Plain::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let request = json!({ "path": path, "includeEntry": true });
    let mut watch = plain.stream_json("/filesystem.Filesystem/WatchDir", request.clone()).await;
    assert_eq!(watch.next_text().await, r#"{"start":{}}"#);
    let watcher = plain.json("/filesystem.Filesystem/CreateWatcher", request).await;
    assert_eq!(keys(&watcher), ["watcherId"]);
    let with_cursors = json!({ "path": path, "cursors": true });
    let asking = plain.json("/filesystem.Filesystem/CreateWatcher", with_cursors).await;

    symlink("/", dir.path().join("link")).unwrap();
    let event: Value = serde_json::from_str(&watch.next_text().await).unwrap();
    assert_eq!(keys(&event), ["filesystem"]);
    assert_eq!(keys(&event["filesystem"]), ["entry", "name", "type"], "{event}");
    check_entry(&event["filesystem"]["entry"], true);

    let take = async |watcher: &Value| {
        in_time("the watcher has events", async || {
            let request = json!({ "watcherId": watcher["watcherId"] });
            let answer = plain.json("/filesystem.Filesystem/GetWatcherEvents", request).await;
            (!answer["events"].is_null()).then_some(answer)
        })
        .await
    };
    let events = take(&watcher).await;
    assert_eq!(keys(&events), ["events"]);
    assert_eq!(keys(&events["events"][0]), ["entry", "name", "type"], "{events}");
    check_entry(&events["events"][0]["entry"], true);
    // Who asked for cursors gets them.
    let events = take(&asking).await;
    assert_eq!(keys(&events["events"][0]), ["cursor", "name", "type"], "{events}");
}

fn sleeping() -> StartRequest {
    StartRequest {
        process: Some(ProcessConfig {
            cmd: "sleep".to_owned(),
            args: vec!["1000".to_owned()],
            ..ProcessConfig::default()
        }),
        ..StartRequest::default()
    }
}

#[tokio::test]
async fn each_way_to_ask_is_heard_in_every_protocol() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let link = dir.path().join("link").to_str().unwrap().to_owned();
    for wire in WIRES {
        let start = async |client: &Client, request: &StartRequest| {
            let mut events = client.stream::<_, StartResponse>(START, request).await.unwrap();
            events.next().await.unwrap().unwrap()
        };
        let (asking, plain) = (Client::new(&daemon, wire), Client::new(&daemon, wire).plain());
        assert!(start(&asking, &sleeping()).await.has_extensions(), "{wire:?}");
        // gRPC over HTTP/2 is not upstream's, and asks by itself.
        let native = wire == Wire::Grpc;
        let answer = start(&plain, &sleeping()).await;
        assert_eq!(answer.has_extensions(), native, "{wire:?}: {answer:?}");
        let Some(Event::Start(event)) = answer.event.unwrap().event else { panic!("{wire:?}") };
        assert!(event.pid > 0);
        let named = StartRequest { stop_on_disconnect: true, ..sleeping() };
        assert!(start(&plain, &named).await.has_extensions(), "{wire:?}");

        let stat = StatRequest { path: link.clone() };
        let answer: StatResponse = plain.unary("/filesystem.Filesystem/Stat", &stat).await.unwrap();
        assert_eq!(answer.entry.unwrap().is_symlink, native, "{wire:?}");

        let all = ListRequest { include_ended: true };
        for (request, has) in [(ListRequest::default(), native), (all, true)] {
            let answer: ListResponse =
                plain.unary("/process.Process/List", &request).await.unwrap();
            assert!(!answer.processes.is_empty());
            assert_eq!(answer.has_extensions(), has, "{wire:?}: {request:?}");
        }
    }
}

#[tokio::test]
async fn an_empty_protocol_version_is_an_absent_one() {
    let daemon = Daemon::start(&[]);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    for (version, status) in [("", 200), ("1", 200), ("2", 400), ("1 1", 400)] {
        let request = http
            .post(daemon.url("/process.Process/List"))
            .timeout(Duration::from_secs(600))
            .header("content-type", "application/json")
            .header("connect-protocol-version", version)
            .body("{}");
        let response = soon("List", request.send()).await.unwrap();
        assert_eq!(response.status(), status, "{version:?}");
    }
}
