//! A TCP port on the loopback that leads to a vsock port of the guest.
//!
//! The host's end of the guest's vsock is a unix socket: a connection that sends `CONNECT PORT` and
//! is answered with `OK ...` is then a connection to that port. The forwarder does this for every
//! client that comes, so that any HTTP client, an SDK for one, can be run over vsock.

use std::{io, path::PathBuf};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
};

/// Listens until the program ends; gives `HOST:PORT`.
pub(crate) async fn listen(socket: PathBuf, port: u32) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                if let Err(error) = forward(client, socket, port).await
                    && error.kind() != io::ErrorKind::ConnectionReset
                {
                    eprintln!("vsock forwarder: {error}");
                }
            });
        }
    });
    address
}

async fn forward(mut client: TcpStream, socket: PathBuf, port: u32) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut guest = connect(&socket, port).await?;
    copy_bidirectional(&mut client, &mut guest).await.map(|_| ())
}

/// A connection to a port of the guest.
async fn connect(socket: &PathBuf, port: u32) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket).await?;
    // Nothing may be sent before the OK has come, so nothing can be behind it either.
    let mut stream = BufReader::new(stream);
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_line(&mut answer).await?;
    match answer.starts_with("OK ") {
        true => Ok(stream.into_inner()),
        false => Err(io::Error::other(format!("CONNECT {port} was answered with {answer:?}"))),
    }
}
