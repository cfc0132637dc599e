//! The bytes of an archive on their way to tar: bounded, and decompressed.

use std::{
    cell::Cell,
    io::{self, BufRead, Read},
    rc::Rc,
};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::fs::archive::Compression;

/// The largest window of Zstandard: what a decoder has to hold. `zstd -19` makes 8 MiB.
pub const MAX_ZSTD_WINDOW: u64 = 32 << 20;

/// What bzip2 data goes on with behind its first four bytes: a block, or the end.
const BZIP2_BLOCKS: [&[u8]; 2] = [b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90"];

/// How an archive is compressed, by its first bytes.
///
/// # Errors
/// In a way that is not known here, or the input cannot be read.
pub(super) fn guess(input: &mut impl BufRead) -> io::Result<Compression> {
    let unsupported = |name: &str| {
        let text = format!("compression not supported: {name}; supported are gzip and Zstandard");
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    };
    Ok(match input.fill_buf()? {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        // A tar may begin with a file of that name, but not of that and these bytes.
        [b'B', b'Z', b'h', b'1'..=b'9', rest @ ..]
            if BZIP2_BLOCKS
                .iter()
                .any(|block| rest.starts_with(block) || block.starts_with(rest)) =>
        {
            return unsupported("bzip2");
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return unsupported("xz"),
        [0x5d, 0, 0, _, _, ..] => return unsupported("lzma"),
        [0x1f, 0x9d, ..] => return unsupported("compress"),
        [0x04, 0x22, 0x4d, 0x18, ..] => return unsupported("lz4"),
        _ => Compression::None,
    })
}

/// Lets no more bytes pass than are allowed.
pub(super) struct Bounded<R> {
    pub(super) input: R,
    pub(super) allowance: Rc<Cell<u64>>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowed = self.allowance.get();
        if allowed == u64::MAX {
            return self.input.read(buffer);
        }
        if allowed == 0 {
            return Err(io::Error::other("names and attributes of an entry are too long"));
        }
        let most = usize::try_from(allowed).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.input.read(buffer.get_mut(..most).unwrap_or_default())?;
        self.allowance.set(allowed - read as u64);
        Ok(read)
    }
}

/// Any number of frames of Zstandard.
pub(super) enum Zstd<R: BufRead> {
    Between(Option<R>),
    In(Option<Box<StreamingDecoder<R, FrameDecoder>>>),
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self {
                Self::Between(input) => {
                    let Some(mut rest) = input.take() else { return Ok(0) };
                    if rest.fill_buf()?.is_empty() {
                        *input = Some(rest);
                        return Ok(0);
                    }
                    let decoder = StreamingDecoder::new_with_max_window_size(rest, MAX_ZSTD_WINDOW)
                        .map_err(|error| io::Error::other(error.to_string()))?;
                    *self = Self::In(Some(Box::new(decoder)));
                }
                Self::In(decoder) => {
                    let Some(mut frame) = decoder.take() else { return Ok(0) };
                    let read = frame.read(buffer)?;
                    if read > 0 {
                        *decoder = Some(frame);
                        return Ok(read);
                    }
                    let (rest, frame) = frame.into_parts();
                    let told = frame.get_checksum_from_data();
                    if told.is_some() && told != frame.get_calculated_checksum() {
                        return Err(io::Error::other("the checksum of a Zstandard frame is wrong"));
                    }
                    *self = Self::Between(Some(rest));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_are_known_by_their_first_bytes() {
        let of = |mut bytes: &[u8]| guess(&mut bytes).map_err(|error| error.to_string());
        assert_eq!(of(b"\x1f\x8b\x08"), Ok(Compression::Gzip));
        assert_eq!(of(b"\x28\xb5\x2f\xfd\0"), Ok(Compression::Zstd));
        for tar in [&b""[..], b"name\0\0", b"BZh9/name\0\0\0", b"BZhx"] {
            assert_eq!(of(tar), Ok(Compression::None));
        }
        for (bytes, name) in [
            (&b"BZh91AY&SY\x01"[..], "bzip2"),
            (b"BZh6", "bzip2"),
            (b"\xfd7zXZ\0\0\x04", "xz"),
            (b"\x5d\0\0\x80\0\xff", "lzma"),
        ] {
            let text = of(bytes).unwrap_err();
            assert!(text.starts_with(&format!("compression not supported: {name};")), "{text}");
        }
    }
}
