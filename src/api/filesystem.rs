//! The service `filesystem.Filesystem`.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tonic::{Request, Response, Status, Streaming};

use super::{
    files::{archive, change, read, write},
    identity,
    legacy::View,
    search, status, watch,
};
use crate::{
    blocking::{Pool, stand_on_paths},
    fs::{
        FsError,
        actor::Actor,
        dir,
        entry::{self, Entry, EntryKind},
        move_across::move_across,
        path,
        transfer::Writers,
        uploads::{MAX_KEPT_UPLOADS, Uploads},
    },
    guest::users::{User, Users},
    proto::{
        Timestamp,
        filesystem::{self as pb, filesystem_server::Filesystem},
    },
    sandbox::Sandbox,
    slots::{Slot, Slots},
    wire::metadata::ResponseMetadata,
};

/// The copies, archives and extractions at a time; others wait, and an archive or extraction whose client
/// drips makes room for them. Each holds a thread and up to
/// [`MAX_LEVELS`](crate::fs::MAX_LEVELS) directories, a copy two of each.
pub const MAX_TREES: usize = 4;

/// The service.
#[derive(Debug)]
pub struct Files {
    sandbox: Arc<Sandbox>,
    uploads: Arc<Uploads>,
    trees: Arc<Slots>,
    /// For the uploads with a name that are being written.
    named: Arc<Slots>,
}

/// What a call needs besides its message.
pub(super) struct Call<T> {
    pub(super) user: Arc<User>,
    /// The same user, as the one on whose behalf files are touched.
    pub(super) actor: Actor,
    pub(super) view: View,
    pub(super) metadata: Option<ResponseMetadata>,
    pub(super) message: T,
}

impl Files {
    /// Serves a sandbox's files.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        let uploads = Uploads::new();
        let trees = Slots::with_pieces(MAX_TREES, archive::CHUNK as u64);
        let kept = Arc::downgrade(&uploads);
        let evict = move || kept.upgrade().is_some_and(|kept| kept.evict_oldest());
        sandbox.processes.on_exhaustion(evict);
        let named = Slots::new(MAX_KEPT_UPLOADS);
        Self { sandbox, uploads, trees, named }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.sandbox.files
    }

    pub(super) fn uploads(&self) -> &Arc<Uploads> {
        &self.uploads
    }

    pub(super) fn writers(&self) -> Arc<Writers> {
        Arc::clone(&self.sandbox.writers)
    }

    pub(super) fn users(&self) -> Arc<Users> {
        Arc::clone(&self.sandbox.users)
    }

    /// A place to write an upload with a name; none where all that there are go fast.
    pub(super) async fn named_slot(&self) -> Result<Slot, Status> {
        let too_many = || status::of_own_files(&FsError::TooManyUploads(MAX_KEPT_UPLOADS));
        self.named.take().await.ok_or_else(too_many)
    }

    /// Waits until work on a whole tree may begin.
    pub(super) async fn tree_slot(&self) -> Arc<Slot> {
        self.trees.wait().await
    }

    pub(super) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    pub(super) fn call<T>(&self, request: Request<T>) -> Result<Call<T>, Status> {
        let user = identity::caller(request.extensions(), &self.sandbox)?;
        Ok(Call {
            actor: self.sandbox.actor(&user),
            user,
            view: View::of(&request),
            metadata: request.extensions().get().cloned(),
            message: request.into_inner(),
        })
    }

    pub(super) fn resolve(&self, path: &str, user: &User) -> Result<PathBuf, Status> {
        path::resolve(path, user, self.sandbox.defaults.get().workdir.as_deref())
            .map_err(|error| status::of_files(&error))
    }

    /// Moves to another file system, which takes as long as a copy.
    async fn move_across(
        &self,
        source: PathBuf,
        destination: PathBuf,
        actor: Actor,
    ) -> Result<Entry, Status> {
        let slot = self.tree_slot().await;
        let stop = Arc::new(AtomicBool::new(false));
        let _left = SetOnDrop(Arc::clone(&stop));
        self.blocking(move |users| {
            slot.use_here();
            stand_on_paths(&source, &destination)?;
            move_across(&source, &destination, &actor, users, &stop)
        })
        .await
    }

    /// Runs file work where it may block.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Users) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, Status> {
        let users = Arc::clone(&self.sandbox.users);
        let done = self.sandbox.files.run(move || work(&users)).await;
        done.unwrap_or_else(|busy| Err(busy.into())).map_err(|error| status::of_files(&error))
    }

    /// As [`Self::blocking`], for a method of our own.
    pub(super) async fn blocking_own<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Users) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, Status> {
        let users = Arc::clone(&self.sandbox.users);
        let done = self.sandbox.files.run(move || work(&users)).await;
        done.unwrap_or_else(|busy| Err(busy.into())).map_err(|error| status::of_own_files(&error))
    }

    /// As [`Self::blocking_own`], for work that has begun: it is not refused because others wait.
    pub(super) async fn blocking_step<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Users) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, Status> {
        let users = Arc::clone(&self.sandbox.users);
        let done = self.sandbox.files.run_next_step(move || work(&users)).await;
        done.unwrap_or_else(|busy| Err(busy.into())).map_err(|error| status::of_own_files(&error))
    }
}

#[tonic::async_trait]
impl Filesystem for Files {
    async fn stat(
        &self,
        request: Request<pb::StatRequest>,
    ) -> Result<Response<pb::StatResponse>, Status> {
        let call = self.call(request)?;
        let path = self.resolve(&call.message.path, &call.user)?;
        let actor = call.actor;
        let entry = self.blocking(move |users| entry::stat(&path, &actor, users)).await?;
        call.view.announce(call.metadata.as_ref());
        Ok(Response::new(pb::StatResponse { entry: Some(call.view.entry(info(entry))) }))
    }

    async fn make_dir(
        &self,
        request: Request<pb::MakeDirRequest>,
    ) -> Result<Response<pb::MakeDirResponse>, Status> {
        let call = self.call(request)?;
        let path = self.resolve(&call.message.path, &call.user)?;
        let actor = call.actor;
        let entry = self.blocking(move |users| dir::make_dir(&path, &actor, users)).await?;
        call.view.announce(call.metadata.as_ref());
        Ok(Response::new(pb::MakeDirResponse { entry: Some(call.view.entry(info(entry))) }))
    }

    async fn r#move(
        &self,
        request: Request<pb::MoveRequest>,
    ) -> Result<Response<pb::MoveResponse>, Status> {
        let call = self.call(request)?;
        let source = self.resolve(&call.message.source, &call.user)?;
        let destination = self.resolve(&call.message.destination, &call.user)?;
        let actor = call.actor;
        let (from, to, by) = (source.clone(), destination.clone(), actor.clone());
        let renamed = self
            .blocking(move |users| match dir::move_entry(&from, &to, &by, users) {
                Err(error) if dir::is_across(&error) => Ok(None),
                other => other.map(Some),
            })
            .await?;
        let entry = match renamed {
            Some(entry) => entry,
            None => self.move_across(source, destination, actor).await?,
        };
        call.view.announce(call.metadata.as_ref());
        Ok(Response::new(pb::MoveResponse { entry: Some(call.view.entry(info(entry))) }))
    }

    async fn list_dir(
        &self,
        request: Request<pb::ListDirRequest>,
    ) -> Result<Response<pb::ListDirResponse>, Status> {
        let call = self.call(request)?;
        let path = self.resolve(&call.message.path, &call.user)?;
        let (depth, view, actor) = (call.message.depth, call.view, call.actor);
        let page = dir::Page::new(call.message.page_size, &call.message.page_token)
            .map_err(|error| status::of_files(&error))?;
        let slot = self.sandbox.listings.acquire().await;
        let stop = Arc::new(AtomicBool::new(false));
        let _left = SetOnDrop(Arc::clone(&stop));
        let (entries, next_page_token) = self
            .blocking(move |users| {
                // Held until the work has ended, which may be after its caller has left.
                slot.use_here();
                let (entries, next) = dir::list_page(&path, depth, &actor, users, &stop, &page)?;
                Ok((entries.into_iter().map(|entry| view.entry(info(entry))).collect(), next))
            })
            .await?;
        call.view.announce(call.metadata.as_ref());
        Ok(Response::new(pb::ListDirResponse { entries, next_page_token }))
    }

    async fn remove(
        &self,
        request: Request<pb::RemoveRequest>,
    ) -> Result<Response<pb::RemoveResponse>, Status> {
        let call = self.call(request)?;
        let path = self.resolve(&call.message.path, &call.user)?;
        let actor = call.actor;
        self.blocking(move |_| dir::remove(&path, &actor)).await?;
        call.view.announce(call.metadata.as_ref());
        Ok(Response::new(pb::RemoveResponse {}))
    }

    type WatchDirStream = watch::WatchStream;

    async fn watch_dir(
        &self,
        request: Request<pb::WatchDirRequest>,
    ) -> Result<Response<watch::WatchStream>, Status> {
        watch::watch_dir(self, request).await
    }

    async fn create_watcher(
        &self,
        request: Request<pb::CreateWatcherRequest>,
    ) -> Result<Response<pb::CreateWatcherResponse>, Status> {
        watch::create_watcher(self, request).await
    }

    async fn get_watcher_events(
        &self,
        request: Request<pb::GetWatcherEventsRequest>,
    ) -> Result<Response<pb::GetWatcherEventsResponse>, Status> {
        watch::get_watcher_events(self, request).await
    }

    async fn remove_watcher(
        &self,
        request: Request<pb::RemoveWatcherRequest>,
    ) -> Result<Response<pb::RemoveWatcherResponse>, Status> {
        watch::remove_watcher(self, request)
    }

    type SearchStream = search::SearchStream;

    async fn search(
        &self,
        request: Request<pb::SearchRequest>,
    ) -> Result<Response<search::SearchStream>, Status> {
        search::search(self, request).await
    }

    // Our own.

    type ReadStream = read::ReadStream;

    async fn read(
        &self,
        request: Request<pb::ReadRequest>,
    ) -> Result<Response<read::ReadStream>, Status> {
        read::read(self, request).await
    }

    async fn write(
        &self,
        request: Request<Streaming<pb::WriteRequest>>,
    ) -> Result<Response<pb::WriteResponse>, Status> {
        write::write(self, request).await
    }

    async fn copy(
        &self,
        request: Request<pb::CopyRequest>,
    ) -> Result<Response<pb::CopyResponse>, Status> {
        change::copy(self, request).await
    }

    async fn set_attributes(
        &self,
        request: Request<pb::SetAttributesRequest>,
    ) -> Result<Response<pb::SetAttributesResponse>, Status> {
        change::set_attributes(self, request).await
    }

    async fn create_symlink(
        &self,
        request: Request<pb::CreateSymlinkRequest>,
    ) -> Result<Response<pb::CreateSymlinkResponse>, Status> {
        change::create_symlink(self, request).await
    }

    type ArchiveStream = archive::ArchiveStream;

    async fn archive(
        &self,
        request: Request<pb::ArchiveRequest>,
    ) -> Result<Response<archive::ArchiveStream>, Status> {
        archive::archive(self, request).await
    }

    async fn extract(
        &self,
        request: Request<Streaming<pb::ExtractRequest>>,
    ) -> Result<Response<pb::ExtractResponse>, Status> {
        archive::extract(self, request).await
    }
}

/// Tells work that nobody waits for it any more: a call's future is dropped when its client leaves.
pub(super) struct SetOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub(super) fn info(entry: Entry) -> pb::EntryInfo {
    let kind = match entry.kind {
        EntryKind::File => pb::FileType::File,
        EntryKind::Directory => pb::FileType::Directory,
        EntryKind::Other => pb::FileType::Unspecified,
    };
    pb::EntryInfo {
        name: entry.name,
        r#type: kind.into(),
        path: entry.path,
        size: i64::try_from(entry.size).unwrap_or(i64::MAX),
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_time: entry.modified.map(modified_time),
        symlink_target: entry.symlink_target,
        metadata: entry.metadata.into_iter().collect(),
        is_symlink: entry.is_symlink,
    }
}

/// The first and the last second of a `Timestamp`: the years 1 and 9999.
const TIMESTAMP_SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// The time of a file as a message. Disks hold times that a `Timestamp` does not; JSON of one such
/// message fails, and with it the whole listing, so they become the nearest one that it holds.
fn modified_time((seconds, nanos): (i64, u32)) -> Timestamp {
    let (first, last) = (*TIMESTAMP_SECONDS.start(), *TIMESTAMP_SECONDS.end());
    let nanos = i32::try_from(nanos).unwrap_or(0).clamp(0, 999_999_999);
    let (seconds, nanos) = match seconds {
        _ if seconds < first => (first, 0),
        _ if seconds > last => (last, 999_999_999),
        _ => (seconds, nanos),
    };
    Timestamp { seconds, nanos }
}
