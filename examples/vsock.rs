//! A tonic client over native AF_VSOCK, as a host has it with QEMU's `vhost-vsock-pci`:
//! `cargo run --example vsock -- CID PORT uname -a`

#[path = "shared/mod.rs"]
mod shared;

use std::process::ExitCode;

use hyper_util::rt::TokioIo;
use tokio_vsock::{VsockAddr, VsockStream};
use tonic::transport::{Endpoint, Uri};

#[tokio::main]
async fn main() -> Result<ExitCode, shared::Failure> {
    let usage = "usage: vsock CID PORT [COMMAND [ARGUMENT]...]";
    let mut args = std::env::args().skip(1);
    let cid: u32 = args.next().ok_or(usage)?.parse()?;
    let port: u32 = args.next().ok_or(usage)?.parse()?;
    let connect = tower::service_fn(move |_: Uri| async move {
        VsockStream::connect(VsockAddr::new(cid, port)).await.map(TokioIo::new)
    });
    // The address only fills in the requests' authority.
    let endpoint = Endpoint::from_static("http://sandbox");
    shared::run(endpoint.connect_with_connector(connect).await?, args.collect()).await
}
