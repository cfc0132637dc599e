//! Searching a tree by name and by content, on the crates that ripgrep is made of.
//!
//! Names are matched by `globset` and `ignore`, content by `grep-searcher` and `grep-regex`, whose
//! time is linear in what they read. The walk is our own (`walk`): the one of `ignore` goes by paths,
//! so that a directory which is replaced by a link at the right moment leads it out of the tree, and
//! it starts threads of its own. Here each step is relative to a directory that is held open.
//!
//! One search runs on two threads at most: the walker finds files and searches them itself whenever
//! its helper is behind. Time, matches, and bytes read and returned are bounded ([`Query`]), and when
//! nobody listens any more it stops before the next read.

mod content;
mod query;
mod rules;
mod run;
#[cfg(test)]
mod tests;
mod walk;

pub use self::{
    content::{MAX_LINE_IN_MEMORY, MAX_RANGES},
    query::{
        DEFAULT_BYTES_READ, DEFAULT_BYTES_RETURNED, DEFAULT_LINE_BYTES, DEFAULT_MATCHES,
        DEFAULT_TIMEOUT, MAX_BYTES_RETURNED, MAX_CONTEXT, MAX_GLOB_BYTES, MAX_GLOBS,
        MAX_LINE_BYTES, MAX_MATCHES, MAX_PATTERN_BYTES, MAX_REGEX_BYTES, MAX_TIMEOUT, Query,
        SearchError, SearchOptions,
    },
    rules::MAX_IGNORE_FILE_BYTES,
    run::{MAX_QUEUED_FILES, MAX_WAITING_MATCHES, Search, start},
    walk::MAX_DEPTH,
};
use super::entry::{Entry, EntryKind};
use crate::blocking::MountBusy;

/// What a search tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A line, or a name.
    Match(Match),
    /// The end.
    Summary(Summary),
    /// The end, without a summary: a mount in the tree does not answer.
    Failed(MountBusy),
}

impl Found {
    /// The bytes of its path and line.
    fn bytes(&self) -> usize {
        match self {
            Self::Match(found) => {
                found.path.len() + found.line.as_ref().map_or(0, |line| line.bytes.len())
            }
            Self::Summary(_) | Self::Failed(_) => 0,
        }
    }
}

/// A line that matches, a line around it, or a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The path that was asked for, and the one below it.
    pub path: String,
    /// What it is; of a link, [`EntryKind::Other`].
    pub kind: EntryKind,
    /// None when the search is by name.
    pub line: Option<Line>,
    /// If it was asked for and could be read.
    pub entry: Option<Box<Entry>>,
}

/// One line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// From 1.
    pub number: u64,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// What it holds, without the line feed.
    pub bytes: Vec<u8>,
    /// Whether it was longer.
    pub truncated: bool,
    /// Whether nothing matches in it.
    pub context: bool,
    /// Where the pattern matches.
    pub ranges: Vec<(usize, usize)>,
}

/// How a search ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Without lines of context.
    pub matches: u64,
    /// Files whose content was searched, or names that were looked at.
    pub searched: u64,
    /// Bytes of files that were read.
    pub bytes_read: u64,
    /// How many were skipped, by [`Skip`], those of which there are any.
    pub skipped: Vec<(Skip, u64)>,
    /// What ended it early.
    pub truncated: Option<Truncation>,
}

/// Why something was not searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// It holds a NUL byte.
    Binary,
    /// It is larger than was asked for.
    TooLarge,
    /// A line is longer than [`MAX_LINE_IN_MEMORY`].
    LineTooLong,
    /// It may not be read.
    Permission,
    /// It could not be read for another reason.
    Error,
    /// It is on a file system of the kernel's own.
    Virtual,
    /// It is [`MAX_DEPTH`] levels below the root.
    TooDeep,
    /// It is a device, FIFO or socket.
    Special,
    /// It is a file of rules that is too large or cannot be read.
    IgnoreFile,
}

impl Skip {
    /// All reasons.
    pub const ALL: [Self; 9] = [
        Self::Binary,
        Self::TooLarge,
        Self::LineTooLong,
        Self::Permission,
        Self::Error,
        Self::Virtual,
        Self::TooDeep,
        Self::Special,
        Self::IgnoreFile,
    ];
}

/// What ended a search early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// The matches.
    Matches,
    /// The bytes read.
    BytesRead,
    /// The bytes returned.
    BytesReturned,
    /// The time.
    Timeout,
}
