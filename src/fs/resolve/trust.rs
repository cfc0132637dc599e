//! What the walk believes of what it meets: owners, file systems, sticky directories.

use std::{fs, os::fd::AsFd};

use nix::{
    errno::Errno,
    sys::{
        stat::FileStat,
        statfs::{FUSE_SUPER_MAGIC, PROC_SUPER_MAGIC},
    },
};

use crate::sys::path_fd;

/// The longest /proc/self/mountinfo that is read.
const MAX_MOUNTINFO: usize = 4 << 20;

pub(super) fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

pub(super) fn is_link(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFLNK
}

/// Whether root owns it, and nobody else could say so: the server of a FUSE file system, which may be
/// a program of any user, says of its files what it likes.
pub(super) fn is_roots(fd: &impl AsFd, stat: &FileStat) -> nix::Result<bool> {
    if stat.st_uid != 0 {
        return Ok(false);
    }
    if path_fd::fs_type(fd)? != FUSE_SUPER_MAGIC {
        return Ok(true);
    }
    Ok(is_mounted_by_root(stat.st_dev))
}

/// Whether a directory is root's and nobody else may put names in it. In one that all may write, such
/// as /tmp, anybody makes hard links where fs.protected_hardlinks is off.
pub(super) fn is_only_roots(fd: &impl AsFd, stat: &FileStat) -> nix::Result<bool> {
    Ok(stat.st_mode & libc::S_IWOTH == 0 && is_roots(fd, stat)?)
}

/// Whether it lies in procfs.
pub(super) fn is_proc(fd: &impl AsFd) -> nix::Result<bool> {
    Ok(path_fd::fs_type(fd)? == PROC_SUPER_MAGIC)
}

/// Whether the FUSE file system of this device was mounted by root; false where that is unknown.
fn is_mounted_by_root(device: u64) -> bool {
    use std::io::Read;
    let mut text = Vec::new();
    let Ok(file) = fs::File::open("/proc/self/mountinfo") else { return false };
    if file.take(MAX_MOUNTINFO as u64).read_to_end(&mut text).is_err() {
        return false;
    }
    mounted_by(&text, device) == Some(0)
}

/// The `user_id` of the FUSE mount of `device`, from the text of /proc/self/mountinfo.
fn mounted_by(mountinfo: &[u8], device: u64) -> Option<u32> {
    let wanted = format!("{}:{}", libc::major(device), libc::minor(device));
    mountinfo.split(|byte| *byte == b'\n').find_map(|line| {
        // ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER-OPTIONS
        let mut fields = line.split(|byte| *byte == b' ');
        if fields.nth(2)? != wanted.as_bytes() {
            return None;
        }
        fields.find(|field| *field == b"-")?;
        let options = fields.nth(2)?;
        let mut options = options.split(|byte| *byte == b',');
        let number = options.find_map(|option| option.strip_prefix(b"user_id="))?;
        std::str::from_utf8(number).ok()?.parse().ok()
    })
}

/// The kernel's rule of fs.protected_symlinks, which it applies to the links that it follows itself:
/// in a sticky directory that all may write, a link at the end of a path leads on only for its owner,
/// or if the directory's owner made it.
pub(super) fn may_follow(directory: &FileStat, link: &FileStat, uid: u32) -> nix::Result<()> {
    let sticky = libc::S_ISVTX | libc::S_IWOTH;
    if link.st_uid == uid
        || link.st_uid == directory.st_uid
        || directory.st_mode & sticky != sticky
        || !links_are_protected()
    {
        return Ok(());
    }
    Err(Errno::EACCES)
}

/// fs.protected_symlinks; set where it cannot be read.
fn links_are_protected() -> bool {
    fs::read("/proc/sys/fs/protected_symlinks").map_or(true, |text| !text.starts_with(b"0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_a_fuse_mount_is_found_by_its_device() {
        let text = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            31 22 0:45 / /mnt/a\\040b rw,nosuid shared:7 master:1 - fuse.sshfs x rw,user_id=5001,group_id=5\n\
            32 22 0:46 / /mnt/c rw - fuse.gcs x rw,user_id=0,group_id=0,allow_other\n\
            33 22 0:47 / /mnt/d rw - fuse x rw\n";
        let of = |minor| mounted_by(text, libc::makedev(0, minor));
        assert_eq!([of(45), of(46), of(47), of(48)], [Some(5001), Some(0), None, None]);
    }
}
