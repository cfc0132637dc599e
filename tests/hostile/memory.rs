//! What the daemon may take of memory, whatever its callers send; `scripts/hostile-memory.py` measures more.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use envd::{
    proto::process::{ListRequest, ListResponse, ProcessConfig, StartRequest},
    wire::memory::MAX_UNPROVEN_BYTES,
};
use prost::Message;

use super::{TOKEN, answers, frame, with_many_files};
use crate::common::{
    Daemon, PATIENCE, eventually,
    process::{LIST, begin, run, sh, start},
    rpc::{Client, WIRES, Wire},
};

/// Small, so that the tests are quick.
const BUFFERED: usize = 64 << 20;
/// What may be resident: 128 MiB and twice the buffer, in KiB.
const BOUND: u64 = (128 << 10) + 2 * (BUFFERED as u64 >> 10);
/// What may stay, in KiB.
const KEPT: u64 = 16 << 10;

struct Guarded {
    daemon: Daemon,
    before: u64,
    _dir: tempfile::TempDir,
}

impl Guarded {
    fn start() -> Self {
        with_many_files();
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, TOKEN).unwrap();
        let daemon = Daemon::start(&[
            &format!("--access-token-file={}", token.display()),
            &format!("--max-buffered-bytes={BUFFERED}"),
            &format!("--max-message-bytes={}", BUFFERED / 2),
        ]);
        assert!(answers(TcpStream::connect(daemon.tcp()).unwrap()));
        let before = daemon.memory("VmRSS");
        Self { daemon, before, _dir: dir }
    }

    fn client(&self, wire: Wire) -> Client {
        Client::new(&self.daemon, wire).with("x-access-token", TOKEN)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.daemon.tcp()).unwrap();
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
        stream.set_write_timeout(Some(*PATIENCE)).unwrap();
        stream
    }

    /// It answers, never took too much, and gives back what it took.
    fn is_within(&self, bound: u64) {
        assert!(answers(self.connect()));
        let peak = self.daemon.memory("VmHWM");
        assert!(peak < bound, "{peak} KiB, and {bound} were allowed");
    }

    fn gives_back(&self) {
        let most = self.before + KEPT;
        eventually("memory is given back", || (self.daemon.memory("VmRSS") <= most).then_some(()));
    }
}

fn post(path: &str, kind: &str, body: &[u8], token: bool) -> Vec<u8> {
    let token = if token { format!("x-access-token: {TOKEN}\r\n") } else { String::new() };
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\n{token}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn enveloped(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// The answers to the same request on many connections at a time.
fn at_once(guarded: &Guarded, request: &[u8], number: usize) -> Vec<Vec<u8>> {
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..number)
            .map(|_| {
                scope.spawn(|| {
                    let mut stream = guarded.connect();
                    let mut answer = Vec::new();
                    // It may be refused before it has been read.
                    let _ = stream.write_all(request);
                    let _ = stream.read_to_end(&mut answer);
                    answer
                })
            })
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

fn holds(answer: &[u8], text: &str) -> bool {
    answer.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn millions_of_empty_arguments_are_refused_before_they_are_decoded() {
    let guarded = Guarded::start();
    let args = vec![String::new(); 2_000_000];
    let process = Some(ProcessConfig { cmd: "true".to_owned(), args, ..Default::default() });
    let message = StartRequest { process, ..Default::default() }.encode_to_vec();
    let json =
        format!(r#"{{"process":{{"cmd":"true","args":[{}""]}}}}"#, r#""","#.repeat(1_300_000));
    for (kind, message) in
        [("application/connect+proto", message), ("application/connect+json", json.into_bytes())]
    {
        let request = post("/process.Process/Start", kind, &enveloped(&message), true);
        for answer in at_once(&guarded, &request, 16) {
            assert!(holds(&answer, "resource_exhausted"), "{}", String::from_utf8_lossy(&answer));
        }
    }
    guarded.is_within(BOUND);
    guarded.gives_back();
    let (_, end) = run(&guarded.client(Wire::Grpc), &sh("true")).await;
    assert_eq!(end.exit_code, 0);
}

#[tokio::test]
async fn a_list_of_long_arguments_is_written_a_process_at_a_time() {
    let guarded = Guarded::start();
    let client = guarded.client(Wire::Grpc);
    let long = "x".repeat(127_000);
    let args: Vec<&str> = std::iter::repeat_n(long.as_str(), 14).collect();
    let mut running = Vec::new();
    for _ in 0..12 {
        let request = start("sh", &[&["-c", "sleep 60", "sh"][..], &args].concat());
        running.push(begin(&client, &request).await);
    }
    // Each is 21 MB.
    for (kind, body) in [("application/json", &b"{}"[..]), ("application/proto", b"")] {
        let request = post(LIST, kind, body, true);
        for answer in at_once(&guarded, &request, 16) {
            let (head, rest) =
                answer.split_at(answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4);
            assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(head));
            let processes = match kind {
                "application/json" => {
                    serde_json::from_slice::<ListResponse>(rest).unwrap().processes
                }
                _ => ListResponse::decode(rest).unwrap().processes,
            };
            assert_eq!(processes.len(), 12);
            assert!(
                processes.iter().all(|process| process.config.as_ref().unwrap().args.len() == 17)
            );
        }
    }
    // In every protocol, compressed or not.
    for wire in WIRES {
        let listed: ListResponse =
            guarded.client(wire).unary(LIST, &ListRequest::default()).await.unwrap();
        assert_eq!(listed.processes.len(), 12, "{wire:?}");
    }
    guarded.is_within(BOUND);
    drop(running);
}

#[test]
fn strangers_heads_share_what_there_is_for_them() {
    let guarded = Guarded::start();
    let http1 = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}", "x".repeat(120 << 10));
    let mut http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    http2.extend(frame(4, 0, 0, &[]));
    http2.extend(frame(1, 0, 1, b"\x82\x86\x84\x41\x01x"));
    for _ in 0..7 {
        // A literal header `a` of 16,000 bytes.
        let mut literal = b"\x00\x01a\x7f\x81\x7c".to_vec();
        literal.resize(6 + 16_000, b'x');
        http2.extend(frame(9, 0, 1, &literal));
    }
    for head in [http1.as_bytes(), &http2] {
        let mut held = Vec::new();
        for _ in 0..800 {
            let mut stream = TcpStream::connect(guarded.daemon.tcp()).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
            // It is closed while it sends, if there is nothing left for it.
            let _ = stream.write_all(head);
            held.push(stream);
        }
        // What is within the limit: connections themselves take some, too.
        let most = u64::try_from(MAX_UNPROVEN_BYTES >> 10).unwrap();
        guarded.is_within(guarded.before + most + (64 << 10));
        drop(held);
        guarded.gives_back();
    }
}

#[test]
fn bodies_of_init_before_it_is_authorised_share_what_there_is_for_them() {
    let guarded = Guarded::start();
    let variables: Vec<String> =
        (0..290_000).map(|number| format!(r#""a{number:07}":"""#)).collect();
    let many = format!(r#"{{"accessToken":"wrong","envVars":{{{}}}}}"#, variables.join(","));
    let long = format!(r#"{{"accessToken":"wrong","caBundle":"{}"}}"#, "x".repeat(3 << 20));
    for body in [many, long] {
        let request = post("/init", "application/json", body.as_bytes(), false);
        let answers = at_once(&guarded, &request, 32);
        for answer in &answers {
            let refused = ["HTTP/1.1 401", "HTTP/1.1 503", "HTTP/1.1 400"];
            // The kernel drops an answer when the daemon closes before the whole body has come, which
            // it does 5 s after a refusal.
            assert!(
                answer.is_empty()
                    || refused.iter().any(|status| answer.starts_with(status.as_bytes())),
                "{}",
                String::from_utf8_lossy(answer)
            );
        }
        assert!(answers.iter().any(|answer| !answer.is_empty()), "some are answered");
    }
    let most = u64::try_from(MAX_UNPROVEN_BYTES >> 10).unwrap();
    guarded.is_within(guarded.before + 2 * most + (32 << 10));
    guarded.gives_back();
}

#[test]
fn downloads_that_nobody_reads_share_what_there_is_for_them() {
    let guarded = Guarded::start();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let path = format!("/files?path={}", file.path().display());
    let short = |text: &str| {
        let length = u8::try_from(text.len()).unwrap();
        assert!(length < 127);
        [&[length], text.as_bytes()].concat()
    };
    let request = [
        b"\x82\x86\x04".to_vec(),
        short(&path),
        b"\x41\x01x\x00".to_vec(),
        short("x-access-token"),
        short(TOKEN),
    ]
    .concat();
    let target = file.path();
    let opened = || {
        let all = std::fs::read_dir(format!("/proc/{}/fd", guarded.daemon.pid())).unwrap();
        let all = all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        all.filter(|opened| opened == target).count()
    };
    // One connection after another: 4096 opens at once would be more than may wait for a thread, and
    // those beyond are refused.
    let mut held = Vec::new();
    for connection in 1..=16 {
        let mut stream = guarded.connect();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(4, 0, 0, &[0, 4, 0, 0x10, 0, 0])).unwrap();
        stream.write_all(&frame(8, 0, 0, &[0x40, 0, 0, 0])).unwrap();
        for number in 0..256 {
            stream.write_all(&frame(1, 5, 2 * number + 1, &request)).unwrap();
        }
        held.push(stream);
        eventually("all files are open", || (opened() >= 250 * connection).then_some(()));
    }
    guarded.is_within(BOUND);
    // Whoever reads gets it all.
    let mut stream = guarded.connect();
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-access-token: {TOKEN}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut content = Vec::new();
    stream.read_to_end(&mut content).unwrap();
    assert!(content.len() > 64 << 20);
    drop((held, stream));
    guarded.gives_back();
}
