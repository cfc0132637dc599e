//! A service's gRPC response in the protocol that the client speaks.
//!
//! tonic answers either with headers that hold the final status already ("Trailers-Only") or with
//! a body of envelopes and trailers. Both become `Answer`, and from that each protocol is
//! written. Messages are passed on as they come, one flush each: nothing is buffered here.

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, response};
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::{
    Body,
    budget::Share,
    envelope::{self, COMPRESSED, END_STREAM, Encoding, MIN_COMPRESSED_BYTES, Splitter, TRAILERS},
    error, memory,
    metadata::{ResponseMetadata, append_all},
    protocol::{Framing, Protocol},
    shutdown::{self, Reached},
    spans, timeout,
};

/// Tells nginx, and proxies that follow it, to pass each message on as it comes.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
const GZIP: HeaderValue = HeaderValue::from_static("gzip");
/// Headers that tonic sets for itself and that each protocol says in its own way.
const OWN_HEADERS: [&str; 5] =
    ["content-type", "grpc-status", "grpc-message", "grpc-status-details-bin", "grpc-encoding"];

/// The trailers that tell the outcome of a gRPC call.
const STATUS_TRAILERS: [&str; 3] = ["grpc-status", "grpc-message", "grpc-status-details-bin"];

/// The most bytes of a status message, as it is written in a header.
const MAX_STATUS_MESSAGE: usize = 4 << 10;

/// How to write one response.
pub struct Writer {
    /// The protocol to write.
    pub protocol: Protocol,
    /// How to compress messages.
    pub encoding: Encoding,
    /// What the handler adds.
    pub metadata: ResponseMetadata,
    /// When the call's time is over.
    pub deadline: Option<Instant>,
    /// What the answer borrows from, where it is one message.
    pub share: Option<Share>,
    /// When a call ends because the daemon does, if it may.
    pub(super) ends: Option<Reached>,
    /// Whether the names of gRPC's trailers have to be in the head, as HTTP/1.1 wants it.
    pub announces_trailers: bool,
    /// When a stream of events ends because its client has closed its sending side, if it may.
    pub(super) departed: Option<Reached>,
    /// When a stream ends because its client has stalled and others need the connection.
    pub(super) evicted: Option<Reached>,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// In the extensions of a service's response: it is one message without an error, of so many bytes behind
/// the envelope's head, which comes as a frame of its own. It is passed on as it comes, not collected.
#[derive(Debug, Clone, Copy)]
pub struct Prepared {
    /// The length of the message.
    pub length: usize,
}

impl Writer {
    /// A writer for errors that come before a handler.
    pub fn plain(protocol: Protocol) -> Self {
        Self {
            protocol,
            encoding: Encoding::Identity,
            metadata: ResponseMetadata::default(),
            deadline: None,
            share: None,
            ends: None,
            announces_trailers: false,
            departed: None,
            evicted: None,
        }
    }

    /// A call that failed before its service could answer.
    pub fn error(self, status: &Status) -> Response<Body> {
        let mut trailers = HeaderMap::new();
        if let Err(error) = status.add_header(&mut trailers) {
            tracing::warn!(%error, "status cannot be written");
        }
        self.finished(HeaderMap::new(), trailers)
    }

    /// What the service answered.
    pub async fn response(mut self, response: Response<Body>) -> Response<Body> {
        let (parts, body) = response.into_parts();
        let prepared = parts.extensions.get::<Prepared>().copied();
        if prepared.is_some() {
            // To compress it, it would have to be in memory whole.
            self.encoding = Encoding::Identity;
            self.share = None;
        }
        let grpc = parts
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        if parts.headers.contains_key(Status::GRPC_STATUS) {
            return self.finished(HeaderMap::new(), parts.headers);
        }
        if !grpc {
            // Not from a service of tonic: a gate in front of it answered in plain HTTP.
            return Response::from_parts(parts, body);
        }
        match self.protocol.framing {
            Framing::ConnectUnary => match prepared {
                Some(prepared) => self.connect_prepared(parts, body, prepared.length),
                None => self.connect_unary(parts, body).await,
            },
            _ => self.streaming(parts.headers, body),
        }
    }

    /// A response that has its outcome and no message.
    fn finished(self, leading: HeaderMap, mut trailers: HeaderMap) -> Response<Body> {
        shorten(&mut trailers);
        let extra = self.metadata.take_headers();
        match self.protocol.framing {
            Framing::ConnectUnary => {
                let mut headers = leading;
                append_all(&mut headers, extra);
                self.connect_unary_error(headers, trailers)
            }
            Framing::Grpc | Framing::GrpcWeb { .. } if extra.is_empty() => {
                // Trailers-Only, as gRPC has it: the status is in the headers.
                spans::rpc_ended(code(&trailers));
                let mut headers = trailers;
                append_all(&mut headers, self.metadata.take_trailers());
                headers.insert(header::CONTENT_TYPE, self.protocol.content_type);
                response_with(StatusCode::OK, headers, Body::empty())
            }
            _ => {
                let mut leading = leading;
                append_all(&mut leading, extra);
                self.streaming(leading, Body::new(TrailersBody(Some(trailers))))
            }
        }
    }

    fn streaming(self, mut headers: HeaderMap, body: Body) -> Response<Body> {
        for name in OWN_HEADERS {
            headers.remove(name);
        }
        append_all(&mut headers, self.metadata.take_headers());
        let (own, accepted) = self.protocol.encoding_headers();
        if self.encoding == Encoding::Gzip {
            headers.insert(HeaderName::from_static(own), GZIP);
        }
        headers.insert(HeaderName::from_static(accepted), GZIP);
        headers.insert(header::CONTENT_TYPE, self.protocol.content_type.clone());
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
        if self.protocol.framing == Framing::Grpc && self.announces_trailers {
            // hyper leaves out what is not announced, so that trailers of a handler are sent only if
            // it has added them by now.
            let own = STATUS_TRAILERS.into_iter().map(HeaderValue::from_static);
            let added = self.metadata.trailer_names().into_iter().map(HeaderValue::from);
            for name in own.chain(added) {
                headers.append(header::TRAILER, name);
            }
        }
        let body = Outgoing {
            framing: self.protocol.framing,
            inner: Some(body),
            compressor: (self.encoding == Encoding::Gzip).then(|| Splitter::new(usize::MAX)),
            metadata: self.metadata,
            deadline: self.deadline.map(|at| Box::pin(tokio::time::sleep_until(at))),
            ends: self.ends,
            departed: self.departed,
            evicted: self.evicted,
            ready: VecDeque::new(),
            share: self.share,
        };
        response_with(StatusCode::OK, headers, Body::new(body))
    }

    async fn connect_unary(mut self, parts: response::Parts, mut body: Body) -> Response<Body> {
        let mut message = BytesMut::new();
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => message.extend_from_slice(&data),
                Ok(Err(frame)) => trailers = frame.into_trailers().ok(),
                Err(error) => return self.error(&Status::from_error(error.into())),
            }
        }
        let trailers = trailers.unwrap_or_default();
        let mut headers = parts.headers;
        append_all(&mut headers, self.metadata.take_headers());
        let status = Status::from_header_map(&trailers);
        if status.is_some_and(|status| status.code() != Code::Ok) {
            return self.connect_unary_error(headers, trailers);
        }
        if message.len() < envelope::HEADER_BYTES {
            return self.error(&Status::internal("the service answered without a message"));
        }
        spans::rpc_ended(Code::Ok);
        let mut message = message.split_off(envelope::HEADER_BYTES).freeze();
        if let Some(mut share) = self.share.take() {
            if let Err(status) = share.hold(message.len()) {
                return self.error(&status);
            }
            message = memory::charged(message, share);
        }
        for name in OWN_HEADERS {
            headers.remove(name);
        }
        if self.encoding == Encoding::Gzip && message.len() >= MIN_COMPRESSED_BYTES {
            message = envelope::compress(&message);
            headers.insert(header::CONTENT_ENCODING, GZIP);
        }
        headers.insert(header::ACCEPT_ENCODING, GZIP);
        headers.insert(header::CONTENT_TYPE, self.protocol.content_type.clone());
        self.prefix_trailers(&mut headers, trailers);
        response_with(StatusCode::OK, headers, Body::from(message))
    }

    /// As [`Self::connect_unary`], for an answer that is whole and without an error.
    fn connect_prepared(self, parts: response::Parts, body: Body, length: usize) -> Response<Body> {
        spans::rpc_ended(Code::Ok);
        let mut headers = parts.headers;
        append_all(&mut headers, self.metadata.take_headers());
        for name in OWN_HEADERS {
            headers.remove(name);
        }
        headers.insert(header::ACCEPT_ENCODING, GZIP);
        headers.insert(header::CONTENT_TYPE, self.protocol.content_type.clone());
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        self.prefix_trailers(&mut headers, HeaderMap::new());
        let frames = body.into_data_stream().skip(1);
        response_with(StatusCode::OK, headers, Body::from_stream(frames))
    }

    fn connect_unary_error(self, mut headers: HeaderMap, trailers: HeaderMap) -> Response<Body> {
        let status = Status::from_header_map(&trailers)
            .unwrap_or_else(|| Status::unknown("the service gave no status"));
        spans::rpc_ended(status.code());
        for name in OWN_HEADERS {
            headers.remove(name);
        }
        headers.insert(header::ACCEPT_ENCODING, GZIP);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.prefix_trailers(&mut headers, trailers);
        let body = Body::from(error::connect_unary_body(&status));
        response_with(error::connect_code(status.code()).1, headers, body)
    }

    /// Connect's unary protocol sends trailers as headers with a prefix.
    fn prefix_trailers(&self, headers: &mut HeaderMap, mut trailers: HeaderMap) {
        for name in OWN_HEADERS {
            trailers.remove(name);
        }
        append_all(&mut trailers, self.metadata.take_trailers());
        for (name, value) in &trailers {
            if let Ok(name) = HeaderName::try_from(format!("trailer-{name}")) {
                headers.append(name, value.clone());
            }
        }
    }
}

/// The outcome that trailers tell.
fn code(trailers: &HeaderMap) -> Code {
    let code = trailers.get(Status::GRPC_STATUS);
    code.map_or(Code::Unknown, |code| Code::from_bytes(code.as_bytes()))
}

/// Cuts a status message that quotes more of the request than anyone reads: it travels in headers,
/// and clients have limits for those.
fn shorten(trailers: &mut HeaderMap) {
    let length = trailers.get(Status::GRPC_MESSAGE).map_or(0, HeaderValue::len);
    if length <= MAX_STATUS_MESSAGE {
        return;
    }
    let Some(status) = Status::from_header_map(trailers) else { return };
    let message: String = status.message().chars().take(MAX_STATUS_MESSAGE / 4).collect();
    let message = format!("{message}… (cut from {} bytes)", status.message().len());
    let details = Bytes::copy_from_slice(status.details());
    let short = Status::with_details(status.code(), message, details);
    trailers.remove(Status::GRPC_MESSAGE);
    if let Err(error) = short.add_header(trailers) {
        tracing::warn!(%error, "status cannot be written");
    }
}

/// What a stream ends with whose connection others need.
const EVICTED: &str = "the client took nothing for too long while others waited for its connection";

/// The body of a response with envelopes.
struct Outgoing {
    framing: Framing,
    /// What the service still has to say; `None` once the outcome is known.
    inner: Option<Body>,
    /// Present when messages are compressed.
    compressor: Option<Splitter>,
    metadata: ResponseMetadata,
    deadline: Option<Pin<Box<Sleep>>>,
    ends: Option<Reached>,
    departed: Option<Reached>,
    evicted: Option<Reached>,
    ready: VecDeque<Frame<Bytes>>,
    /// What the only message borrows from.
    share: Option<Share>,
}

impl Outgoing {
    fn data(&mut self, mut data: Bytes) -> Result<(), Status> {
        if let Some(mut share) = self.share.take() {
            share.hold(data.len())?;
            data = memory::charged(data, share);
        }
        let Some(splitter) = &mut self.compressor else {
            self.emit(data);
            return Ok(());
        };
        splitter.push(&data);
        let mut out = BytesMut::new();
        while let Some(envelope) = splitter.take()? {
            if envelope.message.len() < MIN_COMPRESSED_BYTES {
                out.extend_from_slice(&envelope::wrap(envelope.flags, &envelope.message));
            } else {
                let message = envelope::compress(&envelope.message);
                out.extend_from_slice(&envelope::wrap(envelope.flags | COMPRESSED, &message));
            }
        }
        if !out.is_empty() {
            self.emit(out.freeze());
        }
        Ok(())
    }

    fn emit(&mut self, data: Bytes) {
        let data = match self.framing {
            Framing::GrpcWeb { text: true } => STANDARD.encode(&data).into(),
            _ => data,
        };
        self.ready.push_back(Frame::data(data));
    }

    fn finish(&mut self, mut trailers: HeaderMap) {
        shorten(&mut trailers);
        spans::rpc_ended(code(&trailers));
        self.inner = None;
        self.deadline = None;
        self.ends = None;
        self.departed = None;
        self.evicted = None;
        append_all(&mut trailers, self.metadata.take_trailers());
        match self.framing {
            Framing::Grpc => self.ready.push_back(Frame::trailers(trailers)),
            Framing::GrpcWeb { .. } => {
                let mut text = Vec::new();
                for (name, value) in &trailers {
                    text.extend_from_slice(name.as_str().as_bytes());
                    text.extend_from_slice(b": ");
                    text.extend_from_slice(value.as_bytes());
                    text.extend_from_slice(b"\r\n");
                }
                self.emit(envelope::wrap(TRAILERS, &text));
            }
            Framing::ConnectUnary | Framing::ConnectStream => {
                let status = Status::from_header_map(&trailers)
                    .unwrap_or_else(|| Status::internal("the service gave no status"));
                for name in OWN_HEADERS {
                    trailers.remove(name);
                }
                let end = error::connect_end_stream(&status, &trailers);
                self.emit(envelope::wrap(END_STREAM, &end));
            }
        }
    }

    fn fail(&mut self, status: &Status) {
        let mut trailers = HeaderMap::new();
        if let Err(error) = status.add_header(&mut trailers) {
            tracing::warn!(%error, "status cannot be written");
        }
        self.finish(trailers);
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if let Some(deadline) = &mut self.deadline
                && deadline.as_mut().poll(cx).is_ready()
            {
                self.fail(&timeout::exceeded());
                continue;
            }
            if let Some(ends) = &mut self.ends
                && ends.as_mut().poll(cx).is_ready()
            {
                self.fail(&shutdown::status());
                continue;
            }
            if let Some(departed) = &mut self.departed
                && departed.as_mut().poll(cx).is_ready()
            {
                self.fail(&departed_status());
                continue;
            }
            if let Some(evicted) = &mut self.evicted
                && evicted.as_mut().poll(cx).is_ready()
            {
                self.fail(&Status::resource_exhausted(EVICTED));
                continue;
            }
            let Some(inner) = &mut self.inner else {
                return Poll::Ready(None);
            };
            match ready!(Pin::new(inner).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        if let Err(status) = self.data(data) {
                            self.fail(&status);
                        }
                    }
                    Err(frame) => self.finish(frame.into_trailers().unwrap_or_default()),
                },
                Some(Err(error)) => self.fail(&Status::from_error(error.into())),
                None => self.fail(&Status::internal("the service's stream ended without a status")),
            }
        }
    }
}

/// The status of a stream of events whose client has closed its sending side: it may have left, and what
/// it started must not wait for it.
pub(super) fn departed_status() -> Status {
    Status::cancelled("the client closed its sending side, which ends a stream of events")
}

/// A body that is only trailers.
struct TrailersBody(Option<HeaderMap>);

impl http_body::Body for TrailersBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }
}

/// A response of these parts.
pub(super) fn response_with(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
