//! At a bound, who does nothing makes room for who wants something.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
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
    let dripping: Vec<_> = (0..64).map(|number| begin(&number.to_string())).collect();
    let over = AtomicBool::new(false);
    let (number, answer) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for mut stream in &dripping {
                    // Those that were evicted are closed.
                    let _ = stream.write_all(b"x");
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let _stop = Defer(|| over.store(true, Ordering::Relaxed));
        // The first newcomers may be served before the last of the others has its slot.
        eventually("one makes room", || {
            for number in 0..8 {
                let mut stream = begin(&format!("new-{number}"));
                stream.write_all(&vec![b'x'; 1_000_000]).unwrap();
                let mut first = [0; 12];
                stream.read_exact(&mut first).unwrap();
                assert_eq!(&first, b"HTTP/1.1 200", "newcomer {number}");
            }
            dripping.iter().enumerate().find_map(|(number, mut stream)| {
                stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                let mut answer = [0; 512];
                let read = stream.read(&mut answer).ok()?;
                Some((number, String::from_utf8_lossy(&answer[..read]).into_owned()))
            })
        })
    });
    // The answer gives the reason, and nothing is left of the upload.
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("the slowest while another waited"), "{answer}");
    eventually("it is gone", || (!dir.path().join(number.to_string()).exists()).then_some(()));
}

/// Runs a function at the end of a scope, also where an assertion fails.
struct Defer<F: FnMut()>(F);

impl<F: FnMut()> Drop for Defer<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// The head of a call whose messages are framed as Connect has it, and its first message.
fn framed(method: &str, length: usize, message: &str) -> Vec<u8> {
    let frame = frame(message);
    let head = format!(
        "POST /filesystem.Filesystem/{method} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\ncontent-length: {}\r\n\r\n",
        frame.len() + length
    );
    [head.into_bytes(), frame].concat()
}

fn frame(message: &str) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), message.as_bytes()].concat()
}

/// Whether a call that needs a slot ends well, while the calls that hold all slots drip.
fn served_beside(
    dripping: &mut [TcpStream],
    mut drip: impl FnMut(&mut TcpStream),
    call: &[u8],
    daemon: &Daemon,
    ending: &str,
) {
    std::thread::scope(|scope| {
        let newcomer = scope.spawn(|| {
            for number in 0..2 {
                let mut stream = open(daemon);
                stream.write_all(call).unwrap();
                let (mut answer, mut some) = (Vec::new(), [0; 4096]);
                while !String::from_utf8_lossy(&answer).contains(ending) {
                    let read = stream.read(&mut some).expect("it is answered");
                    answer.extend(&some[..read]);
                    assert!(read > 0, "{number}: {}", String::from_utf8_lossy(&answer));
                }
            }
        });
        while !newcomer.is_finished() {
            dripping.iter_mut().for_each(&mut drip);
            std::thread::sleep(Duration::from_millis(50));
        }
        newcomer.join().unwrap();
    });
}

/// Takes a byte of what there is.
fn sip(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let _ = stream.read(&mut [0]);
}

/// What the first of these calls says that was given up.
fn told_why(dripping: Vec<TcpStream>) -> bool {
    dripping.into_iter().any(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).contains("the slowest while another waited")
    })
}

fn copy_call(dir: &Path) -> Vec<u8> {
    std::fs::write(dir.join("small"), "small").unwrap();
    let body = format!(r#"{{"source":"{0}/small","destination":"{0}/copy"}}"#, dir.display());
    let head = format!(
        "POST /filesystem.Filesystem/Copy HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

#[test]
fn archives_that_nobody_takes_make_room() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    // Sparse, and more than lies between the two ends of a connection.
    std::fs::File::create(dir.path().join("large")).unwrap().set_len(256 << 20).unwrap();
    let call = framed("Archive", 0, &format!(r#"{{"path":"{}/large"}}"#, dir.path().display()));
    let mut dripping: Vec<_> = (0..6)
        .map(|_| {
            let mut stream = open(&daemon);
            stream.write_all(&call).unwrap();
            stream
        })
        .collect();
    served_beside(&mut dripping, sip, &copy_call(dir.path()), &daemon, r#""entries":"1""#);
    assert!(told_why(dripping));
}

#[test]
fn extractions_that_drip_make_room() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let start = format!(r#"{{"start":{{"path":"{}/out"}}}}"#, dir.path().display());
    let call = framed("Extract", 1 << 20, &start);
    let mut dripping: Vec<_> = (0..6)
        .map(|_| {
            let mut stream = open(&daemon);
            stream.write_all(&call).unwrap();
            stream
        })
        .collect();
    let drip = |stream: &mut TcpStream| {
        let _ = stream.write_all(&frame(r#"{"data":"AA=="}"#));
    };
    served_beside(&mut dripping, drip, &copy_call(dir.path()), &daemon, r#""entries":"1""#);
    assert!(told_why(dripping));
}

#[test]
fn searches_that_nobody_takes_make_room() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let line = [vec![b'x'; 60_000], b"\n".to_vec()].concat();
    std::fs::write(dir.path().join("large"), line.repeat(500)).unwrap();
    std::fs::write(dir.path().join("small"), "y\n").unwrap();
    let search = |pattern: &str| {
        let message = format!(
            r#"{{"path":"{}","pattern":"{pattern}","maxLineBytes":65536,"maxBytesReturned":"268435456","timeout":"3000s"}}"#,
            dir.path().display()
        );
        framed("Search", 0, &message)
    };
    let call = search("x");
    let mut dripping: Vec<_> = (0..6)
        .map(|_| {
            let mut stream = open(&daemon);
            stream.write_all(&call).unwrap();
            stream
        })
        .collect();
    served_beside(&mut dripping, sip, &search("y"), &daemon, r#""summary""#);
    assert!(told_why(dripping));
}

#[test]
fn uploads_with_a_name_make_room() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let begin = |name: &str| {
        let start = format!(
            r#"{{"start":{{"path":"{}/{name}","uploadId":"{name}"}}}}"#,
            dir.path().display()
        );
        frame(&start)
    };
    let head = |length: usize| {
        format!(
            "POST /filesystem.Filesystem/Write HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+json\r\ncontent-length: {length}\r\n\r\n"
        )
        .into_bytes()
    };
    let whole = |name: &str| {
        let body = [begin(name), frame(r#"{"chunk":{"data":"eA=="}}"#)].concat();
        [head(body.len()), body].concat()
    };
    // Given up by their clients, and more than are kept.
    for number in 0..40 {
        let mut stream = open(&daemon);
        stream.write_all(&whole(&format!("kept-{number}"))).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
    }
    let mut dripping: Vec<_> = (0..32)
        .map(|number| {
            let begun = begin(&format!("drips-{number}"));
            let mut stream = open(&daemon);
            stream.write_all(&[head(begun.len() + (1 << 20)), begun].concat()).unwrap();
            stream
        })
        .collect();
    let drip = |stream: &mut TcpStream| {
        let _ = stream.write_all(&frame(r#"{"chunk":{"data":"eA=="}}"#));
    };
    // Before all have their slot, newcomers are served without an eviction.
    eventually("all are under way", || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        let unnamed = |target: &Path| target.to_string_lossy().ends_with(" (deleted)");
        let below = |target: &Path| target.starts_with(dir.path());
        (targets.filter(|target| below(target) && unnamed(target)).count() >= 32).then_some(())
    });
    served_beside(&mut dripping, drip, &whole("new"), &daemon, r#""received":"#);
    assert!(told_why(dripping));
}
