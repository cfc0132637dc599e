//! Random bytes of the kernel.

use std::{
    fs::File,
    io::{self, Read},
};

/// Fills a buffer with bytes that nobody can guess. It never waits for the kernel to collect entropy.
///
/// # Errors
/// Where getrandom(2) is refused, or the kernel has no entropy yet: those of reading /dev/urandom.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut rest = &mut *buffer;
    while !rest.is_empty() {
        // SAFETY: the kernel writes no more than the buffer's length into it.
        let filled =
            unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), libc::GRND_NONBLOCK) };
        match usize::try_from(filled) {
            Ok(filled) if filled > 0 => rest = rest.get_mut(filled..).unwrap_or_default(),
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return File::open("/dev/urandom")?.read_exact(rest),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_differ() {
        let (mut one, mut other) = ([0; 32], [0; 32]);
        fill(&mut one).unwrap();
        fill(&mut other).unwrap();
        assert_ne!(one, other);
        fill(&mut []).unwrap();
    }
}
