//! One connection, from its first byte to its last: which HTTP it speaks, and how long it may take.
//!
//! * The first bytes decide between HTTP/2 with prior knowledge and HTTP/1.1. A client that sends
//!   too few to tell is let go after the header timeout.
//! * An HTTP/1.1 request head that has begun must be complete within the header timeout, else 408.
//!   hyper's own timer cannot serve: it also runs while a kept-alive connection is idle, which here
//!   may last [`super::IDLE_TIMEOUT`].
//! * A connection without a call is closed after the idle timeout. One timer an idle connection,
//!   none while calls run.
//! * A client that takes nothing of what is there for it for [`super::STALL_TIMEOUT`] is let go.
//! * At the limit on connections the one that has been without a call for longest is closed for a
//!   newcomer ([`super::eviction`]); where there is none, a call of the newcomer is answered with
//!   `unavailable` or 503.

use std::{
    convert::Infallible,
    io,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::{Frame, SizeHint};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::{OwnedSemaphorePermit, watch},
    time::Sleep,
};
use tower::Service;

use super::{
    Body, HEADER_TIMEOUT, Limits, MAX_CONCURRENT_STREAMS, MAX_HEADER_BYTES, MAX_HEADER_LINES,
    MAX_SEND_BUFFER,
    activity::{Activity, Running, Waiting},
    drain::DrainOnDrop,
    error,
    heads::Heads,
    loopback::ViaLoopback,
    memory::Memory,
    peer::Peer,
    translate::Refused,
};
use crate::telemetry::rate_limit;

/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const REQUEST_TIMEOUT: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// How often HTTP/2 clients are asked whether they are there, and how long they may take to
/// answer. A client that vanished without closing would hold its calls for ever.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// The most that HTTP/1.1 buffers of a request and of an answer: a head, and what it takes to find its end.
const MAX_HTTP1_BUFFER: usize = MAX_HEADER_BYTES + (32 << 10);

/// How long a connection without a call may take to end once that was asked of it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for one that makes room for another.
const EVICTION_TIMEOUT: Duration = Duration::from_millis(200);

/// In a request's extensions: its caller is a program of this machine ([`super::KEPT_SHARE`]).
#[derive(Debug, Clone, Copy)]
pub struct Inner;

/// One of the connections that there may be.
#[derive(Debug)]
pub struct Slot {
    /// Of all; held, and never looked at.
    #[allow(dead_code)]
    pub(super) all: OwnedSemaphorePermit,
    /// Of those for peers of this machine, if it is one.
    pub(super) inner: Option<OwnedSemaphorePermit>,
}

/// The client's place on a connection.
#[derive(Debug)]
pub struct Place {
    /// Held while the connection lives.
    pub slot: Slot,
    /// Who is at the other end.
    pub peer: Peer,
    /// Whose log lines those of its requests are.
    pub log_peer: rate_limit::Peer,
    /// Whether it is over a listener that is bound to a loopback address.
    pub via_loopback: bool,
    /// Present when the connection is one too many.
    pub refused: Option<Refused>,
    /// What the heads of its requests borrow from, and what notes its end.
    pub memory: Memory,
    /// What happens on it, which others may look at.
    pub(super) activity: Arc<Activity>,
}

/// Serves one connection until it ends; on `shutdown` after its running calls.
pub async fn serve<I, S>(
    mut io: I,
    service: S,
    place: Place,
    limits: &Limits,
    shutdown: watch::Receiver<bool>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let activity = place.activity;
    let heads = Arc::new(Heads::new(place.memory.unproven(place.slot.inner.is_some())));
    let sniffed = tokio::select! {
        sniffed = tokio::time::timeout(limits.header_timeout, sniff(&mut io)) => sniffed,
        () = activity.evicted() => return tracing::debug!("connection closed for another one"),
    };
    let start = match sniffed {
        Ok(Ok(start)) => start,
        Ok(Err(error)) => return tracing::debug!(%error, "connection closed before a request"),
        Err(_) => return tracing::debug!("connection closed: no request within the time for one"),
    };
    let http2 = start.starts_with(PREFACE);
    if http2 {
        // A client that says hello and calls later is idle, not slow.
        activity.rest();
        heads.http2();
    }
    let io = Watched {
        io: Rewound { start, io },
        activity: Arc::clone(&activity),
        heads: !http2,
        stall_timeout: limits.stall_timeout,
        stalled: None,
        count: Arc::clone(&heads),
    };
    let service = Calls {
        inner: service,
        activity: Arc::clone(&activity),
        peer: place.peer,
        log_peer: place.log_peer,
        via_loopback: place.via_loopback,
        from_inside: place.slot.inner.is_some(),
        refused: place.refused,
        heads,
        memory: place.memory.clone(),
    };
    let memory = place.memory;
    let io = TokioIo::new(io);
    if http2 {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .max_send_buf_size(MAX_SEND_BUFFER)
            .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).unwrap_or(u32::MAX))
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        let connection = std::pin::pin!(builder.serve_connection(io, service));
        supervise(connection, &activity, limits, shutdown, |connection| {
            connection.graceful_shutdown();
        })
        .await;
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .max_header_size(MAX_HEADER_BYTES)
            .max_headers(MAX_HEADER_LINES)
            .max_buf_size(MAX_HTTP1_BUFFER);
        let mut connection = builder.serve_connection(io, service);
        let late =
            supervise(Pin::new(&mut connection), &activity, limits, shutdown, |connection| {
                connection.graceful_shutdown();
            })
            .await;
        if late {
            let mut io = connection.into_parts().io.into_inner();
            let _ = tokio::time::timeout(HEADER_TIMEOUT, io.write_all(REQUEST_TIMEOUT)).await;
            let _ = io.shutdown().await;
        }
    }
    drop(place.slot);
    memory.freed();
}

/// Runs a connection; true when it is to be told that its request came too slowly.
async fn supervise<C>(
    mut connection: Pin<&mut C>,
    activity: &Activity,
    limits: &Limits,
    mut shutdown: watch::Receiver<bool>,
    close: impl Fn(Pin<&mut C>),
) -> bool
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut closing = false;
    loop {
        let timer = activity.timer(limits);
        let expired = async {
            match timer {
                // The end that was announced is given time to be read.
                Some(_) if closing && activity.is_evicted() => {
                    tokio::time::sleep(EVICTION_TIMEOUT).await;
                }
                Some(_) if closing => tokio::time::sleep(CLOSE_TIMEOUT).await,
                Some((at, _)) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                }
                return false;
            }
            () = activity.changed.notified() => if activity.is_evicted() && !closing {
                closing = true;
                close(connection.as_mut());
            },
            () = expired => match timer {
                // The state may have changed while the timer fired.
                now if now != activity.timer(limits) => {}
                Some((_, Waiting::ForHead)) => return true,
                _ if closing => return false,
                _ => {
                    closing = true;
                    close(connection.as_mut());
                }
            },
            _ = shutdown.wait_for(|stop| *stop), if !closing => {
                closing = true;
                close(connection.as_mut());
            }
        }
    }
}

/// Reads until the client's HTTP version is known.
async fn sniff(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut start = BytesMut::with_capacity(PREFACE.len());
    while start.len() < PREFACE.len() && PREFACE.starts_with(&start) {
        let wanted = PREFACE.len() - start.len();
        if (&mut *io).take(wanted as u64).read_buf(&mut start).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(start.freeze())
}

/// A connection whose first bytes were read already.
#[derive(Debug)]
struct Rewound<I> {
    start: Bytes,
    io: I,
}

/// Sees bytes arrive on an HTTP/1.1 connection.
#[derive(Debug)]
struct Watched<I> {
    io: Rewound<I>,
    activity: Arc<Activity>,
    heads: bool,
    /// See [`super::STALL_TIMEOUT`].
    stall_timeout: Duration,
    /// Runs while the client takes nothing that is there for it.
    stalled: Option<Pin<Box<Sleep>>>,
    /// What heads take.
    count: Arc<Heads>,
}

impl<I> Watched<I> {
    /// What becomes of a write: an error when it has waited for too long.
    fn progress<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.stall_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.io.start.has_remaining() {
            let some = self.io.start.len().min(buf.remaining());
            buf.put_slice(&self.io.start.split_to(some));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io.io).poll_read(cx, buf))?;
        let came = buf.filled().get(before..).unwrap_or_default();
        if self.heads && !came.is_empty() {
            self.activity.bytes_came();
        }
        self.count.came(came, self.heads && !self.activity.has_calls())?;
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io.io).poll_write(cx, bytes);
        self.progress(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io.io).poll_write_vectored(cx, slices);
        self.progress(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io.io).poll_shutdown(cx)
    }
}

/// The service of one connection: counts its calls.
#[derive(Debug, Clone)]
struct Calls<S> {
    inner: S,
    activity: Arc<Activity>,
    peer: Peer,
    log_peer: rate_limit::Peer,
    via_loopback: bool,
    from_inside: bool,
    refused: Option<Refused>,
    heads: Arc<Heads>,
    memory: Memory,
}

/// In a request's extensions: what to tell when its caller has shown the token.
#[derive(Debug, Clone)]
pub(super) struct Unproven(Arc<Heads>);

impl Unproven {
    /// The caller has shown it.
    pub(super) fn proven(&self) {
        self.0.proven();
    }
}

impl<S> hyper::service::Service<Request<Incoming>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
    S::Future: Send + 'static,
{
    type Response = Response<CallBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<CallBody>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let large_head = self.heads.ended();
        let running = self.activity.begin();
        let refused = self.refused.clone();
        let http1 = request.version() < Version::HTTP_2;
        let mut request = request.map(|body| match http1 {
            true => Body::new(DrainOnDrop::new(body, self.activity.begin())),
            false => Body::new(body),
        });
        request.extensions_mut().insert(self.peer);
        request.extensions_mut().insert(self.log_peer);
        if self.via_loopback {
            request.extensions_mut().insert(ViaLoopback);
        }
        request.extensions_mut().insert(Unproven(Arc::clone(&self.heads)));
        if self.from_inside {
            request.extensions_mut().insert(Inner);
        }
        // A buffer that has grown stays as large as it is.
        let close = http1 && (refused.is_some() || large_head);
        if let Some(refused) = refused {
            request.extensions_mut().insert(refused);
        }
        let memory = self.memory.clone();
        let response = self.inner.clone().call(request);
        Box::pin(async move {
            // A fault of ours is that call's misfortune, and no other's.
            let mut response = match AssertUnwindSafe(response).catch_unwind().await {
                Ok(response) => response?,
                Err(_) => error::rest(StatusCode::INTERNAL_SERVER_ERROR, "the call failed"),
            };
            if close {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok(response.map(|body| CallBody { body, running: Some(running), memory }))
        })
    }
}

/// A response's body; the call runs until it has been sent.
#[derive(Debug)]
struct CallBody {
    body: Body,
    running: Option<Running>,
    memory: Memory,
}

impl Drop for CallBody {
    fn drop(&mut self) {
        self.memory.freed();
    }
}

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() {
            self.running = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
