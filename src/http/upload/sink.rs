//! Writing one file of an upload, a job at a time.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use http::StatusCode;

use super::{Target, Written};
use crate::{
    blocking::{MountId, stand_on_again},
    fs::{FsError, transfer::Writer},
    http::{Refusal, blocking},
    sandbox::Sandbox,
    slots::Slot,
};

/// A file that is being written, between the jobs that do it.
pub(super) struct Sink {
    sandbox: Arc<Sandbox>,
    /// None while a job has it, and for good once one has failed.
    open: Option<Open>,
    metadata: BTreeMap<String, String>,
}

/// What the jobs of one file hand on.
struct Open {
    coder: Coder,
    slot: Arc<Slot>,
    /// That of the file.
    mount: Option<MountId>,
}

enum Coder {
    Plain(Box<Output>),
    /// With whether a byte has come: a body of none is no broken gzip.
    Gzip(Box<MultiGzDecoder<Output>>, bool),
}

impl Sink {
    pub(super) async fn open(
        target: &Target,
        path: PathBuf,
        gzip: bool,
        length: Option<u64>,
    ) -> Result<Self, Refusal> {
        let (actor, slot) = (target.sandbox.actor(&target.user), Arc::clone(&target.slot));
        let writers = Arc::clone(&target.sandbox.writers);
        let (fsync, mode) = (target.query.fsync, target.query.mode);
        let open = blocking(&target.sandbox.files, move || {
            slot.use_here();
            let mut writer = Writer::create(&writers, &path, &actor)?;
            if let Some(length) = length.filter(|length| *length > 0) {
                writer.expect_bytes(length);
            }
            if fsync {
                writer.fsync();
            }
            if let Some(mode) = mode {
                writer.mode_of_new(mode);
            }
            let output = Output { writer, failed: None };
            let coder = match gzip {
                true => Coder::Gzip(Box::new(MultiGzDecoder::new(output)), false),
                false => Coder::Plain(Box::new(output)),
            };
            Ok(Open { coder, slot, mount: MountId::current() })
        });
        let open = Some(open.await?);
        let (sandbox, metadata) = (Arc::clone(&target.sandbox), target.metadata.clone());
        Ok(Self { sandbox, open, metadata })
    }

    /// Writes chunks.
    pub(super) async fn send(&mut self, chunks: Vec<Bytes>) -> Result<(), Refusal> {
        let open = self
            .next_step(move |mut open| {
                chunks.iter().try_for_each(|chunk| open.coder.write(chunk))?;
                Ok(open)
            })
            .await?;
        self.open = Some(open);
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<Written, Refusal> {
        let metadata = std::mem::take(&mut self.metadata);
        let info =
            self.next_step(move |open| Ok(open.coder.finish()?.writer.finish(&metadata)?)).await?;
        Ok(Written { metadata: info.metadata, name: info.name, path: info.path, r#type: "file" })
    }

    /// Uploads are bounded, and one that has begun is not refused in its middle.
    async fn next_step<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(Open) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let open = self.open.take().ok_or_else(|| cut(&"it has failed before"))?;
        let done = self
            .sandbox
            .files
            .run_next_step(move || {
                open.slot.use_here();
                stand_on_again(open.mount).map_err(FsError::from)?;
                work(open)
            })
            .await;
        done.map_err(|busy| Refusal::from(FsError::from(busy)))?
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // To take a file away may block.
        if let Some(open) = self.open.take() {
            self.sandbox.files.run_later(move || drop(open));
        }
    }
}

impl Coder {
    fn write(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        match self {
            Self::Plain(output) => Ok(output.writer.write(chunk)?),
            Self::Gzip(decoder, any) => {
                *any = true;
                decoder.write_all(chunk).map_err(|error| decoder.get_mut().failure(&error))
            }
        }
    }

    fn finish(self) -> Result<Output, Refusal> {
        match self {
            Self::Plain(output) => Ok(*output),
            Self::Gzip(mut decoder, any) => {
                if any && let Err(error) = decoder.try_finish() {
                    return Err(decoder.get_mut().failure(&error));
                }
                decoder.finish().map_err(|error| not_gzip(&error))
            }
        }
    }
}

/// A writer as flate2 wants it, which keeps what really failed.
struct Output {
    writer: Writer,
    failed: Option<FsError>,
}

impl Output {
    /// What ended a write: the file system, or a body that is no gzip.
    fn failure(&mut self, error: &io::Error) -> Refusal {
        self.failed.take().map_or_else(|| not_gzip(error), Refusal::from)
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

fn not_gzip(error: &io::Error) -> Refusal {
    Refusal::bad(format!("error decompressing request body: {error}"))
}

pub(super) fn cut(error: &dyn std::fmt::Display) -> Refusal {
    Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("error writing file: {error}"))
}
