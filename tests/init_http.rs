//! `POST /init`: who may, what it changes, and that it changes all of it or nothing.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use common::{
    Daemon, eventually, in_time,
    mmds::Mmds,
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
            assert_eq!(told(&daemon, body).await.0, 204);
        }
        // The hash of nothing is not there at all.
        mmds.say("b", hash.map_or("", String::as_str));
        let mut body = json!({ "envVars": { "NEW": "yes" } });
        if let Some(brought) = brought {
            body["accessToken"] = brought.into();
        }
        let case = format!("{stored:?} {brought:?} {hash:?}");
        let (status, text) = told(&daemon, body).await;
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
    raw.send("POST /init HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"accessToken\":\"t\"")
        .await;
    drop(raw);
    assert_eq!(told(&daemon, json!({})).await.0, 204);
}

#[tokio::test]
async fn bodies_of_strangers_wait_in_bounded_memory() {
    let daemon = Daemon::start(&[]);
    let head = |length: usize| {
        format!("POST /init HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n")
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
    let at = |time: &str, value: &str| json!({ "timestamp": time, "envVars": { "V": value } });
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
        assert_eq!(envs(&daemon, "").await.unwrap()["V"], now, "{time}");
    }
    // Without one it always counts.
    assert_eq!(told(&daemon, json!({ "envVars": { "V": "timeless" } })).await.0, 204);
    assert_eq!(envs(&daemon, "").await.unwrap()["V"], "timeless");
    assert_eq!(told(&daemon, at("2026-01-01T00:00:10Z", "stale")).await.0, 204);
    assert_eq!(envs(&daemon, "").await.unwrap()["V"], "timeless");
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

const PEM: &str = "-----BEGIN CERTIFICATE-----\nZmlyc3Q=\n-----END CERTIFICATE-----";

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
    assert_eq!(read(root.path(), bundle), format!("OLD\n{PEM}\n"));
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(read(root.path(), bundle), format!("OLD\n{PEM}\n"));
    let second = PEM.replace("Zmlyc3Q=", "c2Vjb25k");
    let body = json!({ "hyperloopIP": "10.9.9.9", "caBundle": second });
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(read(root.path(), bundle), format!("OLD\n{second}\n"));
    assert_eq!(read(root.path(), "etc/hosts"), hosts.replace("10.1.2.3", "10.9.9.9"));
    // An address that is none is only logged.
    assert_eq!(told(&daemon, json!({ "hyperloopIP": "nowhere" })).await.0, 204);
    assert_eq!(read(root.path(), "etc/hosts"), hosts.replace("10.1.2.3", "10.9.9.9"));
}

#[tokio::test]
async fn what_fails_leaves_everything_as_it_was() {
    let (root, flag) = guest();
    fs::remove_file(root.path().join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    let daemon = Daemon::start(&[&flag]);
    let body = json!({
        "accessToken": "t", "envVars": { "A": "1" }, "defaultUser": "x", "caBundle": PEM,
        "timestamp": "2099-01-01T00:00:00Z",
    });
    let (status, text) = told(&daemon, body.clone()).await;
    assert_eq!(status, 400);
    assert!(text.starts_with("failed to install CA bundle: etc/ssl/certs/"), "{text}");
    assert!(!envs(&daemon, "").await.unwrap().contains_key("A"));
    // Not even the timestamp counts: the host repeats itself, and then it works.
    fs::write(root.path().join("etc/ssl/certs/ca-certificates.crt"), "").unwrap();
    assert_eq!(told(&daemon, body).await.0, 204);
    assert_eq!(envs(&daemon, "t").await.unwrap()["A"], "1");
}

#[tokio::test]
async fn a_volume_that_cannot_be_mounted_is_named_and_nothing_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("volume");
    let daemon = Daemon::start(&[]);
    let body = json!({
        "accessToken": "t",
        "volumeMounts": [{ "nfs_target": "127.0.0.1:/export", "path": place }],
    });
    // The kernel has no NFS, there is no server, or this is not root.
    let (status, text) = told(&daemon, body).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.starts_with("failed to setup NFS volumes: "), "{text}");
    assert!(text.contains(place.to_str().unwrap()) || text.contains("10 s"), "{text}");
    assert!(envs(&daemon, "").await.is_ok(), "no token was set");
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
    assert_eq!(told(&daemon, json!({ "accessToken": "t" })).await.0, 204);
    assert_eq!(mmds.asked(), 2);
    assert_eq!(told(&daemon, json!({ "accessToken": "wrong" })).await.0, 401);
    assert_eq!(mmds.asked(), 3);
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
