//! Sparse files in the formats that put them into extended headers: GNU tar's 1.0 (its own choice,
//! and bsdtar's) and 0.1. Taken for ordinary files they would become files of other content.
//!
//! The records `GNU.sparse.*` tell the real name and size. In 1.0 the map of the data stands in
//! front of them, as decimal numbers a line (how many parts, then offset and length of each) in
//! whole blocks; in 0.1 it is a record. Format 0.0 repeats records, and is refused.

use std::io::Read;

use tar::Entry;

use super::{MAX_ENTRY_HEAD, bad};
use crate::fs::FsError;

/// What every key of ours begins with.
const PREFIX: &str = "GNU.sparse.";
/// tar's unit.
const BLOCK: usize = 512;

/// What is told of a sparse file.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    /// Its path, where that of the entry is another.
    pub(super) name: Option<Vec<u8>>,
    /// With its holes.
    pub(super) size: u64,
    /// Offset and length of its parts; none where they stand in front of the data.
    parts: Option<Vec<(u64, u64)>>,
}

impl Sparse {
    /// What the extended headers of an entry tell; none for one that is not sparse, or is in the
    /// old way, which the crate of tar knows.
    pub(super) fn of<R: Read>(entry: &mut Entry<'_, R>) -> Result<Option<Self>, FsError> {
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let wrong = |what: &str| {
            let shown = crate::quote::text(&shown);
            FsError::BadArchive(format!("entry {shown}: {what}"))
        };
        let Some(extensions) = entry.pax_extensions().map_err(|error| bad(&error))? else {
            return Ok(None);
        };
        let (mut is_sparse, mut version) = (false, (None, None));
        let (mut found, mut size) = (Self::default(), None);
        for extension in extensions {
            let extension = extension.map_err(|error| bad(&error))?;
            let key = extension.key().ok().and_then(|key| key.strip_prefix(PREFIX));
            let Some(key) = key else { continue };
            is_sparse = true;
            let value = extension.value_bytes();
            match key {
                "name" => found.name = Some(value.to_vec()),
                "major" => version.0 = number(value),
                "minor" => version.1 = number(value),
                "size" | "realsize" => {
                    let told = number(value).ok_or_else(|| wrong("its size is no number"))?;
                    size = Some(told);
                }
                "map" => {
                    let numbers = value.split(|byte| *byte == b',').map(number);
                    let numbers: Option<Vec<u64>> = numbers.collect();
                    let numbers = numbers.ok_or_else(|| wrong("its map has what is no number"))?;
                    found.parts = Some(pairs(&numbers).ok_or_else(|| wrong("half its map"))?);
                }
                // 0.0 has no map but these, one record each.
                _ => {}
            }
        }
        if !is_sparse {
            return Ok(None);
        }
        match (version, &found.parts) {
            ((Some(1), Some(0)), None) | ((None | Some(0), None | Some(1)), Some(_)) => {}
            _ => return Err(wrong("a sparse file whose format is not known")),
        }
        found.size = size.ok_or_else(|| wrong("a sparse file without a size"))?;
        Ok(Some(found))
    }

    /// The parts, checked; they may have to be read from where the data are.
    pub(super) fn map(self, input: &mut impl Read) -> Result<Vec<(u64, u64)>, FsError> {
        let wrong = |what: &str| FsError::BadArchive(format!("the map of a sparse file {what}"));
        let parts = match self.parts {
            Some(parts) => parts,
            None => in_front(input)?,
        };
        let mut end = 0;
        for (start, length) in &parts {
            if *start < end {
                return Err(wrong("goes backwards"));
            }
            end = start
                .checked_add(*length)
                .filter(|end| *end <= self.size)
                .ok_or_else(|| wrong("leads behind its end"))?;
        }
        Ok(parts)
    }
}

/// Reads a map of format 1.0, in whole blocks.
fn in_front(input: &mut impl Read) -> Result<Vec<(u64, u64)>, FsError> {
    let wrong = || FsError::BadArchive("the map of a sparse file is not one".to_owned());
    let (mut numbers, mut now) = (Vec::new(), Vec::new());
    let mut block = [0; BLOCK];
    let mut read = 0;
    loop {
        read += BLOCK as u64;
        if read > MAX_ENTRY_HEAD {
            return Err(FsError::BadArchive("the map of a sparse file is too long".to_owned()));
        }
        input.read_exact(&mut block).map_err(|error| bad(&error))?;
        for byte in block {
            if byte != b'\n' {
                now.push(byte);
                continue;
            }
            numbers.push(number(&now).ok_or_else(wrong)?);
            now.clear();
            // Behind the last there are zeros.
            if let Some((count, rest)) = numbers.split_first()
                && rest.len() as u64 == count.checked_mul(2).ok_or_else(wrong)?
            {
                return pairs(rest).ok_or_else(wrong);
            }
        }
    }
}

fn pairs(numbers: &[u64]) -> Option<Vec<(u64, u64)>> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[start, length]| (*start, *length)).collect())
}

/// A decimal number, and nothing else.
fn number(bytes: &[u8]) -> Option<u64> {
    let digits = bytes.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(bytes).ok().filter(|_| digits)?.parse().ok()
}
