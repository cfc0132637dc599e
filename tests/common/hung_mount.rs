//! A mounted file system whose server does not answer, until it is made to.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// What the kernel sends to a FUSE server, and what it wants back (linux/fuse.h).
const FUSE_LOOKUP: u32 = 1;
const FUSE_GETATTR: u32 = 3;
const FUSE_INIT: u32 = 26;
const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;
/// The kernel refuses to fill a smaller buffer.
const MIN_READ: usize = 128 << 10;

/// The file system. Dropped, it is unmounted, and whoever waits for it gets an error.
pub struct HungMount {
    at: PathBuf,
    server: Option<File>,
}

impl HungMount {
    /// Mounts it at a directory that exists. None where FUSE cannot be mounted.
    pub fn at(path: &Path) -> Option<Self> {
        Self::with(path, "user_id=0,group_id=0,allow_other")
    }

    /// Mounts one that only a user may look at: the kernel refuses all others, root included.
    pub fn of_user(path: &Path, uid: u32) -> Option<Self> {
        Self::with(path, &format!("user_id={uid},group_id={uid}"))
    }

    fn with(path: &Path, options: &str) -> Option<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let data = format!("fd={},rootmode=40000,{options}", server.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("hung"), path, Some("fuse"), flags, Some(data.as_str())).ok()?;
        Some(Self { at: path.to_owned(), server: Some(server) })
    }

    pub fn path(&self) -> &str {
        self.at.to_str().unwrap()
    }

    /// Says where it is now, after a directory above it was renamed.
    pub fn moved_to(&mut self, path: &Path) {
        self.at = path.to_owned();
    }

    /// Ends the server: who waits for it gets an error.
    pub fn end(&mut self) {
        self.server = None;
    }

    /// Makes the server answer, what has been asked included: an empty directory.
    pub fn answer(&self) {
        let mut server = self.server.as_ref().unwrap().try_clone().unwrap();
        std::thread::spawn(move || {
            let mut request = vec![0; MIN_READ];
            while let Ok(length) = server.read(&mut request) {
                let number = |at| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
                assert!(length >= 40, "a whole header");
                let (opcode, unique) = (number(4), &request[8..16]);
                let (error, body) = match opcode {
                    FUSE_INIT => (0, init()),
                    FUSE_GETATTR => (0, attributes_of_a_directory()),
                    FUSE_LOOKUP => (-ENOENT, Vec::new()),
                    _ => (-ENOSYS, Vec::new()),
                };
                let mut answer = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
                answer.extend(i32::to_ne_bytes(error));
                answer.extend(unique);
                answer.extend(body);
                // Refused when whoever asked has gone.
                let _ = server.write(&answer);
            }
        });
    }
}

/// `fuse_init_out` of version 7.31: no features.
fn init() -> Vec<u8> {
    let mut body: Vec<u8> = [7_u32, 31, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    body.extend([16_u16, 12].into_iter().flat_map(u16::to_ne_bytes));
    body.extend([4096_u32, 1].into_iter().flat_map(u32::to_ne_bytes));
    body.resize(64, 0);
    body
}

/// `fuse_attr_out`, valid for no time.
fn attributes_of_a_directory() -> Vec<u8> {
    let mut body = vec![0; 16];
    body.extend([1_u64, 0, 0, 0, 0, 0].into_iter().flat_map(u64::to_ne_bytes));
    let rest = [0_u32, 0, 0, 0o40_755, 2, 0, 0, 0, 4096, 0];
    body.extend(rest.into_iter().flat_map(u32::to_ne_bytes));
    body
}

impl Drop for HungMount {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}
