//! The RPC services: protobuf to domain and back. No logic of their own.

mod events;
pub mod filesystem;
pub mod identity;
pub mod keepalive;
pub mod legacy;
mod limits;
mod outcome;
pub mod process;
pub mod read;
mod status;
pub mod wait;

use std::sync::Arc;

use crate::{
    proto::{
        self, filesystem::filesystem_server::FilesystemServer,
        process::process_server::ProcessServer,
    },
    sandbox::Sandbox,
    wire::methods::Methods,
};
use axum::Router;

/// Routes to every service, and the table of their methods.
///
/// # Errors
/// When the descriptors that were built in are broken.
pub fn router(sandbox: &Arc<Sandbox>) -> Result<(Router, Methods), prost::DecodeError> {
    let health = tonic_health::pb::FILE_DESCRIPTOR_SET;
    let reflection = [
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let methods = Methods::default()
        .add(proto::DESCRIPTORS, true)?
        .add(health, false)?
        .add(reflection[0], false)?
        .add(reflection[1], false)?
        .allow_large("/process.Process/SendInput")
        .allow_large("/process.Process/StreamInput");

    // The wire has checked every message already.
    let process = ProcessServer::new(process::Processes::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let filesystem = FilesystemServer::new(filesystem::Files::new(Arc::clone(sandbox)))
        .max_decoding_message_size(usize::MAX);
    let (reporter, health_service) = tonic_health::server::health_reporter();
    for service in [proto::PROCESS, proto::FILESYSTEM] {
        // The reporter is asynchronous for the sake of those who watch, and nobody does yet.
        let reporter = reporter.clone();
        tokio::spawn(async move {
            reporter.set_service_status(service, tonic_health::ServingStatus::Serving).await;
        });
    }
    let mut router = Router::new()
        .route_service("/process.Process/{*method}", process)
        .route_service("/filesystem.Filesystem/{*method}", filesystem)
        .route_service("/grpc.health.v1.Health/{*method}", health_service);

    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(health)
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
