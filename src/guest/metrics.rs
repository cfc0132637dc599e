//! What the machine uses: CPU, memory, disk.
//!
//! Read from `/proc/stat`, `/proc/meminfo`, `/proc/cpuinfo` (proc(5)) and by statvfs(3) of `/`. The
//! figures are upstream's, computed as upstream does; nothing is read unless somebody asks.

use std::{
    fs, io,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;
use serde::Serialize;

use crate::sys::procfs;

/// One look. The fields have the names and the order of upstream's JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Seconds since 1970.
    pub ts: u64,
    /// Processors.
    pub cpu_count: u32,
    /// How much of them was busy since the look before, in percent of all, with two decimals.
    pub cpu_used_pct: f64,
    /// Mebibytes of memory.
    pub mem_total_mib: u64,
    /// Mebibytes of memory in use.
    pub mem_used_mib: u64,
    /// Bytes of memory.
    pub mem_total: u64,
    /// Bytes of memory that are not available to new programs.
    pub mem_used: u64,
    /// Bytes of memory that cache files.
    pub mem_cache: u64,
    /// Bytes of the file system of `/` that are used or reserved.
    pub disk_used: u64,
    /// Bytes of the file system of `/`.
    pub disk_total: u64,
}

/// Time that all processors have spent since boot, in ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

/// Looks, and remembers the last look for what is told of the time between.
#[derive(Debug, Default)]
pub struct Meter(Mutex<CpuTimes>);

impl Meter {
    /// A meter whose first look tells of the time since now.
    pub fn new() -> Self {
        Self(Mutex::new(cpu_times().unwrap_or_default()))
    }

    /// Looks. Blocks as long as the file system of `/` does.
    ///
    /// # Errors
    /// `/proc` is not mounted, or not as Linux has it.
    pub fn look(&self) -> io::Result<Metrics> {
        let now = cpu_times()?;
        let before = std::mem::replace(&mut *self.0.lock(), now);
        let memory = fs::read("/proc/meminfo")?;
        let memory = |name: &str| procfs::entry_bytes(&memory, name.as_bytes());
        let missing = || io::Error::other("/proc/meminfo lacks a line");
        let total = memory("MemTotal:").ok_or_else(missing)?;
        let used = total.saturating_sub(memory("MemAvailable:").ok_or_else(missing)?);
        let cached =
            memory("Cached:").unwrap_or(0).saturating_add(memory("SReclaimable:").unwrap_or(0));
        let (disk_used, disk_total) = disk()?;
        Ok(Metrics {
            ts: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            cpu_count: cpu_count()?,
            cpu_used_pct: percent(before, now),
            mem_total_mib: total >> 20,
            mem_used_mib: used >> 20,
            mem_total: total,
            mem_used: used,
            mem_cache: cached,
            disk_used,
            disk_total,
        })
    }
}

fn cpu_times() -> io::Result<CpuTimes> {
    let stat = fs::read("/proc/stat")?;
    let times = procfs::cpu_times(&stat).map(|(busy, total)| CpuTimes { busy, total });
    times.ok_or_else(|| io::Error::other("/proc/stat has no line of all CPUs"))
}

/// Busy time of all time, rounded to two decimals.
fn percent(before: CpuTimes, now: CpuTimes) -> f64 {
    let busy = now.busy.saturating_sub(before.busy);
    let total = now.total.saturating_sub(before.total);
    if total == 0 {
        return 0.0;
    }
    // Hundredths of a percent, in whole numbers: as exact as the ticks are.
    let hundredths = u128::from(busy.min(total)) * 10_000 + u128::from(total) / 2;
    let hundredths = u32::try_from(hundredths / u128::from(total)).unwrap_or(10_000);
    f64::from(hundredths) / 100.0
}

fn cpu_count() -> io::Result<u32> {
    let cpuinfo = fs::read("/proc/cpuinfo")?;
    let count = procfs::lines(&cpuinfo).filter(|line| line.starts_with(b"processor")).count();
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}

#[allow(clippy::useless_conversion)] // The types of statvfs differ between the C libraries.
fn disk() -> io::Result<(u64, u64)> {
    let disk = statvfs("/")?;
    // statfs(2) counts in f_bsize on Linux; statvfs(3) in f_frsize, which is the same there.
    let block = u64::from(disk.fragment_size());
    // The server of a FUSE mount names any number.
    let total = u64::from(disk.blocks()).saturating_mul(block);
    let available = u64::from(disk.blocks_available()).saturating_mul(block);
    Ok((total.saturating_sub(available), total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_time() {
        let at = |busy, total| CpuTimes { busy, total };
        for (before, now, expected) in [
            (at(0, 0), at(0, 0), 0.0),
            (at(0, 0), at(1, 3), 33.33),
            (at(0, 0), at(2, 3), 66.67),
            (at(10, 100), at(110, 200), 100.0),
            // Ticks may go backwards when a processor is taken away.
            (at(10, 100), at(5, 90), 0.0),
        ] {
            assert!((percent(before, now) - expected).abs() < 1e-9, "{before:?} {now:?}");
        }
    }

    #[test]
    fn this_machine_has_something_of_each() {
        let meter = Meter::new();
        let metrics = meter.look().unwrap();
        assert!(metrics.cpu_count >= 1 && metrics.ts > 1_700_000_000);
        assert!(metrics.mem_used > 0 && metrics.mem_used < metrics.mem_total);
        assert!(metrics.disk_used <= metrics.disk_total && metrics.disk_total > 0);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
    }
}
