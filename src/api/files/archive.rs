//! `Archive` and `Extract`: trees as tar archives in streams of messages.
//!
//! tar is written and read by a thread of the pool that goes as fast as its client: a few messages
//! lie between the two. [`MAX_TREES`](crate::api::filesystem::MAX_TREES) bounds the threads.

use std::{
    io::{self, Read, Write},
    pin::{Pin, pin},
    sync::{Arc, atomic::AtomicBool},
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, future::BoxFuture, stream};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{next_message, no_start, second_start};
use crate::{
    api::{
        filesystem::{Files, SetOnDrop},
        status,
    },
    blocking::{MountId, leave_mount, stand_on_again, stand_on_path},
    fs::{
        FsError,
        archive::{self, Compression},
    },
    proto::filesystem::{self as pb, extract_request::Event},
    slots::Slot,
    to_client::{self, FromThread, ToClient},
};

/// The bytes of one message of an archive.
pub(in crate::api) const CHUNK: usize = 128 << 10;
/// The messages between a thread and its client.
const MESSAGES: usize = 4;

pub(in crate::api) type ArchiveStream =
    Pin<Box<dyn Stream<Item = Result<pb::ArchiveResponse, Status>> + Send>>;

pub(in crate::api) async fn archive(
    files: &Files,
    request: Request<pb::ArchiveRequest>,
) -> Result<Response<ArchiveStream>, Status> {
    let call = files.call(request)?;
    let path = files.resolve(&call.message.path, &call.user)?;
    let compression = compression(call.message.compression()).unwrap_or(Compression::None);
    let actor = call.actor;
    let slot = files.tree_slot().await;
    let (sender, chunks) = to_client::channel(MESSAGES, Arc::clone(&slot));
    let stop = Arc::new(AtomicBool::new(false));
    let left = SetOnDrop(Arc::clone(&stop));
    let (users, pool) = (files.users(), Arc::clone(files.pool()));
    let work = async move {
        let done = pool.run_next_step(move || {
            slot.use_here();
            let mut out = Chunks { sender, held: BytesMut::new() };
            let done = stand_on_path(&path).map_err(FsError::from).and_then(|()| {
                archive::archive(&path, &actor, compression, &users, &mut out, &stop)
            });
            let last = match done {
                Ok(()) => Ok(None),
                Err(error) => Err(status::of_own_files(&error)),
            };
            leave_mount();
            // Nobody is there who would miss it.
            let _ = out.sender.send_slowly(last, 0);
        });
        done.await.map_err(|busy| status::of_own_files(&busy.into()))
    };
    let mut content = Content { chunks, work: Some(Box::pin(work)), _left: left };
    let first = content.next().await?;
    // Its first part comes, or its error, before there is an answer; then nothing is held here.
    let rest = stream::try_unfold((content, Some(first)), async |(mut content, first)| {
        let now = match first {
            Some(first) => first,
            None => content.next().await?,
        };
        Ok(now.map(|data| (pb::ArchiveResponse { data }, (content, None))))
    });
    Ok(Response::new(Box::pin(rest)))
}

/// An archive as it comes from its thread.
struct Content {
    chunks: FromThread<Result<Option<Bytes>, Status>>,
    /// None once the thread is done.
    work: Option<BoxFuture<'static, Result<(), Status>>>,
    _left: SetOnDrop,
}

impl Content {
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        // Its end may be noticed before its last words are read.
        if let Some(work) = &mut self.work {
            tokio::select! {
                biased;
                Some(chunk) = self.chunks.recv() => return chunk,
                done = work => {
                    self.work = None;
                    done?;
                }
            }
        }
        match self.chunks.recv().await {
            Some(chunk) => chunk,
            None if self.chunks.is_evicted() => Err(status::of_eviction()),
            None => broken(),
        }
    }
}

/// The thread has ended without saying so.
fn broken() -> Result<Option<Bytes>, Status> {
    Err(Status::internal("the archive breaks off; the daemon's log says why"))
}

/// The compression that a request names; none where it names none.
fn compression(compression: pb::Compression) -> Option<Compression> {
    match compression {
        pb::Compression::Unspecified => None,
        pb::Compression::None => Some(Compression::None),
        pb::Compression::Gzip => Some(Compression::Gzip),
        pb::Compression::Zstd => Some(Compression::Zstd),
    }
}

/// What a thread writes, for the client: data, then none at the end, or an error.
struct Chunks {
    sender: ToClient<Result<Option<Bytes>, Status>>,
    held: BytesMut,
}

impl Chunks {
    fn send(&mut self) -> io::Result<()> {
        let chunk = self.held.split().freeze();
        let length = chunk.len();
        let Err(chunk) = self.sender.try_send(Ok(Some(chunk)), length) else { return Ok(()) };
        // A slow client does not make a mount one that hangs.
        let mount = MountId::current();
        leave_mount();
        self.sender.send_slowly(chunk, length).map_err(io::Error::other)?;
        Ok(stand_on_again(mount)?)
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.get(..CHUNK - self.held.len()).unwrap_or(bytes);
        self.held.extend_from_slice(taken);
        if self.held.len() == CHUNK {
            self.send()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.held.is_empty() { Ok(()) } else { self.send() }
    }
}

pub(in crate::api) async fn extract(
    files: &Files,
    request: Request<Streaming<pb::ExtractRequest>>,
) -> Result<Response<pb::ExtractResponse>, Status> {
    let call = files.call(request)?;
    let mut requests = call.message;
    let Some(pb::ExtractRequest { event: Some(Event::Start(start)) }) =
        next_message(&mut requests).await?
    else {
        return Err(no_start());
    };
    let path = files.resolve(&start.path, &call.user)?;
    let compression = compression(start.compression());
    let (actor, preserve) = (call.actor, start.preserve);
    let slot = files.tree_slot().await;
    let (sender, chunks) = mpsc::channel(MESSAGES);
    let stop = Arc::new(AtomicBool::new(false));
    let _left = SetOnDrop(Arc::clone(&stop));
    let used = Arc::clone(&slot);
    let mut work = pin!(files.pool().run(move || {
        used.use_here();
        stand_on_path(&path)?;
        let input = Input { chunks, now: Bytes::new(), ended: false, slot: used };
        archive::extract(&path, &actor, input, compression, preserve, &stop)
    }));
    let done = tokio::select! {
        biased;
        // The thread sees that its input breaks off.
        () = slot.evicted() => return Err(status::of_eviction()),
        done = &mut work => done,
        fed = feed(&mut requests, &sender, &slot) => match fed {
            // The thread sees that its input breaks off.
            Err(status) => return Err(status),
            Ok(()) => work.await,
        },
    };
    let done = done.unwrap_or_else(|busy| Err(FsError::from(busy)));
    let done = done.map_err(|error| status::of_own_files(&error))?;
    Ok(Response::new(pb::ExtractResponse { entries: done.entries, bytes: done.bytes }))
}

/// Passes on what the client sends.
async fn feed(
    requests: &mut Streaming<pb::ExtractRequest>,
    sender: &mpsc::Sender<Option<Bytes>>,
    slot: &Slot,
) -> Result<(), Status> {
    loop {
        let chunk = match next_message(requests).await? {
            None => None,
            Some(pb::ExtractRequest { event: Some(Event::Data(data)) }) => {
                slot.progress(data.len());
                Some(data)
            }
            Some(pb::ExtractRequest { event: Some(Event::Start(_)) }) => {
                return Err(second_start());
            }
            Some(pb::ExtractRequest { event: None }) => {
                let text = "event: a message has neither start nor data";
                return Err(Status::invalid_argument(text));
            }
        };
        let last = chunk.is_none();
        // A thread that has ended says why by itself.
        if sender.send(chunk).await.is_err() || last {
            return Ok(());
        }
    }
}

/// What a client sends, for the thread.
struct Input {
    chunks: mpsc::Receiver<Option<Bytes>>,
    now: Bytes,
    ended: bool,
    slot: Arc<Slot>,
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() && !self.ended {
            let chunk = match self.chunks.try_recv() {
                Ok(chunk) => Some(chunk),
                Err(_) => {
                    // As above.
                    let mount = MountId::current();
                    leave_mount();
                    let chunk = self.slot.wait_for_client(self.chunks.recv()).flatten();
                    stand_on_again(mount)?;
                    chunk
                }
            };
            match chunk {
                Some(Some(chunk)) => self.now = chunk,
                Some(None) => self.ended = true,
                None => return Err(io::Error::other("the stream breaks off")),
            }
        }
        let length = self.now.len().min(buffer.len());
        self.now.copy_to_slice(buffer.get_mut(..length).unwrap_or_default());
        Ok(length)
    }
}
