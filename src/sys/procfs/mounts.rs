//! The tables of mounts: proc_pid_mountinfo(5), proc_pid_mounts(5).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use super::{lines, number};

/// A line of /proc/PID/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's number, as statx(2) and /proc/PID/fdinfo have it.
    pub id: u64,
    /// The number of the mount that it is on.
    pub parent: u64,
    /// Where it is, below the root of the process.
    pub mount_point: PathBuf,
    /// The type of the file system, `nfs4` say.
    pub kind: Vec<u8>,
    /// What is mounted: a device, an export; any text.
    pub source: Vec<u8>,
}

/// A line of /proc/PID/mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub mount_point: PathBuf,
    /// The type of the file system.
    pub kind: Vec<u8>,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// The mounts of a mountinfo table, in its order: a later one covers an earlier one.
pub fn mountinfo(table: &[u8]) -> impl DoubleEndedIterator<Item = MountInfo> {
    let mounts: Vec<MountInfo> = lines(table).filter_map(info).collect();
    mounts.into_iter()
}

/// The mounts of a mounts table, in its order.
pub fn mounts(table: &[u8]) -> impl DoubleEndedIterator<Item = Mount> {
    let mounts: Vec<Mount> = lines(table).filter_map(mount).collect();
    mounts.into_iter()
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE OPTIONS`
fn info(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let (id, parent) = (number(fields.next()?)?, number(fields.next()?)?);
    let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(2)?)));
    let mut behind = fields.skip_while(|field| *field != b"-").skip(1);
    let (kind, source) = (unescape(behind.next()?), unescape(behind.next()?));
    Some(MountInfo { id, parent, mount_point, kind, source })
}

/// `SOURCE POINT TYPE OPTIONS 0 0`, as fstab(5).
fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ').skip(1);
    let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.next()?)));
    let kind = unescape(fields.next()?);
    let read_only = fields.next()?.split(|byte| *byte == b',').any(|option| option == b"ro");
    Some(Mount { mount_point, kind, read_only })
}

/// Space, tab, newline, backslash and `#` come as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..3).filter(|digits| digits.iter().all(u8::is_ascii_digit));
        let code = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(*first);
                rest = behind;
            }
        }
    }
    plain
}
