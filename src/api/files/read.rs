//! `Read`: the content of a file as a stream of messages.

use std::{io, sync::Arc};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status};

use crate::{
    api::{
        filesystem::{Files, info},
        status,
    },
    blocking::{MountId, stand_on_again},
    fs::{
        FsError, PathError, entry,
        read::{self, LARGE_PIECE, PIECE, Reader},
    },
    proto::filesystem::{self as pb, read_response::Event},
};

/// The bytes of one message where the client does not say it.
const DEFAULT_CHUNK: usize = LARGE_PIECE;
/// The most bytes of one message: gRPC clients take 4 MiB by default.
const MAX_CHUNK: u32 = 1 << 20;

pub(in crate::api) type ReadStream =
    std::pin::Pin<Box<dyn Stream<Item = Result<pb::ReadResponse, Status>> + Send>>;

pub(in crate::api) async fn read(
    files: &Files,
    request: Request<pb::ReadRequest>,
) -> Result<Response<ReadStream>, Status> {
    let call = files.call(request)?;
    let (wanted, actor) = (call.message, call.actor);
    let path = files.resolve(&wanted.path, &call.user)?;
    let chunk = match wanted.chunk_bytes {
        0 => DEFAULT_CHUNK,
        bytes if bytes > MAX_CHUNK => {
            let text = format!("chunk_bytes: {bytes} is more than {MAX_CHUNK}");
            return Err(Status::invalid_argument(text));
        }
        bytes => bytes as usize,
    };
    let permit = if chunk > PIECE { read::roomy() } else { None };
    let chunk = if permit.is_some() { chunk } else { chunk.min(PIECE) };
    let (told, first, (reader, mount)) = files
        .blocking_own(move |users| {
            let read::Opened { file, meta, rights } = read::open(&path, &actor)?;
            let tag = read::tag(&meta);
            if !wanted.if_match.is_empty() && wanted.if_match != tag {
                return Err(FsError::Changed { path, now: format!("its tag is {tag}") });
            }
            let entry = entry::of_file(&file, &rights, &path, users)?;
            let rest = match meta.len() {
                // A file of /proc says that it is empty and is not.
                0 => u64::MAX,
                size => size.saturating_sub(wanted.offset),
            };
            let length = wanted.length.unwrap_or(u64::MAX).min(rest);
            let failed = |error: io::Error| FsError::OpenForReading {
                error: PathError::io("read", &path, &error),
            };
            let start = if length == 0 { 0 } else { wanted.offset };
            let mut reader = Reader::new(file, start, length).map_err(failed)?;
            let first = reader.next(chunk).map_err(failed)?;
            let told = pb::read_response::Info { entry: Some(info(entry)), tag };
            Ok((told, first, (reader, MountId::current())))
        })
        .await?;
    let pool = Arc::clone(files.pool());
    let rest = stream::try_unfold((reader, permit), move |(mut reader, permit)| {
        let pool = Arc::clone(&pool);
        async move {
            if reader.left() == 0 {
                return Ok(None);
            }
            // Calls are bounded by the wire, and one that has begun shall come to its end.
            let read = pool.run_next_step(move || {
                stand_on_again(mount)?;
                let piece = reader.next(chunk);
                Ok::<_, FsError>((reader, piece))
            });
            let read = read.await.unwrap_or_else(|busy| Err(busy.into()));
            let (reader, piece) = read.map_err(|error| status::of_own_files(&error))?;
            let piece =
                piece.map_err(|error| Status::internal(format!("error reading file: {error}")))?;
            Ok((!piece.is_empty()).then(|| (data(piece), (reader, permit))))
        }
    });
    let begin = [Some(message(Event::Info(told))), (!first.is_empty()).then(|| data(first))];
    let begin = stream::iter(begin.into_iter().flatten().map(Ok));
    Ok(Response::new(Box::pin(begin.chain(rest))))
}

fn data(piece: Vec<u8>) -> pb::ReadResponse {
    message(Event::Data(Bytes::from(piece)))
}

fn message(event: Event) -> pb::ReadResponse {
    pb::ReadResponse { event: Some(event) }
}
