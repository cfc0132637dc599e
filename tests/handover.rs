//! Started in place of another daemon (`-resume-handover`): what the answer to `/init` says of it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, path::Path, process::Command};

use common::{
    Daemon,
    process::{With, start, stdout},
    rpc::{Client, Wire},
    soon,
};
use serde_json::{Value, json};

/// What envd 0.6.13 has written: two processes, two endings, one watcher.
const GOLDEN: &[u8] = include_bytes!("data/handover-0.6.13.pb");

fn daemon(root: &Path, blob: Option<&[u8]>) -> Daemon {
    let place = root.join("run/e2b");
    fs::create_dir_all(&place).unwrap();
    if let Some(blob) = blob {
        fs::write(place.join("envd-handover.pb"), blob).unwrap();
    }
    let root = root.to_str().unwrap();
    // In a chain of upgrades the flag is repeated.
    let flags = ["-isnotfc", "--no-clock", "--guest-root", root];
    Daemon::start(&[&flags[..], &["-resume-handover", "--resume-handover"]].concat())
}

/// The status of `/init` with this body, and the header.
async fn init(daemon: &Daemon, body: &str) -> (u16, Option<Value>) {
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = http.post(daemon.url("/init")).body(body.to_owned());
    let response = soon("an answer", request.send()).await.unwrap();
    let header = response.headers().get("x-envd-handover");
    let header = header.map(|value| serde_json::from_slice(value.as_bytes()).unwrap());
    (response.status().as_u16(), header)
}

fn report(failed: bool, procs: u32, retained: u32, watchers: u32) -> Value {
    json!({
        "failed": failed,
        "procs": procs,
        "procs_failed": procs,
        "retained": retained,
        "retained_failed": retained,
        "watchers": watchers,
        "watchers_failed": watchers,
    })
}

#[tokio::test]
async fn every_answer_to_init_says_how_the_hand_over_went() {
    let newer = [&[8, 4], &GOLDEN[2..]].concat();
    for (blob, expected) in [
        (None, report(false, 0, 0, 0)),
        (Some(GOLDEN), report(true, 2, 2, 1)),
        (Some(&GOLDEN[..100]), report(true, 0, 0, 0)),
        (Some(&newer[..]), report(true, 0, 0, 0)),
    ] {
        let root = tempfile::tempdir().unwrap();
        let daemon = daemon(root.path(), blob);
        assert_eq!(init(&daemon, "{").await, (400, Some(expected.clone())));
        assert_eq!(init(&daemon, "{}").await, (204, Some(expected.clone())));
        assert_eq!(init(&daemon, "").await, (204, Some(expected)));
        assert!(!root.path().join("run/e2b/envd-handover.pb").exists(), "it is removed");
    }
    assert_eq!(init(&Daemon::start(&["-isnotfc", "--no-clock"]), "").await, (204, None));
}

#[tokio::test]
async fn defaults_are_all_that_is_taken_over() {
    // Schema 3, and the field `defaults` with the working directory `/usr`.
    let blob = b"\x08\x03\x4a\x08\x12\x04/usr\x18\x01";
    let root = tempfile::tempdir().unwrap();
    let daemon = daemon(root.path(), Some(blob));
    assert_eq!(init(&daemon, "").await, (204, Some(report(false, 0, 0, 0))));
    let client = Client::new(&daemon, Wire::Grpc);
    assert_eq!(stdout(&client, &start("pwd", &[]).cwd(None)).await, "/usr\n");
}

#[test]
fn descriptors_of_the_daemon_before_are_closed() {
    let is_open = |daemon: &Daemon| Path::new(&format!("/proc/{}/fd/205", daemon.pid())).exists();
    for (flag, expected) in [(&["-resume-handover"][..], false), (&[], true)] {
        let listen = [&["--listen", "tcp://127.0.0.1:0", "-isnotfc"][..], flag].concat();
        let envd = Daemon::command(&listen);
        let mut command = Command::new("bash");
        command.args(["-c", "exec 205</dev/null; exec \"$@\"", "bash"]);
        command.arg(envd.get_program()).args(envd.get_args());
        assert_eq!(is_open(&Daemon::spawn(&mut command)), expected);
    }
}
