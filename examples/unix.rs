//! A tonic client of a unix socket: `cargo run --example unix -- /run/envd.sock uname -a`

#[path = "shared/mod.rs"]
mod shared;

use std::process::ExitCode;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

#[tokio::main]
async fn main() -> Result<ExitCode, shared::Failure> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: unix PATH [COMMAND [ARGUMENT]...]")?;
    let connect = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address only fills in the requests' authority.
    let endpoint = Endpoint::from_static("http://sandbox");
    shared::run(endpoint.connect_with_connector(connect).await?, args.collect()).await
}
