//! The layer, and what it says of a request.

use std::{
    collections::HashSet,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Either};
use http::{HeaderMap, Method as HttpMethod, Request, Response, Version};
use http_body::{Frame, SizeHint};
use opentelemetry::{
    propagation::{Extractor, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Code;
use tower::{Layer, Service};
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::super::{
    Body,
    methods::Methods,
    peer::Peer,
    protocol::{Framing, Protocol},
};

/// The target of spans: nobody but OpenTelemetry's layer looks at it.
pub const TARGET: &str = "request";

/// The longest `tracestate` that is passed on, in bytes (W3C Trace Context, section 3.3.1.5, demands
/// as many): it waits in the queue with its span.
const MAX_TRACESTATE: usize = 512;

/// The layer.
#[derive(Debug, Clone)]
pub struct Requests {
    names: Arc<Names>,
}

/// What spans may be called.
#[derive(Debug)]
struct Names {
    methods: HashSet<String>,
    routes: HashSet<&'static str>,
}

impl Requests {
    /// Of these methods and routes.
    pub fn new(methods: &Methods, routes: &[&'static str]) -> Self {
        let methods = methods.paths().map(|path| path.trim_start_matches('/').to_owned()).collect();
        Self { names: Arc::new(Names { methods, routes: routes.iter().copied().collect() }) }
    }
}

impl<S> Layer<S> for Requests {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner, names: Arc::clone(&self.names) }
    }
}

/// A service whose requests are spans.
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
    names: Arc<Names>,
}

impl<S> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, BoxFuture<'static, Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let span = span(&self.names, &request);
        if span.is_disabled() {
            return Either::Left(self.inner.call(request));
        }
        // Within the span, so that what is logged at once belongs to it.
        let response = span.in_scope(|| self.inner.call(request));
        let ending = Ending { span, told: false };
        Either::Right(Box::pin(async move {
            let response = response.instrument(ending.span.clone()).await?;
            let status = response.status();
            ending.span.record("http.response.status_code", status.as_u16());
            if status.is_server_error() {
                ending.span.record("otel.status_code", "ERROR");
            }
            Ok(response.map(|body| Body::new(TracedBody { body, ending })))
        }))
    }
}

/// The span of a request, disabled if nobody wants it.
fn span(names: &Names, request: &Request<Body>) -> Span {
    // The daemon's own question whether it lives comes from no socket.
    let Some(peer) = request.extensions().get::<Peer>() else { return Span::none() };
    let path = request.uri().path();
    let span = match names.methods.get(path.trim_start_matches('/')) {
        Some(method) if path.starts_with('/') => rpc(method, request, *peer),
        _ => http(names.routes.get(path).copied(), request, *peer),
    };
    if !span.is_disabled() {
        let parent = TraceContextPropagator::new().extract(&Caller(request.headers()));
        if parent.span().span_context().is_valid() {
            // Fails only for a span that has begun.
            let _ = span.set_parent(parent);
        }
    }
    span
}

fn rpc(method: &str, request: &Request<Body>, peer: Peer) -> Span {
    let protocol = Protocol::of(request.headers());
    let system = match protocol.map(|protocol| protocol.framing) {
        Some(Framing::Grpc) => "grpc",
        Some(Framing::GrpcWeb { .. }) => "grpc_web",
        Some(Framing::ConnectUnary | Framing::ConnectStream) => "connectrpc",
        None => "unknown",
    };
    tracing::info_span!(
        target: TARGET,
        "rpc",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        error.type = Empty,
        rpc.system.name = system,
        rpc.method = method,
        rpc.response.status_code = Empty,
        http.response.status_code = Empty,
        network.transport = transport(peer),
        network.protocol.version = version(request.version()),
    )
}

fn http(route: Option<&'static str>, request: &Request<Body>, peer: Peer) -> Span {
    let method = known(request.method());
    let name = match route {
        Some(route) => format!("{method} {route}"),
        None => method.to_owned(),
    };
    tracing::info_span!(
        target: TARGET,
        "http",
        otel.name = name,
        otel.kind = "server",
        otel.status_code = Empty,
        error.type = Empty,
        http.request.method = method,
        http.route = route,
        http.response.status_code = Empty,
        network.transport = transport(peer),
        network.protocol.version = version(request.version()),
    )
}

/// A method that HTTP knows; others are the caller's text.
fn known(method: &HttpMethod) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "_OTHER",
    }
}

fn transport(peer: Peer) -> &'static str {
    match peer {
        Peer::Tcp | Peer::Tls { .. } => "tcp",
        Peer::Unix { .. } => "unix",
        Peer::Vsock { .. } => "vsock",
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "2",
        Version::HTTP_10 => "1.0",
        _ => "1.1",
    }
}

/// The outcome of the RPC whose span this is.
pub fn rpc_ended(code: Code) {
    let span = Span::current();
    if span.is_disabled() {
        return;
    }
    span.record("rpc.response.status_code", name(code));
    // Those for which the server is to blame (semantic conventions for gRPC).
    if matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    ) {
        span.record("otel.status_code", "ERROR");
    }
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// What a caller says of its trace.
struct Caller<'a>(&'a HeaderMap);

impl Extractor for Caller<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?.to_str().ok()?;
        (key != "tracestate" || value.len() <= MAX_TRACESTATE).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// The end of a span, whether or not the client waits for it.
struct Ending {
    span: Span,
    /// Whether all of the answer has been given.
    told: bool,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.told {
            self.span.record("error.type", "cancelled");
            self.span.record("rpc.response.status_code", name(Code::Cancelled));
        }
    }
}

/// A response's body, sent within its span. The span ends with it.
struct TracedBody {
    body: Body,
    ending: Ending,
}

impl http_body::Body for TracedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let _within = this.ending.span.enter();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        // Whoever sends it asks for nothing behind trailers, or behind the last byte of a body whose
        // length is known.
        let is_last = match &frame {
            None => true,
            Some(Ok(frame)) => frame.is_trailers() || this.body.is_end_stream(),
            Some(Err(_)) => false,
        };
        this.ending.told |= is_last;
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for TracedBody {
    fn drop(&mut self) {
        // An empty one is never asked for.
        self.ending.told |= http_body::Body::is_end_stream(&self.body);
    }
}
