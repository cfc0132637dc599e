//! Runs the Go program in `tests/clients/`: connect-go and grpc-go, over HTTP/1.1 and HTTP/2.
//!
//! Where Go or the network is missing the test says so and passes, unless `CI=true` is set.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
};

use common::{Daemon, able};

/// Runs a command to its end; its output, as the error when it fails.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

#[test]
fn connect_go_and_grpc_go() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-clients");
    let mut build = Command::new("go");
    build.arg("build").arg("-o").arg(&program).arg(".");
    if let Err(reason) = output(build.current_dir(sources.join("tests/clients"))) {
        able(&format!("Go and the modules of tests/clients: {reason}"), false);
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut clients = Command::new(program);
    clients.arg("-address").arg(daemon.tcp()).arg("-protos").arg(sources.join("proto"));
    // Each client of the program has a deadline of its own.
    let said = output(&mut clients).unwrap_or_else(|said| panic!("{said}"));
    for client in ["gRPC over HTTP/1.1", "gRPC over HTTP/2", "grpc-go over HTTP/2"] {
        assert!(
            said.lines().any(|line| line.starts_with("ok: ") && line.ends_with(client)),
            "{said}"
        );
    }
}
