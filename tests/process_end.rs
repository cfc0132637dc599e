//! When the end of a process is reported: after the output of those who still work for it, and without
//! waiting for those who only live on.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{
    Daemon, eventually,
    process::{begin, kill, run, sh, start, state},
    rpc::{Client, Wire},
};
use envd::proto::process::StartRequest;
use nix::{sys::signal, unistd::Pid};
use serde_json::Value;

/// Longer than a test waits.
const FOREVER: &str = "3600000";

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

fn bash(script: &str) -> StartRequest {
    start("/bin/bash", &["-c", script])
}

fn kill_stranger(pid: &str) {
    signal::kill(Pid::from_raw(pid.trim().parse().unwrap()), signal::Signal::SIGKILL).unwrap();
}

fn warnings(daemon: &Daemon, message: &str) -> usize {
    let is_one = |line: &&Value| {
        line["level"] == "WARN"
            && line["message"].as_str().is_some_and(|text| text.contains(message))
    };
    daemon.log().iter().filter(is_one).count()
}

#[tokio::test]
async fn output_behind_a_slow_filter_comes_before_the_end() {
    for args in [&["--drain-limit", FOREVER][..], &["--drain-limit", FOREVER, "-no-cgroups"]] {
        let daemon = Daemon::start(args);
        let client = client(&daemon);
        // Nothing is written while it sorts, which takes longer than the grace.
        let sorted = bash("seq 3000000 > >(sort -n | tail -1)");
        let lines = bash("exec > >(while read l; do sleep .1; echo \"$l\"; done); seq 5");
        for (request, expected) in [(sorted, "3000000\n"), (lines, "1\n2\n3\n4\n5\n")] {
            let (said, end) = run(&client, &request).await;
            assert_eq!((said.stdout(), end.exit_code), (expected, 0), "{args:?}");
            assert!(!end.output_open && !end.output_truncated, "{end:?}");
        }
    }
}

#[tokio::test]
async fn a_silent_and_idle_background_process_is_not_waited_for() {
    // It would be waited for longer than this test, if it were taken for one that works.
    let daemon = Daemon::start(&["--drain-limit", FOREVER]);
    let client = client(&daemon);
    let (said, end) = run(&client, &sh("sleep 1000 & echo $!; exit 4")).await;
    kill_stranger(said.stdout());
    assert_eq!(end.exit_code, 4);
    assert!(end.output_open && !end.output_truncated, "{end:?}");
    let (said, end) = run(&client, &sh("sleep 1000 >/dev/null 2>&1 & echo $! >&2; exit 5")).await;
    kill_stranger(said.stderr());
    assert!(!end.output_open && !end.output_truncated, "{end:?}");
    assert_eq!(warnings(&daemon, "output"), 0);
}

#[tokio::test]
async fn output_that_was_cut_is_marked() {
    for (args, script) in [
        (&["--drain-limit", "600"][..], "(while :; do echo y; sleep .05; done) & echo $!"),
        (&["--drain-limit", "600"][..], "(while :; do :; done) & echo $!"),
        (&["--drain-limit", "600", "-no-cgroups"][..], "(while :; do :; done) & echo $!"),
    ] {
        let daemon = Daemon::start(args);
        let (said, end) = run(&client(&daemon), &bash(script)).await;
        kill_stranger(said.stdout().lines().find(|line| *line != "y").unwrap());
        assert!(end.output_open && end.output_truncated, "{script}: {end:?}");
        eventually("it is logged", || (warnings(&daemon, "is cut") == 1).then_some(()));
    }
}

#[tokio::test]
async fn output_after_the_end_is_logged_and_kept() {
    let daemon = Daemon::start(&["--drain-grace", "0", "--drain-limit", "0"]);
    let dir = tempfile::tempdir().unwrap();
    let go = dir.path().join("go");
    let script =
        format!("(until [ -e {} ]; do sleep .05; done; echo late) & echo first", go.display());
    let client = client(&daemon);
    let (said, end) = run(&client, &bash(&script)).await;
    assert_eq!(said.stdout(), "first\n");
    assert!(end.output_open, "{end:?}");
    assert_eq!(warnings(&daemon, "after the end"), 0);
    std::fs::write(go, "").unwrap();
    eventually("the late output is logged", || {
        (warnings(&daemon, "after the end") == 1).then_some(())
    });
}

#[tokio::test]
async fn after_a_kill_nobody_is_waited_for() {
    let daemon = Daemon::start(&["--drain-grace", "60000", "--drain-limit", FOREVER]);
    let client = client(&daemon);
    let script = "(while :; do echo y; done) & echo $! >&2; wait";
    let mut running = begin(&client, &bash(script)).await;
    running.until(|said| said.stderr.ends_with(b"\n") && !said.stdout.is_empty()).await;
    kill(&client, running.pid).await;
    let (said, end) = running.end().await;
    assert_eq!(end.status, "signal: killed");
    assert!(end.output_open && !end.output_truncated, "{end:?}");
    let child = said.stderr().trim().to_owned();
    assert!(state(child.parse().unwrap()).is_some_and(|state| state != 'Z'));
    kill_stranger(&child);
}

#[tokio::test]
async fn the_peak_of_memory_is_never_the_daemons_own() {
    let daemon = Daemon::start(&["-no-cgroups"]);
    let client = client(&daemon);
    let (_, end) = run(&client, &start("echo", &["hi"])).await;
    assert_eq!(end.usage.unwrap().memory_peak_bytes, 0);
}
