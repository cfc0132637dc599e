//! Searching what is in a file.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
};

use grep_matcher::Matcher;
use grep_regex::RegexMatcher;
use grep_searcher::{
    BinaryDetection, MmapChoice, Searcher, SearcherBuilder, Sink, SinkContext, SinkMatch,
};
use nix::{errno::Errno, fcntl::OFlag};

use super::{
    Line, Match, Skip,
    query::SearchOptions,
    run::{Candidate, Search},
    walk::reason,
};
use crate::{
    blocking::{progress, stand_on},
    fs::{
        entry::{Entry, EntryKind},
        errno,
    },
};

/// The longest line that is searched: what a searcher holds in memory.
pub const MAX_LINE_IN_MEMORY: usize = 8 << 20;
/// The parts of one line that are told.
pub const MAX_RANGES: usize = 64;

/// What searches files, one after the other.
pub(super) fn searcher(options: &SearchOptions) -> Searcher {
    let lines = |lines: u32| usize::try_from(lines).unwrap_or(0);
    let binary = match options.binary {
        true => BinaryDetection::none(),
        false => BinaryDetection::quit(0),
    };
    SearcherBuilder::new()
        .line_number(true)
        .binary_detection(binary)
        .before_context(lines(options.before_context))
        .after_context(lines(options.after_context))
        .heap_limit(Some(MAX_LINE_IN_MEMORY))
        // A file that shrinks while it is mapped would end the daemon.
        .memory_map(MmapChoice::never())
        // Offsets are those of the file.
        .bom_sniffing(false)
        .build()
}

/// Searches one file.
pub(super) fn search_file(
    search: &Search,
    searcher: &mut Searcher,
    matcher: &RegexMatcher,
    candidate: &Candidate,
) {
    // The helper is a job of its own.
    if let Err(busy) = stand_on(candidate.dir.as_fd()) {
        return search.fail(busy);
    }
    // O_NONBLOCK: what was a file a moment ago can be a FIFO.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let file = match search.rights.open_in(&candidate.dir, &candidate.name, flags) {
        Ok((file, ..)) => file,
        // Gone, or replaced by a link.
        Err(Errno::ENOENT | Errno::ELOOP) => return,
        Err(errno) => return search.skip(reason(errno), 1),
    };
    let meta = match file.metadata() {
        Ok(meta) => meta,
        Err(error) => return search.skip(reason(errno::of(&error)), 1),
    };
    if !meta.is_file() {
        return search.skip(Skip::Special, 1);
    }
    let most = search.query.options.max_file_bytes;
    if most != 0 && meta.len() > most {
        return search.skip(Skip::TooLarge, 1);
    }
    let mut reader = Counted { file, search, failed: None };
    let path = search.shown(&candidate.rel);
    let mut lines = Lines { search, matcher, candidate, path, entry: None, binary: false };
    let done = searcher.search_reader(matcher, &mut reader, &mut lines);
    search.searched(1);
    if lines.binary {
        search.skip(Skip::Binary, 1);
    }
    if done.is_err() && !search.is_over() {
        let reason = reader.failed.map_or(Skip::LineTooLong, reason);
        search.skip(reason, 1);
    }
}

/// A file whose bytes count for the whole search, which ends between two reads.
struct Counted<'a> {
    file: File,
    search: &'a Search,
    failed: Option<Errno>,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.search.is_over() {
            return Err(io::ErrorKind::Other.into());
        }
        progress();
        match self.file.read(buffer) {
            Ok(read) => {
                self.search.read_bytes(read);
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.failed = Some(errno::of(&error));
                Err(error)
            }
        }
    }
}

/// Takes the lines of one file.
struct Lines<'a> {
    search: &'a Search,
    matcher: &'a RegexMatcher,
    candidate: &'a Candidate,
    path: String,
    /// Looked up for the first match.
    entry: Option<Option<Box<Entry>>>,
    binary: bool,
}

impl Lines<'_> {
    /// Tells a line; whether to go on.
    fn tell(&mut self, number: Option<u64>, offset: u64, bytes: &[u8], context: bool) -> bool {
        let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let most = usize::try_from(self.search.query.options.max_line_bytes).unwrap_or(usize::MAX);
        let cut = line.get(..most).unwrap_or(line);
        let mut ranges = Vec::new();
        if !context {
            // The matcher's own error type has no values.
            let _ = self.matcher.find_iter(line, |found| {
                if found.start() >= cut.len() && !cut.is_empty() {
                    return false;
                }
                ranges.push((found.start(), found.end().min(cut.len())));
                ranges.len() < MAX_RANGES
            });
        }
        let (search, candidate) = (self.search, self.candidate);
        let entry = self.entry.get_or_insert_with(|| {
            search.entry(candidate.dir.as_fd(), &candidate.name, &candidate.rel)
        });
        let line = Line {
            number: number.unwrap_or(0),
            offset,
            bytes: cut.to_owned(),
            truncated: cut.len() < line.len(),
            context,
            ranges,
        };
        search.tell(Match {
            path: self.path.clone(),
            kind: EntryKind::File,
            line: Some(line),
            entry: entry.clone(),
        })
    }
}

impl Sink for Lines<'_> {
    type Error = io::Error;

    fn matched(&mut self, _: &Searcher, found: &SinkMatch<'_>) -> io::Result<bool> {
        let (number, offset) = (found.line_number(), found.absolute_byte_offset());
        Ok(self.tell(number, offset, found.bytes(), false))
    }

    fn context(&mut self, _: &Searcher, around: &SinkContext<'_>) -> io::Result<bool> {
        let (number, offset) = (around.line_number(), around.absolute_byte_offset());
        Ok(self.tell(number, offset, around.bytes(), true))
    }

    fn binary_data(&mut self, _: &Searcher, _: u64) -> io::Result<bool> {
        self.binary = true;
        Ok(true)
    }
}
