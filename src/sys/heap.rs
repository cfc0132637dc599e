//! The C library's heap: how much memory it keeps, and giving it back.
//!
//! glibc keeps what is freed in up to eight arenas a processor, and returns only what lies at the end of
//! one. musl returns whole groups of slots by itself.

/// Limits the arenas, of which each keeps free memory of its own. Before there is a second thread.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    {
        /// One for each worker of the runtime; contention is no concern with so few threads that compute.
        const ARENAS: libc::c_int = 2;
        // SAFETY: mallopt takes two integers and touches only the allocator's own state, under its lock.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }
}

/// Whether [`trim`] does anything.
pub const CAN_TRIM: bool = cfg!(target_env = "gnu");

/// Returns free memory to the kernel. Takes milliseconds, more with much to return.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's locks itself, and releases only pages without live data.
    unsafe {
        libc::malloc_trim(0);
    }
}
