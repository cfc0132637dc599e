//! The part of a journal that is on disk: the oldest, in segments that are dropped as a whole.
//!
//! A segment is a file that is open only while it is read or written ([`super::spill_dir`]), so that a
//! journal holds no descriptor. It holds records: a byte for the channel, four for the length
//! (little-endian), and the bytes. An index in memory tells where to begin, with an entry for every
//! [`INDEX_STEP`] bytes. All work on files is done in a pool for it.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;

use super::{
    Channel, Disk, Piece,
    core::{MAX_EVENT, SPILL_BATCH},
    spill_dir::SpillFile,
};

/// A segment is this part of what may be on disk.
const SEGMENTS: u64 = 8;
/// The largest segment.
const MAX_SEGMENT: u64 = 64 * 1024 * 1024;
/// How far apart entries of the index are, in bytes of the file.
const INDEX_STEP: usize = 32 * 1024;
/// Channel and length.
const HEAD: usize = 5;
/// What one look into a file reads. A record that begins within a step of the index is in it.
const LOOK: usize = INDEX_STEP + 2 * (HEAD + MAX_EVENT);

const _: () = assert!(LOOK < 2 * SPILL_BATCH);

#[derive(Debug)]
pub(super) struct Spill {
    disk: Disk,
    capacity: u64,
    segments: Mutex<VecDeque<Segment>>,
}

#[derive(Debug, Clone)]
struct Segment {
    file: Arc<SpillFile>,
    /// The offsets of the first byte and of the one behind the last.
    start: u64,
    end: u64,
    /// The size of the file.
    size: u64,
    /// Offsets of records and where they begin in the file.
    index: Vec<(u64, u64)>,
}

impl Spill {
    /// Nothing so far, of `capacity` bytes.
    pub(super) fn new(disk: Disk, capacity: u64) -> Self {
        Self { disk, capacity, segments: Mutex::default() }
    }

    /// The offset behind what is on disk.
    pub(super) fn end(&self) -> u64 {
        self.segments.lock().back().map_or(0, |last| last.end)
    }

    /// Puts adjacent pieces behind those that are there. One call at a time.
    pub(super) async fn write(&self, pieces: Vec<Piece>) -> io::Result<()> {
        let Some(start) = pieces.first().map(|first| first.offset) else { return Ok(()) };
        let full = (self.capacity / SEGMENTS).clamp(1, MAX_SEGMENT);
        // A segment has no holes; what was dropped from memory leaves one.
        let fits = |last: &&Segment| last.size < full && last.end == start;
        let last = self.segments.lock().back().filter(fits).cloned();
        let dir = Arc::clone(&self.disk.dir);
        let written = self.disk.pool.run_next_step(move || {
            let (mut segment, opened) = match last {
                Some(last) => {
                    let opened = last.file.open()?;
                    (last, opened)
                }
                None => {
                    let (file, opened) = dir.create()?;
                    let file = Arc::new(file);
                    (Segment { file, start, end: start, size: 0, index: Vec::new() }, opened)
                }
            };
            segment.append(&opened, &pieces)?;
            Ok::<_, io::Error>(segment)
        });
        let segment = written.await.map_err(io::Error::other)??;
        let mut segments = self.segments.lock();
        match segments.back_mut() {
            Some(last) if last.start == segment.start => *last = segment,
            _ => segments.push_back(segment),
        }
        Ok(())
    }

    /// Drops the oldest segments beyond the capacity, as far as they lie before `droppable`. Returns
    /// the offset of the oldest byte.
    pub(super) fn trim(&self, droppable: u64) -> u64 {
        let mut segments = self.segments.lock();
        let mut size: u64 = segments.iter().map(|segment| segment.size).sum();
        let mut dropped = Vec::new();
        while size > self.capacity
            && segments.len() > 1
            && let Some(first) = segments.pop_front_if(|first| first.end <= droppable)
        {
            size -= first.size;
            dropped.push(first);
        }
        let oldest = segments.front().map_or(0, |first| first.start);
        drop(segments);
        if !dropped.is_empty() {
            // To remove a large file takes time.
            self.disk.pool.run_later(move || drop(dropped));
        }
        oldest
    }

    /// Blocks: drops all that is on disk, except what is being read.
    pub(super) fn clear(&self) {
        let dropped = std::mem::take(&mut *self.segments.lock());
        drop(dropped);
    }

    /// Whether there is anything on disk.
    pub(super) fn is_used(&self) -> bool {
        !self.segments.lock().is_empty()
    }

    /// Blocks: asks for room on disk, or descriptors; whether there is more now.
    pub(super) async fn relieve(&self, error: &io::Error) -> bool {
        let (relief, errno) = (Arc::clone(&self.disk.relief), error.raw_os_error());
        let relieved = self.disk.pool.run_next_step(move || relief.relieve(errno));
        relieved.await.unwrap_or(false)
    }

    /// Where what is on disk goes on behind `from`, which is not there; `to` when it does not
    /// before.
    pub(super) fn next_after(&self, from: u64, to: u64) -> u64 {
        let segments = self.segments.lock();
        let next = segments.iter().map(|segment| segment.start).find(|start| *start > from);
        next.map_or(to, |next| next.min(to))
    }

    /// The bytes from `from` and before `to`, some of them, as adjacent pieces; none when they are
    /// not there.
    pub(super) async fn read(&self, from: u64, to: u64) -> io::Result<Vec<Piece>> {
        let segment = {
            let segments = self.segments.lock();
            let holds = |segment: &&Segment| (segment.start..segment.end).contains(&from);
            segments.iter().find(holds).cloned()
        };
        let Some(segment) = segment else { return Ok(Vec::new()) };
        let read = self.disk.pool.run_next_step(move || segment.read(from, to));
        read.await.map_err(io::Error::other)?
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        let dropped = std::mem::take(self.segments.get_mut());
        if !dropped.is_empty() {
            self.disk.pool.run_later(move || drop(dropped));
        }
    }
}

impl Segment {
    fn append(&mut self, file: &File, pieces: &[Piece]) -> io::Result<()> {
        let mut records = Vec::new();
        let mut index = Vec::new();
        let mut indexed = self.index.last().map_or(0, |(_, position)| *position);
        let mut end = self.end;
        for piece in pieces {
            let position = self.size + records.len() as u64;
            if position == 0 || position - indexed >= INDEX_STEP as u64 {
                index.push((piece.offset, position));
                indexed = position;
            }
            let length = u32::try_from(piece.data.len()).map_err(io::Error::other)?;
            records.push(number(piece.channel));
            records.extend_from_slice(&length.to_le_bytes());
            records.extend_from_slice(&piece.data);
            end = piece.end();
        }
        file.write_all_at(&records, self.size)?;
        self.size += records.len() as u64;
        self.end = end;
        self.index.append(&mut index);
        Ok(())
    }

    fn read(&self, from: u64, to: u64) -> io::Result<Vec<Piece>> {
        let entry = self.index.partition_point(|(offset, _)| *offset <= from).saturating_sub(1);
        let Some(&(mut offset, position)) = self.index.get(entry) else { return Ok(Vec::new()) };
        let rest = usize::try_from(self.size - position).unwrap_or(LOOK);
        let mut block = vec![0; rest.min(LOOK)];
        self.file.open()?.read_exact_at(&mut block, position)?;
        let mut block = Bytes::from(block);
        let mut pieces = Vec::new();
        while let Some((channel, data)) = record(&mut block) {
            let begin = offset;
            offset += data.len() as u64;
            if offset <= from {
                continue;
            }
            if begin >= to {
                break;
            }
            let piece = Piece { channel, offset: begin, data };
            pieces.push(piece.between(from, to));
        }
        Ok(pieces)
    }
}

/// The next record, if the block holds all of it.
fn record(block: &mut Bytes) -> Option<(Channel, Bytes)> {
    let mut head = block.get(..HEAD)?;
    let channel = channel(head.get_u8())?;
    let length = usize::try_from(head.get_u32_le()).ok()?;
    if block.len() < HEAD + length {
        return None;
    }
    block.advance(HEAD);
    Some((channel, block.split_to(length)))
}

fn number(channel: Channel) -> u8 {
    match channel {
        Channel::Stdout => 1,
        Channel::Stderr => 2,
        Channel::Pty => 3,
    }
}

fn channel(number: u8) -> Option<Channel> {
    [Channel::Stdout, Channel::Stderr, Channel::Pty]
        .into_iter()
        .find(|channel| self::number(*channel) == number)
}
