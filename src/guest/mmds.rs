//! Firecracker's metadata service: what the host says about this sandbox.
//!
//! A token is fetched first, then the document with it (Firecracker's MMDS version 2). Each request
//! is a connection of its own, as a connection does not survive a snapshot.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};

/// Where the service is, in every VM.
pub const ADDRESS: SocketAddr =
    SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(169, 254, 169, 254), 80));

/// How long both requests may take together. The service answers from memory; what takes longer is a
/// connection from before a snapshot, or packets that nobody answers.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most bytes of an answer.
const MAX_ANSWER: usize = 64 << 10;
/// The seconds that a token lives.
const TOKEN_TTL: &str = "60";

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum MmdsError {
    /// The service cannot be reached.
    #[error("cannot reach the metadata service: {0}")]
    Connect(#[from] io::Error),
    /// It does not speak HTTP.
    #[error("the metadata service: {0}")]
    Http(#[from] hyper::Error),
    /// Its answer breaks off, or is too long.
    #[error("the answer of the metadata service: {0}")]
    Answer(String),
    /// It gave an empty token.
    #[error("the metadata service gave no token")]
    NoToken,
    /// It did not answer.
    #[error("the metadata service did not answer within 2 s")]
    Late,
}

/// What the host says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Document {
    /// The sandbox's id.
    #[serde(rename = "instanceID")]
    pub sandbox_id: String,
    /// Its template's id.
    #[serde(rename = "envID")]
    pub template_id: String,
    /// SHA-512 of the access token, in hexadecimal.
    #[serde(rename = "accessTokenHash")]
    pub token_hash: String,
}

/// Asks the service once.
///
/// # Errors
/// [`MmdsError`].
pub async fn fetch(address: SocketAddr) -> Result<Document, MmdsError> {
    let both = async {
        let token = Request::builder()
            .method(Method::PUT)
            .uri("/latest/api/token")
            .header("X-metadata-token-ttl-seconds", TOKEN_TTL);
        let token = ask(address, token).await?;
        if token.is_empty() {
            return Err(MmdsError::NoToken);
        }
        let document = Request::builder()
            .uri("/")
            .header("X-metadata-token", token.as_ref())
            .header(header::ACCEPT, "application/json");
        let document = ask(address, document).await?;
        serde_json::from_slice(&document).map_err(|error| MmdsError::Answer(error.to_string()))
    };
    timeout(PATIENCE, both).await.unwrap_or(Err(MmdsError::Late))
}

async fn ask(address: SocketAddr, request: http::request::Builder) -> Result<Bytes, MmdsError> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = request
        .header(header::HOST, address.ip().to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|error| MmdsError::Answer(error.to_string()))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| MmdsError::Answer(error.to_string()))
    };
    tokio::pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        ended = connection => {
            ended?;
            // What had come before the connection ended is there, or the reason why it is not.
            answer.await
        }
    }
}
