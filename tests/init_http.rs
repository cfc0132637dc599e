//! `POST /init`: who may, what it changes and in which order, and that a request that is refused
//! changes nothing.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{collections::BTreeMap, fs, net::UdpSocket, path::Path, process::Command, time::Instant};

use common::{
    Daemon, PATIENCE, able, eventually, in_time, is_root,
    mmds::Mmds,
    offered,
    raw::Raw,
    rpc::{Client, Wire},
    soon,
};
use envd::proto::process::{
    ProcessConfig, StartRequest, StartResponse, process_event::Event,
    process_event::data_event::Output,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha512};

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// The status and text of an answer; every one must say upstream's version.
async fn init(daemon: &Daemon, body: impl Into<reqwest::Body>) -> (u16, String) {
    let response = soon("init", http().post(daemon.url("/init")).body(body).send()).await.unwrap();
    let version = response.headers()["x-envd-version"].to_str().unwrap().to_owned();
    assert_eq!(version, envd::version::E2B);
    let status = response.status().as_u16();
    if status == 204 {
        assert_eq!(response.headers()["cache-control"], "no-store");
    }
    (status, soon("init", response.text()).await.unwrap())
}

async fn told(daemon: &Daemon, body: Value) -> (u16, String) {
    init(daemon, body.to_string()).await
}

/// As [`told`], for a call that the metadata service has to vouch for. On a busy machine its answer may
/// come after the 20 ms that it has: then the call is 401, and the host repeats it.
async fn told_again(daemon: &Daemon, body: Value) -> (u16, String) {
    in_time("the metadata service answers in time", async || {
        let answer = told(daemon, body.clone()).await;
        (answer.0 != 401).then_some(answer)
    })
    .await
}

async fn envs(daemon: &Daemon, token: &str) -> Result<BTreeMap<String, String>, u16> {
    let request = http().get(daemon.url("/envs")).header("x-access-token", token).send();
    let response = soon("envs", request).await.unwrap();
    match response.status().as_u16() {
        200 => Ok(soon("envs", response.json()).await.unwrap()),
        other => Err(other),
    }
}

fn sha512(text: &str) -> String {
    Sha512::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn output(daemon: &Daemon, token: &str, script: &str) -> String {
    let client = Client::new(daemon, Wire::Grpc).with("x-access-token", token);
    let request = StartRequest {
        process: Some(ProcessConfig {
            cmd: "/bin/sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..ProcessConfig::default()
        }),
        ..StartRequest::default()
    };
    let mut events =
        client.stream::<_, StartResponse>("/process.Process/Start", &request).await.unwrap();
    let mut text = String::new();
    while let Some(event) = events.next().await.unwrap() {
        if let Some(Event::Data(data)) = event.event.and_then(|event| event.event)
            && let Some(Output::Stdout(bytes)) = data.output
        {
            text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    }
    text
}

#[tokio::test]
async fn the_table_of_who_may_initialise() {
    let (of_t, of_r, of_none) = (sha512("t"), sha512("r"), sha512(""));
    let reset = "access token reset not authorized";
    let wrong = "access token validation failed";
    for (stored, brought, hash, expected) in [
        (Some("t"), Some("t"), None, ""),
        (Some("t"), Some("t"), Some(&of_r), ""),
        (Some("t"), Some("r"), Some(&of_r), ""),
        (Some("t"), None, Some(&of_none), ""),
        (None, Some("r"), Some(&of_r), ""),
        (None, None, Some(&of_none), ""),
        (None, Some("r"), None, ""),
        (None, None, None, ""),
        (None, Some("r"), Some(&of_t), wrong),
        (None, None, Some(&of_t), reset),
        (Some("t"), Some("r"), None, wrong),
        (Some("t"), Some("r"), Some(&of_none), wrong),
        (Some("t"), None, None, reset),
        (Some("t"), None, Some(&of_t), reset),
    ] {
        let mmds = Mmds::start();
        let daemon = Daemon::start(&[&mmds.flag()]);
        if let Some(stored) = stored {
            mmds.say("a", &sha512(stored));
            let body = json!({ "accessToken": stored, "envVars": { "KEPT": "yes" } });
            assert_eq!(told_again(&daemon, body).await.0, 204);
        }
        // The hash of nothing is not there at all.
        mmds.say("b", hash.map_or("", String::as_str));
        let mut body = json!({ "envVars": { "NEW": "yes" } });
        if let Some(brought) = brought {
            body["accessToken"] = brought.into();
        }
        let case = format!("{stored:?} {brought:?} {hash:?}");
        let (status, text) = match expected {
            "" => told_again(&daemon, body).await,
            _ => told(&daemon, body).await,
        };
        if expected.is_empty() {
            assert_eq!((status, text.as_str()), (204, ""), "{case}");
            let envs = envs(&daemon, brought.unwrap_or_default()).await.expect(&case);
            assert_eq!(envs.get("NEW").map(String::as_str), Some("yes"), "{case}");
            assert!(!envs.contains_key("KEPT"), "{case}");
        } else {
            assert_eq!((status, text.as_str()), (401, expected), "{case}");
            // What was before is so still.
            let envs = envs(&daemon, stored.unwrap_or_default()).await.expect(&case);
            assert!(!envs.contains_key("NEW"), "{case}");
            assert_eq!(envs.contains_key("KEPT"), stored.is_some(), "{case}");
        }
    }
}

#[tokio::test]
async fn the_header_with_the_token_means_nothing_to_init() {
    let daemon = Daemon::start(&[]);
    assert_eq!(told(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    let request = http().post(daemon.url("/init")).header("x-access-token", "t").body("{}").send();
    assert_eq!(soon("init", request).await.unwrap().status(), 401);
    envs(&daemon, "t").await.unwrap();
    // The token goes with a request that brings it and no other field.
    assert_eq!(told(&daemon, json!({ "accessToken": "t", "envVars": null })).await.0, 204);
    assert_eq!(envs(&daemon, "").await, Err(401));
}

#[tokio::test]
async fn bodies() {
    let daemon = Daemon::start(&[]);
    for body in ["", "{}", "null", "{\"x\":1}", "  {\"ENVVARS\":{\"A\":\"1\"}}\n"] {
        assert_eq!(init(&daemon, body).await, (204, String::new()), "{body}");
    }
    assert_eq!(envs(&daemon, "").await.unwrap()["A"], "1");
    for body in [
        "{",
        "[]",
        "{} {}",
        "\u{feff}{}",
        "{\"accessToken\":\"\"}",
        "{\"accessToken\":\"a\\\\b\"}",
        "{\"timestamp\":\"2026-01-01\"}",
        "{\"timestamp\":\"Thu, 01 Jan 2026 00:00:00 GMT\"}",
        "{\"envVars\":[]}",
    ] {
        assert_eq!(init(&daemon, body).await, (400, String::new()), "{body}");
    }
    for (body, field) in [
        (json!({ "envVars": { "A=B": "secret" } }), "envVars: \"A=B\""),
        (json!({ "envVars": { "A": "secret\0" } }), "envVars: the value of \"A\""),
        (json!({ "caBundle": "secret" }), "caBundle:"),
        (json!({ "volumeMounts": [{ "nfs_target": "x", "path": "/a" }] }), "volumeMounts: 'x'"),
        (json!({ "defaultWorkdir": "/a\0" }), "defaultWorkdir:"),
    ] {
        let mut body = body;
        body["accessToken"] = "set-by-a-bad-request".into();
        let (status, text) = told(&daemon, body).await;
        assert_eq!(status, 400, "{text}");
        assert!(text.starts_with(field) && !text.contains("secret"), "{text}");
    }
    // Nothing of them was done, and nobody is locked out.
    assert_eq!(envs(&daemon, "").await.unwrap()["A"], "1");
    let request = http().get(daemon.url("/init")).send();
    assert_eq!(soon("a GET", request).await.unwrap().status(), 405);
}

#[tokio::test]
async fn a_body_that_is_too_large_or_cut_is_refused() {
    let daemon = Daemon::start(&[]);
    let (status, text) = init(&daemon, vec![b' '; (4 << 20) + 1]).await;
    assert_eq!((status, text.as_str()), (400, ""));
    let large = format!("{{\"unknown\":\"{}\"}}", "x".repeat(1 << 20));
    assert_eq!(init(&daemon, large).await.0, 204);
    let mut raw = Raw::open(&daemon).await;
    raw.send("POST /init HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{\"accessToken\":\"t\"")
        .await;
    drop(raw);
    assert_eq!(told(&daemon, json!({})).await.0, 204);
}

#[tokio::test]
async fn bodies_of_strangers_wait_in_bounded_memory() {
    let daemon = Daemon::start(&[]);
    let head = |length: usize| {
        format!("POST /init HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n")
    };
    // Large ones that do not come to their end. Which of them have a place is not to be seen, so
    // there are more of them until a whole one finds none.
    let mut stuck = Vec::new();
    in_time("all places for large ones are taken", async || {
        let mut raw = Raw::open(&daemon).await;
        raw.send(head(3 << 20)).await;
        raw.send(vec![b' '; 128 << 10]).await;
        stuck.push(raw);
        let (status, _) = init(&daemon, vec![b' '; 128 << 10]).await;
        (status == 503).then_some(())
    })
    .await;
    // A small one is not refused.
    assert_eq!(told(&daemon, json!({})).await.0, 204);
    drop(stuck);
    in_time("their places are free again", async || {
        (init(&daemon, [vec![b' '; 128 << 10], b"{}".to_vec()].concat()).await.0 == 204)
            .then_some(())
    })
    .await;
    let peak = daemon.memory("VmHWM");
    assert!(peak < 96 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn timestamps_order_what_the_host_says() {
    let daemon = Daemon::start(&[]);
    let at = |time: &str, value: &str| json!({ "accessToken": "t", "timestamp": time, "envVars": { "V": value } });
    for (time, value, now) in [
        ("2026-01-01T00:00:10Z", "first", "first"),
        ("2026-01-01T00:00:09.999999999Z", "stale", "first"),
        ("2026-01-01T00:00:10Z", "equal", "equal"),
        ("2026-01-01T01:00:10+01:00", "zone", "zone"),
        ("2026-01-01T00:00:10.000000001Z", "newer", "newer"),
        ("2026-01-01T00:00:10.000000000Z", "stale", "newer"),
        ("1969-12-31T23:59:59Z", "stale", "newer"),
    ] {
        assert_eq!(told(&daemon, at(time, value)).await.0, 204, "{time}");
        assert_eq!(envs(&daemon, "t").await.unwrap()["V"], now, "{time}");
    }
    // Without one it always counts.
    let timeless = json!({ "accessToken": "t", "envVars": { "V": "timeless" } });
    assert_eq!(told(&daemon, timeless).await.0, 204);
    assert_eq!(envs(&daemon, "t").await.unwrap()["V"], "timeless");
    assert_eq!(told(&daemon, at("2026-01-01T00:00:10Z", "stale")).await.0, 204);
    assert_eq!(envs(&daemon, "t").await.unwrap()["V"], "timeless");
}

#[tokio::test]
async fn a_stale_request_initialises_and_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let body = json!({ "timestamp": "2026-01-01T00:00:10Z", "accessToken": "t" });
    assert_eq!(told(&daemon, body).await.0, 204);
    let stale =
        json!({ "timestamp": "2026-01-01T00:00:01Z", "accessToken": "t", "envVars": { "A": "1" } });
    assert_eq!(told(&daemon, stale).await.0, 204);
    assert!(!envs(&daemon, "t").await.unwrap().contains_key("A"));
}

const FAR_FUTURE: &str = "9999-12-31T23:59:59Z";
const NOW: &str = "2026-01-01T00:00:00Z";

#[tokio::test]
async fn a_strangers_timestamp_makes_no_request_of_the_host_stale() {
    for args in [&[][..], &["--require-token"]] {
        let daemon = Daemon::start(args);
        for _ in 0..3 {
            let stranger = json!({ "timestamp": FAR_FUTURE, "envVars": { "A": "stranger" } });
            assert_eq!(told(&daemon, stranger).await.0, 204);
        }
        let host = json!({ "timestamp": NOW, "accessToken": "t", "envVars": { "A": "host" } });
        assert_eq!(told(&daemon, host).await.0, 204);
        assert_eq!(envs(&daemon, "").await, Err(401));
        assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "host");
        // Nor does one that is refused.
        let wrong = json!({ "timestamp": FAR_FUTURE, "accessToken": "wrong" });
        assert_eq!(told(&daemon, wrong).await.0, 401);
        assert_eq!(told(&daemon, json!({ "timestamp": FAR_FUTURE })).await.0, 401);
        let host = json!({ "timestamp": NOW, "accessToken": "t", "envVars": { "A": "again" } });
        assert_eq!(told(&daemon, host).await.0, 204);
        assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "again");
    }
}

#[tokio::test]
async fn a_stranger_moves_no_time_after_the_token_was_cleared() {
    let mmds = Mmds::start();
    let daemon = Daemon::start(&[&mmds.flag()]);
    mmds.say("a", &sha512("t"));
    assert_eq!(told_again(&daemon, json!({ "accessToken": "t", "timestamp": NOW })).await.0, 204);
    // Cleared as the host does it, with the hash of nothing: everybody can send that.
    mmds.say("a", &sha512(""));
    assert_eq!(told_again(&daemon, json!({ "timestamp": FAR_FUTURE })).await.0, 204);
    envs(&daemon, "").await.unwrap();
    // There has been a token, so that the first of a stranger moves nothing either.
    mmds.say("a", "");
    let stranger = json!({ "timestamp": FAR_FUTURE, "accessToken": "stranger" });
    assert_eq!(told_again(&daemon, stranger).await.0, 204);
    mmds.say("a", &sha512("u"));
    assert_eq!(told_again(&daemon, json!({ "accessToken": "u", "timestamp": NOW })).await.0, 204);
    envs(&daemon, "u").await.unwrap();
}

#[tokio::test]
async fn a_stale_request_with_another_token_is_refused() {
    let mmds = Mmds::start();
    let daemon = Daemon::start(&[&mmds.flag()]);
    mmds.say("a", &sha512("t"));
    let newest = json!({ "accessToken": "t", "timestamp": "2026-01-01T00:00:10Z" });
    assert_eq!(told_again(&daemon, newest).await.0, 204);
    // Also if the host's metadata has its hash: a success would say that it is set.
    mmds.say("a", &sha512("u"));
    let (status, text) = told(&daemon, json!({ "accessToken": "u", "timestamp": NOW })).await;
    assert_eq!((status, text.as_str()), (401, "access token validation failed"));
    envs(&daemon, "t").await.unwrap();
    // Without a token it is upstream's success that changes nothing.
    mmds.say("a", &sha512(""));
    assert_eq!(told_again(&daemon, json!({ "timestamp": NOW })).await.0, 204);
    envs(&daemon, "t").await.unwrap();
    // And where the token was cleared there is none that it could be.
    assert_eq!(told_again(&daemon, json!({})).await.0, 204);
    envs(&daemon, "").await.unwrap();
    let stale = json!({ "accessToken": "t", "timestamp": NOW });
    mmds.say("a", "");
    assert_eq!(told(&daemon, stale).await.0, 401);
    envs(&daemon, "").await.unwrap();
}

#[tokio::test]
async fn defaults_reach_every_call_and_internal_names_are_not_the_callers() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&["-isnotfc"]);
    let workdir = dir.path().canonicalize().unwrap();
    let me = common::me().name;
    let body = json!({
        "defaultUser": me, "defaultWorkdir": workdir,
        "envVars": { "A": "<1>", "E2B_SANDBOX": "forged", "E2B_SANDBOX_ID": "own", "PATH": "/bin:/usr/bin" },
    });
    assert_eq!(told(&daemon, body).await.0, 204);
    let said = output(&daemon, "", "echo $A; echo $E2B_SANDBOX; echo $PATH; pwd").await;
    assert_eq!(said, format!("<1>\nfalse\n/bin:/usr/bin\n{}\n", workdir.display()));
    let text = soon("envs", http().get(daemon.url("/envs")).send()).await.unwrap();
    assert_eq!(text.headers()["cache-control"], "no-store");
    let text = text.text().await.unwrap();
    assert!(text.starts_with("{\"A\":\"\\u003c1\\u003e\",\"E2B_SANDBOX\":\"false\","), "{text}");
    assert!(text.ends_with("}\n"), "{text}");
    // Replaced as a whole; what is not named stays.
    assert_eq!(told(&daemon, json!({ "envVars": { "B": "2" } })).await.0, 204);
    assert_eq!(output(&daemon, "", "echo $A$B; pwd").await, format!("2\n{}\n", workdir.display()));
    assert_eq!(told(&daemon, json!({ "defaultUser": "", "defaultWorkdir": "" })).await.0, 204);
    assert_eq!(output(&daemon, "", "echo $B; pwd").await, format!("2\n{}\n", workdir.display()));
    // A user who will exist later is taken, and missed when it is needed.
    assert_eq!(told(&daemon, json!({ "defaultUser": "no-such-user" })).await.0, 204);
    let client = Client::new(&daemon, Wire::Grpc);
    let failure = client
        .stream::<_, StartResponse>("/process.Process/Start", &StartRequest::default())
        .await
        .err()
        .unwrap();
    assert_eq!(failure.message, "invalid default user: 'no-such-user'");
}

/// A directory that stands for the guest's root.
fn guest() -> (tempfile::TempDir, String) {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc/ssl/certs")).unwrap();
    fs::write(root.path().join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(root.path().join("etc/ssl/certs/ca-certificates.crt"), "OLD\n").unwrap();
    let flag = format!("--guest-root={}", root.path().display());
    (root, flag)
}

fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}

const PEM: &str = include_str!("common/pem/first.pem");
const SECOND_PEM: &str = include_str!("common/pem/second.pem");

#[tokio::test]
async fn what_the_host_puts_into_the_guest() {
    let (root, flag) = guest();
    let mmds = Mmds::start();
    mmds.say("sandbox-1", "");
    let daemon = Daemon::start(&[&flag, &mmds.flag()]);
    eventually("the ids are there after the boot", || {
        let ids =
            ["SANDBOX", "TEMPLATE"].map(|of| read(root.path(), &format!("run/e2b/.E2B_{of}_ID")));
        (ids == ["sandbox-1", "template-of-sandbox-1"]).then_some(())
    });
    assert_eq!(read(root.path(), "run/e2b/.E2B_SANDBOX"), "true");

    // After a resume the ids are the new ones when the answer comes, not some time later.
    mmds.say("sandbox-2", "");
    let body = json!({ "hyperloopIP": "10.1.2.3", "caBundle": PEM, "lifecycleID": "x", "volumeMounts": [] });
    assert_eq!(told(&daemon, body.clone()).await.0, 204);
    let said =
        output(&daemon, "", "echo $E2B_SANDBOX_ID $E2B_TEMPLATE_ID $E2B_EVENTS_ADDRESS").await;
    assert_eq!(said, "sandbox-2 template-of-sandbox-2 http://10.1.2.3\n");
    assert_eq!(read(root.path(), "run/e2b/.E2B_SANDBOX_ID"), "sandbox-2");
    let hosts = "127.0.0.1 localhost\n10.1.2.3         events.e2b.local\n";
    assert_eq!(read(root.path(), "etc/hosts"), hosts);
    let bundle = "etc/ssl/certs/ca-certificates.crt";
    assert_eq!(read(root.path(), bundle), format!("OLD\n{PEM}"));
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(read(root.path(), bundle), format!("OLD\n{PEM}"));
    let body = json!({ "hyperloopIP": "10.9.9.9", "caBundle": SECOND_PEM });
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(read(root.path(), bundle), format!("OLD\n{SECOND_PEM}"));
    assert_eq!(read(root.path(), "etc/hosts"), hosts.replace("10.1.2.3", "10.9.9.9"));
    // An address that is none is only logged.
    assert_eq!(told(&daemon, json!({ "hyperloopIP": "nowhere" })).await.0, 204);
    assert_eq!(read(root.path(), "etc/hosts"), hosts.replace("10.1.2.3", "10.9.9.9"));
}

#[tokio::test]
async fn certificates_that_cannot_be_installed_fail_with_token_and_variables_set() {
    let (root, flag) = guest();
    let bundle = root.path().join("etc/ssl/certs/ca-certificates.crt");
    fs::remove_file(&bundle).unwrap();
    let daemon = Daemon::start(&[&flag]);
    let body = json!({
        "accessToken": "t", "envVars": { "A": "1" }, "caBundle": PEM, "hyperloopIP": "10.1.2.3",
        "timestamp": "2099-01-01T00:00:00Z",
    });
    let (status, text) = told(&daemon, body.clone()).await;
    assert_eq!(status, 400);
    assert!(text.starts_with("failed to install CA bundle: etc/ssl/certs/"), "{text}");
    assert_eq!(envs(&daemon, "").await, Err(401));
    assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "1");
    // What does not depend on it is done, too.
    assert!(read(root.path(), "etc/hosts").contains("10.1.2.3"));
    // The host repeats itself, and then it works: its timestamp is not stale.
    fs::write(&bundle, "").unwrap();
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(read(root.path(), "etc/ssl/certs/ca-certificates.crt"), PEM);
}

#[tokio::test]
async fn a_bundle_and_hosts_that_are_not_utf_8_are_kept_as_they_are() {
    let (root, flag) = guest();
    let bundle = root.path().join("etc/ssl/certs/ca-certificates.crt");
    let hosts = root.path().join("etc/hosts");
    fs::write(&bundle, b"# \xe4\n").unwrap();
    fs::write(&hosts, b"1.2.3.4 x # \xe4\n").unwrap();
    let daemon = Daemon::start(&[&flag]);
    let body = json!({ "caBundle": PEM, "hyperloopIP": "10.1.2.3" });
    assert_eq!(told(&daemon, body).await, (204, String::new()));
    assert_eq!(fs::read(&bundle).unwrap(), [b"# \xe4\n", PEM.as_bytes()].concat());
    let expected = [&b"1.2.3.4 x # \xe4\n"[..], b"10.1.2.3         events.e2b.local\n"].concat();
    assert_eq!(fs::read(&hosts).unwrap(), expected);
}

#[tokio::test]
async fn what_is_refused_is_named_and_nothing_of_its_request_is_done() {
    let (root, flag) = guest();
    let daemon = Daemon::start(&[&flag]);
    let long = |length: usize| "x".repeat(length);
    let cut = PEM.replacen("MII", "", 1);
    let pair =
        json!([{ "nfs_target": "h:/x", "path": "/a" }, { "nfs_target": "h:/x", "path": "/a" }]);
    let many: Vec<_> =
        (0..65).map(|n| json!({ "nfs_target": "h:/x", "path": format!("/m/{n}") })).collect();
    let variables: BTreeMap<_, _> = (0..100_000).map(|n| (n.to_string(), "")).collect();
    for (field, value) in [
        ("caBundle", json!(cut)),
        ("caBundle", json!(format!("{PEM}{cut}"))),
        ("caBundle", json!("-----BEGIN CERTIFICATE-----\nZmlyc3Q=\n-----END CERTIFICATE-----")),
        ("caBundle", json!(PEM.repeat(2000))),
        ("defaultWorkdir", json!(format!("/{}", long(100 << 10)))),
        ("defaultUser", json!(long(100 << 10))),
        ("hyperloopIP", json!(long(100 << 10))),
        ("lifecycleID", json!(long(100 << 10))),
        ("envVars", json!({ "A": long(200 << 10) })),
        ("envVars", json!(variables)),
        ("volumeMounts", json!([{ "nfs_target": format!("h:/{}", long(5000)), "path": "/a" }])),
        ("volumeMounts", json!([{ "nfs_target": "h:/x", "path": format!("/{}", long(5000)) }])),
        ("volumeMounts", pair),
        ("volumeMounts", json!(many)),
    ] {
        let mut body = json!({
            "accessToken": "t", "envVars": { "A": "1" }, "caBundle": PEM, "hyperloopIP": "10.1.2.3",
        });
        body[field] = value;
        let (status, text) = told(&daemon, body).await;
        assert_eq!(status, 400, "{field}");
        assert!(text.starts_with(&format!("{field}: ")) && text.len() < 4096, "{field}: {text}");
    }
    for (field, body) in [
        ("caBundle", &b"{\"accessToken\":\"t\",\"caBundle\":\"\xff\"}"[..]),
        ("defaultUser", &b"{\"accessToken\":\"t\",\"defaultUser\":\"a\xc3\"}"[..]),
    ] {
        let (status, text) = init(&daemon, body.to_vec()).await;
        assert_eq!((status, text), (400, format!("{field}: it is not UTF-8")));
    }
    assert!(!envs(&daemon, "").await.unwrap().contains_key("A"));
    assert_eq!(read(root.path(), "etc/ssl/certs/ca-certificates.crt"), "OLD\n");
    assert_eq!(read(root.path(), "etc/hosts"), "127.0.0.1 localhost\n");
}

#[tokio::test]
async fn a_volume_that_cannot_be_mounted_is_named_with_token_and_variables_set() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("volume");
    let daemon = Daemon::start(&[]);
    let body = json!({
        "accessToken": "t", "envVars": { "A": "1" },
        "volumeMounts": [{ "nfs_target": "127.0.0.1:/export", "path": place }],
    });
    // The kernel has no NFS, there is no server, or this is not root.
    let (status, text) = told(&daemon, body).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.starts_with("failed to setup NFS volumes: "), "{text}");
    assert!(text.contains(place.to_str().unwrap()), "{text}");
    assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "1");
}

/// A daemon whose look-ups of names never end, so that a volume of a server with a name hangs; with
/// what keeps it so.
fn with_hanging_names() -> Option<(Daemon, tempfile::TempDir, UdpSocket)> {
    let works = || Command::new("unshare").args(["-m", "true"]).output();
    let possible = is_root() && works().is_ok_and(|output| output.status.success());
    if !able("root and unshare(1), for a mount namespace", possible) {
        return None;
    }
    if !offered("/etc/resolv.conf, to be covered", Path::new("/etc/resolv.conf").exists()) {
        return None;
    }
    // Of its own, so that no name server of the machine is in the way. It never answers.
    let server = UdpSocket::bind("127.83.17.5:53").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("resolv.conf");
    fs::write(&conf, "nameserver 127.83.17.5\noptions timeout:30 attempts:5\n").unwrap();
    let mut command = Command::new("unshare");
    let script = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", conf.display());
    command.args(["-m", "sh", "-c", &script, "sh"]);
    let daemon = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    command.arg(daemon.get_program()).args(daemon.get_args());
    Some((Daemon::spawn(&mut command), dir, server))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_hangs_delays_nothing_else_and_fails_no_later_call() {
    let Some((daemon, dir, _server)) = with_hanging_names() else { return };
    let place = dir.path().join("volume");
    let volumes = json!([{ "nfs_target": "no-such-host.example:/x", "path": place }]);
    let body = |value: &str| json!({ "accessToken": "t", "envVars": { "A": value }, "volumeMounts": volumes });
    let first = told(&daemon, body("1"));
    tokio::pin!(first);
    let set = in_time("the token is set while the volume hangs", async || {
        envs(&daemon, "t").await.ok().filter(|envs| envs.contains_key("A"))
    });
    let set = async {
        tokio::select! { biased; set = set => set, early = &mut first => panic!("{early:?}") }
    };
    assert_eq!(set.await["A"], "1");
    // Later ones do not wait for it, with the same volumes or without, through a link or not.
    for (number, body) in
        [body("2"), json!({ "accessToken": "t", "envVars": { "A": "3" } }), body("4")]
            .into_iter()
            .enumerate()
    {
        let begun = Instant::now();
        assert_eq!(told(&daemon, body).await, (204, String::new()), "{number}");
        assert!(begun.elapsed() < *PATIENCE / 12, "{number}: {:?}", begun.elapsed());
    }
    assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "4");
    // One that hangs does not keep another from failing by itself.
    let other = dir.path().join("other");
    let mut both = body("5");
    both["volumeMounts"] = json!([
        { "nfs_target": "no-such-host.example:/x", "path": place },
        { "nfs_target": "127.0.0.1:/x", "path": other },
    ]);
    let (status, text) = told(&daemon, both).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.contains(other.to_str().unwrap()) && !text.contains("10 s"), "{text}");
    let (status, text) = first.await;
    assert_eq!(status, 400, "{text}");
    let expected =
        format!("failed to setup NFS volumes: {}: not done within 10 s", place.display());
    assert_eq!(text, expected);
    // It hangs still, and is left to hang.
    assert_eq!(told(&daemon, body("6")).await, (204, String::new()));
    assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "6");
}

/// The answer to a call, and that it did not wait for the metadata service, by the measure of a machine
/// that is busy with other tests.
async fn in_budget(daemon: &Daemon, body: Value) -> (u16, String) {
    let begun = Instant::now();
    let answer = told(daemon, body).await;
    assert!(begun.elapsed() < *PATIENCE / 40, "it took {:?}", begun.elapsed());
    answer
}

#[tokio::test]
async fn a_metadata_service_that_never_answered_decides_nothing() {
    let mmds = Mmds::start();
    mmds.be_silent(true);
    let daemon = Daemon::start(&[&mmds.flag()]);
    assert_eq!(in_budget(&daemon, json!({ "envVars": { "A": "1" } })).await.0, 204);
    assert_eq!(in_budget(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    assert_eq!(in_budget(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    let (status, text) = in_budget(&daemon, json!({ "accessToken": "u" })).await;
    assert_eq!((status, text.as_str()), (401, "access token validation failed"));
    let (status, text) = in_budget(&daemon, json!({})).await;
    assert_eq!((status, text.as_str()), (401, "access token reset not authorized"));
    envs(&daemon, "t").await.unwrap();
}

#[tokio::test]
async fn a_metadata_service_that_answered_once_is_waited_for() {
    let mmds = Mmds::start();
    mmds.say("a", "");
    let daemon = Daemon::start(&[&mmds.flag()]);
    in_time("it is seen at boot", async || {
        envs(&daemon, "").await.unwrap().contains_key("E2B_SANDBOX_ID").then_some(())
    })
    .await;
    // It says nothing of a token, and nobody is refused; but who keeps it from answering is.
    assert_eq!(told_again(&daemon, json!({})).await.0, 204);
    mmds.be_silent(true);
    for (body, text) in [
        (json!({ "accessToken": "t" }), "access token validation failed"),
        (json!({ "timestamp": FAR_FUTURE }), "access token reset not authorized"),
        (json!({ "accessToken": "t" }), "access token validation failed"),
    ] {
        assert_eq!(in_budget(&daemon, body).await, (401, text.to_owned()));
    }
    // The host repeats itself, and is heard once the service answers.
    mmds.say("b", &sha512("t"));
    mmds.be_silent(false);
    in_time("the host's call is authorised", async || {
        (told(&daemon, json!({ "accessToken": "t", "timestamp": NOW })).await.0 == 204)
            .then_some(())
    })
    .await;
    // With the stored token nothing has to be asked.
    mmds.be_silent(true);
    assert_eq!(in_budget(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    assert_eq!(in_budget(&daemon, json!({ "accessToken": "u" })).await.0, 401);
}

#[tokio::test]
async fn a_body_that_does_not_parse_is_logged_without_what_it_holds() {
    let daemon = Daemon::start(&["-verbose"]);
    for body in [
        "{\"envVars\":\"secret-1\"}",
        "{\"accessToken\":{\"secret-2\":1}}",
        "{\"timestamp\":\"secret-3\"}",
    ] {
        assert_eq!(init(&daemon, body).await, (400, String::new()));
    }
    let log = serde_json::to_string(&daemon.wait_for_log("an /init that does not parse")).unwrap();
    assert!(!log.contains("secret-"), "{log}");
}

#[tokio::test]
async fn the_metadata_is_asked_only_when_it_decides() {
    let mmds = Mmds::start();
    mmds.say("a", &sha512("t"));
    let daemon = Daemon::start(&[&mmds.flag(), "-isnotfc"]);
    in_time("the search at boot ends", async || (mmds.asked() == 1).then_some(())).await;
    assert_eq!(told_again(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    let asked = mmds.asked();
    assert!(asked >= 2, "{asked}");
    assert_eq!(told(&daemon, json!({ "accessToken": "wrong" })).await.0, 401);
    in_time("it is asked for another token", async || (mmds.asked() > asked).then_some(())).await;
}

/// Twenty searches would ask as often as one does in seconds before the last request is answered.
#[tokio::test]
async fn there_is_one_search_for_metadata_and_it_slows_down() {
    // It answers nothing that can be read.
    let mmds = Mmds::start();
    let daemon = Daemon::start(&[&mmds.flag()]);
    let begun = std::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(told(&daemon, json!({})).await.0, 204);
    }
    let by_requests = 20;
    // One search asks at 0, 50, 150, 350, 750, 1550 and 3150 ms.
    in_time("the search goes on", async || (mmds.asked() >= by_requests + 7).then_some(())).await;
    assert!(begun.elapsed() > std::time::Duration::from_millis(1500), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_leave_a_consistent_state() {
    let daemon = std::sync::Arc::new(Daemon::start(&[]));
    let first = json!({
        "accessToken": "t0", "timestamp": "2026-01-01T00:00:00Z",
        "envVars": { "A": "0", "B": "0" }, "defaultWorkdir": "/",
    });
    assert_eq!(told(&daemon, first).await.0, 204);
    let client = http();
    // Fewer at a time than are refused as too many.
    let turns = std::sync::Arc::new(tokio::sync::Semaphore::new(256));
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..1000_u32 {
        let (client, url) = (client.clone(), daemon.url("/init"));
        let turns = std::sync::Arc::clone(&turns);
        // Of ten: newer, equal, stale, malformed, a wrong token, no token.
        let second = number % 60;
        let value = number.to_string();
        let good = json!({
            "accessToken": "t0", "timestamp": format!("2026-01-01T00:01:{second:02}Z"),
            "envVars": { "A": value, "B": value },
        });
        let mut forged = good.clone();
        forged["envVars"] = json!({ "FORGED": "1" });
        forged["timestamp"] = "2027-01-01T00:00:00Z".into();
        let (body, expected) = match number % 10 {
            0..=3 => (good.to_string(), 204),
            4 => {
                let mut stale = forged.clone();
                stale["timestamp"] = "2025-01-01T00:00:00Z".into();
                (stale.to_string(), 204)
            }
            5 => {
                forged["timestamp"] = "when?".into();
                (forged.to_string(), 400)
            }
            6 => {
                forged["accessToken"] = "t1".into();
                (forged.to_string(), 401)
            }
            7 => {
                forged.as_object_mut().unwrap().remove("accessToken");
                (forged.to_string(), 401)
            }
            8 => (forged.to_string().replace('}', ""), 400),
            _ => {
                forged["accessToken"] = "t".into();
                (forged.to_string(), 401)
            }
        };
        calls.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            let answer = soon("one of a thousand", client.post(url).body(body).send()).await;
            (answer.unwrap().status().as_u16(), expected, number)
        });
    }
    // Meanwhile processes start, and each sees the variables of one request.
    for _ in 0..20 {
        let said = output(&daemon, "t0", "echo $A $B $FORGED").await;
        let values: Vec<_> = said.split_whitespace().collect();
        assert!(matches!(values[..], [a, b] if a == b), "{said}");
    }
    while let Some(done) = calls.join_next().await {
        let (status, expected, number) = done.unwrap();
        assert_eq!(status, expected, "{number}");
    }
    let envs = envs(&daemon, "t0").await.unwrap();
    assert_eq!(envs["A"], envs["B"]);
    assert!(!envs.contains_key("FORGED"));
    // The newest timestamp among the good ones is that of second 53 and the like: no older one came
    // after it.
    let newest = (0..1000_u32).filter(|n| n % 10 < 4).map(|n| n % 60).max().unwrap();
    assert_eq!(envs["A"].parse::<u32>().unwrap() % 60, newest);
}
