//! One client for every protocol: gRPC through tonic, gRPC-Web and Connect written out by hand.

use std::marker::PhantomData;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, BytesMut};
use prost::Message;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use super::{Daemon, soon};

/// A way to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    Grpc,
    GrpcWeb { text: bool, json: bool },
    Connect { json: bool },
}

pub const WIRES: [Wire; 6] = [
    Wire::Grpc,
    Wire::GrpcWeb { text: false, json: false },
    Wire::GrpcWeb { text: true, json: false },
    Wire::GrpcWeb { text: false, json: true },
    Wire::Connect { json: false },
    Wire::Connect { json: true },
];

/// A failed call: Connect's name of the code, and the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: String,
    pub message: String,
}

impl Failure {
    pub fn of(status: &tonic::Status) -> Self {
        let code = envd::wire::error::connect_code(status.code()).0.to_owned();
        Self { code, message: status.message().to_owned() }
    }
}

pub trait Msg: Message + Serialize + DeserializeOwned + Default + 'static {}
impl<T: Message + Serialize + DeserializeOwned + Default + 'static> Msg for T {}

/// A client of one daemon in one protocol.
#[derive(Clone)]
pub struct Client {
    wire: Wire,
    base: String,
    http: reqwest::Client,
    grpc: Channel,
    plain: bool,
    pub headers: Vec<(&'static str, String)>,
}

impl Client {
    pub fn new(daemon: &Daemon, wire: Wire) -> Self {
        Self::at(&daemon.tcp(), wire)
    }

    /// A client of whatever listens at `HOST:PORT`.
    pub fn at(address: &str, wire: Wire) -> Self {
        let base = format!("http://{address}");
        let grpc = Endpoint::from_shared(base.clone()).unwrap().connect_lazy();
        Self::over(grpc, base, wire)
    }

    /// A gRPC client of a unix socket.
    pub fn unix(path: &std::path::Path) -> Self {
        let path = path.to_owned();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let grpc = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect);
        Self::over(grpc, String::new(), Wire::Grpc)
    }

    fn over(grpc: Channel, base: String, wire: Wire) -> Self {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { wire, base, http, grpc, plain: false, headers: Vec::new() }
    }

    /// As a client of upstream's, which does not ask for extension fields. Over gRPC all do.
    pub fn plain(mut self) -> Self {
        self.plain = true;
        self
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// A call with one message each way.
    pub async fn unary<Q: Msg, R: Msg>(&self, path: &str, request: &Q) -> Result<R, Failure> {
        if let Wire::Connect { json } = self.wire {
            let kind = if json { "application/json" } else { "application/proto" };
            let response =
                soon(path, self.post(path, kind, encode(json, request)).send()).await.unwrap();
            let status = response.status();
            let body = soon(path, response.bytes()).await.unwrap();
            return match status.is_success() {
                true => Ok(decode(json, &body)),
                false => Err(failure(&serde_json::from_slice(&body).unwrap())),
            };
        }
        let mut stream = self.stream(path, request).await?;
        let mut only = None;
        while let Some(message) = stream.next().await? {
            assert!(only.replace(message).is_none(), "two messages in a unary answer");
        }
        only.ok_or_else(|| Failure {
            code: "none".into(),
            message: "no message and no error".into(),
        })
    }

    /// A call with one message there and many back.
    pub async fn stream<Q: Msg, R: Msg>(
        &self,
        path: &str,
        request: &Q,
    ) -> Result<Messages<R>, Failure> {
        self.streams(path, std::slice::from_ref(request)).await
    }

    /// A call with any number of messages there, all known, and many back.
    pub async fn streams<Q: Msg, R: Msg>(
        &self,
        path: &str,
        requests: &[Q],
    ) -> Result<Messages<R>, Failure> {
        let kind = match self.wire {
            Wire::Grpc => return self.grpc(path, requests).await,
            Wire::GrpcWeb { text: true, .. } => "application/grpc-web-text+proto",
            Wire::GrpcWeb { json: true, .. } => "application/grpc-web+json",
            Wire::GrpcWeb { .. } => "application/grpc-web+proto",
            Wire::Connect { json: true } => "application/connect+json",
            Wire::Connect { json: false } => "application/connect+proto",
        };
        let (text, json) = match self.wire {
            Wire::GrpcWeb { text, json } => (text, json),
            Wire::Connect { json } => (false, json),
            Wire::Grpc => (false, false),
        };
        let mut body = Vec::new();
        for request in requests {
            let message = encode(json, request);
            body.extend_from_slice(&envelope(0, &message));
        }
        let body = if text { STANDARD.encode(body).into_bytes() } else { body };
        let response = soon(path, self.post(path, kind, body).send()).await.unwrap();
        assert_eq!(response.status(), 200, "{path} {kind}");
        assert_eq!(response.headers()["content-type"], kind);
        let trailers_only = response.headers().get("grpc-status").map(|status| {
            let code = status.to_str().unwrap().parse().unwrap();
            let message = response.headers().get("grpc-message");
            (code, message.map_or("", |m| m.to_str().unwrap()).to_owned())
        });
        match trailers_only {
            Some((0, _)) | None => {}
            Some((code, message)) => return Err(grpc_failure(code, &message)),
        }
        Ok(Messages(Source::Http(Box::new(HttpMessages {
            response,
            buffer: BytesMut::new(),
            cut: BytesMut::new(),
            text,
            json,
            ended: false,
            message: PhantomData,
        }))))
    }

    async fn grpc<Q: Msg, R: Msg>(
        &self,
        path: &str,
        requests: &[Q],
    ) -> Result<Messages<R>, Failure> {
        let mut client =
            tonic::client::Grpc::new(self.grpc.clone()).max_decoding_message_size(usize::MAX);
        soon(path, client.ready()).await.unwrap();
        let requests: Vec<Q> = requests
            .iter()
            .map(|request| Q::decode(request.encode_to_vec().as_slice()).unwrap())
            .collect();
        let mut request = tonic::Request::new(tokio_stream::iter(requests));
        for (name, value) in &self.headers {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let codec = tonic_prost::ProstCodec::<Q, R>::default();
        let path: http::uri::PathAndQuery = path.parse().unwrap();
        match soon("a gRPC call", client.streaming(request, path, codec)).await {
            Ok(response) => Ok(Messages(Source::Grpc(Box::new(response.into_inner())))),
            Err(status) => {
                let mut failure = Failure::of(&status);
                // "transport error" alone helps nobody.
                let mut source = std::error::Error::source(&status);
                while let Some(cause) = source {
                    failure.message.push_str(&format!(": {cause}"));
                    source = cause.source();
                }
                Err(failure)
            }
        }
    }

    fn post(&self, path: &str, kind: &str, body: Vec<u8>) -> reqwest::RequestBuilder {
        let mut request =
            self.http.post(format!("{}{path}", self.base)).header("content-type", kind).body(body);
        if !self.plain {
            request = request.header("envd-extensions", "1");
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        request
    }
}

/// The messages of a response, as they come.
pub struct Messages<R>(Source<R>);

enum Source<R> {
    Grpc(Box<tonic::Streaming<R>>),
    Http(Box<HttpMessages<R>>),
}

impl<R: Msg> Messages<R> {
    /// The next message; `None` after a successful end.
    pub async fn next(&mut self) -> Result<Option<R>, Failure> {
        match &mut self.0 {
            Source::Grpc(stream) => soon("a gRPC message", stream.message())
                .await
                .map_err(|status| Failure::of(&status)),
            Source::Http(http) => soon("a message", http.next()).await,
        }
    }
}

struct HttpMessages<R> {
    response: reqwest::Response,
    buffer: BytesMut,
    /// Of base64, up to three characters that wait for the rest of their group.
    cut: BytesMut,
    text: bool,
    json: bool,
    ended: bool,
    message: PhantomData<R>,
}

impl<R: Msg> HttpMessages<R> {
    async fn next(&mut self) -> Result<Option<R>, Failure> {
        loop {
            if self.ended {
                assert!(self.buffer.is_empty(), "bytes behind the end of the stream");
                return Ok(None);
            }
            if let Some(mut head) = self.buffer.get(..5) {
                let (flags, length) = (head.get_u8(), head.get_u32() as usize);
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    let message = self.buffer.split_to(length);
                    match flags {
                        0 => return Ok(Some(decode(self.json, &message))),
                        0x02 => {
                            self.ended = true;
                            let end: Value = serde_json::from_slice(&message).unwrap();
                            if let Some(error) = end.get("error") {
                                return Err(failure(error));
                            }
                        }
                        0x80 => {
                            self.ended = true;
                            trailers(std::str::from_utf8(&message).unwrap())?;
                        }
                        other => panic!("flags {other:#x}"),
                    }
                    continue;
                }
            }
            let chunk = self.response.chunk().await.expect("the stream is not cut");
            let chunk = chunk.expect("the stream ends with its outcome");
            if self.text {
                self.cut.extend_from_slice(&chunk);
                let whole = self.cut.split_to(self.cut.len() / 4 * 4);
                // Padding may stand anywhere: the daemon encodes each piece by itself, so that
                // none waits for the next.
                for group in whole.chunks(4) {
                    self.buffer.extend_from_slice(&STANDARD.decode(group).unwrap());
                }
            } else {
                self.buffer.extend_from_slice(&chunk);
            }
        }
    }
}

fn trailers(text: &str) -> Result<(), Failure> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim)
    };
    match field("grpc-status").expect("a status").parse().unwrap() {
        0 => Ok(()),
        code => Err(grpc_failure(code, field("grpc-message").unwrap_or_default())),
    }
}

fn grpc_failure(code: i32, message: &str) -> Failure {
    let message = percent_encoding::percent_decode_str(message).decode_utf8().unwrap();
    Failure::of(&tonic::Status::new(tonic::Code::from_i32(code), message))
}

fn failure(error: &Value) -> Failure {
    Failure {
        code: error["code"].as_str().expect("a code").to_owned(),
        message: error["message"].as_str().unwrap_or_default().to_owned(),
    }
}

fn encode<Q: Msg>(json: bool, message: &Q) -> Vec<u8> {
    if json { serde_json::to_vec(message).unwrap() } else { message.encode_to_vec() }
}

fn decode<R: Msg>(json: bool, bytes: &[u8]) -> R {
    if json { serde_json::from_slice(bytes).unwrap() } else { R::decode(bytes).unwrap() }
}

pub fn envelope(flags: u8, message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flags];
    bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}
