//! Requests of every protocol as gRPC requests: uncompressed envelopes, one after the other.
//!
//! A method that takes one message gets exactly one: it is read whole before the service runs, so
//! that a second or missing one is an error and not a surprise. A client stream is passed on
//! envelope by envelope, as they come.
//!
//! What a message will take once it is decoded ([`super::cost`]) is borrowed from the budget before the
//! service sees it. A message that is large or compressed is opened, and so also decoded, off the
//! runtime ([`super::offload`]).

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, Bytes, BytesMut};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use tonic::{Code, Status};

use super::{
    Body, BoxError,
    budget::Share,
    codec::Format,
    envelope::{self, COMPRESSED, END_STREAM, Encoding, Envelope, Splitter, TRAILERS},
    memory::LARGE_MESSAGE,
    methods::{Method, Methods},
    offload,
    protocol::{Framing, Protocol},
};

/// How to read one request.
#[derive(Debug, Clone)]
pub struct Reader {
    /// The protocol it is in.
    pub protocol: Protocol,
    /// How its messages are compressed.
    pub encoding: Encoding,
    /// The most bytes of one message.
    pub limit: usize,
    /// How long a single message may make no progress.
    pub stall_timeout: Duration,
    /// What its messages are decoded to.
    pub methods: Arc<Methods>,
    /// Which method it calls.
    pub method: Method,
}

impl Reader {
    /// What is to be borrowed for a message: its bytes, and what it is decoded to. Data is not copied when it
    /// is protobuf, and takes three quarters of its text when it is JSON.
    fn cost(&self, message: &[u8]) -> usize {
        let decoded = self.methods.types().cost(self.method.input, self.protocol.format, message);
        match (self.method.large, self.protocol.format) {
            (true, Format::Json) => message.len() / 2 + decoded,
            _ => message.len() + decoded,
        }
    }

    /// Reads a request of exactly one message.
    ///
    /// # Errors
    /// `resource_exhausted` over the limit, `unimplemented` for none or several messages, and what
    /// a broken envelope or compression deserves.
    pub async fn single(self, body: Body, share: &mut Share) -> Result<Body, Status> {
        let costs = self.clone();
        let message = match self.protocol.framing {
            Framing::ConnectUnary => self.bare(body, share).await?,
            _ => self.enveloped(body, share).await?,
        };
        if message.len() > LARGE_MESSAGE {
            offload::here().await;
        }
        share.hold(costs.cost(&message))?;
        let header = Bytes::copy_from_slice(&envelope::header(0, message.len()));
        Ok(Body::new(Chunks([header, message].into())))
    }

    /// Passes on a request of many messages.
    pub fn stream(self, body: Body, share: Share) -> Body {
        Body::new(RequestStream(Envelopes::new(self, body), share))
    }

    async fn bare(self, mut body: Body, share: &mut Share) -> Result<Bytes, Status> {
        if let Some(announced) = body.size_hint().exact()
            && announced > self.limit as u64
        {
            let announced = usize::try_from(announced).unwrap_or(usize::MAX);
            return Err(envelope::too_large(announced, self.limit));
        }
        // A body that comes in one piece, as small ones do, is not copied.
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        let mut total = 0;
        while let Some(frame) = self.in_time(body.frame()).await? {
            let Ok(data) = frame.map_err(unreadable)?.into_data() else {
                continue;
            };
            total += data.len();
            if total > self.limit {
                return Err(envelope::too_large(total, self.limit));
            }
            share.hold(total)?;
            if first.is_empty() {
                first = data;
            } else {
                if rest.is_empty() {
                    rest.extend_from_slice(&first);
                }
                rest.extend_from_slice(&data);
            }
        }
        let message = if rest.is_empty() { first } else { rest.freeze() };
        let message = match self.encoding {
            Encoding::Gzip if !message.is_empty() => {
                offload::here().await;
                let hold = |bytes| share.hold(message.len() + bytes);
                envelope::decompress(&message, self.limit, hold)?
            }
            _ => message,
        };
        if message.is_empty() && self.protocol.format == Format::Json {
            return Err(Status::invalid_argument(
                "unmarshal message: zero-length payload is not a valid JSON object",
            ));
        }
        Ok(message)
    }

    async fn enveloped(self, body: Body, share: &mut Share) -> Result<Bytes, Status> {
        let stall = self.clone();
        let mut envelopes = Envelopes::new(self, body);
        let mut only: Option<Bytes> = None;
        loop {
            let next = std::future::poll_fn(|cx| envelopes.poll_progress(cx, share));
            let message = match stall.in_time(next).await? {
                Progress::Message(message) => message?,
                Progress::Bytes => continue,
                Progress::End => break,
            };
            if only.replace(message).is_some() {
                return Err(Status::unimplemented("unary request has multiple messages"));
            }
        }
        only.ok_or_else(|| Status::unimplemented("unary request has zero messages"))
    }

    async fn in_time<T>(&self, step: impl Future<Output = T>) -> Result<T, Status> {
        tokio::time::timeout(self.stall_timeout, step).await.map_err(|_| {
            Status::deadline_exceeded(format!(
                "no byte of the request came for {} s",
                self.stall_timeout.as_secs()
            ))
        })
    }

    /// The message in an envelope, or `None` where the envelope ends the stream. `share` holds `held` more.
    fn open(
        &self,
        envelope: Envelope,
        share: &mut Share,
        held: usize,
    ) -> Result<Option<Bytes>, Status> {
        let ends = match self.protocol.framing {
            Framing::ConnectUnary | Framing::ConnectStream => END_STREAM,
            Framing::GrpcWeb { .. } => TRAILERS,
            Framing::Grpc => 0,
        };
        if envelope.flags & !(COMPRESSED | ends) != 0 {
            return Err(Status::internal(format!(
                "protocol error: invalid envelope flags {}",
                envelope.flags
            )));
        }
        if envelope.flags & ends != 0 {
            return Ok(None);
        }
        match (envelope.flags & COMPRESSED != 0, self.encoding) {
            (false, _) => Ok(Some(envelope.message)),
            (true, Encoding::Identity) => Err(Status::internal(
                "protocol error: sent compressed message without compression support",
            )),
            (true, Encoding::Gzip) if envelope.message.is_empty() => Ok(Some(Bytes::new())),
            (true, Encoding::Gzip) => {
                let hold = |bytes| share.hold(held + envelope.message.len() + bytes);
                envelope::decompress(&envelope.message, self.limit, hold).map(Some)
            }
        }
    }
}

/// The messages of an enveloped body.
struct Envelopes {
    reader: Reader,
    body: Body,
    splitter: Splitter,
    text: Option<TextDecoder>,
    ended: bool,
}

impl Envelopes {
    fn new(reader: Reader, body: Body) -> Self {
        let text = reader.protocol.framing == Framing::GrpcWeb { text: true };
        Self {
            splitter: Splitter::new(reader.limit),
            text: text.then(TextDecoder::default),
            reader,
            body,
            ended: false,
        }
    }

    /// The next message; `share` holds what is buffered, and the message until the next call.
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        share: &mut Share,
    ) -> Poll<Option<Result<Bytes, Status>>> {
        loop {
            match ready!(self.poll_progress(cx, share)) {
                Progress::Message(message) => return Poll::Ready(Some(message)),
                Progress::Bytes => {}
                Progress::End => return Poll::Ready(None),
            }
        }
    }

    fn poll_progress(&mut self, cx: &mut Context<'_>, share: &mut Share) -> Poll<Progress> {
        let failed = |status| Poll::Ready(Progress::Message(Err(status)));
        // To open it, and to decode what is in it right after, takes long.
        if self.splitter.next_is_expensive(LARGE_MESSAGE) && offload::must_move(cx) {
            return Poll::Pending;
        }
        while let Some(envelope) = self.splitter.take().transpose() {
            let envelope = match envelope {
                Ok(envelope) => envelope,
                Err(status) => return failed(status),
            };
            if self.ended {
                continue;
            }
            match self.reader.open(envelope, share, self.splitter.buffered()) {
                Ok(Some(message)) => {
                    let held = share.hold(self.splitter.buffered() + self.reader.cost(&message));
                    return Poll::Ready(Progress::Message(held.map(|()| message)));
                }
                Ok(None) => self.ended = true,
                Err(status) => return failed(status),
            }
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            None if self.ended => return Poll::Ready(Progress::End),
            None => {
                return Poll::Ready(match self.splitter.end() {
                    Ok(()) => Progress::End,
                    Err(status) => Progress::Message(Err(status)),
                });
            }
            Some(Err(error)) => return failed(unreadable(error)),
            Some(Ok(frame)) => frame,
        };
        if let Some(data) = frame.data_ref() {
            match &mut self.text {
                None => self.splitter.push(data),
                Some(text) => match text.decode(data) {
                    Ok(bytes) => self.splitter.push(&bytes),
                    Err(status) => return failed(status),
                },
            }
            if let Err(status) = share.hold(self.splitter.buffered()) {
                return failed(status);
            }
        }
        Poll::Ready(Progress::Bytes)
    }
}

/// One step of reading a body.
enum Progress {
    Message(Result<Bytes, Status>),
    /// Bytes came, of a message that is not whole yet perhaps.
    Bytes,
    End,
}

/// Envelopes again, for tonic.
struct RequestStream(Envelopes, Share);

impl http_body::Body for RequestStream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self(envelopes, share) = &mut *self;
        let message = ready!(envelopes.poll_next(cx, share));
        Poll::Ready(message.map(|message| match message {
            Ok(message) => Ok(Frame::data(envelope::wrap(0, &message))),
            // tonic takes it for the end of the stream, as if the client had sent all there is.
            Err(status) if status.code() == Code::Cancelled => {
                Err(Status::unknown(status.message()))
            }
            Err(status) => Err(status),
        }))
    }
}

/// A body of chunks that are all there.
struct Chunks(VecDeque<Bytes>);

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(self.0.pop_front().map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// The base64 of gRPC-Web's text form: any number of padded pieces, cut anywhere.
#[derive(Default)]
struct TextDecoder {
    /// Fewer than four characters that wait for the rest of their group.
    pending: BytesMut,
}

impl TextDecoder {
    fn decode(&mut self, text: &[u8]) -> Result<Vec<u8>, Status> {
        self.pending.extend_from_slice(text);
        let mut groups = self.pending.split_to(self.pending.len() / 4 * 4);
        let mut bytes = Vec::with_capacity(groups.len() / 4 * 3);
        while !groups.is_empty() {
            // Padding ends a piece, and another may follow it.
            let end = groups
                .iter()
                .position(|byte| *byte == b'=')
                .map_or(groups.len(), |at| (at / 4 + 1) * 4);
            STANDARD.decode_vec(&groups[..end.min(groups.len())], &mut bytes).map_err(|error| {
                Status::invalid_argument(format!("protocol error: body is not base64: {error}"))
            })?;
            groups.advance(end.min(groups.len()));
        }
        Ok(bytes)
    }
}

/// The client went away or broke its own framing.
fn unreadable(error: impl std::fmt::Display) -> Status {
    tracing::debug!(%error, "request body ended early");
    Status::cancelled("unexpected EOF")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_survives_any_cutting_and_padding_inside(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..6),
            cut in 1_usize..9,
        ) {
            let text: String = pieces.iter().map(|piece| STANDARD.encode(piece)).collect();
            let mut decoder = TextDecoder::default();
            let mut bytes = Vec::new();
            for part in text.as_bytes().chunks(cut) {
                bytes.extend(decoder.decode(part).unwrap());
            }
            prop_assert_eq!(bytes, pieces.concat());
        }

        #[test]
        fn text_garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = TextDecoder::default().decode(&bytes);
        }
    }
}
