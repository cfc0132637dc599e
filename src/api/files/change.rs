//! `Copy`, `SetAttributes`, `CreateSymlink`.

use std::sync::{Arc, atomic::AtomicBool};

use tonic::{Request, Response, Status};

use crate::{
    api::filesystem::{Files, SetOnDrop, info},
    blocking::stand_on_paths,
    fs::{
        attributes::{self, Attributes},
        copy::{self, CopyOptions},
        entry,
    },
    proto::filesystem as pb,
};

pub(in crate::api) async fn copy(
    files: &Files,
    request: Request<pb::CopyRequest>,
) -> Result<Response<pb::CopyResponse>, Status> {
    let call = files.call(request)?;
    let source = files.resolve(&call.message.source, &call.user)?;
    let destination = files.resolve(&call.message.destination, &call.user)?;
    let options =
        CopyOptions { preserve: call.message.preserve, create_only: call.message.create_only };
    let slot = files.tree_slot().await;
    let stop = Arc::new(AtomicBool::new(false));
    let _left = SetOnDrop(Arc::clone(&stop));
    let actor = call.actor;
    let (copied, entry) = files
        .blocking_own(move |users| {
            slot.use_here();
            stand_on_paths(&source, &destination)?;
            let copied = copy::copy(&source, &destination, &actor, options, &stop)?;
            Ok((copied, entry::stat(&destination, &actor, users)?))
        })
        .await?;
    let entry = Some(info(entry));
    Ok(Response::new(pb::CopyResponse { entry, entries: copied.entries, bytes: copied.bytes }))
}

pub(in crate::api) async fn set_attributes(
    files: &Files,
    request: Request<pb::SetAttributesRequest>,
) -> Result<Response<pb::SetAttributesResponse>, Status> {
    let call = files.call(request)?;
    let wanted = call.message;
    let path = files.resolve(&wanted.path, &call.user)?;
    let time = |time: Option<crate::proto::Timestamp>| time.map(|time| (time.seconds, time.nanos));
    let attributes = Attributes {
        no_follow: wanted.no_follow,
        mode: wanted.mode,
        owner: wanted.owner,
        group: wanted.group,
        modified: time(wanted.modified_time),
        accessed: time(wanted.accessed_time),
    };
    let actor = call.actor;
    let entry = files
        .blocking_own(move |users| {
            attributes::set(&path, &attributes, &actor, users)?;
            entry::stat(&path, &actor, users)
        })
        .await?;
    Ok(Response::new(pb::SetAttributesResponse { entry: Some(info(entry)) }))
}

pub(in crate::api) async fn create_symlink(
    files: &Files,
    request: Request<pb::CreateSymlinkRequest>,
) -> Result<Response<pb::CreateSymlinkResponse>, Status> {
    let call = files.call(request)?;
    let wanted = call.message;
    let path = files.resolve(&wanted.path, &call.user)?;
    let actor = call.actor;
    let entry = files
        .blocking_own(move |users| {
            attributes::create_symlink(&path, &wanted.target, wanted.replace, &actor)?;
            entry::stat(&path, &actor, users)
        })
        .await?;
    Ok(Response::new(pb::CreateSymlinkResponse { entry: Some(info(entry)) }))
}
