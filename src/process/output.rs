//! From a process's pipe or terminal into its journal: one task a channel.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::{
    journal::{Channel, JOIN_LIMIT, Journal},
    settle::Flow,
};

/// The most that one read takes.
pub const MAX_READ: usize = 32 * 1024;

/// A read block with less room left than this is not used again.
const MIN_READ: usize = 8 * 1024;

/// How much may be in a terminal's buffers in the kernel (two of 4 KiB, and up to 64 KiB between
/// them).
const TERMINAL_BUFFERS: usize = 128 * 1024;

/// How far the reading of a channel has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Progress {
    /// Nothing is known about what is still to come.
    Open,
    /// All that was written before the process's exit is in the journal.
    Drained,
    /// Nobody can write any more.
    Closed,
}

/// Where a channel's bytes come from. The task drops it at its end.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) channel: Channel,
    pub(super) fd: Arc<AsyncFd<OwnedFd>>,
    /// The other end, held open until the process has exited.
    pub(super) held: Option<OwnedFd>,
}

/// Reads until nobody can write any more, and says so through `progress`. Once `exited` is true it
/// first reads what is there, and reports what comes later through `flow`.
pub(super) async fn pump(
    source: Source,
    (pid, journal): (u32, Arc<Journal>),
    mut exited: watch::Receiver<bool>,
    (progress, flow): (watch::Sender<Progress>, Arc<Flow>),
) {
    let Source { channel, fd, mut held } = source;
    let mut block = BytesMut::new();
    let mut drained = false;
    let ended = loop {
        let read = tokio::select! {
            biased;
            () = seen(&mut exited), if !drained => {
                drained = true;
                drop(held.take());
                match drain(channel, &fd, &journal, &mut block).await {
                    Ok(true) => break Ok(()),
                    Ok(false) => {
                        progress.send_replace(Progress::Drained);
                        continue;
                    }
                    Err(error) => break Err(error),
                }
            }
            read = fd.async_io(Interest::READABLE, |fd| read(fd, &mut block)) => read,
        };
        match read {
            Ok(0) => break Ok(()),
            Ok(len) if drained => {
                if flow.received() {
                    tracing::warn!(
                        pid,
                        ?channel,
                        "output of a background process came after the end was reported; it can be \
                         read by offset"
                    );
                }
                journal.append(channel, cut(&mut block, len)).await;
                flow.stored();
            }
            Ok(len) => journal.append(channel, cut(&mut block, len)).await,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    // A terminal's end of file is EIO.
    if let Err(error) = ended
        && error.raw_os_error() != Some(libc::EIO)
    {
        tracing::warn!(?channel, %error, "output cannot be read any further");
    }
    progress.send_replace(Progress::Closed);
}

/// Returns once the exit has been seen, or when nobody is left who would tell.
async fn seen(exited: &mut watch::Receiver<bool>) {
    let _ = exited.wait_for(|exited| *exited).await;
}

/// Reads what a process that has exited has left behind: until nothing is there, but no more than
/// fitted in, since a child of it may go on writing. True when nobody can write any more.
async fn drain(
    channel: Channel,
    fd: &AsyncFd<OwnedFd>,
    journal: &Journal,
    block: &mut BytesMut,
) -> io::Result<bool> {
    let mut left = capacity(channel, fd.get_ref());
    loop {
        match read(fd.get_ref(), block) {
            Ok(0) => return Ok(true),
            Ok(len) => {
                journal.append(channel, cut(block, len)).await;
                left = left.saturating_sub(len);
                if left == 0 {
                    return Ok(false);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// How many bytes can be on their way.
fn capacity(channel: Channel, fd: &OwnedFd) -> usize {
    match channel {
        Channel::Pty => TERMINAL_BUFFERS,
        Channel::Stdout | Channel::Stderr => fcntl(fd, FcntlArg::F_GETPIPE_SZ)
            .ok()
            .and_then(|size| usize::try_from(size).ok())
            .unwrap_or(TERMINAL_BUFFERS),
    }
}

/// The first bytes of the block. A long piece keeps its part of the block, and a short one is copied
/// by the journal; what lies between is copied here, for it would keep a block that is eight times
/// as large.
fn cut(block: &mut BytesMut, len: usize) -> Bytes {
    match block.get(..len) {
        Some(piece) if (JOIN_LIMIT..MAX_READ / 2).contains(&len) => Bytes::copy_from_slice(piece),
        _ => block.split_to(len).freeze(),
    }
}

/// Reads into the block, which always has room: it is replaced when little is left. The chunks cut
/// off it share its memory. When there is nothing to read it is given back: thousands of silent
/// processes hold none.
fn read(fd: &OwnedFd, block: &mut BytesMut) -> io::Result<usize> {
    if block.len() < MIN_READ {
        *block = BytesMut::zeroed(MAX_READ);
    }
    let read = nix::unistd::read(fd.as_fd(), block);
    if read == Err(Errno::EAGAIN) {
        *block = BytesMut::new();
    }
    Ok(read?)
}
