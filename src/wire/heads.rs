//! Charges the heads of requests to the memory of requests that have not shown the token.
//!
//! A head may have 128 KiB, and hyper buffers it whole before anybody sees it. So each connection counts the
//! bytes of the head that is coming in: for HTTP/1.1 what comes while no call runs, for HTTP/2 the frames of
//! a header block. The first [`FREE_HEAD`] bytes cost nothing; for more the connection borrows, and is
//! closed when there is nothing left. A head that has been answered by a call with the token costs nothing.

use std::io;

use parking_lot::Mutex;

use super::budget::{Budget, Share};

/// What every connection may hold of a head without borrowing.
pub(super) const FREE_HEAD: usize = 8 << 10;
/// hyper's buffer doubles as it grows.
const GROWTH: usize = 2;

/// HEADERS, CONTINUATION and END_HEADERS of RFC 9113, sections 6.2 and 6.10.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// The length of a frame's own head.
const FRAME_HEAD: usize = 9;

/// What the head that is coming in has taken.
#[derive(Debug)]
pub(super) struct Heads(Mutex<State>);

#[derive(Debug)]
struct State {
    share: Share,
    bytes: usize,
    frames: Option<Frames>,
}

/// Where a stream of HTTP/2 frames stands.
#[derive(Debug, Default)]
struct Frames {
    /// Of the head of the next frame, what has come.
    head: Vec<u8>,
    /// Bytes that are still to come of the payload.
    payload: usize,
    /// Whether that is a part of a header block, and its last one.
    block: bool,
    last: bool,
}

impl Heads {
    pub(super) fn new(budget: &Budget) -> Self {
        Self(Mutex::new(State { share: budget.share(), bytes: 0, frames: None }))
    }

    /// From now on what comes are HTTP/2 frames, behind the client's preface.
    pub(super) fn http2(&self) {
        self.0.lock().frames = Some(Frames::default());
    }

    /// Counts what has come; `in_head` says that on HTTP/1.1 it belongs to a head.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn came(&self, bytes: &[u8], in_head: bool) -> io::Result<()> {
        let mut state = self.0.lock();
        let state = &mut *state;
        match &mut state.frames {
            Some(frames) => state.bytes = frames.came(bytes, state.bytes),
            None if in_head => state.bytes += bytes.len(),
            None => return Ok(()),
        }
        let wanted = if state.bytes > FREE_HEAD { GROWTH * state.bytes } else { 0 };
        // On HTTP/1.1 the buffer stays as large as it was.
        if wanted > state.share.held() || state.frames.is_some() {
            state.share.hold(wanted).map_err(|_| {
                io::Error::new(io::ErrorKind::OutOfMemory, "too much is held by heads of requests")
            })?;
        }
        Ok(())
    }

    /// A call has begun, with a head of this size. What came with it is its body, or the next request,
    /// and costs nothing here. True when the connection should close behind the answer, because its buffer
    /// is large and stays.
    pub(super) fn ended(&self, head_bytes: usize) -> bool {
        let mut state = self.0.lock();
        if state.frames.is_some() {
            return false;
        }
        let large = head_bytes > FREE_HEAD;
        if !large {
            // To hold nothing cannot fail.
            let _ = state.share.hold(0);
        }
        state.bytes = 0;
        large
    }

    /// The caller has shown the token.
    pub(super) fn proven(&self) {
        // To hold nothing cannot fail.
        let _ = self.0.lock().share.hold(0);
    }
}

impl Frames {
    /// The bytes of the header block that is coming in, which were `held` before.
    fn came(&mut self, mut bytes: &[u8], mut held: usize) -> usize {
        while !bytes.is_empty() {
            if self.payload == 0 {
                let missing = FRAME_HEAD - self.head.len();
                let (taken, rest) = bytes.split_at(missing.min(bytes.len()));
                self.head.extend_from_slice(taken);
                bytes = rest;
                let [a, b, c, kind, flags, ..] = self.head[..] else { break };
                if self.head.len() < FRAME_HEAD {
                    break;
                }
                self.head.clear();
                self.payload = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.block = matches!(kind, HEADERS | CONTINUATION);
                self.last = flags & END_HEADERS != 0;
            } else {
                let some = self.payload.min(bytes.len());
                self.payload -= some;
                bytes = bytes.get(some..).unwrap_or_default();
                if self.block {
                    held += some;
                }
            }
            if self.payload == 0 && self.block && self.last {
                held = 0;
            }
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let length = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.resize(FRAME_HEAD + usize::try_from(u32::from_be_bytes(length)).unwrap(), 0);
        frame
    }

    #[test]
    fn header_blocks_count_however_they_are_cut() {
        let stream = [
            frame(4, 0, 0),
            frame(HEADERS, 0, 1000),
            frame(CONTINUATION, 0, 10),
            frame(CONTINUATION, END_HEADERS, 5),
            frame(0, 1, 70_000),
            frame(HEADERS, 0, 300),
        ]
        .concat();
        for cut in [1, 7, 9, 100, 5000, stream.len()] {
            let (mut frames, mut held, mut most) = (Frames::default(), 0, 0);
            for piece in stream.chunks(cut) {
                held = frames.came(piece, held);
                most = most.max(held);
            }
            assert_eq!(held, 300, "{cut}");
            assert!(cut > 1000 || most >= 900, "{cut}: {most}");
        }
    }

    #[test]
    fn many_large_heads_do_not_fit() {
        let budget = Budget::undivided(1 << 20);
        let piece = vec![b'x'; 100 << 10];
        let mut held = Vec::new();
        let refused = loop {
            let heads = Heads::new(&budget);
            match heads.came(&piece, true) {
                Ok(()) => held.push(heads),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(held.len(), 5);
        held[0].proven();
        Heads::new(&budget).came(&piece, true).unwrap();
        Heads::new(&budget).came(&piece[..FREE_HEAD], true).unwrap();
        assert!(held[1].ended(FREE_HEAD + 1));
        // The rest of what came was a body.
        assert!(!held[2].ended(100));
        Heads::new(&budget).came(&piece, false).unwrap();
    }
}
