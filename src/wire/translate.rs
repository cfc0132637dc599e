//! The layer that lets gRPC, gRPC-Web and Connect clients call the same tonic services.
//!
//! A request to a path of the method table is translated; any other is passed on as it is, for the
//! REST routes. Errors before the service runs:
//!
//! | what | answer |
//! |---|---|
//! | unknown method, gRPC or gRPC-Web | `unimplemented` |
//! | unknown method of a known service, else | 404, as upstream |
//! | not POST | 405 with `Allow` |
//! | content type that the method has not | 415 with `Accept-Post` |
//! | gRPC over HTTP/1.0, or over HTTP/1.1 without `TE: trailers` | 505: no trailers could be sent |
//! | `Connect-Protocol-Version` other than 1, a bad timeout, unknown compression | in the caller's protocol |

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as HttpMethod, Request, Response, StatusCode,
    Version, header,
};
use tokio::time::Instant;
use tonic::Status;
use tower::Service;

use super::{
    Body, Limits, MAX_ORDINARY_BYTES, MESSAGE_STALL,
    activity::Connection,
    budget::Share,
    codec,
    envelope::Encoding,
    error,
    extensions::{self, Extensions},
    gate,
    memory::Memory,
    metadata::ResponseMetadata,
    methods::{Method, Methods},
    offload::Offload,
    protocol::{self, Framing, Protocol},
    request::Reader,
    response::{Writer, departed_status, response_with},
    shutdown::{self, Phase, Phases, SHUTTING_DOWN},
    timeout,
};

/// In a request's extensions: its connection is one too many, and the text to say so.
#[derive(Debug, Clone)]
pub struct Refused(pub Arc<str>);

/// The layer.
#[derive(Debug, Clone)]
pub struct Translate<S> {
    inner: S,
    methods: Arc<Methods>,
    message_bytes: usize,
    stall_timeout: Duration,
    memory: Memory,
    phases: Phases,
}

impl<S> Translate<S> {
    /// Translates calls to `methods` for `inner`, with messages within `limits`, and ends them as
    /// `phases` say.
    pub fn new(
        inner: S,
        methods: Methods,
        limits: &Limits,
        memory: &Memory,
        phases: Phases,
    ) -> Self {
        Self {
            inner,
            methods: Arc::new(methods),
            message_bytes: limits.message_bytes,
            stall_timeout: limits.stall_timeout.min(MESSAGE_STALL),
            memory: memory.clone(),
            phases,
        }
    }
}

impl<S> Service<Request<Body>> for Translate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.recognise(&request) {
            Ok(Some(call)) => {
                let decoders = Arc::clone(self.memory.decoders());
                Box::pin(Offload::new(decoders, call.run(self.inner.clone(), request)))
            }
            Ok(None) => {
                let protocol = Protocol::of(request.headers());
                let (ending, call) = (self.phases.reached(Phase::Ending), self.inner.call(request));
                Box::pin(async move {
                    tokio::select! {
                        biased;
                        response = call => response,
                        () = ending => Ok(refuse(protocol, SHUTTING_DOWN)),
                    }
                })
            }
            Err(response) => Box::pin(async { Ok(*response) }),
        }
    }
}

/// A recognised call.
struct Call {
    method: Method,
    protocol: Protocol,
    message_bytes: usize,
    stall_timeout: Duration,
    share: Share,
    methods: Arc<Methods>,
    phases: Phases,
    extensions: Extensions,
}

impl<S> Translate<S> {
    /// The call that a request is, `None` if it is no RPC, or the answer that it gets instead.
    fn recognise(&self, request: &Request<Body>) -> Result<Option<Call>, Box<Response<Body>>> {
        let path = request.uri().path();
        let protocol = Protocol::of(request.headers());
        if let Some(Refused(why)) = request.extensions().get()
            && !gate::is_probe(request.method(), path)
        {
            return Err(Box::new(refuse(protocol, why)));
        }
        if self.phases.is(Phase::Draining) {
            return Err(Box::new(refuse(protocol, SHUTTING_DOWN)));
        }
        let Some(method) = self.methods.get(path) else {
            return match protocol {
                Some(protocol) if !protocol.is_connect() => {
                    let status = Status::unimplemented(format!("unknown method {path}"));
                    Err(Box::new(Writer::plain(protocol).error(&status)))
                }
                _ if self.methods.has_service_of(path) => Err(Box::new(error::not_found())),
                _ => Ok(None),
            };
        };
        if request.method() != HttpMethod::POST {
            return Err(Box::new(plain(
                StatusCode::METHOD_NOT_ALLOWED,
                header::ALLOW,
                HeaderValue::from_static("POST"),
            )));
        }
        let Some(protocol) = protocol.filter(|protocol| protocol.fits(method)) else {
            let accepted = HeaderValue::try_from(protocol::accepted(method));
            return Err(Box::new(plain(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                HeaderName::from_static("accept-post"),
                accepted.unwrap_or(HeaderValue::from_static("")),
            )));
        };
        if protocol.framing == Framing::Grpc && !takes_trailers(request) {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
            return Err(Box::new(response));
        }
        let native = protocol.framing == Framing::Grpc && request.version() >= Version::HTTP_2;
        let asked = native || method.extension || extensions::asked_by(request.headers());
        Ok(Some(Call {
            extensions: Extensions::new(asked),
            method,
            protocol,
            message_bytes: match method.large {
                true => self.message_bytes,
                false => self.message_bytes.min(MAX_ORDINARY_BYTES),
            },
            stall_timeout: self.stall_timeout,
            share: self.memory.requests().share(),
            methods: Arc::clone(&self.methods),
            phases: self.phases.clone(),
        }))
    }
}

impl Call {
    async fn run<S>(
        self,
        mut inner: S,
        request: Request<Body>,
    ) -> Result<Response<Body>, Infallible>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        let metadata = ResponseMetadata::default();
        let (mut parts, body) = request.into_parts();
        let mut writer = Writer {
            metadata: metadata.clone(),
            announces_trailers: parts.version < Version::HTTP_2,
            ..Writer::plain(self.protocol.clone())
        };
        let (encoding, timeout) = match self.negotiate(&parts.headers, &mut writer) {
            Ok(negotiated) => negotiated,
            Err(status) => return Ok(writer.error(&status)),
        };
        writer.deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let deadline = writer.deadline;
        let ends_at = self.method.ends_at();
        writer.ends = Some(self.phases.reached(ends_at));
        let ends = self.phases.reached(ends_at);
        let connection = parts.extensions.get::<Connection>();
        let events = connection.filter(|_| self.method.is_events());
        writer.departed = events.map(Connection::read_closed);
        let departed = events.map(Connection::read_closed);
        let stream = connection.filter(|_| self.method.server_stream);
        writer.evicted = stream.map(Connection::evicted);
        let reader = Reader {
            protocol: self.protocol.clone(),
            encoding,
            limit: self.message_bytes,
            stall_timeout: self.stall_timeout,
            methods: Arc::clone(&self.methods),
            method: self.method,
        };
        let mut share = self.share;

        let call = async move {
            // A stream holds its share as long as it is read, a single message until it is
            // answered.
            let (body, share) = match self.method.client_stream {
                true => (reader.stream(body, share), None),
                false => match reader.single(body, &mut share).await {
                    Ok(body) => (body, Some(share)),
                    Err(status) => return Ok(writer.error(&status)),
                },
            };
            parts.version = Version::HTTP_2;
            as_grpc(&mut parts.headers);
            parts.extensions.insert(metadata);
            parts.extensions.insert(self.extensions.clone());
            let request = Request::from_parts(parts, body);
            let call = inner.call(request);
            let response = codec::scope(self.protocol.format, self.extensions, call).await?;
            // One message that is answered borrows what the request has borrowed.
            writer.share = share.filter(|_| !self.method.server_stream);
            Ok(writer.response(response).await)
        };
        let exceeded = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let departed = async {
            match departed {
                Some(departed) => departed.await,
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            biased;
            response = call => return response,
            () = exceeded => timeout::exceeded(),
            () = ends => shutdown::status(),
            () = departed => departed_status(),
        };
        Ok(Writer::plain(self.protocol).error(&status))
    }

    /// The request's compression and the time it has.
    fn negotiate(
        &self,
        headers: &HeaderMap,
        writer: &mut Writer,
    ) -> Result<(Encoding, Option<Duration>), Status> {
        let timeout = if self.protocol.is_connect() {
            match headers.get("connect-protocol-version") {
                // Proxies that clear a header leave it empty.
                Some(version) if !matches!(version.as_bytes(), b"" | b"1") => {
                    return Err(Status::invalid_argument(format!(
                        "connect-protocol-version must be \"1\": got {version:?}"
                    )));
                }
                _ => timeout::connect(headers)?,
            }
        } else {
            timeout::grpc(headers)?
        };
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(timeout::exceeded());
        }
        let (own, accepted) = self.protocol.encoding_headers();
        let encoding = headers.get(own).map_or(Ok(""), |name| name.to_str());
        let encoding = Encoding::of_request(encoding.unwrap_or("not a name"))?;
        writer.encoding = match headers.contains_key(accepted) {
            true => Encoding::of_response(
                headers.get_all(accepted).iter().filter_map(|list| list.to_str().ok()),
            ),
            false => encoding,
        };
        Ok((encoding, timeout))
    }
}

/// Whether the status of a gRPC call can be sent behind the messages. In HTTP/1.1 that needs a chunked body
/// and a client that says that it reads trailers; every gRPC client does, as the protocol demands.
fn takes_trailers<B>(request: &Request<B>) -> bool {
    if request.version() >= Version::HTTP_2 {
        return true;
    }
    let lists = request.headers().get_all(header::TE).iter();
    let mut tokens = lists.filter_map(|list| list.to_str().ok()).flat_map(|list| list.split(','));
    request.version() == Version::HTTP_11
        && tokens.any(|token| token.trim().eq_ignore_ascii_case("trailers"))
}

/// Replaces what describes the client's framing by what describes ours.
fn as_grpc(headers: &mut HeaderMap) {
    for name in [
        "accept-encoding",
        "connect-accept-encoding",
        "connect-content-encoding",
        "content-encoding",
        "content-length",
        "grpc-accept-encoding",
        "grpc-encoding",
        "transfer-encoding",
    ] {
        headers.remove(name);
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
}

fn plain(status: StatusCode, name: HeaderName, value: HeaderValue) -> Response<Body> {
    response_with(status, HeaderMap::from_iter([(name, value)]), Body::empty())
}

fn refuse(protocol: Option<Protocol>, why: &str) -> Response<Body> {
    match protocol {
        Some(protocol) => Writer::plain(protocol).error(&Status::unavailable(why)),
        None => error::rest(StatusCode::SERVICE_UNAVAILABLE, why),
    }
}
