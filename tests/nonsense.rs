//! Nonsense in, the documented error out, and the next request is answered.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
};

use common::{Daemon, PATIENCE, noise, rpc::envelope};
use serde_json::Value;

/// Sends bytes as they are and reads until the daemon closes.
fn raw(daemon: &Daemon, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    // The daemon may close before it has all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// Status, lower-case headers and body of an HTTP/1.1 answer, after a request with this head and
/// body.
fn http(daemon: &Daemon, head: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    let head = format!(
        "{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer and then the end, no reset");
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("an answer");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, answer[end + 4..].to_vec())
}

fn connect_error(body: &[u8]) -> (String, String) {
    let error: Value = serde_json::from_slice(body)
        .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(body)));
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (text("code"), text("message"))
}

/// The error in the last envelope of a Connect stream.
fn end_stream(mut body: &[u8]) -> (String, String) {
    // hyper sends streams chunked; the chunks are put together here.
    let mut bytes = Vec::new();
    while let Some(at) = body.windows(2).position(|pair| pair == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&body[..at]).unwrap(), 16).unwrap();
        bytes.extend_from_slice(&body[at + 2..at + 2 + length]);
        body = &body[at + 2 + length + 2..];
        if length == 0 {
            break;
        }
    }
    let mut rest = &bytes[..];
    loop {
        let length = u32::from_be_bytes(rest[1..5].try_into().unwrap()) as usize;
        let message = &rest[5..5 + length];
        if rest[0] & 2 != 0 {
            let end: Value = serde_json::from_slice(message).unwrap();
            return connect_error(end["error"].to_string().as_bytes());
        }
        rest = &rest[5 + length..];
    }
}

fn assert_alive(daemon: &Daemon) {
    let (status, _, body) = http(
        daemon,
        "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json",
        b"{}",
    );
    assert_eq!((status, &body[..]), (200, &b"{}"[..]), "the next request is answered");
}

#[test]
fn random_bytes_on_the_port() {
    let daemon = Daemon::start(&[]);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for round in 0..50 {
        let bytes = noise(1 + round * 700);
        raw(&daemon, &bytes[round..]);
        raw(&daemon, &[&preface[..], &bytes[round..]].concat());
        raw(&daemon, &preface[..round % 24]);
        raw(&daemon, &[b"POST /process.Process/List HTTP/1.1\r\n", &bytes[round..]].concat());
    }
    assert_alive(&daemon);
}

#[test]
fn malformed_heads_get_400_and_large_ones_431() {
    let daemon = Daemon::start(&[]);
    let answer = raw(&daemon, b"GET\r\n\r\n");
    assert!(answer.starts_with(b"HTTP/1.1 400 "), "{}", String::from_utf8_lossy(&answer));
    let long = format!("GET /health HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(129 << 10));
    let answer = raw(&daemon, long.as_bytes());
    assert!(answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    let many = format!("GET /health HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(257));
    let answer = raw(&daemon, many.as_bytes());
    assert!(answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    assert_alive(&daemon);
}

#[test]
fn truncated_and_broken_envelopes() {
    let daemon = Daemon::start(&[]);
    let start = "POST /process.Process/Start HTTP/1.1\r\ncontent-type: application/connect+json";
    let message = br#"{"process":{"cmd":"true"}}"#;
    let whole = envelope(0, message);
    let huge = [&[0, 0xff, 0xff, 0xff, 0xff], &message[..]].concat();
    let cases: [(&[u8], &str, &str); 8] = [
        (b"", "unimplemented", "unary request has zero messages"),
        (&whole[..3], "invalid_argument", "incomplete envelope: unexpected EOF"),
        (&whole[..9], "invalid_argument", "promised 26 bytes in enveloped message, got 4 bytes"),
        (&[&whole[..], &whole[..]].concat(), "unimplemented", "multiple messages"),
        (&envelope(0x40, message), "internal", "invalid envelope flags 64"),
        (&envelope(0x01, message), "internal", "without compression support"),
        (&huge, "resource_exhausted", "message size 4294967295 is larger"),
        (&envelope(0, b"{"), "invalid_argument", "unmarshal message"),
    ];
    for (body, code, text) in cases {
        let (status, _, answer) = http(&daemon, start, body);
        assert_eq!(status, 200, "a stream tells its error at its end");
        let (found, message) = end_stream(&answer);
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{message:?} has not {text:?}");
    }
    assert_alive(&daemon);
}

#[test]
fn content_types_methods_and_versions() {
    let daemon = Daemon::start(&[]);
    let list = "POST /process.Process/List HTTP/1.1\r\ncontent-type: ";
    for kind in ["text/plain", "application/connect+json", "application/json; charset=latin1"] {
        let (status, head, body) = http(&daemon, &format!("{list}{kind}"), b"{}");
        assert_eq!((status, &body[..]), (415, &b""[..]), "{kind}");
        assert!(head.contains("\r\naccept-post: application/grpc, "), "{head}");
        assert!(head.contains(", application/json, application/proto"), "{head}");
    }
    let (status, ..) = http(&daemon, "POST /process.Process/List HTTP/1.1", b"{}");
    assert_eq!(status, 415, "no content type");
    let (status, ..) = http(&daemon, &format!("{list}application/grpc"), b"");
    assert_eq!(status, 505, "gRPC needs trailers");
    // JSON exists only where the code for it was generated.
    let health = "POST /grpc.health.v1.Health/Check HTTP/1.1\r\ncontent-type: application/json";
    assert_eq!(http(&daemon, health, b"{}").0, 415);

    let get = "GET /process.Process/List HTTP/1.1\r\ncontent-type: application/json";
    let (status, head, _) = http(&daemon, get, b"");
    assert_eq!(status, 405);
    assert!(head.contains("\r\nallow: post"), "{head}");

    for path in ["/process.Process/Nope", "/process.Process/", "/process.Process", "/nope"] {
        let head = format!("POST {path} HTTP/1.1\r\ncontent-type: application/json");
        let (status, _, body) = http(&daemon, &head, b"{}");
        assert_eq!((status, &body[..]), (404, &b"404 page not found\n"[..]), "{path}");
        let head = format!("POST {path} HTTP/1.1\r\ncontent-type: application/grpc-web");
        let (status, head, _) = http(&daemon, &head, b"");
        assert_eq!(status, 200, "{path}");
        assert!(head.contains("\r\ngrpc-status: 12"), "{head}");
    }

    let version = format!("{list}application/json\r\nconnect-protocol-version: 2");
    let (status, _, body) = http(&daemon, &version, b"{}");
    let (code, message) = connect_error(&body);
    assert_eq!((status, code.as_str()), (400, "invalid_argument"));
    assert!(message.contains("connect-protocol-version"), "{message}");
    assert_alive(&daemon);
}

#[test]
fn compressions_and_timeouts() {
    let daemon = Daemon::start(&[]);
    let list = "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json\r\n";
    let cases = [
        ("content-encoding: br", 501, "unimplemented", "unknown compression \"br\": supported"),
        ("content-encoding: GZIP", 501, "unimplemented", "unknown compression \"GZIP\""),
        ("content-encoding: gzip", 400, "invalid_argument", "not valid gzip"),
        ("connect-timeout-ms: soon", 400, "invalid_argument", "parse timeout: connect-timeout-ms"),
        ("connect-timeout-ms: 12345678901", 400, "invalid_argument", "more than 10 characters"),
        ("connect-timeout-ms: 0", 504, "deadline_exceeded", "context deadline exceeded"),
        ("connect-timeout-ms: -5", 504, "deadline_exceeded", "context deadline exceeded"),
    ];
    for (header, status, code, text) in cases {
        let (found, _, body) = http(&daemon, &format!("{list}{header}"), b"{}");
        let (found_code, message) = connect_error(&body);
        assert_eq!((found, found_code.as_str()), (status, code), "{header}: {message}");
        assert!(message.contains(text), "{header}: {message}");
    }
    for header in ["content-encoding: identity", "connect-timeout-ms: 60000"] {
        let (status, _, body) = http(&daemon, &format!("{list}{header}"), b"{}");
        assert_eq!((status, &body[..]), (200, &b"{}"[..]), "{header}");
    }
    assert_alive(&daemon);
}

#[test]
fn messages_that_are_none() {
    let daemon = Daemon::start(&[]);
    let stat = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/json";
    let deep = "[".repeat(100_000);
    let cases: [(&[u8], &str); 9] = [
        (b"", "zero-length payload is not a valid JSON object"),
        (b"null", "unmarshal message"),
        (b"[]", "unmarshal message"),
        (b"{\"path\":1}", "unmarshal message"),
        (b"{\"path\":\"/\",\"path\":\"/tmp\"}", "duplicate field"),
        (b"{\"path\":\"/\"} x", "trailing"),
        (b"{\"path\":\"\xff\xfe\"}", "unmarshal message"),
        (b"\xff", "unmarshal message"),
        (deep.as_bytes(), "unmarshal message"),
    ];
    for (body, text) in cases {
        let (status, _, answer) = http(&daemon, stat, body);
        let (code, message) = connect_error(&answer);
        assert_eq!((status, code.as_str()), (400, "invalid_argument"), "{message}");
        assert!(message.contains(text), "{message:?} has not {text:?}");
    }
    let binary = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/proto";
    for body in [&b"\x0a\x02\xff\xfe"[..], b"\x0a\xff\xff\xff\xff\x0f", b"\xff\xff\xff"] {
        let (status, _, answer) = http(&daemon, binary, body);
        let (code, message) = connect_error(&answer);
        assert_eq!((status, code.as_str()), (400, "invalid_argument"), "{message}");
    }
    // Fields that this version does not know are skipped, in both codecs.
    let (status, ..) = http(&daemon, stat, br#"{"path":"/","new":[{"deep":1}]}"#);
    assert_eq!(status, 200);
    let (status, ..) = http(&daemon, binary, b"\x0a\x01/\xa2\x06\x03abc");
    assert_eq!(status, 200);
    assert_alive(&daemon);
}

#[test]
fn a_hundred_megabytes_of_json() {
    let daemon = Daemon::start(&[]);
    let mut body = br#"{"path":""#.to_vec();
    body.resize(100 << 20, b'a');
    body.extend_from_slice(b"\"}");
    for (method, limit) in
        [("filesystem.Filesystem/Stat", 4 << 20), ("process.Process/SendInput", 64 << 20)]
    {
        let head = format!("POST /{method} HTTP/1.1\r\ncontent-type: application/json");
        let (status, _, answer) = http(&daemon, &head, &body);
        let (code, message) = connect_error(&answer);
        assert_eq!((status, code.as_str()), (429, "resource_exhausted"), "{message}");
        let text = format!("larger than the configured maximum of {limit} bytes");
        assert!(message.contains(&text), "{message}");
    }
    assert!(daemon.memory("VmHWM") < 64 << 10, "it was not read into memory");
    assert_alive(&daemon);
}

#[test]
fn a_gzip_bomb_stops_at_the_limit() {
    let daemon = Daemon::start(&["--max-message-bytes", "1048576"]);
    let bomb = envd::wire::envelope::compress(&vec![b' '; 64 << 20]);
    let head = "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json\r\ncontent-encoding: gzip";
    let (status, _, answer) = http(&daemon, head, &bomb);
    let (code, message) = connect_error(&answer);
    assert_eq!((status, code.as_str()), (429, "resource_exhausted"), "{message}");
    assert!(daemon.memory("VmHWM") < 32 << 10, "the bomb was not unpacked");
    assert_alive(&daemon);
}

#[test]
fn paths_and_users_that_cannot_be() {
    let daemon = Daemon::start(&[]);
    let stat = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/json";
    let (status, _, body) = http(&daemon, stat, br#"{"path":"/a\u0000b"}"#);
    let (code, message) = connect_error(&body);
    assert_eq!((status, code.as_str()), (400, "invalid_argument"));
    assert!(message.contains("/a\\0b"), "{message}");

    let unknown = format!("{stat}\r\nauthorization: Basic bm9ib2R5LWhlcmU6");
    let (status, _, body) = http(&daemon, &unknown, br#"{"path":"/"}"#);
    let (code, message) = connect_error(&body);
    assert_eq!((status, code.as_str()), (401, "unauthenticated"));
    assert_eq!(message, "invalid username: 'nobody-here'");
    // A header of another kind names nobody, and that is no error.
    for header in ["Bearer x", "Basic", "Basic %%%", "Basic bm9jb2xvbg=="] {
        let head = format!("{stat}\r\nauthorization: {header}");
        assert_eq!(http(&daemon, &head, br#"{"path":"/"}"#).0, 200, "{header}");
    }
    assert_alive(&daemon);
}

#[test]
fn slow_clients_are_let_go() {
    let daemon = Daemon::start(&["--header-timeout", "1"]);
    let mut silent = TcpStream::connect(daemon.tcp()).unwrap();
    let mut preface = TcpStream::connect(daemon.tcp()).unwrap();
    let mut head = TcpStream::connect(daemon.tcp()).unwrap();
    let mut second = TcpStream::connect(daemon.tcp()).unwrap();
    preface.write_all(b"PRI * HT").unwrap();
    head.write_all(b"GET /health HTTP/1.1\r\nx: ").unwrap();
    second.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut first = [0; 12];
    second.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 204");
    second.write_all(b"GET /hea").unwrap();
    let ends = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).expect("it is closed");
        String::from_utf8(answer).unwrap()
    };
    assert_eq!(ends(&mut silent), "");
    assert_eq!(ends(&mut preface), "");
    assert!(ends(&mut head).starts_with("HTTP/1.1 408 "));
    let second = ends(&mut second);
    assert!(second.contains("HTTP/1.1 408 "), "{second}");
    assert_alive(&daemon);
}

#[test]
fn idle_connections_are_closed_and_busy_ones_are_not() {
    let daemon = Daemon::start(&["--idle-timeout", "1"]);
    let request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut idle = TcpStream::connect(daemon.tcp()).unwrap();
    idle.write_all(request).unwrap();
    let mut busy = TcpStream::connect(daemon.tcp()).unwrap();
    let body = envelope(0, br#"{"process":{"cmd":"cat"}}"#);
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\nkeepalive-ping-interval: 3\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    busy.write_all(head.as_bytes()).unwrap();
    busy.write_all(&body).unwrap();
    for stream in [&idle, &busy] {
        stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    }
    let mut answer = Vec::new();
    idle.read_to_end(&mut answer).expect("the idle connection is closed");
    assert!(answer.starts_with(b"HTTP/1.1 204 "));
    // A silent stream outlives the idle timeout; its keepalive comes three times as late.
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("keepalive") {
        let mut buffer = [0; 4096];
        let bytes = busy.read(&mut buffer).unwrap();
        assert_ne!(bytes, 0, "the stream was cut: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..bytes]);
    }
}

#[test]
fn one_connection_too_many_is_told_so() {
    let daemon = Daemon::start(&["--max-connections", "2"]);
    let mut held: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
            // A call that runs: an idle connection would make room.
            let body = envelope(0, br#"{"process":{"cmd":"cat"}}"#);
            let head = format!(
                "POST /process.Process/Start HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
            // Its place is taken once it has an answer.
            let mut first = [0; 12];
            stream.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"HTTP/1.1 200");
            stream
        })
        .collect();
    let (status, head, body) = http(&daemon, "GET /envs HTTP/1.1", b"");
    assert_eq!(status, 503, "{head}");
    let (_, message) = connect_error(&body);
    assert_eq!(message, "too many connections: the limit is 2");
    let list = "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json";
    let (status, _, body) = http(&daemon, list, b"{}");
    assert_eq!((status, connect_error(&body).0.as_str()), (503, "unavailable"));
    // Whether it lives may be asked all the same; the connection is closed behind the answer.
    for probe in ["GET /health HTTP/1.1", "GET /livez HTTP/1.1"] {
        let (status, head, _) = http(&daemon, probe, b"");
        assert!(status == 204 && head.contains("connection: close"), "{status} {head}");
    }
    held.pop();
    common::eventually("the place is free again", || {
        (http(&daemon, "GET /envs HTTP/1.1", b"").0 == 200).then_some(())
    });
}

#[test]
fn requests_together_stay_within_the_budget() {
    let daemon =
        Daemon::start(&["--max-message-bytes", "1048576", "--max-buffered-bytes", "2097152"]);
    // Each client sends most of a message and waits; together that is too much for one.
    let head = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 600000\r\n\r\n";
    let mut clients: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.tcp()).unwrap();
            stream.set_read_timeout(Some(*PATIENCE)).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            let _ = stream.write_all(&vec![b' '; 500_000]);
            stream
        })
        .collect();
    // Whoever was refused has an answer before its message is complete.
    let refused = common::eventually("one is refused", || {
        clients.iter().position(|stream| {
            stream.set_nonblocking(true).unwrap();
            let answered = stream.peek(&mut [0]).is_ok();
            stream.set_nonblocking(false).unwrap();
            answered
        })
    });
    let mut refused = clients.remove(refused);
    let mut answer = [0; 1024];
    let bytes = refused.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..bytes]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    assert!(answer.contains("requests that are under way hold all of 2097152 bytes"), "{answer}");
    // Meanwhile what is small, above all what ends a process, is answered.
    for _ in 0..20 {
        assert_alive(&daemon);
    }
    drop((refused, clients));
    // What they held is free again.
    let mut body = br#"{"path":"/"}"#.to_vec();
    body.resize(900_000, b' ');
    let stat = "POST /filesystem.Filesystem/Stat HTTP/1.1\r\ncontent-type: application/json";
    common::eventually("their memory is given back", || {
        (http(&daemon, stat, &body).0 == 200).then_some(())
    });
}

#[test]
fn clients_that_stall_are_let_go() {
    let daemon = Daemon::start(&["--stall-timeout", "1", "--max-connections", "1"]);
    // In the middle of a message.
    let mut sender = TcpStream::connect(daemon.tcp()).unwrap();
    sender.set_read_timeout(Some(*PATIENCE)).unwrap();
    sender.write_all(b"POST /process.Process/List HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{").unwrap();
    let mut answer = String::new();
    let _ = sender.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    assert!(answer.contains("no byte of the request came for 1 s"), "{answer}");
    drop(sender);
    // With an answer that it does not take: more than the sockets hold.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(256 << 20).unwrap();
    let mut reader = common::eventually("the place is free", || {
        let mut reader = TcpStream::connect(daemon.tcp()).unwrap();
        let path = file.path().display();
        let request = format!("GET /files?path={path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        reader.write_all(request.as_bytes()).unwrap();
        let mut first = [0; 12];
        reader.read_exact(&mut first).unwrap();
        (&first == b"HTTP/1.1 200").then_some(reader)
    });
    common::eventually("its place is given to another", || {
        (http(&daemon, "GET /envs HTTP/1.1", b"").0 == 200).then_some(())
    });
    // What was sent is there, and not all of it.
    let mut rest = Vec::new();
    let _ = reader.read_to_end(&mut rest);
    assert!(rest.len() < 256 << 20);
}

#[test]
fn an_http2_client_that_calls_later_is_idle_and_not_slow() {
    let daemon = Daemon::start(&["--header-timeout", "1", "--idle-timeout", "3"]);
    let mut client = TcpStream::connect(daemon.tcp()).unwrap();
    client.set_read_timeout(Some(*PATIENCE)).unwrap();
    let start = std::time::Instant::now();
    // The preface and empty settings.
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    // Its end was announced (a GOAWAY frame is of type 7), and not before the idle timeout.
    assert!(start.elapsed() >= std::time::Duration::from_secs(2), "{:?}", start.elapsed());
    let mut frames = &answer[..];
    let mut types = Vec::new();
    while frames.len() >= 9 {
        let length = u32::from_be_bytes([0, frames[0], frames[1], frames[2]]) as usize;
        types.push(frames[3]);
        frames = &frames[(9 + length).min(frames.len())..];
    }
    assert!(types.contains(&7), "{types:?}");
}

#[test]
fn a_body_that_nobody_wanted_is_no_slow_request() {
    let daemon = Daemon::start(&["--header-timeout", "1"]);
    let mut client = TcpStream::connect(daemon.tcp()).unwrap();
    client
        .write_all(b"POST /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n")
        .unwrap();
    let mut answer = [0; 1024];
    let bytes = client.read(&mut answer).unwrap();
    assert!(answer[..bytes].starts_with(b"HTTP/1.1 405 "));
    client.write_all(b"0123456789").unwrap();
    // Longer than the header timeout there is nothing to read.
    client.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
    let nothing = client.read(&mut answer).unwrap_err().kind();
    assert_eq!(nothing, std::io::ErrorKind::WouldBlock);
    client.set_read_timeout(Some(*PATIENCE)).unwrap();
    client.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let bytes = client.read(&mut answer).unwrap();
    assert!(answer[..bytes].starts_with(b"HTTP/1.1 204 "));
}

#[test]
fn messages_that_quote_the_request_are_cut() {
    let daemon = Daemon::start(&[]);
    let tag = "x".repeat(100_000);
    let json = format!(r#"{{"process":{{"tag":"{tag}"}},"signal":"SIGNAL_SIGKILL"}}"#);
    let method = "POST /process.Process/SendSignal HTTP/1.1\r\ncontent-type: ";
    let (status, _, body) = http(&daemon, &format!("{method}application/json"), json.as_bytes());
    let (code, message) = connect_error(&body);
    assert_eq!((status, code.as_str()), (404, "not_found"));
    assert!(message.starts_with("process with tag xxx"), "{message}");
    assert!(message.len() < 5000 && message.ends_with("bytes)"), "{message}");
    let web = format!("{method}application/grpc-web+json");
    let (status, head, _) = http(&daemon, &web, &envelope(0, json.as_bytes()));
    assert_eq!(status, 200);
    assert!(head.contains("\r\ngrpc-status: 5") && head.len() < 8000, "{head}");
}
