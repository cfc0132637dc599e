//! The server under test of the Connect conformance suite, in its server mode: what the suite wants
//! comes on stdin, the address goes to stdout, each behind its length.
//!
//! Only the service is written here. Sockets, protocols, limits and errors are envd's own.

mod any;
mod service;

/// The suite's messages have no extension fields.
macro_rules! without_extensions {
    ($($message:ident)*) => { $(impl envd::wire::extensions::Extensible for proto::$message {})* };
}

without_extensions! {
    UnaryRequest UnaryResponse ServerStreamRequest ServerStreamResponse ClientStreamRequest
    ClientStreamResponse BidiStreamRequest BidiStreamResponse UnimplementedRequest
    UnimplementedResponse IdempotentUnaryRequest IdempotentUnaryResponse
}

/// The suite's messages.
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/connectrpc.conformance.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/connectrpc.conformance.v1.serde.rs"));
}

use std::{error::Error, sync::Arc};

use envd::{
    access::Access,
    wire::{
        self, Limits, listen, memory::Memory, methods::Methods, peer::Trust, server::Server,
        shutdown::Phases,
    },
};
use prost::Message;
use proto::{
    ServerCompatRequest, ServerCompatResponse, conformance_service_server::ConformanceServiceServer,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
};

const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut stdin = tokio::io::stdin();
    let length = stdin.read_u32().await?;
    let mut request = vec![0; usize::try_from(length)?];
    stdin.read_exact(&mut request).await?;
    let request = ServerCompatRequest::decode(request.as_slice())?;

    let mut limits = Limits::default();
    if request.message_receive_limit > 0 {
        limits.message_bytes = usize::try_from(request.message_receive_limit)?;
    }
    let service =
        ConformanceServiceServer::new(service::Conformance).max_decoding_message_size(usize::MAX);
    let router = axum::Router::new()
        .route_service("/connectrpc.conformance.v1.ConformanceService/{*method}", service);
    let methods = Methods::default().add(DESCRIPTORS, true)?;
    let access = Arc::new(Access::new(None, false, false));
    let memory = Memory::new(limits.buffered_bytes);
    let (trust, phases) = (Trust::default(), Phases::none());
    let service = wire::stack(router, methods, &limits, &memory, access, trust, phases);

    let (_stop, stopped) = watch::channel(false);
    let server = Server::new(service, limits, memory, stopped);
    let mut port = 0;
    for listener in listen::bind(&"tcp://127.0.0.1:0".parse()?, false).await? {
        if let Some(bound) = listener.local().rsplit(':').next() {
            port = bound.parse()?;
        }
        tokio::spawn(server.clone().accept(listener));
    }
    let response =
        ServerCompatResponse { host: "127.0.0.1".into(), port, ..ServerCompatResponse::default() };
    let response = response.encode_to_vec();
    let mut stdout = tokio::io::stdout();
    stdout.write_u32(u32::try_from(response.len())?).await?;
    stdout.write_all(&response).await?;
    stdout.flush().await?;
    // The suite ends it with SIGTERM.
    std::future::pending().await
}
