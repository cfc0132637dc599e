//! The socket of one connection as hyper sees it: notes when bytes arrive, bounds how long the client may
//! take nothing, and watches the read side while calls run.
//!
//! hyper is told to allow half-closed connections (RFC 9112, section 9.6: the end of what a client sends does
//! not mean that it has left), and then reads nothing between the end of a request and the end of its
//! response. So nobody would see that a client of a long stream has gone. [`Watched`] therefore reads ahead
//! itself, a few bytes at most, each time hyper flushes: it reports the end of the read side to the
//! connection's [`Activity`], and fails the connection when the client has reset it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::{activity::Activity, heads::Heads};

/// The most bytes of a following request that are read while a call runs: only their arrival matters.
const READ_AHEAD: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Watched<I> {
    /// What was read already: the first bytes of the connection, or what was read ahead.
    start: Bytes,
    io: I,
    /// The client has sent its last byte.
    ended: bool,
    activity: Arc<Activity>,
    http1: bool,
    /// See [`super::STALL_TIMEOUT`].
    stall_timeout: Duration,
    /// Runs while the client takes nothing that is there for it.
    stalled: Option<Pin<Box<Sleep>>>,
    /// What heads take.
    count: Arc<Heads>,
}

impl<I> Watched<I> {
    /// A connection of which `start` has been read.
    pub(super) fn new(
        start: Bytes,
        io: I,
        (activity, count): (Arc<Activity>, Arc<Heads>),
        http1: bool,
        stall_timeout: Duration,
    ) -> Self {
        Self { start, io, ended: false, activity, http1, stall_timeout, stalled: None, count }
    }

    /// The connection itself; what was read of it and not used is lost.
    pub(super) fn into_inner(self) -> I {
        self.io
    }

    /// What becomes of a write: an error when it has waited for too long.
    fn progress<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if self.stalled.take().is_some() {
                self.activity.set_stalled(false);
            }
            return written;
        }
        self.activity.set_stalled(true);
        let timeout = self.stall_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl<I: AsyncRead + Unpin> Watched<I> {
    /// Reads into `buf`, and counts what came.
    fn poll_fill(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let came = buf.filled().get(before..).unwrap_or_default();
        if self.http1 && !came.is_empty() {
            self.activity.bytes_came();
        }
        self.count.came(came, self.http1 && !self.activity.has_calls())?;
        Poll::Ready(Ok(()))
    }

    /// Looks for the end of the read side while a call runs whose request has come whole.
    ///
    /// # Errors
    /// The client has reset the connection.
    fn observe(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.http1 || self.ended || self.start.has_remaining() || !self.activity.is_answering()
        {
            return Ok(());
        }
        let mut bytes = [0; READ_AHEAD];
        let mut buf = ReadBuf::new(&mut bytes);
        match self.poll_fill(cx, &mut buf) {
            Poll::Pending => return Ok(()),
            // A TLS client that ends its TCP stream without saying so has ended it all the same.
            Poll::Ready(Err(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(error);
            }
            Poll::Ready(_) => {}
        }
        if buf.filled().is_empty() {
            self.ended = true;
            self.activity.read_side_closed();
        } else {
            self.start = Bytes::copy_from_slice(buf.filled());
        }
        // Whoever waits for bytes finds them here.
        cx.waker().wake_by_ref();
        Ok(())
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.start.has_remaining() {
            let some = self.start.len().min(buf.remaining());
            buf.put_slice(&self.start.split_to(some));
            if self.http1 {
                self.activity.bytes_came();
            }
            return Poll::Ready(Ok(()));
        }
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        self.poll_fill(cx, buf)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.progress(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.progress(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// hyper flushes each time it is polled, also when there is nothing to flush.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.observe(cx)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
