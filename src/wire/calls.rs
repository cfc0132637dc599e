//! The service of one connection: counts its calls, gives each what is known of the connection, and answers
//! requests that break the rules of HTTP.

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tower::Service;

use super::{
    Body,
    activity::{Activity, Connection, Running},
    connection::Inner,
    drain::DrainOnDrop,
    error,
    heads::Heads,
    loopback::ViaLoopback,
    memory::Memory,
    peer::Peer,
    request_rules,
    translate::Refused,
};
use crate::telemetry::rate_limit;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Calls<S> {
    pub(super) inner: S,
    pub(super) activity: Arc<Activity>,
    pub(super) peer: Peer,
    pub(super) log_peer: rate_limit::Peer,
    pub(super) via_loopback: bool,
    pub(super) from_inside: bool,
    pub(super) refused: Option<Refused>,
    pub(super) heads: Arc<Heads>,
    pub(super) memory: Memory,
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
        let large_head = self.heads.ended(head_bytes(&request));
        let running = self.activity.begin();
        let refused = self.refused.clone();
        let http1 = request.version() < Version::HTTP_2;
        let broken = request_rules::check(&request);
        let mut unwanted = None;
        let (parts, body) = request.into_parts();
        let body = match http1 {
            true => {
                let waits = request_rules::waits_for_continue(&parts);
                let body = DrainOnDrop::new(body, self.activity.begin_body(), waits);
                unwanted = body.unwanted();
                Body::new(body)
            }
            false => Body::new(body),
        };
        let mut request = Request::from_parts(parts, body);
        request.extensions_mut().insert(self.peer);
        request.extensions_mut().insert(self.log_peer);
        if self.via_loopback {
            request.extensions_mut().insert(ViaLoopback);
        }
        request.extensions_mut().insert(Unproven(Arc::clone(&self.heads)));
        request.extensions_mut().insert(Connection::new(&self.activity));
        if self.from_inside {
            request.extensions_mut().insert(Inner);
        }
        // A buffer that has grown stays as large as it is.
        let mut close = http1 && (refused.is_some() || large_head);
        if let Some(refused) = refused {
            request.extensions_mut().insert(refused);
        }
        let memory = self.memory.clone();
        let activity = Arc::clone(&self.activity);
        let response = match broken {
            Some(_) => None,
            None => Some(self.inner.clone().call(request)),
        };
        Box::pin(async move {
            let mut response = match (response, broken) {
                // A fault of ours is that call's misfortune, and no other's.
                (Some(response), _) => match AssertUnwindSafe(response).catch_unwind().await {
                    Ok(response) => response?,
                    Err(_) => error::rest(StatusCode::INTERNAL_SERVER_ERROR, "the call failed"),
                },
                (None, Some(broken)) => broken,
                (None, None) => error::rest(StatusCode::BAD_REQUEST, "the request is broken"),
            };
            if unwanted.is_some_and(|body| body.is_unwanted()) {
                // Whether the client sends the body all the same cannot be known, so what comes
                // next on this connection cannot be told from it (RFC 9110, section 10.1.1).
                close = true;
                activity.drain_at_end();
            }
            if close {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok(response.map(|body| CallBody { body, running: Some(running), memory }))
        })
    }
}

/// About how many bytes the head of a request took on HTTP/1.1.
fn head_bytes<B>(request: &Request<B>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let line = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 4;
    target + request.headers().iter().map(line).sum::<usize>()
}

/// A response's body; the call runs until it has been sent.
#[derive(Debug)]
pub(super) struct CallBody {
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
