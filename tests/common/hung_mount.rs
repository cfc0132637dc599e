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
const FUSE_SETATTR: u32 = 4;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const FUSE_STATFS: u32 = 17;
const FUSE_INIT: u32 = 26;
const FUSE_OPENDIR: u32 = 27;
const FUSE_READDIR: u32 = 28;
const FUSE_CREATE: u32 = 35;
/// The length of `fuse_in_header`.
const HEADER: usize = 40;
const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;
/// The kernel refuses to fill a smaller buffer.
const MIN_READ: usize = 128 << 10;

/// The nodes of the file system.
const ROOT: u64 = 1;
const FILE: u64 = 2;
const NEW_FILE: u64 = 3;

/// The length of the file of a mount that hangs in the middle, and where that is: more than a client's
/// and the daemon's buffers hold.
pub const BIG: u64 = 256 << 20;
pub const HANGS_AT: u64 = 4 << 20;

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
        self.serve(|request| {
            Some(match request.opcode {
                FUSE_INIT => Ok(init()),
                FUSE_GETATTR => Ok(attributes_of(ROOT, 0)),
                FUSE_LOOKUP => Err(ENOENT),
                _ => Err(ENOSYS),
            })
        });
    }

    /// Makes the server answer for the attributes of the root, and for nothing else.
    pub fn answer_for_attributes(&self) {
        self.serve(|request| match request.opcode {
            FUSE_INIT => Some(Ok(init())),
            FUSE_GETATTR => Some(Ok(attributes_of(ROOT, 0))),
            _ => None,
        });
    }

    /// Makes the server answer, with a directory that holds the file `big` of [`BIG`] bytes and in which
    /// files can be created, until [`HANGS_AT`] bytes were read or written: then it answers nothing more.
    pub fn answer_until_the_middle(&self) {
        let mut moved = 0;
        self.serve(move |request| {
            if moved >= HANGS_AT {
                return None;
            }
            let size = if request.node == FILE { BIG } else { 0 };
            Some(match request.opcode {
                FUSE_INIT => Ok(init()),
                FUSE_GETATTR | FUSE_SETATTR => Ok(attributes_of(request.node, size)),
                FUSE_LOOKUP if request.body.starts_with(b"big\0") => Ok(entry_of(FILE, BIG)),
                FUSE_LOOKUP => Err(ENOENT),
                FUSE_OPEN | FUSE_OPENDIR => Ok(opened()),
                FUSE_STATFS => Ok(vec![0; 80]),
                FUSE_CREATE => Ok([entry_of(NEW_FILE, 0), opened()].concat()),
                FUSE_READDIR if request.number_at(8) == 0 => Ok(listing()),
                FUSE_READDIR => Ok(Vec::new()),
                FUSE_READ => {
                    let left = BIG.saturating_sub(request.number_at(8));
                    let length = left.min(request.number_at(16) & 0xffff_ffff);
                    moved += length;
                    Ok(vec![b'x'; usize::try_from(length).unwrap()])
                }
                FUSE_WRITE => {
                    let length = request.number_at(16) & 0xffff_ffff;
                    moved += length;
                    Ok(length.to_ne_bytes().to_vec())
                }
                _ => Err(ENOSYS),
            })
        });
    }

    /// Serves the mount by a thread until it is unmounted. What gets no answer hangs.
    fn serve(
        &self,
        mut answer: impl FnMut(&Request<'_>) -> Option<Result<Vec<u8>, i32>> + Send + 'static,
    ) {
        let mut server = self.server.as_ref().unwrap().try_clone().unwrap();
        std::thread::spawn(move || {
            let mut request = vec![0; MIN_READ];
            while let Ok(length) = server.read(&mut request) {
                let (header, body) = request[..length].split_at(HEADER);
                let opcode = u32::from_ne_bytes(header[4..8].try_into().unwrap());
                let (unique, node) = (&header[8..16], number(&header[16..]));
                let Some(answer) = answer(&Request { opcode, node, body }) else { continue };
                let (error, body) = match answer {
                    Ok(body) => (0, body),
                    Err(errno) => (-errno, Vec::new()),
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

/// What the kernel asks.
struct Request<'a> {
    opcode: u32,
    node: u64,
    body: &'a [u8],
}

impl Request<'_> {
    /// A number of eight bytes in its body.
    fn number_at(&self, at: usize) -> u64 {
        number(&self.body[at..])
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes[..8].try_into().unwrap())
}

/// `fuse_init_out` of version 7.31: no features.
fn init() -> Vec<u8> {
    let mut body: Vec<u8> = [7_u32, 31, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    body.extend([16_u16, 12].into_iter().flat_map(u16::to_ne_bytes));
    body.extend([4096_u32, 1].into_iter().flat_map(u32::to_ne_bytes));
    body.resize(64, 0);
    body
}

/// `fuse_attr`: a directory for the root, else a file.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let mode = if node == ROOT { 0o40_755 } else { 0o100_644 };
    let mut body: Vec<u8> =
        [node, size, 0, 0, 0, 0].into_iter().flat_map(u64::to_ne_bytes).collect();
    let rest = [0_u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
    body.extend(rest.into_iter().flat_map(u32::to_ne_bytes));
    body
}

/// `fuse_attr_out`, valid for no time.
fn attributes_of(node: u64, size: u64) -> Vec<u8> {
    [vec![0; 16], attributes(node, size)].concat()
}

/// `fuse_entry_out`, valid for no time.
fn entry_of(node: u64, size: u64) -> Vec<u8> {
    [node.to_ne_bytes().to_vec(), vec![0; 32], attributes(node, size)].concat()
}

/// `fuse_open_out` with `FOPEN_DIRECT_IO`: reads and writes come as they are made.
fn opened() -> Vec<u8> {
    [0_u64, 1].into_iter().flat_map(u64::to_ne_bytes).collect()
}

/// One `fuse_dirent`.
fn listing() -> Vec<u8> {
    let mut body: Vec<u8> = [FILE, 1].into_iter().flat_map(u64::to_ne_bytes).collect();
    body.extend([3_u32, 8].into_iter().flat_map(u32::to_ne_bytes));
    body.extend(b"big\0\0\0\0\0");
    body
}

/// Gives this thread, and the daemons that it starts, a table of mounts of their own: for mounts in such
/// numbers that others would be disturbed. False where that is not allowed.
pub fn with_own_mounts() -> bool {
    // SAFETY: the call takes a number, and changes this thread alone.
    #[allow(unsafe_code)]
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    unshared && mount(None::<&str>, "/", None::<&str>, private, None::<&str>).is_ok()
}

impl Drop for HungMount {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}
