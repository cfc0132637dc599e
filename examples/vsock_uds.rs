//! A tonic client over the unix socket that stands for a guest's vsock, as Firecracker and
//! vhost-device-vsock make it: `cargo run --example vsock_uds -- /path/v.sock 49983 uname -a`
//!
//! A connection sends `CONNECT PORT` and a newline. `OK` and a number in return mean that it now
//! leads to that port of the guest; an end instead means that nobody listens there. Nothing may be
//! sent before the answer, and the number means different things to different VMMs.

#[path = "shared/mod.rs"]
mod shared;

use hyper_util::rt::TokioIo;
use std::{io, process::ExitCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tonic::transport::{Endpoint, Uri};

/// The longest answer that is waited for: `OK`, a number, a newline.
const MAX_ANSWER: usize = 32;

async fn connect(path: &str, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the newline belongs to the guest.
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_ANSWER {
            return Err(io::Error::other("the answer to CONNECT is too long"));
        }
        answer.push(stream.read_u8().await?);
    }
    match answer.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned())),
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, shared::Failure> {
    let usage = "usage: vsock_uds PATH PORT [COMMAND [ARGUMENT]...]";
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or(usage)?;
    let port: u32 = args.next().ok_or(usage)?.parse()?;
    let connect = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { connect(&path, port).await.map(TokioIo::new) }
    });
    // The address only fills in the requests' authority.
    let endpoint = Endpoint::from_static("http://sandbox");
    shared::run(endpoint.connect_with_connector(connect).await?, args.collect()).await
}
