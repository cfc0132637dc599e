//! At a bound, who does nothing makes room for who wants something.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use super::{HEALTH, serves, with_many_files};
use crate::common::{Daemon, PATIENCE, eventually};

fn open(daemon: &Daemon) -> TcpStream {
    let stream = TcpStream::connect(daemon.tcp()).unwrap();
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    stream
}

/// Whether `/health` answers on a connection that is used again.
fn answers_again(stream: &mut (impl Read + Write)) -> bool {
    let mut head = Vec::new();
    let mut byte = [0];
    stream.write_all(HEALTH).unwrap();
    while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
        head.extend(byte);
    }
    head.starts_with(b"HTTP/1.1 204")
}

/// Whether a call comes through on a new connection at once.
fn newcomer_is_served(daemon: &Daemon) -> bool {
    let begun = Instant::now();
    serves(open(daemon)) && begun.elapsed() < Duration::from_secs(5)
}

#[test]
fn idle_connections_make_room_for_newcomers() {
    with_many_files();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listen = format!("--listen=unix://{}", socket.display());
    let daemon = Daemon::start(&["--max-connections", "64", &listen]);
    // One from elsewhere, and it is the oldest.
    let mut host = UnixStream::connect(&socket).unwrap();
    assert!(answers_again(&mut host));
    // One with a call that waits for its client.
    let mut busy = open(&daemon);
    let body = br#"{"depth":1,"path":"/"}"#;
    let head = format!(
        "POST /filesystem.Filesystem/ListDir HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    busy.write_all(head.as_bytes()).unwrap();
    // More than there may be: used once and kept, never used, with half a head, and HTTP/2.
    let mut idle: Vec<_> = (0..100)
        .map(|number| {
            let mut stream = open(&daemon);
            match number % 4 {
                0 => assert!(answers_again(&mut stream)),
                1 => stream.write_all(b"GET /health HTTP/1.1\r\n").unwrap(),
                2 => stream
                    .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                    .unwrap(),
                _ => {}
            }
            stream
        })
        .collect();
    eventually("a newcomer is served", || newcomer_is_served(&daemon).then_some(()));
    for _ in 0..200 {
        assert!(newcomer_is_served(&daemon));
    }
    // Programs of the sandbox take no place from others, and nobody takes one from a call.
    assert!(answers_again(&mut host));
    busy.write_all(body).unwrap();
    let mut first = [0; 12];
    busy.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    // It was the oldest that had to go.
    let mut end = Vec::new();
    let _ = idle[0].read_to_end(&mut end);
    assert!(end.is_empty());
}

#[test]
fn uploads_that_drip_make_room_for_newcomers() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let begin = |name: &str| {
        let path = dir.path().join(name);
        let mut stream = open(&daemon);
        let head = format!(
            "POST /files?path={} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\ncontent-length: 1000000\r\n\r\n",
            path.display()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let mut dripping: Vec<_> = (0..64).map(|number| begin(&number.to_string())).collect();
    let mut drip = |until: Instant| {
        while Instant::now() < until {
            for stream in &mut dripping {
                // Those that were evicted are closed.
                let _ = stream.write_all(b"x");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    std::thread::scope(|scope| {
        let newcomers = scope.spawn(|| {
            for number in 0..8 {
                let mut stream = begin(&format!("new-{number}"));
                stream.write_all(&vec![b'x'; 1_000_000]).unwrap();
                let mut first = [0; 12];
                stream.read_exact(&mut first).unwrap();
                assert_eq!(&first, b"HTTP/1.1 200", "newcomer {number}");
            }
        });
        while !newcomers.is_finished() {
            drip(Instant::now() + Duration::from_millis(100));
        }
        newcomers.join().unwrap();
    });
    // One that was evicted is told why, and leaves nothing behind.
    let evicted = dripping.iter_mut().find_map(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut answer = [0; 512];
        let read = stream.read(&mut answer).ok()?;
        let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
        answer.starts_with("HTTP/1.1 503").then_some(answer)
    });
    assert!(evicted.unwrap().contains("the slowest while another waited"));
    eventually("it is gone", || {
        (std::fs::read_dir(dir.path()).unwrap().count() < 64 + 8).then_some(())
    });
}
