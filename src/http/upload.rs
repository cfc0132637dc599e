//! `POST /files`: one file as the body, or any number as a multipart form.
//!
//! Each chunk of a body is written by a job of its own, so that a client that stalls holds no
//! thread. One that brings nothing for [`UPLOAD_STALL`], or goes away, leaves the file as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::{RawQuery, Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures_util::{FutureExt, Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde::Serialize;

use super::{FilesQuery, Refusal, Shared, check_signature, resolve, user};
use crate::{
    access::Operation,
    fs::transfer::{self},
    guest::users::User,
    quote,
    sandbox::{MAX_UPLOADS, Sandbox},
    slots::Slot,
    wire::STALL_TIMEOUT,
};

mod disposition;
mod form;
mod quoted_printable;
mod sink;

use form::{Form, FormError};
use sink::{Sink, cut};

/// How long an upload may bring no byte before it is ended. One that stalls holds a slot and no thread, and
/// makes room for a newcomer when there is none left ([`crate::slots`]).
pub const UPLOAD_STALL: Duration = STALL_TIMEOUT;
/// Bytes of a body that one job writes, as long as they are there; the last chunk may exceed it.
const MAX_BATCH: usize = 256 << 10;
/// Compressed bytes that are decompressed at a time: they may grow a thousandfold in memory.
const MAX_GZIP_PIECE: usize = 8 << 10;
/// The most bytes of paths, names and metadata of one form's files: they are told in one answer, at
/// its end.
const MAX_TOLD: usize = 16 << 20;
/// The prefix of headers that become metadata.
const METADATA: &str = "x-metadata-";

/// What is told of a file that was written.
#[derive(Debug, Serialize)]
struct Written {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
    name: String,
    path: String,
    r#type: &'static str,
}

pub(super) async fn upload(
    State(sandbox): Shared,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, Refusal> {
    let query = FilesQuery::parse(&query.unwrap_or_default())?;
    let (parts, body) = request.into_parts();
    let granted = parts.extensions.get();
    check_signature(&sandbox, Operation::Write, &query, &parts.headers, granted)?;
    let body = body.into_data_stream();
    let gzip = is_gzip(&parts.headers)?;
    let user = Arc::new(user(&sandbox, &query)?);
    let metadata = metadata(&parts.headers)?;
    let slot = Arc::new(sandbox.uploads.take().await.ok_or_else(too_many_uploads)?);
    let target = Target { sandbox, query, user, metadata, slot: Arc::clone(&slot) };
    let stalled = Arc::new(AtomicBool::new(false));
    let chunks = patient(body, &stalled, &slot, UPLOAD_STALL);
    let written = write_all(target, &parts.headers, gzip, chunks);
    // Whatever the layers between made of it.
    let written = written.await.map_err(|refusal| match stalled.load(Ordering::Relaxed) {
        _ if slot.is_evicted() => Refusal(StatusCode::SERVICE_UNAVAILABLE, EVICTED.to_owned()),
        true => Refusal(StatusCode::REQUEST_TIMEOUT, Stalled(UPLOAD_STALL).to_string()),
        false => refusal,
    })?;
    let text = serde_json::to_string(&written).unwrap_or_default();
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// The answer to one upload too many.
pub(super) fn too_many_uploads() -> Refusal {
    let text = format!("too many uploads: {MAX_UPLOADS} are under way");
    Refusal(StatusCode::SERVICE_UNAVAILABLE, text)
}

/// The answer to an upload that made room for another.
const EVICTED: &str = "too many uploads: this one was the slowest while another waited; try again";

/// The client brings nothing.
#[derive(Debug, thiserror::Error)]
#[error("error reading the body of the upload: no byte came for {} s", .0.as_secs())]
struct Stalled(Duration);

/// The chunks of a body; it ends with an error when the slot is evicted, and, having set `stalled`, when
/// none comes for `stall`.
fn patient<B>(
    body: B,
    stalled: &Arc<AtomicBool>,
    slot: &Arc<Slot>,
    stall: Duration,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + use<B>
where
    B: Stream<Item = Result<Bytes, axum::Error>> + Send + Unpin + 'static,
{
    let (stalled, slot) = (Arc::clone(stalled), Arc::clone(slot));
    Box::pin(futures_util::stream::try_unfold(body, move |mut body| {
        let (stalled, slot) = (Arc::clone(&stalled), Arc::clone(&slot));
        async move {
            // Frames without a byte do not count.
            let bytes = async {
                loop {
                    match body.next().await {
                        Some(Ok(chunk)) if chunk.is_empty() => {}
                        other => return other.transpose(),
                    }
                }
            };
            let bytes = tokio::time::timeout(stall, bytes);
            let bytes = tokio::select! {
                bytes = bytes => bytes,
                () = slot.evicted() => return Err(io::Error::other(EVICTED)),
            };
            match bytes {
                Ok(chunk) => Ok(chunk.map_err(io::Error::other)?.map(|chunk| {
                    slot.progress(chunk.len());
                    (chunk, body)
                })),
                Err(_) => {
                    stalled.store(true, Ordering::Relaxed);
                    Err(io::Error::other(Stalled(stall)))
                }
            }
        }
    }))
}

async fn write_all(
    target: Target,
    headers: &HeaderMap,
    gzip: bool,
    chunks: impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
) -> Result<Vec<Written>, Refusal> {
    let content_type = headers.get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/octet-stream" {
        let length = headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(vec![raw(target, chunks, gzip, length).await?])
    } else if essence.starts_with("multipart/") {
        let (_, parameters) = disposition::parse(content_type.as_bytes());
        let Some(boundary) = parameters.get("boundary").filter(|name| !name.is_empty()) else {
            return Err(Refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                "error parsing multipart form: no multipart boundary param in Content-Type"
                    .to_owned(),
            ));
        };
        match gzip {
            true => multipart(target, gunzip(chunks), boundary).await,
            false => multipart(target, chunks, boundary).await,
        }
    } else {
        Err(Refusal::bad(format!(
            "unsupported content type: {content_type}, expected multipart/form-data or application/octet-stream"
        )))
    }
}

/// Where and as whom to write.
struct Target {
    sandbox: Arc<Sandbox>,
    query: FilesQuery,
    user: Arc<User>,
    metadata: BTreeMap<String, String>,
    /// Goes with every piece of the work, so that what hangs in the kernel still counts.
    slot: Arc<Slot>,
}

impl Target {
    fn resolve(&self, path: &OsStr) -> Result<PathBuf, Refusal> {
        resolve(&self.sandbox, path, &self.user)
    }
}

async fn raw<E: std::fmt::Display>(
    target: Target,
    mut chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
    gzip: bool,
    length: Option<u64>,
) -> Result<Written, Refusal> {
    let path = match target.query.path() {
        path if !path.is_empty() => target.resolve(path)?,
        _ => {
            return Err(Refusal::bad("path query parameter is required for raw body upload"));
        }
    };
    let mut sink = Sink::open(&target, path, gzip, length).await?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| cut(&error))?;
        let (mut bytes, mut batch) = (chunk.len(), vec![chunk]);
        // HTTP/2 brings 16 KiB at a time. What has come already does not need jobs of its own.
        while bytes < MAX_BATCH
            && let Some(Some(chunk)) = chunks.next().now_or_never()
        {
            let chunk = chunk.map_err(|error| cut(&error))?;
            bytes += chunk.len();
            batch.push(chunk);
        }
        sink.send(batch).await?;
    }
    sink.finish().await
}

async fn multipart<E: std::fmt::Display>(
    target: Target,
    chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
    boundary: &[u8],
) -> Result<Vec<Written>, Refusal> {
    let mut form = Form::new(chunks, boundary);
    let mut written = Vec::new();
    let mut seen = BTreeSet::new();
    let mut told = 0;
    loop {
        let part = form.next_part().await.map_err(|error| broken_form(&error))?;
        let Some(part) = part else {
            return Ok(written);
        };
        if part.name() != Some(b"file") {
            continue;
        }
        let name = match (target.query.path(), part.file_name()) {
            (path, _) if !path.is_empty() => path,
            (_, Some(name)) => OsStr::from_bytes(name),
            (_, None) => {
                return Err(Refusal::bad(
                    "error getting multipart custom part file name: filename not found in Content-Disposition header",
                ));
            }
        };
        let path = target.resolve(name)?;
        let metadata: usize =
            target.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        // The name is a part of the path, and the path is also among those seen.
        told += 3 * path.as_os_str().len() + metadata;
        if told > MAX_TOLD {
            return Err(Refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!(
                    "too many files in one form: what is to be told of the first {} and of '{}' is more than {MAX_TOLD} bytes",
                    written.len(),
                    quote::path(&path)
                ),
            ));
        }
        if !seen.insert(path.clone()) {
            return Err(Refusal::bad(format!(
                "you cannot upload multiple files to the same path '{}' in one upload request, only the first specified file was uploaded",
                quote::path(&path)
            )));
        }
        let mut sink = Sink::open(&target, path, false, None).await?;
        while let Some(chunk) = form.chunk().await.map_err(|error| cut(&error))? {
            sink.send(vec![chunk]).await?;
        }
        written.push(sink.finish().await?);
    }
}

/// Decompresses a body that is read, not written: a form.
fn gunzip<E: std::fmt::Display + Send + 'static>(
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static {
    struct State<S> {
        chunks: S,
        /// Of the last chunk, what is still to be decompressed.
        rest: Bytes,
        /// None once the end has been reached.
        decoder: Option<MultiGzDecoder<Vec<u8>>>,
    }
    let decoder = Some(MultiGzDecoder::new(Vec::new()));
    let state = State { chunks, rest: Bytes::new(), decoder };
    Box::pin(futures_util::stream::try_unfold(state, |mut state| async move {
        let Some(decoder) = &mut state.decoder else {
            return Ok(None);
        };
        loop {
            if state.rest.is_empty() {
                match state.chunks.next().await {
                    Some(Ok(chunk)) => state.rest = chunk,
                    Some(Err(error)) => return Err(io::Error::other(error.to_string())),
                    None => {
                        decoder.try_finish()?;
                        let last = std::mem::take(decoder.get_mut());
                        state.decoder = None;
                        return Ok(Some((Bytes::from(last), state)));
                    }
                }
            }
            let piece = state.rest.split_to(state.rest.len().min(MAX_GZIP_PIECE));
            decoder.write_all(&piece)?;
            let plain = std::mem::take(decoder.get_mut());
            if !plain.is_empty() {
                return Ok(Some((Bytes::from(plain), state)));
            }
        }
    }))
}

fn is_gzip(headers: &HeaderMap) -> Result<bool, Refusal> {
    let Some(value) = headers.get(header::CONTENT_ENCODING) else {
        return Ok(false);
    };
    let text = value.to_str().unwrap_or("?");
    let coding = text.split(';').next().unwrap_or_default().trim();
    match coding.to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(false),
        "gzip" => Ok(true),
        _ => Err(Refusal::bad(format!(
            "error decompressing request body: unsupported Content-Encoding: {coding}, supported: [gzip]"
        ))),
    }
}

fn metadata(headers: &HeaderMap) -> Result<BTreeMap<String, String>, Refusal> {
    let mut metadata = BTreeMap::new();
    for name in headers.keys() {
        // http keeps names in lower case.
        let Some(key) = name.as_str().strip_prefix(METADATA).filter(|key| !key.is_empty()) else {
            continue;
        };
        let Some(value) = headers.get(name) else {
            continue;
        };
        metadata.insert(key.to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    transfer::validate_metadata(&metadata)?;
    Ok(metadata)
}

fn broken_form(error: &FormError) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("error reading form: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_that_stalls_ends_and_one_that_goes_on_does_not() {
        let stalled = Arc::new(AtomicBool::new(false));
        let chunks = [&b"one"[..], b"", b"two"].map(|chunk| Ok(Bytes::from_static(chunk)));
        // Then nothing, and no end.
        let body = futures_util::stream::iter(chunks).chain(futures_util::stream::pending());
        let slot = Arc::new(crate::slots::Slots::new(1).take().await.unwrap());
        let mut body = patient(body, &stalled, &slot, Duration::from_millis(20));
        assert_eq!(body.next().await.unwrap().unwrap(), "one");
        assert_eq!(body.next().await.unwrap().unwrap(), "two");
        assert!(!stalled.load(Ordering::Relaxed));
        body.next().await.unwrap().unwrap_err();
        assert!(stalled.load(Ordering::Relaxed));
        assert!(body.next().await.is_none());
    }
}
