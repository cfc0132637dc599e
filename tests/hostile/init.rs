//! `/init` before the first token: a program of the sandbox, and any other stranger, gets there first.

use std::process::Command;

use serde_json::json;

use super::as_user;
use crate::common::{
    Daemon, able, is_root,
    mmds::Mmds,
    process::{run, sh},
    rpc::{Client, Wire},
};

/// Posts each timestamp that a stranger might try, without a token; says how many were answered.
const STRANGER: &str = r#"
import http.client, json, sys
times = ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59.999999999Z", "2300-01-01T00:00:00+14:00",
         "9999-12-31T23:59:59-23:59"]
bodies = [{"timestamp": time} for time in times]
bodies += [{"TimeStamp": time, "accessToken": None} for time in times]
bodies += [{"timestamp": time, "envVars": {"OWNED": "1"}} for time in times]
answered = 0
for body in bodies:
    for headers in ({}, {"X-Access-Token": "guess"}):
        connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
        connection.request("POST", "/init", json.dumps(body), headers)
        answered += connection.getresponse().status in (204, 400, 401)
print("answered", answered)
"#;

async fn init(daemon: &Daemon, body: serde_json::Value) -> u16 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(daemon.url("/init")).body(body.to_string());
    request.send().await.unwrap().status().as_u16()
}

async fn list(daemon: &Daemon, token: &str) -> u16 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.get(daemon.url("/envs")).header("x-access-token", token);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn no_timestamp_of_a_stranger_keeps_the_hosts_token_out() {
    let nobody = matches!(nix::unistd::User::from_name("nobody"), Ok(Some(_)));
    let python = Command::new("python3").arg("--version").output().is_ok();
    if !able("root, a user nobody and python3", is_root() && nobody && python) {
        return;
    }
    let mmds = Mmds::start();
    let flag = mmds.flag();
    for args in [&[][..], &["--require-token"], &[&flag]] {
        let daemon = Daemon::start(args);
        let script = format!("exec python3 -c '{STRANGER}' {}", daemon.tcp());
        let stranger = if args.contains(&"--require-token") {
            // Nobody can start a command yet; it comes from elsewhere.
            let python = ["-c", STRANGER, &daemon.tcp()];
            let output = Command::new("python3").args(python).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        } else {
            let (request, who) = as_user("nobody", sh(&script));
            let client = Client::new(&daemon, Wire::Grpc).with("authorization", &who);
            let (said, end) = run(&client, &request).await;
            assert_eq!(end.exit_code, 0, "{}", said.stderr());
            said.stdout().to_owned()
        };
        assert_eq!(stranger.trim(), "answered 24", "{args:?}");
        let host = json!({ "timestamp": "2026-01-01T00:00:00Z", "accessToken": "of-the-host" });
        assert_eq!(init(&daemon, host).await, 204, "{args:?}");
        assert_eq!(list(&daemon, "").await, 401, "{args:?}");
        assert_eq!(list(&daemon, "of-the-host").await, 200, "{args:?}");
    }
}
