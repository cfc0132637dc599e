//! HTTP/1.1 by hand, for what no well-behaved client does: stopping in the middle, not reading,
//! reading slowly.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Daemon, soon};

/// One connection.
pub struct Raw {
    stream: TcpStream,
    /// What was read and not yet taken.
    buffer: Vec<u8>,
    /// The most that one read takes.
    pub at_once: usize,
}

/// A whole response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The lines of the head, names in lower case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Raw {
    pub async fn open(daemon: &Daemon) -> Self {
        let stream = soon("connecting", TcpStream::connect(daemon.tcp())).await.unwrap();
        Self { stream, buffer: Vec::new(), at_once: 64 << 10 }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        soon("sending", self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    /// Sends a piece of a chunked body.
    pub async fn send_chunk(&mut self, bytes: &[u8]) {
        self.send(format!("{:x}\r\n", bytes.len())).await;
        self.send(bytes).await;
        self.send("\r\n").await;
    }

    /// Reads a little more; false at the end.
    async fn more(&mut self) -> bool {
        let mut piece = vec![0; self.at_once];
        let read = soon("reading", self.stream.read(&mut piece)).await.unwrap();
        self.buffer.extend_from_slice(&piece[..read]);
        read > 0
    }

    /// Everything to the end of `mark`.
    pub async fn until(&mut self, mark: &[u8]) -> Vec<u8> {
        loop {
            let found = self.buffer.windows(mark.len()).position(|window| window == mark);
            if let Some(start) = found {
                return self.buffer.drain(..start + mark.len()).collect();
            }
            let so_far = String::from_utf8_lossy(&self.buffer).into_owned();
            assert!(self.more().await, "the connection ended after {so_far:?}");
        }
    }

    async fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert!(self.more().await, "the connection ended early");
        }
        self.buffer.drain(..length).collect()
    }

    /// The status and head of the response, names in lower case.
    pub async fn head(&mut self) -> (u16, String) {
        let head = String::from_utf8(self.until(b"\r\n\r\n").await).unwrap();
        let status = head.split(' ').nth(1).expect("a status line").parse().unwrap();
        let lines = head.lines().skip(1).map(|line| match line.split_once(':') {
            Some((name, value)) => format!("{}:{value}\n", name.to_ascii_lowercase()),
            None => String::new(),
        });
        (status, lines.collect())
    }

    /// The next piece of a chunked body; `None` at its end.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = String::from_utf8(self.until(b"\r\n").await).unwrap();
        let length = usize::from_str_radix(line.trim(), 16).unwrap();
        let piece = self.exactly(length).await;
        self.until(b"\r\n").await;
        (length > 0).then_some(piece)
    }

    /// The whole response.
    pub async fn answer(&mut self) -> Answer {
        let (status, head) = self.head().await;
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
        let mut body = Vec::new();
        if let Some(length) = field("content-length:") {
            body = self.exactly(length.trim().parse().unwrap()).await;
        } else if field("transfer-encoding:").is_some() {
            while let Some(piece) = self.chunk().await {
                body.extend_from_slice(&piece);
            }
        }
        Answer { status, head, body }
    }
}
