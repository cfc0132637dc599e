//! The mount table of this process, from /proc/self/mountinfo, read again when it has changed.
//!
//! It answers without asking any file system: which mount point has an id, and whether there is a
//! mount at all whose server could stop answering.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read, Seek},
    os::{
        fd::AsFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;

/// How old the table may be where the kernel does not notify of changes (gVisor).
const MAX_AGE: Duration = Duration::from_secs(5);

/// The file systems that the kernel keeps in memory by itself: they have no server and no disk.
const IN_MEMORY: [&str; 21] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devtmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "hugetlbfs",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
    "fusectl",
    "bpf",
    "pstore",
    "efivarfs",
    "ramfs",
    "rootfs",
    "nsfs",
    "binfmt_misc",
];

/// What the names of file systems begin with that a program or another machine serves.
const SERVED: [&str; 12] = [
    "fuse", "nfs", "cifs", "smb", "9p", "ceph", "afs", "virtiofs", "lustre", "gluster", "beegfs",
    "autofs",
];

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) id: u64,
    /// The id of the mount that it is on.
    parent: u64,
    pub(super) point: PathBuf,
    kind: String,
}

/// The table as it was read last.
struct Table {
    /// Kept open: poll(2) on it reports changes. None where it cannot be opened.
    file: Option<File>,
    read_at: Option<Instant>,
    lines: Vec<Line>,
    /// The id of the mount at `/`.
    root: Option<u64>,
    /// Whether a mount other than `/` could stop answering.
    risky: bool,
    /// Whether one of them is served by a program or another machine.
    served: bool,
}

static TABLE: Mutex<Table> = Mutex::new(Table {
    file: None,
    read_at: None,
    lines: Vec::new(),
    root: None,
    risky: true,
    served: true,
});

/// Whether there is a mount besides `/` that is served by a program, another machine or a disk.
/// True where the table cannot be read.
pub(super) fn is_any_risky() -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    table.risky
}

/// Whether there is a mount besides `/` that is served by a program or another machine.
pub(super) fn is_any_served() -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    table.served
}

/// Whether a program or another machine serves a mount other than `/`. True where that is not known.
pub(super) fn is_served(id: u64) -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    let line = table.lines.iter().find(|line| line.id == id);
    line.is_none_or(|line| line.is_risky() && line.is_served())
}

/// Whether names in a mount are looked up by a program or another machine, and nothing is mounted by
/// that.
pub(super) fn looks_names_up_elsewhere(id: u64) -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    let line = table.lines.iter().find(|line| line.id == id);
    line.is_some_and(|line| line.is_served() && line.kind != "autofs")
}

/// Whether a mount is the one at `/`, and the kernel serves it by itself.
pub(super) fn is_local_root(id: u64) -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    let line = table.lines.iter().find(|line| line.id == id);
    table.root == Some(id) && line.is_some_and(|line| !line.is_served())
}

/// Whether a mount is the one at `/`.
pub(super) fn is_root(id: u64) -> bool {
    let mut table = TABLE.lock();
    table.refresh();
    table.root == Some(id)
}

/// The mount point of a mount.
pub(super) fn point_of(id: u64) -> Option<PathBuf> {
    let mut table = TABLE.lock();
    table.refresh();
    table.lines.iter().find(|line| line.id == id).map(|line| line.point.clone())
}

/// The mount that a path without links is on: of the mount points that the path begins with, the
/// longest one, and of those the one mounted last.
pub(super) fn id_of(path: &Path) -> Option<u64> {
    let mut table = TABLE.lock();
    table.refresh();
    longest(&table.lines, path).map(|line| line.id)
}

/// The names in a directory at which something is mounted that could stop answering. The path has no
/// links. [`stand_on_child`](super::stand_on_child) before anything is asked of one of these.
pub fn mounts_in(dir: &Path) -> Vec<OsString> {
    let mut table = TABLE.lock();
    table.refresh();
    let risky = table.lines.iter().filter(|line| line.is_risky());
    let inside = risky.filter(|line| line.point.parent() == Some(dir));
    inside.filter_map(|line| line.point.file_name().map(OsStr::to_owned)).collect()
}

/// A mount point anywhere inside a directory, which is on the mount `mount` and whose path has no links.
/// Mounts that the mount of the directory covers do not count.
pub fn mount_inside(dir: &Path, mount: u64) -> Option<PathBuf> {
    let mut table = TABLE.lock();
    table.refresh();
    let mut on_mount = table.lines.iter().filter(|line| line.parent == mount);
    on_mount.find(|line| line.point != dir && line.point.starts_with(dir)).map(|l| l.point.clone())
}

fn longest<'a>(lines: &'a [Line], path: &Path) -> Option<&'a Line> {
    let above = lines.iter().filter(|line| path.starts_with(&line.point));
    above.max_by_key(|line| line.point.as_os_str().len())
}

impl Line {
    fn is_served(&self) -> bool {
        SERVED.iter().any(|kind| self.kind.starts_with(kind))
    }

    fn is_risky(&self) -> bool {
        !IN_MEMORY.contains(&self.kind.as_str()) && self.point != Path::new("/")
    }
}

impl Table {
    fn refresh(&mut self) {
        if self.read_at.is_some_and(|at| at.elapsed() < MAX_AGE) && !self.has_changed() {
            return;
        }
        if self.file.is_none() {
            self.file = File::open("/proc/self/mountinfo").ok();
        }
        let mut text = Vec::new();
        let read = self.file.as_mut().is_some_and(|file| {
            file.rewind().is_ok() && file.read_to_end(&mut text).is_ok() && !text.is_empty()
        });
        self.read_at = Some(Instant::now());
        if !read {
            // Nothing is known: everything is looked at with care.
            (self.file, self.root, self.risky, self.served) = (None, None, true, true);
            self.lines.clear();
            return;
        }
        self.lines = parse(&text);
        self.root = longest(&self.lines, Path::new("/")).map(|line| line.id);
        self.risky = self.lines.iter().any(Line::is_risky);
        self.served = self.lines.iter().any(|line| line.is_risky() && line.is_served());
    }

    fn has_changed(&self) -> bool {
        let Some(file) = &self.file else {
            return false;
        };
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let changed = PollFlags::POLLPRI | PollFlags::POLLERR;
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|_| {
            fds.iter().any(|fd| fd.revents().is_some_and(|events| events.intersects(changed)))
        })
    }
}

/// Lines that make no sense are left out.
fn parse(text: &[u8]) -> Vec<Line> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse_line(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let parent = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = unescape(fields.nth(2)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    let kind = String::from_utf8_lossy(kind).into_owned();
    Some(Line { id, parent, point, kind })
}

/// Spaces, tabs, newlines and backslashes come as `\` and three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// A mount point for a message.
pub(super) fn name_of(id: u64) -> String {
    match point_of(id) {
        Some(point) => crate::quote::path(&point),
        None => format!("mount {id} (unmounted, or of another namespace)"),
    }
}

/// The mount of a descriptor by its path in /proc, where the kernel gives no mount id.
pub(super) fn id_by_link(link: &Path) -> Option<u64> {
    let path = std::fs::read_link(link).ok()?;
    let path = path.as_os_str().as_bytes();
    // What is behind it was removed, which says nothing about the mount.
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    path.starts_with(b"/").then(|| id_of(Path::new(OsStr::from_bytes(path))))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_optional_fields_and_escapes() {
        let text = b"21 1 8:1 / / rw - ext4 /dev/sda rw\n\
            30 21 0:40 / /mnt/a\\040b rw,nosuid shared:5 master:1 - fuse.x x rw\n\
            rubbish\n31 21 0:41 / /mnt\\134 rw - nfs4 h:/ rw\n";
        let lines = parse(text);
        let told: Vec<_> = lines
            .iter()
            .map(|line| (line.id, line.point.to_str().unwrap(), line.kind.as_str()))
            .collect();
        assert_eq!(told, [(21, "/", "ext4"), (30, "/mnt/a b", "fuse.x"), (31, "/mnt\\", "nfs4")]);
        assert_eq!(longest(&lines, Path::new("/mnt/a b/c")).map(|line| line.id), Some(30));
        assert_eq!(longest(&lines, Path::new("/mnt/a bc")).map(|line| line.id), Some(21));
    }

    #[test]
    fn the_table_of_this_process_is_known() {
        let proc = id_of(Path::new("/proc/self/status")).unwrap();
        assert_eq!(name_of(proc), "/proc");
        assert!(!is_root(proc) && is_root(id_of(Path::new("/")).unwrap()));
        let file = File::open("/proc/self/status").unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert_eq!(id_by_link(Path::new(&link)), Some(proc));
    }
}
