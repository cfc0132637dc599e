//! The stack on which a child runs between clone and exec.

use std::{io, ptr};

use libc::c_void;

/// The size of the stack. The child calls a handful of frames and allocates nothing; a debug build
/// of it stays below 4 KiB.
pub(super) const SIZE: usize = 64 * 1024;

/// The size of the guard below it: one page on every machine (arm64 kernels may use 64 KiB pages).
const GUARD: usize = 64 * 1024;

/// A private mapping with a guard at its low end, so that an overflow faults in the child instead
/// of writing over the daemon's memory, which the child shares.
#[derive(Debug)]
pub(super) struct Stack {
    base: *mut c_void,
}

impl Stack {
    /// Maps a stack.
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory
        // that anything else knows of.
        let base =
            unsafe { libc::mmap(ptr::null_mut(), GUARD + SIZE, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self { base };
        let usable = base.cast::<u8>().wrapping_add(GUARD).cast::<c_void>();
        // SAFETY: the range is the upper part of the mapping made above, which nobody uses yet.
        if unsafe { libc::mprotect(usable, SIZE, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stack)
    }

    /// The address where the stack begins; it grows downwards. Page-aligned, so aligned for every
    /// ABI.
    pub(super) fn top(&self) -> *mut c_void {
        self.base.cast::<u8>().wrapping_add(GUARD + SIZE).cast()
    }

    /// The lowest address that may be used, [`SIZE`] below the top.
    pub(super) fn bottom(&self) -> *mut c_void {
        self.base.cast::<u8>().wrapping_add(GUARD).cast()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and whoever ran on it has gone: with CLONE_VFORK the
        // child has left it by exec or exit before clone returns, else it has its own copy.
        unsafe { libc::munmap(self.base, GUARD + SIZE) };
    }
}
