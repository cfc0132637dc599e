//! What has to be done to the mounts before the power goes: planned as a pure function over
//! `/proc/mounts`, so that the plan can be tested, and carried out in one place.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::console::say;
use crate::sys::procfs;

/// File systems without anything that could be lost.
const PSEUDO: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Unmount it; where that fails, make it read-only.
    Unmount(PathBuf),
    /// Make it read-only: the root cannot be unmounted.
    ReadOnly(PathBuf),
}

/// The steps for these mounts, in order: the last mounted first.
pub(super) fn plan(mounts: &[u8]) -> Vec<Step> {
    let mounts: Vec<procfs::Mount> = procfs::mounts(mounts).collect();
    let is_pseudo =
        |mount: &procfs::Mount| PSEUDO.iter().any(|kind| kind.as_bytes() == mount.kind.as_slice());
    // A pseudo file system matters only where it keeps a real one from being unmounted.
    let holds = |path: &Path| {
        mounts.iter().any(|other| {
            let point = &other.mount_point;
            !is_pseudo(other) && point != Path::new("/") && path.starts_with(point)
        })
    };
    let mut steps = Vec::new();
    for mount in mounts.iter().rev() {
        let path = &mount.mount_point;
        if path == Path::new("/") {
            // Later ones hide earlier ones, and only the last can be reached.
            let seen = steps.iter().any(|step| matches!(step, Step::ReadOnly(_)));
            if !is_pseudo(mount) && !mount.read_only && !seen {
                steps.push(Step::ReadOnly(path.clone()));
            }
        } else if !is_pseudo(mount) || holds(path) {
            steps.push(Step::Unmount(path.clone()));
        }
    }
    // The root is the first mount and so the last step, but a bind of it may stand behind.
    steps.sort_by_key(|step| matches!(step, Step::ReadOnly(_)));
    steps
}

/// Carries the plan for this machine's mounts out, and says what fails.
pub(super) fn carry_out() {
    let mounts = match fs::read("/proc/mounts") {
        Ok(mounts) => mounts,
        Err(error) => return say!("reading /proc/mounts: {error}"),
    };
    for step in plan(&mounts) {
        let (path, unmounted) = match &step {
            Step::Unmount(path) => (path, umount2(path, MntFlags::UMOUNT_NOFOLLOW)),
            Step::ReadOnly(path) => (path, Err(nix::errno::Errno::EBUSY)),
        };
        if unmounted.is_err()
            && let Err(error) = make_read_only(path)
        {
            say!("making {} read-only: {error}", path.display());
        }
    }
}

fn make_read_only(path: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    mount(none, path, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unmount(path: &str) -> Step {
        Step::Unmount(path.into())
    }

    fn read_only(path: &str) -> Step {
        Step::ReadOnly(path.into())
    }

    #[test]
    fn real_file_systems_in_reverse_and_the_root_last() {
        let mounts = b"/dev/vda / ext4 rw,relatime 0 0\n\
            proc /proc proc rw 0 0\n\
            devtmpfs /dev devtmpfs rw 0 0\n\
            tmpfs /run tmpfs rw 0 0\n\
            /dev/vdb /data ext4 rw 0 0\n\
            tmpfs /data/cache tmpfs rw 0 0\n\
            /dev/vdc /data/deep\\040er xfs ro 0 0\n\
            share /mnt/host virtiofs rw 0 0\n\
            overlay /mnt/o overlay rw 0 0\n";
        let expected = [
            unmount("/mnt/o"),
            unmount("/mnt/host"),
            unmount("/data/deep er"),
            unmount("/data/cache"),
            unmount("/data"),
            read_only("/"),
        ];
        assert_eq!(plan(mounts), expected);
    }

    #[test]
    fn nothing_for_a_root_that_cannot_lose_anything() {
        assert_eq!(plan(b"rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n"), []);
        assert_eq!(plan(b"/dev/vda / squashfs ro,noatime 0 0\n"), []);
        assert_eq!(plan(b""), []);
        assert_eq!(plan(b"nonsense\n\n / \n"), []);
    }

    #[test]
    fn an_initramfs_below_the_root_is_not_taken_for_it() {
        let mounts = b"rootfs / rootfs rw 0 0\n/dev/vda / ext4 rw 0 0\n/dev/vdb /b ext4 rw 0 0\n";
        assert_eq!(plan(mounts), [unmount("/b"), read_only("/")]);
    }
}
