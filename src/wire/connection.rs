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
//!   newcomer ([`super::eviction`]), else the one whose client has taken nothing for longest: it gives up its
//!   place at once, and has [`super::EVICTED_TIME`] to read on, for its streams to their error. Where there
//!   is neither, a call of the newcomer is answered with `unavailable` or 503.

use std::{convert::Infallible, io, pin::Pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tower::Service;

use super::{
    Body, EVICTED_TIME, HEADER_TIMEOUT, Limits, MAX_CONCURRENT_STREAMS, MAX_EVICTED,
    MAX_HEADER_BYTES, MAX_HEADER_LINES, MAX_SEND_BUFFER,
    activity::{Activity, Waiting, Why},
    calls::Calls,
    drain::{MAX_DRAIN_TIME, MAX_DRAINED_BYTES},
    heads::Heads,
    memory::Memory,
    peer::Peer,
    translate::Refused,
    watched_io::Watched,
};
use crate::telemetry::rate_limit;

/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const REQUEST_TIMEOUT: &[u8] =
    b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// How often HTTP/2 clients are asked whether they are there. They may take as long to answer as they may
/// take nothing: a client that is stopped for a while answers when it goes on. TCP finds out by itself whether
/// the client's machine is there.
const PING_INTERVAL: Duration = Duration::from_secs(60);

/// The most that HTTP/1.1 buffers of a request and of an answer: a head, and what it takes to find its end.
const MAX_HTTP1_BUFFER: usize = MAX_HEADER_BYTES + (32 << 10);

/// The connections that read on without a place.
static EVICTED: Semaphore = Semaphore::const_new(MAX_EVICTED);

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
    let counted = (Arc::clone(&activity), Arc::clone(&heads));
    let io = Watched::new(start, io, counted, !http2, limits.stall_timeout);
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
    let mut slot = Some(place.slot);
    let io = TokioIo::new(io);
    if http2 {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .max_send_buf_size(MAX_SEND_BUFFER)
            .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).unwrap_or(u32::MAX))
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(limits.stall_timeout);
        let connection = std::pin::pin!(builder.serve_connection(io, service));
        supervise(connection, &activity, limits, shutdown, &mut slot, |connection| {
            connection.graceful_shutdown();
        })
        .await;
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            // Without it a client that closes its sending side behind a request gets no answer.
            .half_close(true)
            .max_header_size(MAX_HEADER_BYTES)
            .max_headers(MAX_HEADER_LINES)
            .max_buf_size(MAX_HTTP1_BUFFER);
        let mut connection = builder.serve_connection(io, service);
        let late =
            supervise(Pin::new(&mut connection), &activity, limits, shutdown, &mut slot, |it| {
                it.graceful_shutdown();
            })
            .await;
        if late {
            let mut io = connection.into_parts().io.into_inner();
            let _ = tokio::time::timeout(HEADER_TIMEOUT, io.write_all(REQUEST_TIMEOUT)).await;
            let _ = io.shutdown().await;
        } else if activity.is_drained_at_end() {
            let io = connection.into_parts().io.into_inner().into_inner();
            let _ = tokio::time::timeout(MAX_DRAIN_TIME, discard(io)).await;
        }
    }
    drop(slot);
    memory.freed();
}

/// Runs a connection; true when it is to be told that its request came too slowly.
async fn supervise<C>(
    mut connection: Pin<&mut C>,
    activity: &Activity,
    limits: &Limits,
    mut shutdown: watch::Receiver<bool>,
    slot: &mut Option<Slot>,
    close: impl Fn(Pin<&mut C>),
) -> bool
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut closing = false;
    // Held, with the end of its time, by a connection that has given up its place.
    let mut without_slot = None;
    loop {
        let timer = activity.timer(limits);
        let without_slot_until = without_slot.as_ref().map(|(at, _)| *at);
        let expired = async {
            if let Some(at) = without_slot_until {
                // What was sent is given time to be read, also when its call has ended.
                return tokio::time::sleep_until(at).await;
            }
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
            () = activity.changed.notified() => if let Some(why) = activity.eviction()
                && !closing
            {
                closing = true;
                // Its streams may have ended by now, and what is left of them waits for the client.
                if activity.is_stalled() {
                    let permit = EVICTED.try_acquire().ok().filter(|_| why == Why::Place);
                    let Some(permit) = permit else {
                        tracing::debug!("connection closed for others: its client takes nothing");
                        return false;
                    };
                    without_slot = Some((Instant::now() + EVICTED_TIME, permit));
                    drop(slot.take());
                }
                close(connection.as_mut());
            },
            () = expired => match timer {
                _ if without_slot_until.is_some() => return false,
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

/// Reads what a client sends that nobody wants: unread bytes would make the kernel reset the connection, and
/// the client might not see its answer.
async fn discard(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    // hyper has flushed the answer, or has failed to.
    if io.shutdown().await.is_ok() {
        let mut unwanted = io.take(MAX_DRAINED_BYTES as u64);
        let _ = tokio::io::copy(&mut unwanted, &mut tokio::io::sink()).await;
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
