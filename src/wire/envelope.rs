//! Envelopes: one flag byte, a big-endian `u32` length, then that many bytes of message. gRPC,
//! gRPC-Web and Connect streams share them; they differ in what the upper flags mean.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compression, bufread::GzDecoder, write::GzEncoder};
use std::io::{Read, Write};
use tonic::Status;

/// Bytes before the message.
pub const HEADER_BYTES: usize = 5;
/// Flag: the message is compressed.
pub const COMPRESSED: u8 = 0x01;
/// Flag of Connect: the envelope ends the stream and carries its outcome as JSON.
pub const END_STREAM: u8 = 0x02;
/// Flag of gRPC-Web: the envelope carries the trailers.
pub const TRAILERS: u8 = 0x80;

/// Messages below this size are sent as they are though the client accepts gzip: compressing them
/// costs more than it saves.
pub const MIN_COMPRESSED_BYTES: usize = 256;

/// A compression of messages. Only gzip exists, as upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Messages as they are.
    Identity,
    /// RFC 1952.
    Gzip,
}

impl Encoding {
    /// The encoding of request messages named by a header.
    ///
    /// # Errors
    /// `unimplemented`, naming it, for any but `gzip` and `identity`.
    pub fn of_request(name: &str) -> Result<Self, Status> {
        match name {
            "" | "identity" => Ok(Self::Identity),
            "gzip" => Ok(Self::Gzip),
            other => Err(Status::unimplemented(format!(
                "unknown compression \"{other}\": supported encodings are gzip"
            ))),
        }
    }

    /// The encoding to answer in, from the list of what the client accepts. Names must match
    /// exactly, so that `gzip;q=0` is no gzip.
    pub fn of_response<'a>(accepted: impl Iterator<Item = &'a str>) -> Self {
        let mut names = accepted.flat_map(|list| list.split(','));
        if names.any(|name| name.trim() == "gzip") { Self::Gzip } else { Self::Identity }
    }
}

/// One envelope taken from a stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The flag byte.
    pub flags: u8,
    /// The message.
    pub message: Bytes,
}

/// Cuts a stream of bytes into envelopes, none longer than the limit.
#[derive(Debug)]
pub struct Splitter {
    buffer: BytesMut,
    limit: usize,
}

impl Splitter {
    /// A splitter for messages of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { buffer: BytesMut::new(), limit }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The bytes that were added and not taken yet.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Whether the next envelope has come whole, and is compressed or larger than this.
    pub fn next_is_expensive(&self, large: usize) -> bool {
        self.header().is_some_and(|(flags, length)| {
            let whole = length <= self.limit && self.buffer.len() >= HEADER_BYTES + length;
            whole && (length > large || flags & COMPRESSED != 0)
        })
    }

    /// Takes the next whole envelope, if it has come.
    ///
    /// # Errors
    /// `resource_exhausted` as soon as an envelope announces more than the limit.
    pub fn take(&mut self) -> Result<Option<Envelope>, Status> {
        let Some((flags, length)) = self.header() else {
            return Ok(None);
        };
        if length > self.limit {
            return Err(too_large(length, self.limit));
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some(Envelope { flags, message: self.buffer.split_to(length).freeze() }))
    }

    /// Says whether the stream may end here.
    ///
    /// # Errors
    /// `invalid_argument` in the middle of an envelope.
    pub fn end(&self) -> Result<(), Status> {
        match self.header() {
            None if self.buffer.is_empty() => Ok(()),
            None => {
                Err(Status::invalid_argument("protocol error: incomplete envelope: unexpected EOF"))
            }
            Some((_, promised)) => Err(Status::invalid_argument(format!(
                "protocol error: promised {promised} bytes in enveloped message, got {} bytes",
                self.buffer.len() - HEADER_BYTES
            ))),
        }
    }

    fn header(&self) -> Option<(u8, usize)> {
        let mut header = self.buffer.get(..HEADER_BYTES)?;
        Some((header.get_u8(), header.get_u32() as usize))
    }
}

/// The error for a message over the limit.
pub fn too_large(bytes: usize, limit: usize) -> Status {
    Status::resource_exhausted(format!(
        "message size {bytes} is larger than the configured maximum of {limit} bytes"
    ))
}

/// Puts a message into an envelope.
pub fn wrap(flags: u8, message: &[u8]) -> Bytes {
    let mut envelope = BytesMut::with_capacity(HEADER_BYTES + message.len());
    envelope.extend_from_slice(&header(flags, message.len()));
    envelope.extend_from_slice(message);
    envelope.freeze()
}

/// The header of an envelope. Lengths above `u32::MAX` cannot occur: messages are limited below.
pub fn header(flags: u8, length: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let mut rest = &mut header[..];
    rest.put_u8(flags);
    rest.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    header
}

/// How much is decompressed before it is asked whether there is room for more, at least.
const DECOMPRESSED_PIECE: usize = 64 << 10;

/// Takes a message out of its compression.
///
/// # Errors
/// `invalid_argument` for bytes that are no gzip; `resource_exhausted` when they grow beyond the
/// limit, however small they came; and what `hold` says, which is told of each size before it is reached.
pub fn decompress(
    message: &[u8],
    limit: usize,
    mut hold: impl FnMut(usize) -> Result<(), Status>,
) -> Result<Bytes, Status> {
    let mut plain = Vec::new();
    let mut decoder = GzDecoder::new(message);
    loop {
        let piece =
            DECOMPRESSED_PIECE.max(plain.len()).min((limit - plain.len()).saturating_add(1));
        hold(plain.len() + piece)?;
        let piece = u64::try_from(piece).unwrap_or(u64::MAX);
        let read = (&mut decoder).take(piece).read_to_end(&mut plain).map_err(|error| {
            Status::invalid_argument(format!("decompress: message is not valid gzip: {error}"))
        })?;
        if plain.len() > limit {
            return Err(Status::resource_exhausted(format!(
                "message size after decompression is larger than the configured maximum of {limit} bytes"
            )));
        }
        if (read as u64) < piece {
            return Ok(plain.into());
        }
    }
}

/// Compresses a message, fast rather than small.
pub fn compress(message: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(message.len() / 2), Compression::fast());
    match encoder.write_all(message).and_then(|()| encoder.finish()) {
        Ok(bytes) => bytes.into(),
        // Writing to a Vec cannot fail; the type says otherwise.
        Err(_) => Bytes::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tonic::Code;

    #[test]
    fn announced_length_over_the_limit_is_refused_before_it_comes() {
        let mut splitter = Splitter::new(10);
        splitter.push(&header(0, 11));
        assert_eq!(splitter.take().unwrap_err().code(), Code::ResourceExhausted);
    }

    #[test]
    fn truncated_streams_are_told_apart() {
        let mut splitter = Splitter::new(10);
        splitter.end().unwrap();
        splitter.push(&[0, 0]);
        assert!(splitter.end().unwrap_err().message().contains("unexpected EOF"));
        splitter.push(&[0, 0, 4, b'x']);
        assert!(splitter.end().unwrap_err().message().contains("promised 4 bytes"));
    }

    #[test]
    fn a_small_bomb_is_stopped_at_the_limit() {
        let bomb = compress(&vec![0; 1 << 20]);
        assert!(bomb.len() < 8 << 10);
        let free = |_| Ok(());
        assert_eq!(decompress(&bomb, 1 << 10, free).unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!(decompress(&bomb, 1 << 20, free).unwrap().len(), 1 << 20);
        assert_eq!(decompress(b"nonsense", 10, free).unwrap_err().code(), Code::InvalidArgument);
        let little = |bytes| match bytes > 512 << 10 {
            true => Err(Status::unavailable("no memory")),
            false => Ok(()),
        };
        assert_eq!(decompress(&bomb, 1 << 20, little).unwrap_err().code(), Code::Unavailable);
    }

    proptest! {
        #[test]
        fn envelopes_survive_any_cutting(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..8),
            cuts in prop::collection::vec(1_usize..20, 1..50),
        ) {
            let stream: Vec<u8> =
                messages.iter().flat_map(|m| wrap(COMPRESSED, m).to_vec()).collect();
            let (mut splitter, mut rest, mut seen) = (Splitter::new(50), &stream[..], Vec::new());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                splitter.push(now);
                rest = later;
                while let Some(envelope) = splitter.take().unwrap() {
                    prop_assert_eq!(envelope.flags, COMPRESSED);
                    seen.push(envelope.message.to_vec());
                }
            }
            prop_assert!(splitter.end().is_ok());
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut splitter = Splitter::new(64);
            splitter.push(&bytes);
            while let Ok(Some(envelope)) = splitter.take() {
                let _ = decompress(&envelope.message, 64, |_| Ok(()));
            }
            let _ = splitter.end();
        }

        #[test]
        fn compression_round_trip(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(decompress(&compress(&bytes), 5000, |_| Ok(())).unwrap(), bytes);
        }
    }
}
