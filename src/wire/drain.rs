//! Reads the rest of a request that nobody wants, so that its answer arrives.
//!
//! On HTTP/1.1 a server that answers early and closes with unread bytes in its socket makes the
//! kernel send a reset (RFC 9112, section 9.6), and the client may never see the answer. A body
//! that is dropped unread is therefore read on in the background, up to the bounds below; after
//! that the connection is closed. HTTP/2 resets single streams and needs none of this.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// The most bytes that are read for nothing: reading costs little, and an answer beats a reset.
pub const MAX_DRAINED_BYTES: usize = 128 << 20;
/// The longest time for it.
pub const MAX_DRAIN_TIME: Duration = Duration::from_secs(5);

/// An HTTP/1.1 request body that is read on when it is dropped. `G` is held until its end.
///
/// One whose client waits for 100 is read on only if its reading has begun, which makes hyper send the 100.
#[derive(Debug)]
pub struct DrainOnDrop<G: Send + 'static> {
    body: Option<(Incoming, G)>,
    /// Present while the client waits for 100, until the body is read.
    unwanted: Option<Unwanted>,
}

/// Whether a body whose client waits for 100 has not been read.
#[derive(Debug, Clone)]
pub struct Unwanted(Arc<AtomicBool>);

impl Unwanted {
    /// It has not.
    pub fn is_unwanted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<G: Send + 'static> DrainOnDrop<G> {
    /// Wraps a body as hyper gave it; `waits` says that its client waits for 100 before it sends it.
    pub fn new(body: Incoming, guard: G, waits: bool) -> Self {
        let body = (!body.is_end_stream()).then_some((body, guard));
        let unwanted = (waits && body.is_some()).then(|| Unwanted(Arc::new(AtomicBool::new(true))));
        Self { body, unwanted }
    }

    /// What tells whether a body is read for which the client waits; `None` for any other.
    pub fn unwanted(&self) -> Option<Unwanted> {
        self.unwanted.clone()
    }
}

impl<G: Send + Unpin + 'static> Body for DrainOnDrop<G> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(unwanted) = self.unwanted.take() {
            unwanted.0.store(false, Ordering::Release);
        }
        let Some((body, _)) = &mut self.body else {
            return Poll::Ready(None);
        };
        let frame = std::task::ready!(Pin::new(body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), |(body, _)| body.size_hint())
    }
}

impl<G: Send + 'static> Drop for DrainOnDrop<G> {
    fn drop(&mut self) {
        let Some((body, guard)) = self.body.take().filter(|(body, _)| !body.is_end_stream()) else {
            return;
        };
        if self.unwanted.is_some() {
            // To read it would ask for it, or take the next request for it.
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let _ = tokio::time::timeout(MAX_DRAIN_TIME, drain(body)).await;
                drop(guard);
            });
        }
    }
}

async fn drain(mut body: Incoming) {
    use http_body_util::BodyExt;
    let mut drained = 0;
    while let Some(Ok(frame)) = body.frame().await {
        drained += frame.data_ref().map_or(0, Bytes::len);
        if drained > MAX_DRAINED_BYTES {
            return;
        }
    }
}
