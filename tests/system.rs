//! `envd.v1.System`: what there is, what is used, and the RPC twin of `/init`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::{
    Daemon, is_root,
    rpc::{Client, Failure, WIRES, Wire},
    soon,
};
use envd::proto::Timestamp;
use envd::proto::v1::{
    InfoRequest, InfoResponse, MetricsRequest, MetricsResponse, PortsRequest, PortsResponse,
    SyncRequest, SyncResponse,
    sync_request::{Variables, Volume},
    sync_response::step::Outcome,
};
use pbjson_types::Duration;

const INFO: &str = "/envd.v1.System/Info";
const METRICS: &str = "/envd.v1.System/Metrics";
const SYNC: &str = "/envd.v1.System/Sync";

async fn sync(client: &Client, request: &SyncRequest) -> Result<SyncResponse, Failure> {
    client.unary(SYNC, request).await
}

async fn envs(daemon: &Daemon, token: &str) -> Option<BTreeMap<String, String>> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.get(daemon.url("/envs")).header("x-access-token", token);
    let response = soon("envs", request.send()).await.unwrap();
    response.status().is_success().then_some(())?;
    Some(response.json().await.unwrap())
}

fn variables(pairs: &[(&str, &str)]) -> Option<Variables> {
    let variables = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Some(Variables { variables: variables.collect() })
}

#[tokio::test]
async fn info_in_every_protocol() {
    let daemon = Daemon::start(&["--max-connections", "77"]);
    for wire in WIRES {
        let info: InfoResponse =
            Client::new(&daemon, wire).unary(INFO, &InfoRequest {}).await.unwrap();
        assert_eq!(info.version, env!("CARGO_PKG_VERSION"), "{wire:?}");
        assert_eq!(info.e2b_version, envd::version::E2B, "{wire:?}");
        assert!(info.features.iter().any(|feature| feature == "sync"), "{wire:?}");
        assert!(!info.kernel.is_empty() && !info.architecture.is_empty(), "{wire:?}");
        assert_eq!(info.is_root, is_root(), "{wire:?}");
        assert_eq!(info.limits.unwrap().connections, 77, "{wire:?}");
    }
}

#[tokio::test]
async fn who_listens_in_every_protocol() {
    let daemon = Daemon::start(&[]);
    let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (own_port, envds) = (own.local_addr().unwrap().port(), daemon.tcp());
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let open = async || -> PortsResponse {
            client.unary("/envd.v1.System/Ports", &PortsRequest {}).await.unwrap()
        };
        let told = open().await;
        let of = |port: u32| told.ports.iter().find(|open| open.port == port);
        let mine = of(own_port.into()).unwrap();
        assert_eq!(mine.pid, Some(std::process::id()), "{wire:?}");
        assert_eq!((mine.address.as_str(), mine.command.is_empty()), ("127.0.0.1", false));
        let port = envds.rsplit_once(':').unwrap().1.parse().unwrap();
        assert_eq!(of(port).unwrap().pid, Some(daemon.pid()), "{wire:?}");
        assert!(!told.truncated);
    }
    drop(own);
    let client = Client::new(&daemon, Wire::Grpc);
    let told: PortsResponse =
        client.unary("/envd.v1.System/Ports", &PortsRequest {}).await.unwrap();
    assert!(told.ports.iter().all(|open| open.pid != Some(std::process::id())));
}

#[tokio::test]
async fn metrics_once_or_as_a_stream() {
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let mut once = client
            .stream::<_, MetricsResponse>(METRICS, &MetricsRequest { interval: None })
            .await
            .unwrap();
        let metrics = once.next().await.unwrap().unwrap();
        assert!(metrics.memory_used > 0 && metrics.memory_used < metrics.memory_total, "{wire:?}");
        assert_eq!(once.next().await.unwrap(), None, "{wire:?}");
    }
    let client = Client::new(&daemon, Wire::Grpc);
    let tenth = Some(Duration { seconds: 0, nanos: 100_000_000 });
    let request = MetricsRequest { interval: tenth };
    let mut many = client.stream::<_, MetricsResponse>(METRICS, &request).await.unwrap();
    let mut last = None;
    for _ in 0..3 {
        let metrics = many.next().await.unwrap().unwrap();
        let time = metrics.time.unwrap();
        let time = (time.seconds, time.nanos);
        assert!(last.is_none_or(|last| last < time));
        last = Some(time);
    }
    for (seconds, nanos) in [(0, 0), (0, 99_999_999), (-1, 0), (86_401, 0), (1, -1)] {
        let request = MetricsRequest { interval: Some(Duration { seconds, nanos }) };
        let refused = client.stream::<_, MetricsResponse>(METRICS, &request).await;
        let failure = match refused {
            Ok(mut stream) => stream.next().await.unwrap_err(),
            Err(failure) => failure,
        };
        assert_eq!(failure.code, "invalid_argument", "{seconds} {nanos}");
        assert!(failure.message.contains("`interval`"), "{failure:?}");
    }
}

#[tokio::test]
async fn sync_is_init_with_a_report() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("etc")).unwrap();
    let flag = format!("--guest-root={}", root.path().display());
    for wire in WIRES {
        let _ = std::fs::remove_file(root.path().join("etc/hosts"));
        let daemon = Daemon::start(&[&flag]);
        let open = Client::new(&daemon, wire);
        let at = |seconds| Some(Timestamp { seconds, nanos: 5 });
        let request = SyncRequest {
            access_token: Some("t".to_owned()),
            timestamp: at(100),
            env: variables(&[("A", "1")]),
            default_workdir: "/".to_owned(),
            events_ip: "10.0.0.1".to_owned(),
            ..SyncRequest::default()
        };
        let done = sync(&open, &request).await.unwrap();
        assert!(!done.stale, "{wire:?}");
        assert_eq!(done.version, env!("CARGO_PKG_VERSION"));
        let outcomes: BTreeMap<_, _> =
            done.steps.iter().map(|step| (step.name.as_str(), step.outcome())).collect();
        for name in ["access_token", "env", "default_workdir", "hosts"] {
            assert_eq!(outcomes.get(name), Some(&Outcome::Applied), "{wire:?} {name} {outcomes:?}");
        }
        assert!(done.steps.iter().all(|step| step.took.is_some() && step.error.is_empty()));

        // Now the gate is closed for who has not got the token, and Sync is behind the gate.
        if wire == Wire::Grpc {
            let refused = sync(&open, &request).await.unwrap_err();
            assert_eq!(refused.code, "unauthenticated");
        }
        let known = Client::new(&daemon, wire).with("x-access-token", "t");
        let again = sync(&known, &request).await.unwrap();
        assert!(again.steps.iter().all(|step| step.outcome() == Outcome::Unchanged), "{again:?}");
        // What is left out stays, the token too.
        let request = SyncRequest {
            timestamp: at(101),
            env: variables(&[("B", "2")]),
            ..SyncRequest::default()
        };
        sync(&known, &request).await.unwrap();
        let envs_now = envs(&daemon, "t").await.expect("the token is still t");
        assert!(envs_now.contains_key("B") && !envs_now.contains_key("A"), "{wire:?}");
        let stale =
            SyncRequest { timestamp: at(99), env: variables(&[]), ..SyncRequest::default() };
        let stale = sync(&known, &stale).await.unwrap();
        assert!(stale.stale && stale.steps.is_empty(), "{wire:?}");
        // The caller who has the token may change it, and take it away.
        let request = SyncRequest { access_token: Some("u".to_owned()), ..SyncRequest::default() };
        sync(&known, &request).await.unwrap();
        assert!(
            envs(&daemon, "t").await.is_none() && envs(&daemon, "u").await.is_some(),
            "{wire:?}"
        );
        let known = Client::new(&daemon, wire).with("x-access-token", "u");
        let request = SyncRequest { access_token: Some(String::new()), ..SyncRequest::default() };
        sync(&known, &request).await.unwrap();
        assert!(envs(&daemon, "").await.is_some(), "{wire:?}");
    }
}

#[tokio::test]
async fn what_makes_no_sense_is_named_and_nothing_is_done() {
    let daemon = Daemon::start(&[]);
    let client = Client::new(&daemon, Wire::Connect { json: true });
    let base = SyncRequest { access_token: Some("t".to_owned()), ..SyncRequest::default() };
    let not_der = "-----BEGIN CERTIFICATE-----\nZmlyc3Q=\n-----END CERTIFICATE-----";
    for (request, named) in [
        (SyncRequest { access_token: Some("x".repeat(5000)), ..base.clone() }, "access_token"),
        (SyncRequest { env: variables(&[("A=", "secret")]), ..base.clone() }, "env: \"A=\""),
        (SyncRequest { ca_bundle: "secret".to_owned(), ..base.clone() }, "ca_bundle"),
        (SyncRequest { ca_bundle: not_der.to_owned(), ..base.clone() }, "ca_bundle: certificate 1"),
        (SyncRequest { default_user: "x".repeat(100 << 10), ..base.clone() }, "default_user"),
        (SyncRequest { default_workdir: "x".repeat(100 << 10), ..base.clone() }, "default_workdir"),
        (SyncRequest { events_ip: "x".repeat(100 << 10), ..base.clone() }, "events_ip"),
        (SyncRequest { lifecycle_id: "x".repeat(100 << 10), ..base.clone() }, "lifecycle_id"),
        (SyncRequest { default_user: "a\0".to_owned(), ..base.clone() }, "default_user"),
        (
            SyncRequest {
                volumes: vec![Volume {
                    nfs_target: "h:/x".to_owned(),
                    path: "relative".to_owned(),
                }],
                ..base.clone()
            },
            "volumes: 'relative'",
        ),
    ] {
        let failure = sync(&client, &request).await.unwrap_err();
        assert_eq!(failure.code, "invalid_argument", "{failure:?}");
        assert!(
            failure.message.starts_with(named) && !failure.message.contains("secret"),
            "{failure:?}"
        );
    }
    assert!(envs(&daemon, "").await.is_some(), "no token was set");
}

#[tokio::test]
async fn sync_opens_a_sandbox_that_is_closed_until_it_is_initialised() {
    let daemon = Daemon::start(&["--require-token"]);
    let client = Client::new(&daemon, Wire::Grpc);
    client.unary::<_, InfoResponse>(INFO, &InfoRequest {}).await.unwrap_err();
    let request = SyncRequest { access_token: Some("t".to_owned()), ..SyncRequest::default() };
    sync(&client, &request).await.unwrap();
    client.unary::<_, InfoResponse>(INFO, &InfoRequest {}).await.unwrap_err();
    let known = client.with("x-access-token", "t");
    known.unary::<_, InfoResponse>(INFO, &InfoRequest {}).await.unwrap();
}
