//! Traces and logs as an OpenTelemetry collector gets them; with the cargo feature `otlp`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use common::{
    Daemon, in_time,
    process::sh,
    rpc::{Client, WIRES, Wire},
    soon,
};
use envd::proto::process::StartResponse;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::{body::Frame, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serde_json::json;
use tokio::net::{TcpListener, UnixListener};

const START: &str = "/process.Process/Start";
const LIST: &str = "/process.Process/List";

// What is looked at of opentelemetry/proto/collector/{trace,logs}/v1.

#[derive(Clone, PartialEq, Message)]
struct Export<T: Message + Default + std::fmt::Debug> {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<OfResource<T>>,
}

#[derive(Clone, PartialEq, Message)]
struct OfResource<T: Message + Default + std::fmt::Debug> {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<OfScope<T>>,
}

#[derive(Clone, PartialEq, Message)]
struct OfScope<T: Message + Default + std::fmt::Debug> {
    #[prost(message, repeated, tag = "2")]
    items: Vec<T>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 2, 3")]
    value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Value {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(bool, tag = "2")]
    Bool(bool),
    #[prost(int64, tag = "3")]
    Int(i64),
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(message, optional, tag = "5")]
    body: Option<AnyValue>,
    #[prost(message, repeated, tag = "6")]
    attributes: Vec<KeyValue>,
    #[prost(bytes = "vec", tag = "9")]
    trace_id: Vec<u8>,
}

const SERVER: i32 = 2;
const ERROR: i32 = 2;

fn map(attributes: &[KeyValue]) -> BTreeMap<&str, String> {
    let text = |value: &Option<AnyValue>| match &value.as_ref().unwrap().value {
        Some(Value::Text(text)) => text.clone(),
        Some(Value::Int(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|pair| (pair.key.as_str(), text(&pair.value))).collect()
}

impl Span {
    fn has(&self, key: &str, value: &str) -> bool {
        map(&self.attributes).get(key).is_some_and(|found| found == value)
    }
}

/// What a collector got.
#[derive(Default)]
struct Got {
    spans: Vec<Span>,
    lines: Vec<Line>,
    resources: Vec<Resource>,
    headers: Vec<HeaderMap>,
    /// All of it, as it came.
    raw: Vec<u8>,
}

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Got>>);

impl Collector {
    /// Listens on TCP; gives the URL.
    async fn tcp() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        let taking = collector.clone();
        tokio::spawn(async move {
            loop {
                taking.clone().serve(listener.accept().await.unwrap().0);
            }
        });
        (collector, url)
    }

    async fn unix(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let collector = Self::default();
        let taking = collector.clone();
        tokio::spawn(async move {
            loop {
                taking.clone().serve(listener.accept().await.unwrap().0);
            }
        });
        collector
    }

    fn serve<I>(self, io: I)
    where
        I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let service = service_fn(move |request: Request<Incoming>| {
            let collector = self.clone();
            async move { Ok::<_, Infallible>(collector.take(request).await) }
        });
        let http = http2::Builder::new(TokioExecutor::new());
        tokio::spawn(http.serve_connection(TokioIo::new(io), service));
    }

    async fn take(
        self,
        request: Request<Incoming>,
    ) -> Response<StreamBody<impl futures_util::Stream<Item = Result<Frame<Bytes>, Infallible>>>>
    {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let message = body.slice(5..);
        {
            let mut got = self.0.lock().unwrap();
            got.raw.extend_from_slice(&body);
            got.headers.push(parts.headers);
            match parts.uri.path() {
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
                    for of in Export::<Span>::decode(message).unwrap().resources {
                        got.resources.extend(of.resource);
                        got.spans.extend(of.scopes.into_iter().flat_map(|scope| scope.items));
                    }
                }
                "/opentelemetry.proto.collector.logs.v1.LogsService/Export" => {
                    for of in Export::<Line>::decode(message).unwrap().resources {
                        got.resources.extend(of.resource);
                        got.lines.extend(of.scopes.into_iter().flat_map(|scope| scope.items));
                    }
                }
                other => panic!("{other} was called"),
            }
        }
        let trailers =
            HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
        let frames = [Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(trailers)];
        let body = StreamBody::new(futures_util::stream::iter(frames.map(Ok)));
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    }

    /// Waits for a span.
    async fn span(&self, what: &str, check: impl Fn(&Span) -> bool) -> Span {
        in_time(what, async || {
            self.0.lock().unwrap().spans.iter().find(|span| check(span)).cloned()
        })
        .await
    }

    async fn line(&self, message: &str) -> Line {
        let is_it = |line: &&Line| {
            let body = line.body.as_ref().and_then(|body| body.value.as_ref());
            body == Some(&Value::Text(message.to_owned()))
        };
        in_time(message, async || self.0.lock().unwrap().lines.iter().find(is_it).cloned()).await
    }

    /// Nothing that came has this in it.
    fn is_ignorant_of(&self, secret: &str) {
        let got = self.0.lock().unwrap();
        let found = got.raw.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "the collector was told {secret}");
    }
}

/// A daemon with these variables, and none of the tests' own.
fn daemon(variables: &[(&str, &str)], args: &[&str]) -> Daemon {
    Daemon::spawn(&mut command(variables, args))
}

fn command(variables: &[(&str, &str)], args: &[&str]) -> Command {
    let mut all = vec!["--listen", "tcp://127.0.0.1:0"];
    all.extend(args);
    let mut command = Daemon::command(&all);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    command
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

#[tokio::test]
async fn a_collector_sees_each_call_in_its_callers_trace_and_no_secret() {
    let (collector, url) = Collector::tcp().await;
    let daemon = daemon(
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret-of-collector"),
            ("OTEL_RESOURCE_ATTRIBUTES", "region=here"),
        ],
        &["-verbose"],
    );
    let token = "secret-token";
    let init_trace = "0af7651916cd43dd8448eb211c80319c";
    let init = http()
        .post(daemon.url("/init"))
        .header("traceparent", format!("00-{init_trace}-b7ad6b7169203331-01"))
        .json(&json!({ "accessToken": token, "envVars": { "NAME": "secret-variable" } }));
    assert_eq!(soon("init", init.send()).await.unwrap().status(), 204);
    // One that is refused, for its line in the log.
    let refused_trace = "1af7651916cd43dd8448eb211c80319d";
    let refused = http()
        .post(daemon.url("/init"))
        .header("traceparent", format!("00-{refused_trace}-b7ad6b7169203331-01"))
        .body("{");
    assert_eq!(soon("init", refused.send()).await.unwrap().status(), 400);

    for (number, wire) in WIRES.into_iter().enumerate() {
        let trace = format!("4bf92f3577b34da6a3ce929d0e0e47{number:02x}");
        let parent = "00f067aa0ba902b7";
        let client = Client::new(&daemon, wire)
            .with("x-access-token", token)
            .with("tracestate", "vendor=secret-state")
            .with("traceparent", &format!("00-{trace}-{parent}-01"));
        let mut request = sh("echo secret-output; echo secret-argument >/dev/null");
        let envs = [("NAME".to_owned(), "secret-value".to_owned())];
        request.process.as_mut().unwrap().envs = envs.into();
        let mut events = client.stream::<_, StartResponse>(START, &request).await.unwrap();
        while events.next().await.unwrap().is_some() {}
        let span = collector.span("Start", |span| hex(&span.trace_id) == trace).await;
        assert_eq!(span.name, "process.Process/Start");
        assert_eq!((hex(&span.parent_span_id).as_str(), span.kind), (parent, SERVER));
        let (system, version) = match wire {
            Wire::Grpc => ("grpc", "2"),
            Wire::GrpcWeb { .. } => ("grpc_web", "1.1"),
            Wire::Connect { .. } => ("connectrpc", "1.1"),
        };
        for (key, value) in [
            ("rpc.system.name", system),
            ("rpc.method", "process.Process/Start"),
            ("rpc.response.status_code", "OK"),
            ("http.response.status_code", "200"),
            ("network.transport", "tcp"),
            ("network.protocol.version", version),
        ] {
            assert!(span.has(key, value), "{wire:?}: no {key}={value} in {span:?}");
        }
        assert!(!map(&span.attributes).contains_key("error.type"), "{span:?}");
    }

    // A call of a process that is not there, and one without the token.
    let client = Client::new(&daemon, Wire::Connect { json: true });
    let refused = http().post(daemon.url(LIST)).json(&json!({})).send();
    assert_eq!(soon("a refusal", refused).await.unwrap().status(), 401);
    let span = collector.span("the refusal", |span| span.name == "process.Process/List").await;
    assert!(span.has("http.response.status_code", "401"), "{span:?}");
    let missing = client.with("x-access-token", token);
    let select = envd::proto::process::ConnectRequest {
        process: common::process::pid(u32::MAX),
        ..Default::default()
    };
    let mut events =
        missing.stream::<_, StartResponse>("/process.Process/Connect", &select).await.unwrap();
    assert_eq!(events.next().await.unwrap_err().code, "not_found");
    let span = collector.span("Connect", |span| span.name == "process.Process/Connect").await;
    assert!(span.has("rpc.response.status_code", "NOT_FOUND"), "{span:?}");
    assert_ne!(span.status.unwrap_or_default().code, ERROR);

    // Routes by their names; what is none has no name of its own.
    for path in ["/files?path=/secret-path&signature=secret-signature", "/secret-route?a=secret-q"]
    {
        soon("a request", http().get(daemon.url(path)).send()).await.unwrap();
    }
    let files = collector.span("GET /files", |span| span.name == "GET /files").await;
    assert!(files.has("http.route", "/files") && files.has("http.response.status_code", "401"));
    collector.span("GET", |span| span.name == "GET").await;

    // The log, with the trace of the request that a line is of.
    let line = collector.line("an /init that does not parse").await;
    assert_eq!(hex(&line.trace_id), refused_trace, "{line:?}");
    collector.line("ready").await;
    {
        let got = collector.0.lock().unwrap();
        for resource in &got.resources {
            let resource = map(&resource.attributes);
            assert_eq!(resource["service.name"], "envd");
            assert_eq!(resource["region"], "here");
            assert!(resource.contains_key("service.version"));
        }
        assert!(got.headers.iter().all(|headers| headers["x-key"] == "secret-of-collector"));
    }
    for secret in [
        token,
        "secret-variable",
        "secret-value",
        "secret-argument",
        "secret-output",
        "secret-path",
        "secret-signature",
        "secret-route",
        "secret-q",
        "secret-of-collector",
    ] {
        collector.is_ignorant_of(secret);
    }
}

#[tokio::test]
async fn what_waits_is_sent_at_the_end_over_the_daemons_own_kinds_of_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("otlp");
    let collector = Collector::unix(&socket).await;
    let flag = format!("--otlp=unix://{}", socket.display());
    // The flag comes before the variable.
    let nowhere = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    let mut daemon = daemon(&[nowhere, ("OTEL_SERVICE_NAME", "sandbox")], &[&flag]);
    // A caller who leaves in the middle.
    let client = Client::new(&daemon, Wire::Grpc);
    let mut events = client.stream::<_, StartResponse>(START, &sh("sleep 60")).await.unwrap();
    events.next().await.unwrap();
    drop(events);
    let cancelled = |span: &Span| span.has("rpc.response.status_code", "CANCELLED");
    collector.span("a call whose client left", cancelled).await;
    let health = soon("health", http().get(daemon.url("/health")).send()).await.unwrap();
    assert_eq!(health.status(), 204);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    let status = tokio::task::spawn_blocking(move || daemon.wait()).await.unwrap();
    assert!(status.success());
    let got = collector.0.lock().unwrap();
    assert!(got.spans.iter().any(|span| span.name == "GET /health"));
    assert_eq!(map(&got.resources[0].attributes)["service.name"], "sandbox");
}

#[tokio::test]
async fn a_collector_that_accepts_and_never_answers_slows_nothing() {
    // The kernel accepts, and nobody reads.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let flag = format!("--otlp=http://{}", listener.local_addr().unwrap());
    let mut daemon = daemon(&[], &[&flag]);
    let http = http();
    // More than the queue has room for.
    for _ in 0..3000 {
        let answer = soon("health", http.get(daemon.url("/health")).send()).await.unwrap();
        assert_eq!(answer.status(), 204);
    }
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    let status = tokio::task::spawn_blocking(move || daemon.wait()).await.unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn a_collector_that_is_down_is_told_of_once_and_only_on_stderr() {
    let daemon = daemon(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")], &[]);
    let http = http();
    let failures = || {
        let lines = daemon.wait_for_log("ready");
        lines.iter().filter(|line| line["message"] == "the collector takes no telemetry").count()
    };
    let health = async || {
        let answer = soon("health", http.get(daemon.url("/health")).send()).await.unwrap();
        assert_eq!(answer.status(), 204);
    };
    health().await;
    in_time("both kinds have failed", async || (failures() == 2).then_some(())).await;
    health().await;
    assert_eq!(failures(), 2);
}

#[tokio::test]
async fn callers_decide_whether_their_calls_are_sampled_unless_the_sampler_does() {
    let (collector, url) = Collector::tcp().await;
    let daemon = daemon(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &url)], &[]);
    let with = |trace: &str, flags: &str| {
        let parent = format!("00-{trace}-b7ad6b7169203331-{flags}");
        http().get(daemon.url("/health")).header("traceparent", parent).send()
    };
    let (not, yes) = ("1".repeat(32), "2".repeat(32));
    soon("health", with(&not, "00")).await.unwrap();
    soon("health", with(&yes, "01")).await.unwrap();
    // A trace that makes no sense is a new one.
    soon("health", with("nonsense", "01")).await.unwrap();
    collector.span("the sampled one", |span| hex(&span.trace_id) == yes).await;
    collector.span("the new one", |span| span.parent_span_id.is_empty()).await;
    let got = collector.0.lock().unwrap();
    assert!(got.spans.iter().all(|span| hex(&span.trace_id) != not));
    // Of the log nothing was said.
    assert!(got.lines.is_empty());
}

#[test]
fn what_is_no_collector_is_told_by_name() {
    for (variables, args, text) in [
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere")][..], &[][..], "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (&[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "https://x")], &[], "without TLS"),
        (&[("OTEL_TRACES_EXPORTER", "zipkin")], &[], "OTEL_TRACES_EXPORTER"),
        (
            &[
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318"),
            ],
            &[],
            "OTEL_EXPORTER_OTLP_PROTOCOL: this envd speaks grpc",
        ),
        (&[], &["--otlp", "http://x:1/v1/traces"], "--otlp"),
    ] {
        let output = command(variables, args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(text), "{variables:?} {args:?}: {said}");
    }
}
