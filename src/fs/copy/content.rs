//! The content of one file into another: shared where that is possible, else without its holes.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use crate::{blocking::progress, sys::reflink};

/// The bytes that are copied between two looks at whether anybody still waits.
const COPY_STEP: u64 = 16 << 20;

/// Copies `size` bytes of `from` into `to`, which is empty; gives how many they were. Ends early
/// when `stop` says so.
pub(super) fn copy_content(
    mut from: &File,
    mut to: &File,
    size: u64,
    stop: impl Fn() -> bool,
) -> io::Result<u64> {
    if size == 0 {
        // A file of /proc says that it is empty and is not, and may not end.
        let mut at = 0;
        while !stop() {
            progress();
            let copied = io::copy(&mut from.take(COPY_STEP), &mut to)?;
            at += copied;
            if copied < COPY_STEP {
                break;
            }
        }
        return Ok(at);
    }
    if reflink::clone_content(from, to).is_ok() {
        return Ok(size);
    }
    let mut at = 0;
    while at < size && !stop() {
        let Some((start, end)) = next_data(from, at, size)? else {
            break;
        };
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        at = start;
        while at < end && !stop() {
            let step = COPY_STEP.min(end - at);
            // By copy_file_range(2), where the two file systems can.
            progress();
            let copied = io::copy(&mut from.take(step), &mut to)?;
            at += copied;
            if copied < step {
                // It has become shorter meanwhile.
                to.set_len(at)?;
                return Ok(at);
            }
        }
    }
    to.set_len(size)?;
    Ok(size)
}

/// Where the next bytes are that are no hole, from `at` on.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |at: u64, whence| -> nix::Result<u64> {
        let offset = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, offset, whence).map(|found| u64::try_from(found).unwrap_or(0))
    };
    match seek(at, Whence::SeekData) {
        Ok(start) => {
            let end = seek(start, Whence::SeekHole).unwrap_or(size);
            Ok((start < size).then(|| (start, end.min(size))))
        }
        // Nothing but a hole to the end.
        Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL) => Ok(Some((at, size))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_an_end_is_given_up_when_nobody_waits() {
        let endless = File::open("/dev/zero").unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(copy_content(&endless, &full, 0, || true).unwrap(), 0);
    }
}
