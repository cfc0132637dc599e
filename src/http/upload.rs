//! `POST /files`: one file as the body, or any number as a multipart form.
//!
//! A body is passed to a thread that writes; at most [`CHUNKS_IN_FLIGHT`] chunks wait between the
//! two. When the client goes away the thread's writer is dropped, and the file is as it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, ready},
};

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{FilesParams, FilesQuery, Refusal, Shared, blocking, query, resolve, user};
use crate::{
    fs::{
        FsError,
        transfer::{self, WriteInfo, Writer},
    },
    guest::users::User,
    sandbox::Sandbox,
};

/// Chunks of a body between the network and the disk.
const CHUNKS_IN_FLIGHT: usize = 8;
/// The most bytes between two parts of a form: boundary and headers.
const MAX_PART_HEAD: usize = 64 << 10;
/// Compressed bytes that are decompressed at a time: they may grow a thousandfold in memory.
const MAX_GZIP_PIECE: usize = 8 << 10;
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
    params: FilesParams,
    request: Request,
) -> Result<Response, Refusal> {
    let query = query(params)?;
    let (parts, body) = request.into_parts();
    let gzip = is_gzip(&parts.headers)?;
    let user = Arc::new(user(&sandbox, &query)?);
    let metadata = metadata(&parts.headers)?;
    let target = Target { sandbox, query, user, metadata };

    let content_type = parts.headers.get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let chunks = body.into_data_stream();
    let written = if essence == "application/octet-stream" {
        let length = parts.headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        vec![raw(target, chunks, gzip, length).await?]
    } else if essence.starts_with("multipart/") {
        let boundary =
            multer::parse_boundary(content_type.replacen(&essence, "multipart/form-data", 1))
                .map_err(|error| {
                    Refusal(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        format!("error parsing multipart form: {error}"),
                    )
                })?;
        match gzip {
            true => multipart(target, gunzip(chunks), boundary).await?,
            false => multipart(target, chunks, boundary).await?,
        }
    } else {
        return Err(Refusal::bad(format!(
            "unsupported content type: {content_type}, expected multipart/form-data or application/octet-stream"
        )));
    };
    let text = serde_json::to_string(&written).unwrap_or_default();
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Where and as whom to write.
struct Target {
    sandbox: Arc<Sandbox>,
    query: FilesQuery,
    user: Arc<User>,
    metadata: BTreeMap<String, String>,
}

impl Target {
    fn resolve(&self, path: &str) -> Result<PathBuf, Refusal> {
        resolve(&self.sandbox, path, &self.user)
    }
}

async fn raw<E: std::fmt::Display>(
    target: Target,
    mut chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
    gzip: bool,
    length: Option<u64>,
) -> Result<Written, Refusal> {
    let path = match target.query.path.as_deref() {
        Some(path) if !path.is_empty() => target.resolve(path)?,
        _ => {
            return Err(Refusal::bad("path query parameter is required for raw body upload"));
        }
    };
    let mut sink = Sink::open(&target, path, gzip, length).await?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| cut(&error))?;
        if !sink.send(chunk).await {
            break;
        }
    }
    sink.finish().await
}

async fn multipart<E>(
    target: Target,
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    boundary: String,
) -> Result<Vec<Written>, Refusal>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let head = Arc::new(AtomicUsize::new(0));
    let chunks = bound_heads(one_by_one(chunks), Arc::clone(&head));
    let mut form = multer::Multipart::new(chunks, boundary);
    let mut written = Vec::new();
    let mut seen = BTreeSet::new();
    loop {
        head.store(0, Ordering::Relaxed);
        let field = form.next_field().await.map_err(|error| broken_form(&error))?;
        let Some(mut field) = field else {
            return Ok(written);
        };
        // Only the way from one part to the next is bounded, not what is in it.
        head.store(usize::MAX, Ordering::Relaxed);
        if field.name() != Some("file") {
            while field.chunk().await.map_err(|error| broken_form(&error))?.is_some() {}
            continue;
        }
        let name = match (target.query.path.as_deref(), field.file_name()) {
            (Some(path), _) if !path.is_empty() => path.to_owned(),
            (_, Some(name)) => name.to_owned(),
            (_, None) => {
                return Err(Refusal::bad(
                    "error getting multipart custom part file name: filename not found in Content-Disposition header",
                ));
            }
        };
        let path = target.resolve(&name)?;
        if !seen.insert(path.clone()) {
            return Err(Refusal::bad(format!(
                "you cannot upload multiple files to the same path '{}' in one upload request, only the first specified file was uploaded",
                path.display()
            )));
        }
        let mut sink = Sink::open(&target, path, false, None).await?;
        while let Some(chunk) = field.chunk().await.map_err(|error| cut(&error))? {
            if !sink.send(chunk).await {
                break;
            }
        }
        written.push(sink.finish().await?);
    }
}

/// Has nothing ready right after each chunk. multer reads as long as something is ready and keeps
/// it all in memory, and a body can be ready to its end: decompressed, it may be a thousand times
/// what was sent.
fn one_by_one<T>(chunks: impl Stream<Item = T> + Send + 'static) -> impl Stream<Item = T> + Send {
    let mut chunks = Box::pin(chunks);
    let mut pause = false;
    futures_util::stream::poll_fn(move |context| {
        if std::mem::take(&mut pause) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let chunk = ready!(chunks.as_mut().poll_next(context));
        pause = true;
        Poll::Ready(chunk)
    })
}

/// Lets no more bytes pass than [`MAX_PART_HEAD`] while `head` counts, which it does unless it is
/// `usize::MAX`.
fn bound_heads<E>(
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    head: Arc<AtomicUsize>,
) -> impl Stream<Item = Result<Bytes, Box<dyn std::error::Error + Send + Sync>>> + Send + 'static
where
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    chunks.map(move |chunk| {
        let chunk = chunk.map_err(Into::into)?;
        let passed = head.load(Ordering::Relaxed);
        if passed != usize::MAX {
            // The chunk in which the limit is reached may be mostly content.
            if passed > MAX_PART_HEAD {
                return Err("the headers of a part are too long".into());
            }
            head.store(passed + chunk.len(), Ordering::Relaxed);
        }
        Ok(chunk)
    })
}

/// A file that is being written on another thread.
struct Sink {
    /// Chunks, and `None` behind the last one of a body that came to its end.
    chunks: mpsc::Sender<Option<Bytes>>,
    end: tokio::task::JoinHandle<Result<WriteInfo, FsOrBody>>,
}

/// What ended a write: the file system, or a body that is no gzip.
enum FsOrBody {
    Fs(FsError),
    Body(io::Error),
    Cut,
}

impl Sink {
    async fn open(
        target: &Target,
        path: PathBuf,
        gzip: bool,
        length: Option<u64>,
    ) -> Result<Self, Refusal> {
        let user = Arc::clone(&target.user);
        let mut writer = blocking(move || Writer::create(&path, &user)).await??;
        if let Some(length) = length.filter(|length| *length > 0) {
            writer.expect_bytes(length);
        }
        let metadata = target.metadata.clone();
        let (chunks, received) = mpsc::channel(CHUNKS_IN_FLIGHT);
        let end = tokio::task::spawn_blocking(move || write(writer, received, gzip, &metadata));
        Ok(Self { chunks, end })
    }

    /// Passes on a chunk; false when the writer has given up.
    async fn send(&mut self, chunk: Bytes) -> bool {
        self.chunks.send(Some(chunk)).await.is_ok()
    }

    async fn finish(self) -> Result<Written, Refusal> {
        let _ = self.chunks.send(None).await;
        drop(self.chunks);
        let internal = |message: String| Refusal(StatusCode::INTERNAL_SERVER_ERROR, message);
        match self.end.await {
            Ok(Ok(info)) => Ok(Written {
                metadata: info.metadata,
                name: info.name,
                path: info.path,
                r#type: "file",
            }),
            Ok(Err(FsOrBody::Fs(error))) => Err(error.into()),
            Ok(Err(FsOrBody::Body(error))) => {
                Err(Refusal::bad(format!("error decompressing request body: {error}")))
            }
            Ok(Err(FsOrBody::Cut)) => Err(cut(&"unexpected EOF")),
            Err(error) => Err(internal(format!("error writing file: {error}"))),
        }
    }
}

fn write(
    writer: Writer,
    mut chunks: mpsc::Receiver<Option<Bytes>>,
    gzip: bool,
    metadata: &BTreeMap<String, String>,
) -> Result<WriteInfo, FsOrBody> {
    let mut output = Output { writer, failed: None };
    if gzip {
        let mut decoder = MultiGzDecoder::new(output);
        let mut any = false;
        loop {
            match chunks.blocking_recv() {
                None => return Err(FsOrBody::Cut),
                Some(None) => break,
                Some(Some(chunk)) => {
                    any = true;
                    if let Err(error) = decoder.write_all(&chunk) {
                        return Err(decoder.get_mut().failure(error));
                    }
                }
            }
        }
        if any && let Err(error) = decoder.try_finish() {
            return Err(decoder.get_mut().failure(error));
        }
        output = match decoder.finish() {
            Ok(output) => output,
            Err(error) => return Err(FsOrBody::Body(error)),
        };
    } else {
        loop {
            match chunks.blocking_recv() {
                None => return Err(FsOrBody::Cut),
                Some(None) => break,
                Some(Some(chunk)) => output.writer.write(&chunk).map_err(FsOrBody::Fs)?,
            }
        }
    }
    output.writer.finish(metadata).map_err(FsOrBody::Fs)
}

/// A writer as flate2 wants it, which keeps what really failed.
struct Output {
    writer: Writer,
    failed: Option<FsError>,
}

impl Output {
    fn failure(&mut self, error: io::Error) -> FsOrBody {
        self.failed.take().map_or(FsOrBody::Body(error), FsOrBody::Fs)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let text = error.to_string();
                self.failed = Some(error);
                Err(io::Error::other(text))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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

fn cut(error: &dyn std::fmt::Display) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("error writing file: {error}"))
}

fn broken_form(error: &multer::Error) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("error reading form: {error}"))
}
