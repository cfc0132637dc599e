//! Bytes to calls: everything between a socket and an ordinary tonic service.
//!
//! A request travels through these rooms, outermost first:
//!
//! 1. [`listen`] binds TCP (with TLS, [`tls`]), unix and vsock sockets and [`server`] accepts from them; [`connection`]
//!    decides between HTTP/1.1 and HTTP/2 and holds the limits on headers, idle and slow clients.
//!    [`watched_io`] is its socket, [`calls`] its service, [`request_rules`] what HTTP demands.
//!    [`spans`] tells a collector of each request, if there is one.
//! 2. [`loopback`] keeps web pages out where a daemon without a token listens on loopback only.
//!    [`cors`] answers browsers.
//! 3. [`gate`] lets pass who has the sandbox's token, or is trusted by the kernel's word ([`peer`]).
//! 4. [`translate`] recognises the protocol of a call ([`protocol`]), turns its request into one
//!    gRPC request ([`request`]) and the service's gRPC response into the protocol's own
//!    ([`response`]). Calls that are not RPC pass through it untouched.
//!    [`shutdown`] ends the calls of a daemon that is told to end.
//! 5. [`codec`] lets one generated tonic service speak protobuf and JSON, and leaves [`extensions`]
//!    out of answers to callers that do not ask for them.
//!
//! What is behind it sees gRPC over HTTP/2 with uncompressed messages, whatever the client spoke.
//! Every message is checked against one size limit before and after decompression, so a service
//! never sees more. Nothing here knows what the calls mean.
//!
//! Held to the public Connect conformance suite (`make conformance`).

mod activity;
pub mod budget;
mod calls;
pub mod codec;
pub mod connection;
pub mod cors;
pub mod cost;
pub mod dial;
pub mod drain;
pub mod envelope;
pub mod error;
mod eviction;
pub mod extensions;
pub mod gate;
mod heads;
pub mod listen;
pub mod loopback;
pub mod memory;
pub mod metadata;
pub mod methods;
pub mod offload;
pub mod peer;
pub mod protocol;
pub mod request;
mod request_rules;
pub mod response;
pub mod server;
pub mod shutdown;
pub mod spans;
pub mod timeout;
pub mod tls;
pub mod translate;
mod trim;
mod watched_io;

use std::{sync::Arc, time::Duration};

use crate::access::Access;

/// The body of requests and responses inside the daemon.
pub type Body = axum::body::Body;

/// A boxed error, as tower and hyper pass them.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The largest request message that is accepted, in bytes, before and after decompression.
/// Upstream has no limit; this one is far above what any client sends and keeps a single request
/// from taking the sandbox's memory.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// The largest message of a method whose messages are not data: what can be started has arguments
/// and variables of 2 MiB at most (execve(2)), and a path is shorter still.
pub const MAX_ORDINARY_BYTES: usize = 4 << 20;

/// The most bytes of all requests together that wait in memory, with what they are decoded to.
pub const MAX_BUFFERED_BYTES: usize = 256 << 20;

/// The most bytes of one request's headers. Beyond: 431.
pub const MAX_HEADER_BYTES: usize = 128 << 10;

/// The most header lines of one request. Beyond: 431.
pub const MAX_HEADER_LINES: usize = 256;

/// The most connections served at the same time, over all listeners. Beyond, the longest idle one is
/// closed; where none is idle: 503, or `unavailable` in the caller's protocol.
pub const MAX_CONNECTIONS: usize = 1024;

/// For so many connections there is one more for peers from elsewhere: programs of the sandbox, which
/// reach the daemon's TCP and vsock ports too, cannot take it from whoever runs the sandbox.
pub const KEPT_SHARE: usize = 8;

/// The most connections beyond [`MAX_CONNECTIONS`] that are told so at the same time; more are
/// closed without an answer. Probes are answered on them all the same.
pub const MAX_REFUSALS: usize = 64;

/// How long such a connection may take to ask, and may stay.
pub const REFUSAL_TIME: Duration = Duration::from_secs(2);

/// The most calls at the same time on one HTTP/2 connection (`SETTINGS_MAX_CONCURRENT_STREAMS`).
pub const MAX_CONCURRENT_STREAMS: u32 = 256;

/// The most bytes of one HTTP/2 response that wait for the client to take them.
pub const MAX_SEND_BUFFER: usize = 64 << 10;

/// How long a client may take nothing while there is something for it, where nothing is short. A debugger, a
/// laptop's lid or a slow consumer is no reason to lose data.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(4 * 3600);

/// How long a client must have taken nothing before its connection makes room for another one.
pub const MIN_STALL: Duration = Duration::from_secs(10);

/// The same where memory for requests, answers and downloads is used up: downloads go on in small pieces then.
pub const MIN_STALL_FOR_MEMORY: Duration = Duration::from_secs(60);

/// How long a client may send nothing in the middle of the message of a unary call, which is held in memory;
/// or [`STALL_TIMEOUT`], if that is shorter.
pub const MESSAGE_STALL: Duration = Duration::from_secs(60);

/// How long a connection that has given up its place for another one may take to read what it has been sent,
/// and why it ends. There are at most [`MAX_EVICTED`] of them.
pub const EVICTED_TIME: Duration = Duration::from_secs(600);

/// See [`EVICTED_TIME`]; more are closed at once.
pub const MAX_EVICTED: usize = 32;

/// How long a connection without a call stays open. E2B's proxies keep theirs for 620 s.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(640);

/// How long a client may take for its first bytes, and for the head of each HTTP/1.1 request once
/// that has begun.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// The limits of the wire, as configured.
#[derive(Debug, Clone)]
pub struct Limits {
    /// See [`MAX_MESSAGE_BYTES`].
    pub message_bytes: usize,
    /// See [`MAX_BUFFERED_BYTES`].
    pub buffered_bytes: usize,
    /// See [`MAX_CONNECTIONS`].
    pub connections: usize,
    /// See [`IDLE_TIMEOUT`].
    pub idle_timeout: Duration,
    /// See [`HEADER_TIMEOUT`].
    pub header_timeout: Duration,
    /// See [`STALL_TIMEOUT`].
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: MAX_MESSAGE_BYTES,
            buffered_bytes: MAX_BUFFERED_BYTES,
            connections: MAX_CONNECTIONS,
            idle_timeout: IDLE_TIMEOUT,
            header_timeout: HEADER_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
        }
    }
}

// Over the frame that carries them, HTTP/2 messages must fit the length field of an envelope.
const _: () = assert!(MAX_MESSAGE_BYTES <= u32::MAX as usize);
// One message of the largest size, and its decompressed form, must find room.
const _: () = assert!(2 * MAX_MESSAGE_BYTES <= MAX_BUFFERED_BYTES);

/// The layers of [`stack`].
pub type Stack<S> = loopback::LoopbackGuard<cors::Cors<gate::Gate<translate::Translate<S>>>>;

/// Everything that stands between a connection and a router of tonic services and REST routes.
pub fn stack<S>(
    inner: S,
    methods: methods::Methods,
    limits: &Limits,
    memory: &memory::Memory,
    access: Arc<Access>,
    trust: peer::Trust,
    phases: shutdown::Phases,
) -> Stack<S> {
    let trust = Arc::new(trust);
    let calls = translate::Translate::new(inner, methods, limits, memory, phases);
    let gate = gate::Gate::new(calls, Arc::clone(&access), Arc::clone(&trust));
    loopback::LoopbackGuard::new(cors::Cors::new(gate), access, trust)
}
