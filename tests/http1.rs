//! HTTP/1.1 itself: half-closed connections, pipelining, `Expect`, `Host`, escapes.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::ffi::OsStrExt,
    path::Path,
    time::Duration,
};

use common::{Daemon, PATIENCE, eventually, noise, rpc::envelope};
use prost::Message;

struct Client(TcpStream);

struct Answer {
    status: u16,
    /// In lower case.
    head: String,
    body: Vec<u8>,
}

impl Client {
    fn of(daemon: &Daemon) -> Self {
        let stream = TcpStream::connect(daemon.tcp()).unwrap();
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
        stream.set_write_timeout(Some(*PATIENCE)).unwrap();
        Self(stream)
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.0.write_all(bytes.as_ref()).unwrap();
        self
    }

    fn half_close(&mut self) -> &mut Self {
        self.0.shutdown(Shutdown::Write).unwrap();
        self
    }

    /// One line head; whatever the body is, it is left.
    fn head(&mut self) -> (u16, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let read = self.0.read(&mut byte).unwrap();
            assert_eq!(read, 1, "the end after {:?}", String::from_utf8_lossy(&head));
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head)
    }

    /// An answer with a length, or without a body.
    fn answer(&mut self) -> Answer {
        let (status, head) = self.head();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        Answer { status, head, body }
    }

    /// What comes until the daemon closes, which it does without a reset.
    fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).expect("the end, and no reset");
        rest
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")
}

fn post(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\ncontent-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

const JSON: &str = "content-type: application/json";
const RAW: &str = "content-type: application/octet-stream";

fn escaped(path: &Path) -> String {
    path.as_os_str().as_bytes().iter().map(|byte| format!("%{byte:02x}")).collect()
}

#[test]
fn a_client_that_has_closed_its_sending_side_is_answered() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    // More than the sockets hold.
    let content = noise(16 << 20);
    let large = dir.path().join("large");
    std::fs::write(&large, &content).unwrap();

    let answer = Client::of(&daemon).send(get("/health")).half_close().answer();
    assert_eq!(answer.status, 204);

    let stat = post("/filesystem.Filesystem/Stat", JSON, br#"{"path":"/"}"#);
    let answer = Client::of(&daemon).send(stat).half_close().answer();
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));

    let path = format!("/files?path={}", escaped(&large));
    let answer = Client::of(&daemon).send(get(&path)).half_close().answer();
    assert_eq!(answer.status, 200);
    assert!(answer.body == content);

    let copy = dir.path().join("copy");
    let upload = post(&format!("/files?path={}", escaped(&copy)), RAW, &content);
    let answer = Client::of(&daemon).send(upload).half_close().answer();
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    assert!(std::fs::read(&copy).unwrap() == content);

    // Two requests, of which the second has come before the first is answered, and then the end.
    let mut client = Client::of(&daemon);
    client.send(get(&path) + &get("/envs")).half_close();
    assert!(client.answer().body == content);
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.rest(), b"");
}

#[test]
fn a_call_that_takes_its_time_is_answered_behind_a_half_close() {
    let daemon = Daemon::start(&[]);
    // A process that reads nothing: input above what a pipe holds waits.
    let start =
        br#"{"process":{"cmd":"/bin/sh","args":["-c","read line; cat >/dev/null"]},"stdin":true}"#;
    let mut events = Client::of(&daemon);
    let connect = "content-type: application/connect+json";
    events.send(post("/process.Process/Start", connect, &envelope(0, start)));
    assert_eq!(events.head().0, 200);
    let mut first = [0; 512];
    let read = events.0.read(&mut first).unwrap();
    let text = String::from_utf8_lossy(&first[..read]).into_owned();
    let pid: u32 = text
        .split("\"pid\":")
        .nth(1)
        .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .unwrap_or_else(|| panic!("no pid in {text}"));
    let input = |data: &str| {
        let body = format!(r#"{{"process":{{"pid":{pid}}},"input":{{"stdin":"{data}"}}}}"#);
        post("/process.Process/SendInput", JSON, body.as_bytes())
    };
    // "x" 3 million times over, and no line end: it waits in the pipe.
    let mut blocked = Client::of(&daemon);
    blocked.send(input(&"eHh4".repeat(1 << 20))).half_close();
    // The stream of events of a client that has half-closed ends, with a reason, and the process goes on.
    let mut other = Client::of(&daemon);
    let body = format!(r#"{{"process":{{"pid":{pid}}}}}"#);
    other.send(post("/process.Process/Connect", connect, &envelope(0, body.as_bytes())));
    assert_eq!(other.head().0, 200);
    let ended = String::from_utf8_lossy(&other.half_close().rest()).into_owned();
    assert!(ended.contains("canceled") && ended.contains("closed its sending side"), "{ended}");
    // Now it ends, and the input with it.
    let kill = format!(r#"{{"process":{{"pid":{pid}}},"signal":"SIGNAL_SIGKILL"}}"#);
    let killed = Client::of(&daemon)
        .send(post("/process.Process/SendSignal", JSON, kill.as_bytes()))
        .answer();
    assert_eq!(killed.status, 200, "{}", String::from_utf8_lossy(&killed.body));
    let answer = blocked.answer();
    assert!(answer.status >= 200, "an answer, whatever it says");
}

#[test]
fn a_request_that_comes_while_a_call_runs_is_answered_after_it() {
    let daemon = Daemon::start(&[]);
    let file = tempfile::NamedTempFile::new().unwrap();
    let content = noise(16 << 20);
    std::fs::write(file.path(), &content).unwrap();
    let mut client = Client::of(&daemon);
    client.send(get(&format!("/files?path={}", escaped(file.path()))));
    let (status, head) = client.head();
    assert_eq!(status, 200, "{head}");
    // The download runs, since nobody has read it. In pieces, and one of them a long one.
    client.send("G").send("ET /envs HTTP/1.1\r\nhost: localhost\r\n");
    client.send(format!("x: {}\r\n\r\n", "y".repeat(4000)));
    let mut body = vec![0; content.len()];
    client.0.read_exact(&mut body).unwrap();
    assert!(body == content);
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.send(get("/health")).answer().status, 204);
}

#[test]
fn requests_that_come_together_with_a_body_are_all_answered() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let upload = |name: &str| {
        post(&format!("/files?path={}", escaped(&dir.path().join(name))), RAW, &noise(20_000))
    };
    // In one write, so that head, body and the next requests come with one read.
    let mut client = Client::of(&daemon);
    client.send([upload("a"), upload("b"), get("/health").into_bytes()].concat());
    for wanted in [200, 200, 204] {
        let answer = client.answer();
        assert_eq!(answer.status, wanted);
        assert!(!answer.head.contains("connection: close"), "{}", answer.head);
    }
    assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), noise(20_000));
    client.send(get("/health").repeat(400)).half_close();
    for _ in 0..400 {
        assert_eq!(client.answer().status, 204);
    }
}

#[test]
fn an_expectation_that_is_refused_closes_the_connection() {
    let daemon = Daemon::start(&[]);
    for expect in ["tea", "100-continue,", "100-continue, 100-continue"] {
        let mut client = Client::of(&daemon);
        let answer = client
            .send(format!(
                "POST /files?path=/x HTTP/1.1\r\nhost: localhost\r\n{RAW}\r\nexpect: {expect}\r\ncontent-length: 50\r\n\r\n"
            ))
            .answer();
        assert_eq!(answer.status, 417, "{expect}");
        // Nobody can tell whether the body or the next request follows.
        assert!(answer.head.contains("\r\nconnection: close\r\n"), "{}", answer.head);
        assert_eq!(client.rest(), b"");
    }
}

#[test]
fn an_upload_that_is_refused_before_its_body_closes_the_connection() {
    let daemon = Daemon::start(&[]);
    let waiting = "expect: 100-continue\r\ncontent-type: text/plain\r\ncontent-length: 60";
    let request = format!("POST /files?path=/x HTTP/1.1\r\nhost: localhost\r\n{waiting}\r\n\r\n");
    let mut client = Client::of(&daemon);
    let answer = client.send(&request).answer();
    assert_eq!(answer.status, 400, "{}", answer.head);
    assert!(answer.head.contains("\r\nconnection: close\r\n"), "{}", answer.head);
    assert_eq!(client.rest(), b"");
    // One that does not wait for the 100 sees its answer too.
    let mut client = Client::of(&daemon);
    client.send(&request).send([b'x'; 60]);
    assert_eq!(client.answer().status, 400);
    client.rest();
    // One that is accepted is asked for its body, and the connection goes on.
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = escaped(file.path());
    let mut client = Client::of(&daemon);
    client.send(format!(
        "POST /files?path={path} HTTP/1.1\r\nhost: localhost\r\n{RAW}\r\nExpect: 100-Continue\r\ncontent-length: 4\r\n\r\n"
    ));
    assert_eq!(client.head().0, 100);
    let answer = client.send("data").answer();
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    assert_eq!(std::fs::read(file.path()).unwrap(), b"data");
    assert_eq!(client.send(get("/health")).answer().status, 204);
}

#[test]
fn what_breaks_the_rules_of_http_is_refused_and_what_keeps_them_is_not() {
    let daemon = Daemon::start(&[]);
    for (request, wanted) in [
        ("GET /health HTTP/1.1\r\n\r\n", 400),
        ("GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", 204),
        ("GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n", 204),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nexpect: tea\r\n\r\n", 417),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n\r\n", 204),
        ("GET /%zz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        ("GET /files?path=%zz HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        ("GET /files?path=/%4 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    ] {
        let mut client = Client::of(&daemon);
        let answer = client.send(request).answer();
        assert_eq!(answer.status, wanted, "{request:?}");
    }
    let mut client = Client::of(&daemon);
    let answer = client.send("GET /files?path=%zz HTTP/1.1\r\nhost: localhost\r\n\r\n").answer();
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.contains("%zz"), "{text}");
    assert_eq!(client.send(get("/health")).answer().status, 204, "the connection goes on");
}

#[test]
fn a_stream_of_events_ends_with_its_client_and_what_it_was_to_stop_too() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("pid");
    let start = format!(
        r#"{{"process":{{"cmd":"/bin/sh","args":["-c","echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000"]}},"stopOnDisconnect":true}}"#,
        mark.display()
    );
    let mut client = Client::of(&daemon);
    let connect = "content-type: application/connect+json";
    client.send(post("/process.Process/Start", connect, &envelope(0, start.as_bytes())));
    let pid: u32 =
        eventually("the process runs", || std::fs::read_to_string(&mark).ok()?.trim().parse().ok());
    drop(client);
    eventually("it has ended", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z ")).then_some(())
    });
}

/// More than a minute: debuggers, laptop lids and slow consumers take as long.
const PAUSE: Duration = Duration::from_secs(65);

#[test]
fn a_client_that_pauses_for_more_than_a_minute_loses_nothing() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let content = noise(16 << 20);
    let (large, copy) = (dir.path().join("large"), dir.path().join("copy"));
    std::fs::write(&large, &content).unwrap();

    let mut download = Client::of(&daemon);
    download.send(get(&format!("/files?path={}", escaped(&large))));
    assert_eq!(download.head().0, 200);
    let upload = post(&format!("/files?path={}", escaped(&copy)), RAW, &content);
    let (first, rest) = upload.split_at(upload.len() / 2);
    let mut uploading = Client::of(&daemon);
    uploading.send(first);
    // More than the sockets and the window hold, so that the process has to wait.
    let start = common::process::sh(&format!("cat '{0}' '{0}'", large.display()));
    let start = envelope(0, &start.encode_to_vec());
    let mut stream = Client::of(&daemon);
    let connect = "content-type: application/connect+proto\r\nconnection: close";
    stream.send(post("/process.Process/Start", connect, &start));
    assert_eq!(stream.head().0, 200);
    // What is tested is that nothing happens while that time passes.
    std::thread::sleep(PAUSE);

    let mut body = vec![0; content.len()];
    download.0.read_exact(&mut body).unwrap();
    assert!(body == content);
    let answer = uploading.send(rest).answer();
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    assert!(std::fs::read(&copy).unwrap() == content);
    let stream = stream.rest();
    assert!(stream.len() > 2 * content.len(), "{} bytes of the stream", stream.len());
    assert!(stream.ends_with(b"\r\n0\r\n\r\n"), "the stream has its end");
    let end = String::from_utf8_lossy(&stream[stream.len() - 60..]).into_owned();
    assert!(end.contains("{}") && !end.contains("error"), "{end}");
}

#[test]
fn a_client_that_pauses_makes_room_for_others_and_is_told_so() {
    let daemon = Daemon::start(&["--max-connections", "1"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(256 << 20).unwrap();
    let mut paused = Client::of(&daemon);
    let read = format!(r#"{{"path":"{}"}}"#, file.path().display());
    let connect = "content-type: application/connect+json";
    paused.send(post("/filesystem.Filesystem/Read", connect, &envelope(0, read.as_bytes())));
    assert_eq!(paused.head().0, 200);
    // It keeps its place for a while, and then not.
    eventually("another client has its place", || {
        (Client::of(&daemon).send(get("/envs")).answer().status == 200).then_some(())
    });
    let rest = paused.rest();
    assert!(rest.len() < 256 << 20, "{} bytes", rest.len());
    let end = String::from_utf8_lossy(&rest[rest.len().saturating_sub(300)..]).into_owned();
    assert!(end.contains("resource_exhausted"), "{end}");
    assert!(rest.ends_with(b"\r\n0\r\n\r\n"), "{end}");
}
