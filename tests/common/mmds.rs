//! A metadata service as Firecracker has it, for one daemon.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};

/// What it says can be changed; it ends with the tests.
pub struct Mmds {
    address: SocketAddr,
    document: Arc<Mutex<Option<Value>>>,
    asked: Arc<AtomicUsize>,
    silent: Arc<AtomicBool>,
}

impl Mmds {
    /// One that says nothing yet: its document is not JSON.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let document = Arc::new(Mutex::new(None));
        let asked = Arc::new(AtomicUsize::new(0));
        let silent = Arc::new(AtomicBool::new(false));
        std::thread::spawn({
            let (document, asked) = (Arc::clone(&document), Arc::clone(&asked));
            let silent = Arc::clone(&silent);
            move || {
                let mut unanswered = Vec::new();
                for stream in listener.incoming().map_while(Result::ok) {
                    if silent.load(Ordering::Relaxed) {
                        unanswered.push(stream);
                        continue;
                    }
                    let document = document.lock().unwrap().clone();
                    answer(stream, document.as_ref(), &asked);
                }
            }
        });
        Self { address, document, asked, silent }
    }

    /// The flag that leads a daemon to it.
    pub fn flag(&self) -> String {
        format!("--mmds={}", self.address)
    }

    /// How often the document was asked for.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// From now on it accepts connections and answers none, or answers again.
    pub fn be_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    pub fn say(&self, sandbox: &str, hash: &str) {
        let document = json!({
            "instanceID": sandbox, "envID": format!("template-of-{sandbox}"),
            "address": "http://127.0.0.1:1", "accessTokenHash": hash,
        });
        *self.document.lock().unwrap() = Some(document);
    }
}

fn answer(mut stream: TcpStream, document: Option<&Value>, asked: &AtomicUsize) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let body = if head.starts_with("put /latest/api/token ") {
        assert!(head.contains("x-metadata-token-ttl-seconds: 60"), "{head}");
        "the-token".to_owned()
    } else {
        asked.fetch_add(1, Ordering::Relaxed);
        assert!(head.starts_with("get / "), "{head}");
        assert!(head.contains("x-metadata-token: the-token"), "{head}");
        assert!(head.contains("accept: application/json"), "{head}");
        document.map_or_else(|| "?".to_owned(), Value::to_string)
    };
    let length = body.len();
    let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
}
