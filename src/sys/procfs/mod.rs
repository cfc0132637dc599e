//! Parsers of the text files under /proc, as bytes.
//!
//! The contract of this module:
//!
//! * **Bytes, never UTF-8.** Names of processes, mount points and control groups hold whatever a
//!   program put there: one that is not UTF-8 must not hide a process, a mount or a socket.
//! * **A parser never panics**, and gives `None` for what it does not understand; each is a fuzz
//!   target (`fuzz/fuzz_targets/procfs.rs`).
//! * Everybody who reads /proc reads it through here, so that there is one parser of each format.
//!
//! The formats are those of proc(5) and of the kernel's Documentation/filesystems/proc.rst.

mod mounts;
mod sockets;
mod stat;

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

pub use mounts::{Mount, MountInfo, mountinfo, mounts};
pub use sockets::{Socket, TCP_LISTEN, UDP_UNCONNECTED, sockets};
pub use stat::{Group, Stat};

/// The lines of a text, without their ends.
pub fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

/// The words of a line, which spaces and tabs separate.
pub fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// A decimal number, and nothing else.
pub fn number(text: &[u8]) -> Option<u64> {
    // `parse` would take a sign.
    let digits = text.first().is_some_and(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// The text behind `name` at the beginning of a line, trimmed: `entry(status, b"CapEff:")`.
pub fn entry<'a>(text: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    lines(text).find_map(|line| line.strip_prefix(name)).map(<[u8]>::trim_ascii)
}

/// The number behind `name` at the beginning of a line, without its unit.
pub fn entry_number(text: &[u8], name: &[u8]) -> Option<u64> {
    number(words(entry(text, name)?).next()?)
}

/// As [`entry_number`] for a number of KiB, in bytes.
pub fn entry_bytes(text: &[u8], name: &[u8]) -> Option<u64> {
    entry_number(text, name)?.checked_mul(1024)
}

/// The pid that was given last in this pid namespace, the last word of /proc/loadavg: it changes as
/// soon as somebody forks.
pub fn newest_pid(loadavg: &[u8]) -> Option<u64> {
    number(words(loadavg).last()?)
}

/// The path of a process's control group of version 2, from /proc/PID/cgroup: absolute, and as its
/// cgroup namespace shows it.
pub fn unified_cgroup(text: &[u8]) -> Option<PathBuf> {
    let path = lines(text).find_map(|line| line.strip_prefix(b"0::"))?;
    path.starts_with(b"/").then(|| PathBuf::from(OsStr::from_bytes(path)))
}

/// The types of file systems in /proc/filesystems that live on a block device.
pub fn block_filesystems(text: &[u8]) -> Vec<String> {
    let plain = lines(text).filter(|line| !line.starts_with(b"nodev"));
    let names = plain.map(<[u8]>::trim_ascii).filter(|kind| !kind.is_empty());
    names.map(|kind| String::from_utf8_lossy(kind).into_owned()).collect()
}

/// Busy and whole time of all processors, in ticks since boot, from /proc/stat: `cpu user nice system
/// idle iowait irq softirq steal guest guest_nice`. A guest's time is in user and nice already.
pub fn cpu_times(text: &[u8]) -> Option<(u64, u64)> {
    let ticks: Vec<u64> = words(entry(text, b"cpu ")?).map_while(number).collect();
    let total = ticks.iter().take(8).fold(0, |sum: u64, ticks| sum.saturating_add(*ticks));
    let idle = ticks.get(3)?.saturating_add(ticks.get(4).copied().unwrap_or(0));
    Some((total.saturating_sub(idle), total))
}

/// The pids of all processes that /proc shows.
///
/// # Errors
/// When /proc cannot be listed.
pub fn pids() -> io::Result<impl Iterator<Item = i32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| pid_of(&entry.ok()?.file_name())))
}

fn pid_of(name: &OsStr) -> Option<i32> {
    i32::try_from(number(name.as_bytes())?).ok()
}

/// The children of all threads of a process, from /proc/PID/task/TID/children. None where the kernel
/// has no such files (CONFIG_PROC_CHILDREN), and never those of more than `max_threads` threads.
#[derive(Debug)]
pub struct Children(Vec<fs::File>);

impl Children {
    /// Opens the lists, to be read as often as wanted.
    pub fn open(pid: i32, max_threads: usize) -> Self {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        let lists = tasks
            .take(max_threads)
            .filter_map(|task| fs::File::open(task.ok()?.path().join("children")).ok());
        Self(lists.collect())
    }

    /// The children now; none of a process that has ended.
    pub fn read(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for mut list in &self.0 {
            let mut text = Vec::new();
            let read = io::Seek::seek(&mut list, io::SeekFrom::Start(0))
                .and_then(|_| io::Read::read_to_end(&mut list, &mut text));
            if read.is_ok() {
                let numbers = words(&text).filter_map(number);
                pids.extend(numbers.filter_map(|pid| i32::try_from(pid).ok()));
            }
        }
        pids
    }
}

/// The number of the mount that an open file is on, from /proc/self/fdinfo; Linux has it there since
/// 3.15, and in statx(2) since 5.8.
pub fn mount_id(fd: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    entry_number(&text, b"mnt_id:")
}

/// Whether /proc is there at all, and shows this process.
pub fn is_mounted() -> bool {
    Path::new("/proc/self/stat").exists()
}

#[cfg(test)]
mod tests;
