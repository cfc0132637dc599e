//! The RPC services: protobuf to domain and back. No logic of their own.

mod events;
mod files;
pub mod filesystem;
pub mod health;
pub mod identity;
pub mod keepalive;
pub mod legacy;
mod limits;
mod list;
mod outcome;
pub mod process;
pub mod read;
mod search;
mod status;
pub mod system;
pub mod template;
pub mod wait;
mod watch;

pub(crate) use outcome::timestamp;

use std::sync::Arc;

use crate::{
    proto::{
        self, filesystem::filesystem_server::FilesystemServer,
        process::process_server::ProcessServer, v1::system_server::SystemServer,
        v1::template_server::TemplateServer,
    },
    sandbox::Sandbox,
    wire::methods::Methods,
};
use axum::Router;
use tonic_health::pb::health_server::HealthServer;

/// Routes to every service, and the table of their methods.
///
/// # Errors
/// When the descriptors that were built in are broken.
pub fn router(sandbox: &Arc<Sandbox>) -> Result<(Router, Methods), prost::DecodeError> {
    let health_descriptors = tonic_health::pb::FILE_DESCRIPTOR_SET;
    let reflection = [
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let methods = Methods::default()
        .add(proto::DESCRIPTORS, true)?
        .add(health_descriptors, false)?
        .add(reflection[0], false)?
        .add(reflection[1], false)?
        .mark_upstream(proto::PROCESS, &proto::UPSTREAM_PROCESS)
        .mark_upstream(proto::FILESYSTEM, &proto::UPSTREAM_FILESYSTEM)
        .allow_large("/process.Process/SendInput")
        .allow_large("/process.Process/StreamInput")
        .mark_transfer("/filesystem.Filesystem/Read")
        .mark_transfer("/filesystem.Filesystem/Write")
        .mark_transfer("/filesystem.Filesystem/Archive")
        .mark_transfer("/filesystem.Filesystem/Extract")
        .mark_finite("/filesystem.Filesystem/Search");

    // The wire has checked every message already.
    let process = ProcessServer::new(process::Processes::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let filesystem = FilesystemServer::new(filesystem::Files::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let template = TemplateServer::new(template::Templates::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let system = SystemServer::new(system::Systems::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let probe = HealthServer::new(health::Probe::new(Arc::clone(sandbox)));
    let mut router = Router::new()
        .route_service("/process.Process/List", list::List(Arc::clone(sandbox)))
        .route_service("/process.Process/{*method}", process)
        .route_service("/filesystem.Filesystem/{*method}", filesystem)
        .route_service("/envd.v1.Template/{*method}", template)
        .route_service("/envd.v1.System/{*method}", system)
        .route_service("/grpc.health.v1.Health/{*method}", probe);

    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(health_descriptors)
    };
    match describe().build_v1() {
        Ok(v1) => {
            router = router.route_service("/grpc.reflection.v1.ServerReflection/{*method}", v1);
        }
        Err(error) => tracing::error!(%error, "no reflection"),
    }
    match describe().build_v1alpha() {
        Ok(alpha) => {
            let path = "/grpc.reflection.v1alpha.ServerReflection/{*method}";
            router = router.route_service(path, alpha);
        }
        Err(error) => tracing::error!(%error, "no reflection for older clients"),
    }
    Ok((router, methods))
}
