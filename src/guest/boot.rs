//! When the boot reached which point, on the clock that starts with the kernel.

use nix::time::{ClockId, clock_gettime};

/// The environment variable in which PID 1 tells the daemon when the kernel had started it.
pub const KERNEL_US: &str = "ENVD_BOOT_KERNEL_US";

/// The environment variable in which PID 1 tells the daemon when it was ready to start it.
pub const INIT_US: &str = "ENVD_BOOT_INIT_US";

/// Microseconds between the start of the kernel and each step; the first two only where envd is
/// PID 1 itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// The kernel started PID 1.
    pub kernel_us: Option<u64>,
    /// PID 1 had prepared the machine and started the daemon.
    pub init_us: Option<u64>,
    /// The daemon listened.
    pub ready_us: u64,
}

impl Times {
    /// The times of a daemon that is ready now.
    pub fn now() -> Self {
        Self {
            kernel_us: passed_on(KERNEL_US),
            init_us: passed_on(INIT_US),
            ready_us: microseconds(),
        }
    }
}

/// Microseconds since the kernel started, those of a suspended machine included.
pub fn microseconds() -> u64 {
    // The clock has been in every kernel since 2.6.39; without it the times are just unknown.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000).saturating_add(nanoseconds / 1000)
    })
}

/// A time that an earlier stage of the boot passed on.
pub fn passed_on(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}
