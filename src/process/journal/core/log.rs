//! A log of bytes in memory, cut into chunks of one channel each.
//!
//! * Offsets count over all channels; chunks are adjacent, and none is empty.
//! * Every chunk costs its length and [`CHUNK_COST`], and short writes are joined, so a process that
//!   writes single bytes cannot make the log larger than its bound.
//! * Readers share the bytes. Short writes are gathered in a block that is cut, not copied, when
//!   somebody reads from it.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::{CHUNK_COST, JOIN_LIMIT, MAX_EVENT};

/// Where output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The pipe of file descriptor 1.
    Stdout,
    /// The pipe of file descriptor 2.
    Stderr,
    /// The terminal.
    Pty,
}

/// Adjacent bytes of one channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where they came from.
    pub channel: Channel,
    /// The offset of the first of them.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

impl Piece {
    /// The offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    /// Those of the bytes that lie at or behind `from` and before `to`.
    pub fn between(&self, from: u64, to: u64) -> Self {
        let len = self.data.len();
        let at = |offset: u64| {
            usize::try_from(offset.saturating_sub(self.offset)).map_or(len, |at| at.min(len))
        };
        let data = self.data.slice(at(from)..at(to).max(at(from)));
        Self { channel: self.channel, offset: self.offset.max(from), data }
    }
}

#[derive(Debug, Default)]
pub(super) struct Log {
    chunks: VecDeque<Chunk>,
    /// Short writes since the last chunk; adjacent to it.
    open: Option<Open>,
    /// The rest of the last block for short writes.
    spare: BytesMut,
    /// The offset of the next byte.
    end: u64,
    /// The cost of everything ever pushed; it wraps, and only differences count.
    pushed: usize,
}

#[derive(Debug)]
struct Chunk {
    piece: Piece,
    /// [`Log::pushed`] before this chunk.
    before: usize,
}

#[derive(Debug)]
struct Open {
    channel: Channel,
    offset: u64,
    before: usize,
    /// Never empty.
    data: BytesMut,
}

impl Log {
    /// The offset of the next byte.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// The offset of the oldest byte; the end when there is none.
    pub(super) fn start(&self) -> u64 {
        match (self.chunks.front(), &self.open) {
            (Some(first), _) => first.piece.offset,
            (None, Some(open)) => open.offset,
            (None, None) => self.end,
        }
    }

    /// What all of it costs.
    pub(super) fn cost(&self) -> usize {
        self.cost_from(self.start())
    }

    /// What it costs to keep everything from `offset` on.
    pub(super) fn cost_from(&self, offset: u64) -> usize {
        let before = match self.index_of(offset) {
            Some(index) => self.chunks.get(index).map(|chunk| chunk.before),
            None => self.open.as_ref().filter(|_| offset < self.end).map(|open| open.before),
        };
        before.map_or(0, |before| self.pushed.wrapping_sub(before))
    }

    pub(super) fn push(&mut self, channel: Channel, data: &Bytes) {
        let offset = self.end;
        self.end += data.len() as u64;
        if let Some(open) = &mut self.open
            && open.channel == channel
            && open.data.len() + data.len() <= JOIN_LIMIT.min(open.data.capacity())
        {
            open.data.extend_from_slice(data);
            self.pushed = self.pushed.wrapping_add(data.len());
            return;
        }
        self.seal();
        let before = self.pushed;
        self.pushed = self.pushed.wrapping_add(data.len() + CHUNK_COST);
        if data.len() < JOIN_LIMIT {
            // Memory of its own: a part of the reader's block would keep all of that.
            let mut block = std::mem::take(&mut self.spare);
            if block.capacity() < data.len() {
                block = BytesMut::with_capacity(JOIN_LIMIT);
            }
            block.extend_from_slice(data);
            self.open = Some(Open { channel, offset, before, data: block });
        } else {
            let piece = Piece { channel, offset, data: data.clone() };
            self.chunks.push_back(Chunk { piece, before });
        }
    }

    /// Makes a chunk of the short writes.
    fn seal(&mut self) {
        if let Some(Open { channel, offset, before, mut data }) = self.open.take() {
            let piece = Piece { channel, offset, data: data.split().freeze() };
            self.chunks.push_back(Chunk { piece, before });
            self.spare = data;
        }
    }

    /// The end of the oldest chunk.
    pub(super) fn first_end(&mut self) -> Option<u64> {
        if self.chunks.is_empty() {
            self.seal();
        }
        self.chunks.front().map(|first| first.piece.end())
    }

    /// Drops the oldest chunk.
    pub(super) fn drop_first(&mut self) {
        if self.chunks.is_empty() {
            self.seal();
        }
        self.chunks.pop_front();
    }

    /// What lies at `offset`: adjacent bytes of one channel before `limit`, at most `max` of them,
    /// or `None` when nothing does.
    pub(super) fn read(&mut self, offset: u64, limit: u64, max: usize) -> Option<Piece> {
        let max = max.min(MAX_EVENT);
        let limit = limit.min(offset.saturating_add(max as u64));
        if offset >= limit.min(self.end) {
            return None;
        }
        if self.open.as_ref().is_some_and(|open| open.offset < limit) {
            self.seal();
        }
        let index = self.index_of(offset)?;
        let first = &self.chunks.get(index)?.piece;
        let channel = first.channel;
        let mut data = first.between(offset, limit).data;
        let mut joined = BytesMut::new();
        for chunk in self.chunks.range(index + 1..) {
            let piece = &chunk.piece;
            let so_far = data.len().max(joined.len());
            if piece.channel != channel || piece.offset >= limit || so_far >= max {
                break;
            }
            if joined.is_empty() {
                joined.extend_from_slice(&data);
            }
            joined.extend_from_slice(&piece.between(offset, limit).data);
        }
        if !joined.is_empty() {
            data = joined.freeze();
        }
        Some(Piece { channel, offset, data })
    }

    /// The index of the chunk that holds the byte at `offset`.
    fn index_of(&self, offset: u64) -> Option<usize> {
        let index = self.chunks.partition_point(|chunk| chunk.piece.offset <= offset);
        let index = index.checked_sub(1)?;
        (offset < self.chunks.get(index)?.piece.end()).then_some(index)
    }
}
