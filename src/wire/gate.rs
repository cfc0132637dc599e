//! The token gate: in front of everything but CORS, for every protocol and every socket.
//!
//! | the sandbox | who passes |
//! |---|---|
//! | has a token | who sends it as `X-Access-Token`; trusted peers ([`Trust`]); exempt requests |
//! | has none and is closed | trusted peers, `GET /health`, `POST /init`, and what stands beside them |
//! | has none otherwise | everybody |
//!
//! Exempt are upstream's four (the routes of files check signatures themselves, and `/init` its own
//! token), and of what upstream has not, what only says that the daemon lives and is ready: a
//! kubelet's gRPC probe can send no token.
//!
//! The refusal is upstream's 401, which Connect clients read as `unauthenticated`; native gRPC,
//! which upstream does not speak, gets its own status.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::{Either, Ready, ready};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::task::futures::TaskLocalFuture;
use tonic::Status;
use tower::Service;

use super::{
    Body,
    calls::Unproven,
    error,
    peer::{Peer, Trust},
    protocol::{Framing, Protocol},
    response::Writer,
};
use crate::{
    access::{Access, Verdict},
    telemetry::rate_limit,
};

/// The header with the token; in gRPC, metadata of the same name.
pub const TOKEN_HEADER: &str = "x-access-token";

const UNAUTHORISED: &str =
    "unauthorized access, please provide a valid access token or method signing if supported";
const NOT_INITIALISED: &str = "envd not initialized";

/// In a request's extensions: how its caller has proved to be allowed everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granted {
    /// By the token in the header.
    ByToken,
    /// By being a trusted peer, whatever the header says.
    ByPeer,
}

/// The layer.
#[derive(Debug, Clone)]
pub struct Gate<S> {
    inner: S,
    access: Arc<Access>,
    trust: Arc<Trust>,
}

impl<S> Gate<S> {
    /// A gate in front of `inner`.
    pub fn new(inner: S, access: Arc<Access>, trust: Arc<Trust>) -> Self {
        Self { inner, access, trust }
    }
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<
        TaskLocalFuture<Option<rate_limit::Peer>, S::Future>,
        Ready<Result<Response<Body>, Infallible>>,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Peer>();
        let trusted = peer.is_some_and(|peer| self.trust.includes(*peer));
        let verdict = self.access.verdict(token(request.headers()));
        let (method, path) = (request.method(), request.uri().path());
        let refused = match verdict {
            Verdict::Open | Verdict::Known => None,
            _ if trusted => None,
            Verdict::Unknown if is_exempt(method, path) => None,
            Verdict::Unknown => Some(UNAUTHORISED),
            Verdict::NotInitialised if is_open_before_init(method, path) => None,
            Verdict::NotInitialised => Some(NOT_INITIALISED),
        };
        if let Some(why) = refused {
            return Either::Right(ready(Ok(refuse(request.headers(), why))));
        }
        // Who has shown nothing may not fill the log, whatever the request comes to.
        let stranger = match verdict {
            _ if trusted => None,
            Verdict::Known => None,
            Verdict::Open if path != "/init" => None,
            _ => request.extensions().get::<rate_limit::Peer>().copied(),
        };
        if stranger.is_none()
            && let Some(unproven) = request.extensions().get::<Unproven>()
        {
            unproven.proven();
        }
        if trusted {
            request.extensions_mut().insert(Granted::ByPeer);
        } else if verdict == Verdict::Known {
            request.extensions_mut().insert(Granted::ByToken);
        }
        Either::Left(rate_limit::of_peer(stranger, self.inner.call(request)))
    }
}

/// The token that a request presents.
pub fn token(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes)
}

/// Passes without the token.
fn is_exempt(method: &Method, path: &str) -> bool {
    is_probe(method, path)
        || matches!((method.as_str(), path), ("GET" | "POST", "/files") | ("POST", "/init"))
}

/// Passes before the first initialisation.
fn is_open_before_init(method: &Method, path: &str) -> bool {
    let is_init = matches!(path, "/init" | "/envd.v1.System/Sync");
    is_probe(method, path) || (is_init && method == Method::POST)
}

/// Whether it only asks if the daemon lives and is ready.
pub(super) fn is_probe(method: &Method, path: &str) -> bool {
    matches!(
        (method.as_str(), path),
        ("GET", "/health" | "/livez") | ("POST", "/grpc.health.v1.Health/Check")
    )
}

fn refuse(headers: &HeaderMap, why: &'static str) -> Response<Body> {
    match Protocol::of(headers) {
        Some(protocol) if protocol.framing == Framing::Grpc => {
            Writer::plain(protocol).error(&Status::unauthenticated(why))
        }
        _ => error::rest(StatusCode::UNAUTHORIZED, why),
    }
}
