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
/// How an archive is compressed, by its first bytes.
pub(super) fn guess(input: &mut impl BufRead) -> io::Result<Compression> {
    Ok(match input.fill_buf()? {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
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
