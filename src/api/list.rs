//! `List`, written a process at a time.
//!
//! The arguments of one process may be 2 MiB, and there may be hundreds of processes. As one message of
//! tonic's, an answer would be in memory several times over: as the message, encoded, and encoded in the
//! client's protocol. So this method is served without tonic: one pass finds out how long the message will
//! be, and a second one encodes each process when the client has taken the one before. Both run off the
//! runtime.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{future::BoxFuture, stream};
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use tokio::time::{Instant, sleep};
use tonic::Status;
use tower::Service;

use super::{identity, process::summary};
use crate::{
    process::Found,
    proto::process as pb,
    sandbox::Sandbox,
    wire::{
        Body,
        budget::Share,
        codec::{self, Format},
        envelope,
        memory::LARGE_MESSAGE,
        offload,
        response::Prepared,
    },
};

/// The tag of `ListResponse.processes`, which is field 1 and has a length.
const PROCESSES: u8 = 1 << 3 | 2;

/// How long an answer waits for the memory that it needs.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// The pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// The service of this one method.
#[derive(Debug, Clone)]
pub(super) struct List(pub(super) Arc<Sandbox>);

impl Service<Request<Body>> for List {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let sandbox = Arc::clone(&self.0);
        Box::pin(async move {
            Ok(list(&sandbox, request).await.unwrap_or_else(|status| status.into_http()))
        })
    }
}

/// A process without its request, and where that is.
struct Item {
    summary: pb::ProcessInfo,
    found: Found,
    with_envs: bool,
}

impl Item {
    /// The bytes of this process in the answer, with what stands before it.
    fn encode(&self, format: Format, first: bool) -> Result<Bytes, Status> {
        let spec = &self.found.record().spec;
        let envs = match self.with_envs {
            true => spec.requested_env.clone().into_iter().collect(),
            false => Default::default(),
        };
        let info = pb::ProcessInfo {
            config: Some(pb::ProcessConfig {
                cmd: spec.cmd.clone(),
                args: spec.args.clone(),
                envs,
                cwd: spec.requested_cwd.clone(),
            }),
            ..self.summary.clone()
        };
        let failed =
            |error: &dyn std::fmt::Display| Status::internal(format!("marshal message: {error}"));
        let mut bytes = BytesMut::new();
        match format {
            Format::Proto => {
                bytes.reserve(info.encoded_len() + 16);
                bytes.put_u8(PROCESSES);
                info.encode_length_delimited(&mut bytes).map_err(|error| failed(&error))?;
            }
            Format::Json => {
                bytes.put_slice(if first { b"{\"processes\":[" } else { b"," });
                serde_json::to_writer((&mut bytes).writer(), &info)
                    .map_err(|error| failed(&error))?;
            }
        }
        Ok(bytes.freeze())
    }
}

async fn list(sandbox: &Arc<Sandbox>, request: Request<Body>) -> Result<Response<Body>, Status> {
    let (parts, body) = request.into_parts();
    let (format, extensions) = codec::current();
    let body = body.collect().await.map_err(|error| Status::from_error(error.into()))?;
    let envelope = body.to_bytes();
    let message = envelope.get(envelope::HEADER_BYTES..).unwrap_or_default();
    let request: pb::ListRequest = codec::decode(format, Bytes::copy_from_slice(message))?;
    extensions.note(&request);
    // Without a user nobody's environment is shown.
    let caller = identity::caller(&parts.extensions, sandbox).ok();
    let found = sandbox.processes.list(request.include_ended);
    let usages = sandbox.processes.usages(&found).await;
    let items = found.into_iter().zip(usages).map(|(found, usage)| {
        let (summary, with_envs) = summary(&found, usage, caller.as_deref());
        Item { summary: extensions.filter(summary), found, with_envs }
    });
    let items: Vec<Item> = items.collect();

    let size: usize = items.iter().map(|item| item.found.record().spec.size()).sum();
    if size > LARGE_MESSAGE {
        offload::here().await;
    }
    let (mut length, mut longest) = (0, 0);
    let mut share = sandbox.memory.requests().share();
    let mut small = Vec::new();
    for (number, item) in items.iter().enumerate() {
        let bytes = item.encode(format, number == 0)?;
        length += bytes.len();
        longest = longest.max(bytes.len());
        if size <= LARGE_MESSAGE {
            small.push(bytes);
        }
    }
    let end: &[u8] = match (format, items.is_empty()) {
        (Format::Proto, _) => b"",
        (Format::Json, true) => b"{}",
        (Format::Json, false) => b"]}",
    };
    length += end.len();
    // Two that wait for the client; how many are being encoded the pool bounds.
    hold(&mut share, if size <= LARGE_MESSAGE { length } else { 2 * longest }).await?;
    let head = Bytes::copy_from_slice(&envelope::header(0, length));
    let pending = match size > LARGE_MESSAGE {
        true => Pending::Items(items.into_iter()),
        false => Pending::Encoded(small.into_iter()),
    };
    let answer = Answer { pending, first: true, format, _share: share };
    let frames = stream::unfold(
        (Step::Head(head), answer, Arc::clone(sandbox)),
        async move |(step, mut answer, sandbox)| {
            let (frame, next) = match step {
                Step::Head(head) => (Ok(Frame::data(head)), Step::Items),
                Step::Items => match answer.next(&sandbox).await {
                    Some(Ok(bytes)) => (Ok(Frame::data(bytes)), Step::Items),
                    Some(Err(status)) => (Err(status), Step::Over),
                    None if end.is_empty() => (Ok(Frame::trailers(ok())), Step::Over),
                    None => (Ok(Frame::data(Bytes::from_static(end))), Step::Trailers),
                },
                Step::Trailers => (Ok(Frame::trailers(ok())), Step::Over),
                Step::Over => return None,
            };
            Some((frame, (next, answer, sandbox)))
        },
    );
    let mut response = Response::new(Body::new(StreamBody::new(Box::pin(frames))));
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, grpc);
    if size > LARGE_MESSAGE {
        response.extensions_mut().insert(Prepared { length });
    }
    Ok(response)
}

/// Borrows, and waits a while for other answers to be taken: all may be as large as this one.
async fn hold(share: &mut Share, bytes: usize) -> Result<(), Status> {
    let deadline = Instant::now() + MAX_WAIT;
    loop {
        match share.hold(bytes) {
            Err(_) if Instant::now() < deadline => sleep(PAUSE).await,
            held => return held,
        }
    }
}

/// What comes next in a body.
enum Step {
    Head(Bytes),
    Items,
    Trailers,
    Over,
}

/// What is still to be written.
struct Answer {
    pending: Pending,
    /// Whether nothing has been written.
    first: bool,
    format: Format,
    /// Held until all has been written.
    _share: Share,
}

enum Pending {
    /// Of a small answer.
    Encoded(std::vec::IntoIter<Bytes>),
    Items(std::vec::IntoIter<Item>),
}

impl Answer {
    async fn next(&mut self, sandbox: &Arc<Sandbox>) -> Option<Result<Bytes, Status>> {
        let item = match &mut self.pending {
            Pending::Encoded(encoded) => return encoded.next().map(Ok),
            Pending::Items(items) => items.next()?,
        };
        let (format, first) = (self.format, std::mem::take(&mut self.first));
        let encoded = sandbox.memory.decoders().run_next_step(move || item.encode(format, first));
        Some(encoded.await.unwrap_or_else(|busy| Err(Status::internal(busy.to_string()))))
    }
}

fn ok() -> HeaderMap {
    HeaderMap::from_iter([(
        header::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )])
}
