//! What has to be done to the mounts before the power goes: planned as a pure function over
//! `/proc/mounts`, so that the plan can be tested, and carried out in one place.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::console::say;

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
    let mounts: Vec<(PathBuf, String, bool)> =
        mounts.split(|byte| *byte == b'\n').filter_map(parse).collect();
    let is_pseudo = |kind: &str| PSEUDO.contains(&kind);
    // A pseudo file system matters only where it keeps a real one from being unmounted.
    let holds = |path: &Path| {
        mounts.iter().any(|(other, kind, _)| {
            !is_pseudo(kind) && other != Path::new("/") && path.starts_with(other)
        })
    };
    let mut steps = Vec::new();
    for (path, kind, read_only) in mounts.iter().rev() {
        if path == Path::new("/") {
            // Later ones hide earlier ones, and only the last can be reached.
            let seen = steps.iter().any(|step| matches!(step, Step::ReadOnly(_)));
            if !is_pseudo(kind) && !read_only && !seen {
                steps.push(Step::ReadOnly(path.clone()));
            }
        } else if !is_pseudo(kind) || holds(path) {
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

/// Mount point, type, and whether it is read-only, of one line; proc_pid_mounts(5), fstab(5).
fn parse(line: &[u8]) -> Option<(PathBuf, String, bool)> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [_, target, kind, options, ..] = fields[..] else {
        return None;
    };
    let read_only = options.split(|byte| *byte == b',').any(|option| option == b"ro");
    Some((unescape(target), String::from_utf8_lossy(kind).into_owned(), read_only))
}

/// Space, tab, newline and backslash come as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let code = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                path.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            _ => {
                path.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
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

    #[test]
    fn escapes() {
        for (escaped, path) in
            [("/a\\040b", "/a b"), ("/a\\134", "/a\\"), ("/a\\9", "/a\\9"), ("/\\", "/\\")]
        {
            assert_eq!(unescape(escaped.as_bytes()), Path::new(path));
        }
    }
}
