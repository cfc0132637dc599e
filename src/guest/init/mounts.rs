//! The file systems that every program expects, mounted where the kernel or a container's runtime
//! has not done it already. A failure is said and not fatal: a container may not mount anything,
//! and usually has all of it.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        statfs::{FsType, TMPFS_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
};

use super::console::say;

/// One file system to mount.
#[derive(Debug)]
struct Mount {
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

/// What nix has no name for; statfs(2).
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const PLAIN_NO_EXEC: MsFlags = PLAIN.union(MsFlags::MS_NOEXEC);

/// Those that PID 1 itself works with, and which move along to the real root.
const FIRST: &[Mount] = &[
    Mount { target: "/proc", kind: "proc", flags: PLAIN_NO_EXEC, data: "" },
    Mount { target: "/sys", kind: "sysfs", flags: PLAIN_NO_EXEC, data: "" },
    Mount { target: "/dev", kind: "devtmpfs", flags: MsFlags::MS_NOSUID, data: "mode=0755" },
    Mount { target: "/run", kind: "tmpfs", flags: PLAIN, data: "mode=0755" },
];

/// Those that the processes need.
const SECOND: &[Mount] = &[
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        // 5 is the group tty in every distribution; opening /dev/ptmx is for all.
        data: "gid=5,mode=620,ptmxmode=0666",
    },
    Mount { target: "/dev/shm", kind: "tmpfs", flags: PLAIN, data: "mode=1777" },
    Mount { target: "/sys/fs/cgroup", kind: "cgroup2", flags: PLAIN_NO_EXEC, data: "" },
];

const TMP: Mount = Mount { target: "/tmp", kind: "tmpfs", flags: PLAIN, data: "mode=1777" };

/// What udev links, and shells need for `<(…)` and `/dev/stdin`.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// /proc, /sys, /dev and /run.
pub(super) fn first() {
    FIRST.iter().for_each(ensure);
}

/// The rest.
pub(super) fn second() {
    SECOND.iter().for_each(ensure);
    // On a disk /tmp is a directory like another; in memory it is one anyway, and a read-only
    // root has no other place for it.
    if root_is_in_memory() || root_is_read_only() {
        ensure(&TMP);
    }
    for (to, link) in LINKS {
        if fs::symlink_metadata(link).is_err() {
            // In a read-only /dev there is nothing to be done.
            let _ = std::os::unix::fs::symlink(to, link);
        }
    }
}

/// Whether the root is an initramfs (or another file system in memory).
pub(super) fn root_is_in_memory() -> bool {
    statfs("/").is_ok_and(|fs| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&fs.filesystem_type()))
}

fn root_is_read_only() -> bool {
    statvfs("/").is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY))
}

fn ensure(planned: &Mount) {
    let Mount { target, kind, flags, data } = *planned;
    if is_mounted(target) {
        return;
    }
    // About a directory that is missing and cannot be made, the mount itself will say it.
    let _ = fs::create_dir_all(target);
    match mount(Some(kind), target, Some(kind), flags, Some(data)) {
        // EBUSY: the very same is mounted there.
        Ok(()) | Err(Errno::EBUSY) => {}
        Err(error) => say!("mounting {kind} on {target}: {error}"),
    }
}

/// Whether something is mounted there: the directory is on another device than its parent. Works
/// without /proc.
fn is_mounted(target: &str) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|meta| meta.dev());
    let path = Path::new(target);
    match (device(path), path.parent().and_then(device)) {
        (Some(own), Some(parent)) => own != parent,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_known_by_its_device() {
        assert!(is_mounted("/proc"));
        assert!(!is_mounted("/proc/self"));
        assert!(!is_mounted("/no/such/directory"));
    }
}
