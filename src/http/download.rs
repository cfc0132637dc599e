//! `GET /files`: the content of one file, whole or in parts.
//!
//! Upstream compresses nearly every download, because nearly every client says that it accepts
//! gzip. Here a file is compressed where that pays: text, from [`MIN_GZIP`] bytes, at gzip's
//! fastest level, and never a part of a file or the answer to a condition. Everything else goes
//! out as it is, with its length. A client that refuses anything but gzip gets gzip.
//!
//! What is read is copied once into the memory of the connection; hyper has no way to let the
//! kernel send a file by itself (sendfile), so large pieces are what makes it fast.

use std::{
    collections::VecDeque,
    fs::Metadata,
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Write},
    os::unix::fs::FileTypeExt,
    path::Path,
    sync::Arc,
};

use axum::{
    Extension,
    extract::{RawQuery, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use super::{FilesQuery, Refusal, Shared, blocking, check_signature, resolve, user};
use crate::{
    access::Operation,
    blocking::{MountId, Pool, stand_on_again},
    fs::{
        actor::Actor,
        read::{self, LARGE_PIECE, PIECE, Reader},
    },
    wire::{
        Body,
        budget::{Budget, Share},
        gate::Granted,
        memory::charged,
    },
};
use conditions::{Outcome, Validators};
use range::Range;

mod conditions;
pub mod encoding;
mod kind;
mod mime_types;
pub mod range;
mod sniff;

/// The shortest file that is compressed: shorter ones fit in a few packets anyway.
pub const MIN_GZIP: u64 = 64 << 10;

/// A piece of a file for a client, when those that wait for theirs hold all that downloads may have.
const MIN_PIECE: usize = 4 << 10;
/// What an encoder takes.
const ENCODER_BYTES: usize = 384 << 10;

/// With one of these the answer is about the file as it is, and is not compressed.
const CONDITIONAL: [HeaderName; 6] = [
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

pub(super) async fn download(
    State(sandbox): Shared,
    RawQuery(query): RawQuery,
    granted: Option<Extension<Granted>>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let query = FilesQuery::parse(&query.unwrap_or_default())?;
    check_signature(&sandbox, Operation::Read, &query, &headers, granted.as_deref())?;
    let user = user(&sandbox, &query)?;
    let path = resolve(&sandbox, query.path(), &user)?;
    let actor = sandbox.actor(&user);
    let budget = sandbox.memory.downloads().clone();
    let answer =
        blocking(&sandbox.files, move || Answer::to(&path, &actor, &headers, &budget)).await?;
    let body = match answer.content {
        Some(content) => stream_of(Arc::clone(&sandbox.files), content, answer.first),
        None => Body::from(answer.first),
    };
    Ok((answer.status, answer.headers, body).into_response())
}

/// A response, and what its body still has to come from.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    /// Read already: a file that fits is answered in one job.
    first: Bytes,
    content: Option<Content>,
}

impl Answer {
    fn to(
        path: &Path,
        actor: &Actor,
        request: &HeaderMap,
        budget: &Budget,
    ) -> Result<Self, Refusal> {
        let read::Opened { file, meta, .. } = read::open_any(path, actor)?;
        let not_acceptable = |text: String| Refusal(StatusCode::NOT_ACCEPTABLE, text);
        let accepted =
            encoding::accepted(request).map_err(|error| not_acceptable(error.to_string()))?;
        let conditional = CONDITIONAL.iter().any(|name| request.contains_key(name));
        if conditional && !accepted.identity {
            return Err(not_acceptable(
                "identity encoding not acceptable for Range or conditional request".to_owned(),
            ));
        }
        let failed = |error: io::Error| {
            let shown = crate::quote::path(path);
            let text = format!("error reading file '{shown}': {error}");
            Refusal(StatusCode::INTERNAL_SERVER_ERROR, text)
        };
        if meta.file_type().is_char_device() {
            return Ok(Self::of_device(path));
        }
        let size = meta.len();
        // A file of /proc says that it is empty and is not, one of /sys that it has a page.
        let length = if size == 0 { u64::MAX } else { size };
        let mut reader = Reader::new(file, 0, length).map_err(failed)?;
        let permit = (size > PIECE as u64).then(read::roomy).flatten();
        let piece = if permit.is_some() { LARGE_PIECE } else { PIECE };
        if permit.is_some() {
            // The kernel then reads further ahead; that it may not is no reason to fail.
            let _ = posix_fadvise(reader.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        }

        let leases = Leases::new(budget);
        let lease = leases.try_take(wanted(&reader, piece)).ok_or_else(no_room).map_err(failed)?;
        let read = lease.piece(piece);
        let first = reader.next(read).map_err(failed)?;
        let plain = first.len() as u64 == size.min(read as u64);
        let mut headers = HeaderMap::new();
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        let kind = kind::content_type(path, &first);
        headers.insert(header::CONTENT_TYPE, kind.clone());
        if let Ok(value) = HeaderValue::try_from(kind::disposition(path)) {
            headers.insert(header::CONTENT_DISPOSITION, value);
        }
        let mut answer =
            Self { status: StatusCode::OK, headers, first: Bytes::new(), content: None };

        let pays = size >= MIN_GZIP && kind::compresses(&kind);
        let gzip = !accepted.identity || (accepted.gzip && pays && !conditional);
        let mut encoder_share = budget.share();
        let room = gzip && encoder_share.hold(ENCODER_BYTES).is_ok();
        if !room && !accepted.identity {
            let text = "too many downloads are being compressed; try again later".to_owned();
            return Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, text));
        }
        let mut content = Content {
            reader,
            parts: VecDeque::new(),
            piece,
            gzip: None,
            leases,
            _encoder: encoder_share,
            _permit: permit,
            mount: MountId::current(),
        };
        if room {
            answer.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&first).map_err(failed)?;
            content.gzip = Some(encoder);
            answer.first = content.next(lease).map_err(failed)?;
            answer.content = Some(content);
            return Ok(answer);
        }
        if !plain {
            // Neither its length nor its times mean anything.
            answer.first = charged(first, lease);
            answer.content = Some(content);
            return Ok(answer);
        }
        let first = charged(first, lease);
        answer.plain(request, &meta, &kind, first, content).map_err(failed)?;
        Ok(answer)
    }

    /// The answer for a character device, which has the size 0: no more is read than the size says, as with
    /// upstream. What a device like `/dev/zero` gives never ends.
    fn of_device(path: &Path) -> Self {
        let mut answer = Self {
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            first: Bytes::new(),
            content: None,
        };
        answer.headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        answer.headers.insert(header::CONTENT_TYPE, kind::content_type(path, &[]));
        answer.set(header::CONTENT_DISPOSITION, &kind::disposition(path));
        answer.set(header::CONTENT_LENGTH, "0");
        answer
    }

    /// The answer with the file as it is: all of it, some of it, or that nothing has changed.
    fn plain(
        &mut self,
        request: &HeaderMap,
        meta: &Metadata,
        kind: &HeaderValue,
        first: Bytes,
        mut content: Content,
    ) -> io::Result<()> {
        let size = meta.len();
        let modified = meta.modified().ok().and_then(conditions::expressible);
        let file = Validators { tag: format!("\"{}\"", read::tag(meta)), modified };
        self.set(header::ETAG, &file.tag);
        if let Some(modified) = modified {
            self.set(header::LAST_MODIFIED, &httpdate::fmt_http_date(modified));
        }
        self.set(header::ACCEPT_RANGES, "bytes");
        match conditions::check(request, &file) {
            Outcome::Send => {}
            Outcome::NotModified => {
                self.status = StatusCode::NOT_MODIFIED;
                self.headers.remove(header::CONTENT_TYPE);
                return Ok(());
            }
            Outcome::Failed => {
                self.status = StatusCode::PRECONDITION_FAILED;
                self.headers.remove(header::CONTENT_TYPE);
                return Ok(());
            }
        }
        let wanted = request.get(header::RANGE).map(|value| value.to_str().unwrap_or_default());
        let wanted = wanted.filter(|_| conditions::range_counts(request, &file));
        let ranges = match wanted.map(|text| range::parse(text, size)).transpose() {
            Ok(ranges) => ranges.flatten(),
            Err(error) => {
                self.refuse_range(error, size);
                return Ok(());
            }
        };
        let Some(ranges) = ranges else {
            self.set(header::CONTENT_LENGTH, &size.to_string());
            self.first = first;
            self.content = Some(content);
            return Ok(());
        };
        self.status = StatusCode::PARTIAL_CONTENT;
        if let [range] = ranges[..] {
            self.set(header::CONTENT_RANGE, &range.content_range(size));
            self.set(header::CONTENT_LENGTH, &range.length.to_string());
            content.parts.push_back(Part::File(range));
        } else {
            let (boundary, parts, length) = multipart(&ranges, kind, size);
            let kind = format!("multipart/byteranges; boundary={boundary}");
            self.set(header::CONTENT_TYPE, &kind);
            self.set(header::CONTENT_LENGTH, &length.to_string());
            content.parts = parts;
        }
        content.reader.go_to(0, 0)?;
        // It may hold the only lease that there is.
        drop(first);
        let lease = content.leases.try_take(content.wanted()).ok_or_else(no_room)?;
        self.first = content.next(lease)?;
        self.content = Some(content);
        Ok(())
    }

    /// 416, as Go writes it.
    fn refuse_range(&mut self, error: range::RangeError, size: u64) {
        self.status = StatusCode::RANGE_NOT_SATISFIABLE;
        for name in [header::ETAG, header::LAST_MODIFIED, header::CONTENT_DISPOSITION] {
            self.headers.remove(name);
        }
        if error == range::RangeError::NoOverlap {
            self.set(header::CONTENT_RANGE, &format!("bytes */{size}"));
        }
        self.set(header::CONTENT_TYPE, "text/plain; charset=utf-8");
        self.set(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
        let text = format!("{error}\n");
        self.set(header::CONTENT_LENGTH, &text.len().to_string());
        self.first = text.into();
    }

    fn set(&mut self, name: HeaderName, value: &str) {
        if let Ok(value) = HeaderValue::try_from(value) {
            self.headers.insert(name, value);
        }
    }
}

/// The parts of a `multipart/byteranges` body (RFC 9110, 14.6), with its boundary and length.
fn multipart(ranges: &[Range], kind: &HeaderValue, size: u64) -> (String, VecDeque<Part>, u64) {
    // Keyed anew by the standard library each time, from the kernel's random numbers.
    let random = || RandomState::new().build_hasher().finish();
    let boundary = format!("{:016x}{:016x}", random(), random());
    let kind = kind.to_str().unwrap_or_default();
    let mut parts = VecDeque::new();
    let mut length = 0;
    for range in ranges {
        let start = if parts.is_empty() { "" } else { "\r\n" };
        let head = format!(
            "{start}--{boundary}\r\nContent-Range: {}\r\nContent-Type: {kind}\r\n\r\n",
            range.content_range(size)
        );
        length += head.len() as u64 + range.length;
        parts.push_back(Part::Text(head.into()));
        parts.push_back(Part::File(*range));
    }
    let end = format!("\r\n--{boundary}--\r\n");
    length += end.len() as u64;
    parts.push_back(Part::Text(end.into()));
    (boundary, parts, length)
}

/// Leave to hold a piece in memory until the client has taken it.
enum Lease {
    /// Borrowed from what all downloads share.
    Piece(#[allow(dead_code)] Share),
    /// The only small piece that this download may hold without borrowing.
    Small(#[allow(dead_code)] OwnedSemaphorePermit),
}

/// Where the pieces of one download get their leases. HTTP/2 queues as many pieces as it has room for, so
/// small ones are bounded, too.
struct Leases {
    budget: Budget,
    small: Arc<Semaphore>,
}

impl Leases {
    fn new(budget: &Budget) -> Self {
        Self { budget: budget.clone(), small: Arc::new(Semaphore::new(1)) }
    }

    /// A lease for a piece of so many bytes, or else for [`MIN_PIECE`].
    fn try_take(&self, piece: usize) -> Option<Lease> {
        let mut share = self.budget.share();
        match share.hold(piece) {
            Ok(()) => Some(Lease::Piece(share)),
            Err(_) => Arc::clone(&self.small).try_acquire_owned().ok().map(Lease::Small),
        }
    }

    /// As [`Self::try_take`]; waits until the client has taken the small piece before.
    async fn take(&self, piece: usize) -> io::Result<Lease> {
        if let Some(lease) = self.try_take(piece) {
            return Ok(lease);
        }
        let permit = Arc::clone(&self.small).acquire_owned().await;
        permit.map(Lease::Small).map_err(io::Error::other)
    }
}

/// How much the next piece of so many bytes can bring.
fn wanted(reader: &Reader, piece: usize) -> usize {
    // Behind the end there may be another part.
    match usize::try_from(reader.left()).unwrap_or(piece) {
        0 => piece,
        left => left.min(piece),
    }
}

fn no_room() -> io::Error {
    io::Error::other("no memory is left for a piece of it")
}

impl Lease {
    fn piece(&self, wanted: usize) -> usize {
        match self {
            Self::Piece(_) => wanted,
            Self::Small(_) => MIN_PIECE,
        }
    }
}

/// What a body is made of, a piece at a time.
struct Content {
    reader: Reader,
    /// What comes behind what the reader reads now.
    parts: VecDeque<Part>,
    piece: usize,
    /// Compresses what is read; none once the end has been.
    gzip: Option<GzEncoder<Vec<u8>>>,
    /// Where pieces get their leases.
    leases: Leases,
    /// What the encoder has borrowed.
    _encoder: Share,
    _permit: Option<SemaphorePermit<'static>>,
    /// That of the file.
    mount: Option<MountId>,
}

enum Part {
    Text(Bytes),
    File(Range),
}

impl Content {
    /// The next bytes; none at the end.
    fn next(&mut self, lease: Lease) -> io::Result<Bytes> {
        loop {
            let read = self.reader.next(lease.piece(self.piece))?;
            if let Some(encoder) = &mut self.gzip {
                if read.is_empty() {
                    encoder.try_finish()?;
                    let last = std::mem::take(encoder.get_mut());
                    self.gzip = None;
                    return Ok(last.into());
                }
                encoder.write_all(&read)?;
                let packed = std::mem::take(encoder.get_mut());
                if !packed.is_empty() {
                    return Ok(charged(packed, lease));
                }
                continue;
            }
            if !read.is_empty() {
                return Ok(charged(read, lease));
            }
            match self.parts.pop_front() {
                None => return Ok(Bytes::new()),
                Some(Part::Text(text)) => return Ok(text),
                Some(Part::File(range)) => self.reader.go_to(range.start, range.length)?,
            }
        }
    }

    /// How long the next piece can be.
    fn wanted(&self) -> usize {
        wanted(&self.reader, self.piece)
    }

    fn ended(&self) -> bool {
        self.reader.left() == 0 && self.parts.is_empty() && self.gzip.is_none()
    }
}

/// The first piece, then the rest as the client takes it.
fn stream_of(files: Arc<Pool>, content: Content, first: Bytes) -> Body {
    if content.ended() || first.is_empty() {
        return Body::from(first);
    }
    let rest = stream::try_unfold(content, move |mut content| {
        let files = Arc::clone(&files);
        async move {
            let lease = content.leases.take(content.wanted()).await?;
            // Calls are bounded by the wire, and one that has begun shall come to its end.
            let read = files.run_next_step(move || {
                let piece = stand_on_again(content.mount).map_err(io::Error::from);
                let piece = piece.and_then(|()| content.next(lease));
                (content, piece)
            });
            // The status has been sent, so that only the log can say why the body ends early.
            let cut_short = |error: io::Error| {
                tracing::warn!(%error, "a download is cut short");
                error
            };
            let (content, piece) = read.await.map_err(|busy| cut_short(io::Error::other(busy)))?;
            let piece = piece.map_err(cut_short)?;
            Ok::<_, io::Error>((!piece.is_empty()).then_some((piece, content)))
        }
    });
    let first = stream::once(async { Ok(first) });
    Body::from_stream(futures_util::StreamExt::chain(first, rest))
}
