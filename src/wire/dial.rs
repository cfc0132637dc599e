//! The other direction: connecting to an address, where the daemon itself has something to tell.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockStream};

use super::listen::{Address, Place};

/// A connection, whatever it leads through.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection of the daemon's own.
pub type Outgoing = Box<dyn Duplex>;

/// Connects to an address. A vsock address without a context id means the host.
///
/// # Errors
/// What the system says.
pub async fn connect(address: Address) -> io::Result<Outgoing> {
    Ok(match address.place {
        Place::Tcp { host, port } => Box::new(TcpStream::connect((host.as_str(), port)).await?),
        Place::Tls { .. } => {
            let why = "what is told to the host is no secret: write tcp://";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Place::Unix { path, .. } => Box::new(UnixStream::connect(path).await?),
        Place::Vsock { cid, port } => {
            let cid = if cid == VMADDR_CID_ANY { VMADDR_CID_HOST } else { cid };
            Box::new(VsockStream::connect(VsockAddr::new(cid, port)).await?)
        }
    })
}
