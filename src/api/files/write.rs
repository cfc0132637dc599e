//! `Write`: a file from a stream of messages, which can be continued by another stream.

use std::{
    path::PathBuf,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tonic::{Request, Response, Status, Streaming};

use super::{next_message, no_start, second_start};
use crate::{
    api::{
        filesystem::{Files, info},
        status,
    },
    blocking::{MountId, Pool, stand_on_again},
    fs::{
        FsError,
        actor::Actor,
        entry,
        staged::{Expected, Staged, WriteOptions},
        uploads::{Kept, SharedStaged, UPLOAD_KEPT, Uploads},
    },
    proto::filesystem::{self as pb, write_request::Event},
    slots::Slot,
};

pub(in crate::api) async fn write(
    files: &Files,
    request: Request<Streaming<pb::WriteRequest>>,
) -> Result<Response<pb::WriteResponse>, Status> {
    let call = files.call(request)?;
    let mut requests = call.message;
    let Some(Event::Start(start)) = event(&mut requests).await? else {
        return Err(no_start());
    };
    let path = files.resolve(&start.path, &call.user)?;
    let options = options(&start)?;
    let upload = Upload::begin(files, &start.upload_id, path, call.actor, &options).await?;
    loop {
        let next = tokio::select! {
            biased;
            // What has come is kept, and may make room in its turn.
            () = upload.evicted() => return Err(status::of_eviction()),
            next = event(&mut requests) => next?,
        };
        match next {
            Some(Event::Chunk(chunk)) => {
                if let Some(slot) = &upload.slot {
                    slot.progress(chunk.data.len());
                }
                upload.step(move |staged| staged.write(chunk.offset, &chunk.data)).await?;
            }
            Some(Event::Commit(commit)) => return upload.commit(files, commit, options).await,
            Some(Event::Start(_)) => return Err(second_start()),
            None if upload.id.is_some() => return upload.report().await,
            None => {
                let text = "commit: the stream ended without it, and nothing was written";
                return Err(Status::invalid_argument(text));
            }
        }
    }
}

async fn event(requests: &mut Streaming<pb::WriteRequest>) -> Result<Option<Event>, Status> {
    match next_message(requests).await? {
        None => Ok(None),
        Some(pb::WriteRequest { event: None }) => {
            Err(Status::invalid_argument("event: a message has none of start, chunk and commit"))
        }
        Some(pb::WriteRequest { event }) => Ok(event),
    }
}

fn options(start: &pb::write_request::Start) -> Result<WriteOptions, Status> {
    if start.mode.is_some_and(|mode| mode > 0o7777) {
        return Err(Status::invalid_argument("start.mode: more than the permission bits 07777"));
    }
    if start.create_only && !start.if_match.is_empty() {
        let text = "start.create_only: contradicts start.if_match";
        return Err(Status::invalid_argument(text));
    }
    Ok(WriteOptions {
        mode: start.mode,
        if_match: (!start.if_match.is_empty()).then(|| start.if_match.clone()),
        create_only: start.create_only,
        metadata: start.metadata.clone().into_iter().collect(),
        fsync: start.fsync,
    })
}

/// One call's hold on what it writes. Dropped, it keeps what can be continued and lets go of the
/// rest.
struct Upload {
    pool: Arc<Pool>,
    uploads: Arc<Uploads>,
    /// The client's name for it; none when it cannot be continued.
    id: Option<String>,
    path: PathBuf,
    actor: Actor,
    /// Shared with a job that may still run when the call has ended.
    staged: SharedStaged,
    /// That of the file.
    mount: Option<MountId>,
    /// Held by an upload with a name.
    slot: Option<Slot>,
}

impl Upload {
    async fn begin(
        files: &Files,
        id: &str,
        path: PathBuf,
        actor: Actor,
        options: &WriteOptions,
    ) -> Result<Self, Status> {
        let uploads = Arc::clone(files.uploads());
        let id = (!id.is_empty()).then(|| id.to_owned());
        let pool = Arc::clone(files.pool());
        let (kept, slot) = match &id {
            Some(id) => {
                let slot = files.named_slot().await?;
                let taken = uploads.take(id, &path, actor.uid());
                let taken = taken.map_err(|error| status::of_own_files(&error))?;
                if let Some(evicted) = taken.evicted {
                    let_go(&pool, evicted.staged);
                }
                (taken.kept, Some(slot))
            }
            None => (None, None),
        };
        let begun = kept.is_some();
        let staged = kept.map_or_else(SharedStaged::default, |kept| kept.staged);
        let mut upload = Self { pool, uploads, id, path, actor, staged, mount: None, slot };
        let (staged, options) = (Arc::clone(&upload.staged), options.clone());
        let (path, actor) = (upload.path.clone(), upload.actor.clone());
        let created = files
            .blocking_own(move |_| {
                let mut staged = staged.lock();
                // One that was kept may not have begun either: its client left too early.
                if staged.is_none() {
                    *staged = Some(Staged::create(&path, &actor, &options)?);
                }
                Ok(MountId::current())
            })
            .await;
        match created {
            Ok(mount) => upload.mount = mount,
            Err(status) => {
                if !begun {
                    upload.forget();
                }
                return Err(status);
            }
        }
        Ok(upload)
    }

    /// Completes when the upload has to end to make room for another.
    async fn evicted(&self) {
        match &self.slot {
            Some(slot) => slot.evicted().await,
            None => std::future::pending().await,
        }
    }

    /// Does one step of the work where it may block.
    async fn step<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Staged) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, Status> {
        let (staged, mount) = (Arc::clone(&self.staged), self.mount);
        let done = self.pool.run_next_step(move || {
            stand_on_again(mount)?;
            match staged.lock().as_mut() {
                Some(staged) => work(staged),
                None => Err(FsError::BadField {
                    field: "upload_id",
                    why: "the upload has been committed".to_owned(),
                }),
            }
        });
        done.await.unwrap_or_else(|busy| Err(busy.into())).map_err(|e| status::of_own_files(&e))
    }

    /// What has come so far.
    async fn report(self) -> Result<Response<pb::WriteResponse>, Status> {
        let (received, sha256) = self.step(|staged| Ok((staged.length(), staged.sha256()))).await?;
        Ok(Response::new(pb::WriteResponse {
            committed: false,
            received,
            entry: None,
            tag: String::new(),
            sha256: sha256.to_vec().into(),
        }))
    }

    async fn commit(
        mut self,
        files: &Files,
        commit: pb::write_request::Commit,
        options: WriteOptions,
    ) -> Result<Response<pb::WriteResponse>, Status> {
        let sha256 = match commit.sha256 {
            Some(bytes) => match <[u8; 32]>::try_from(bytes.as_ref()) {
                Ok(sum) => Some(sum),
                Err(_) => {
                    let text = format!("commit.sha256: {} bytes, not 32", bytes.len());
                    return Err(Status::invalid_argument(text));
                }
            },
            None => None,
        };
        let expected = Expected { size: commit.size, sha256 };
        // A client that sent too little may go on; what is broken is no use to anybody.
        let checked = self.step(move |staged| staged.check(&expected)).await;
        if let Err(status) = checked {
            if status.code() == tonic::Code::DataLoss {
                self.forget();
            }
            return Err(status);
        }
        let (staged, writers) = (Arc::clone(&self.staged), files.writers());
        let (path, mount) = (self.path.clone(), self.mount);
        let done = files
            .blocking_step(move |users| {
                stand_on_again(mount)?;
                // It is ours from here on, and cannot be continued if this fails.
                let Some(staged) = staged.lock().take() else {
                    return Err(FsError::Abandoned(path));
                };
                let (received, sha256) = (staged.length(), staged.sha256());
                let done = staged.commit(&writers, &options)?;
                let entry = entry::of_file(&done.file, &done.rights, &path, users)?;
                Ok((received, sha256, done.tag, entry))
            })
            .await;
        self.forget();
        let (received, sha256, tag, entry) = done?;
        Ok(Response::new(pb::WriteResponse {
            committed: true,
            received,
            entry: Some(info(entry)),
            tag,
            sha256: sha256.to_vec().into(),
        }))
    }

    /// It is not to be continued.
    fn forget(&mut self) {
        if let Some(id) = self.id.take() {
            self.uploads.forget(&id);
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let staged = std::mem::take(&mut self.staged);
        let Some(id) = self.id.take() else {
            return let_go(&self.pool, staged);
        };
        let kept = Kept { staged, path: std::mem::take(&mut self.path), owner: self.actor.uid() };
        let number = self.uploads.keep(&id, kept);
        let (uploads, pool) = (Arc::downgrade(&self.uploads), Arc::clone(&self.pool));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(expire(uploads, pool, id, number));
        }
    }
}

/// Lets go of an upload that nobody has continued.
async fn expire(uploads: Weak<Uploads>, pool: Arc<Pool>, id: String, number: u64) {
    tokio::time::sleep(UPLOAD_KEPT).await;
    if let Some(kept) = uploads.upgrade().and_then(|uploads| uploads.expire(&id, number)) {
        tracing::info!(upload = id, "an upload that nobody continued is gone");
        let_go(&pool, kept.staged);
    }
}

/// To take a large file away may block.
fn let_go(pool: &Pool, staged: Arc<Mutex<Option<Staged>>>) {
    pool.run_later(move || drop(staged));
}
