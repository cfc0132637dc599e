//! The blocks of code in README.md are run: here, in `tests/sdk.rs` (Python, JavaScript, E2B's CLI) and in
//! `scripts/grpcurl-session.sh`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

use common::{Daemon, able, readme};

/// Where blocks are run, by a text that marks them.
const RUN_BY: [(&str, &str, &str); 7] = [
    ("sh", "cargo run --release", "CI builds the release binary and runs the tests"),
    ("python", "from e2b import", "tests/sdk.rs"),
    ("js", "from \"e2b\"", "tests/sdk.rs"),
    ("sh", "npx e2b", "tests/sdk.rs"),
    ("sh", "grpcurl -plaintext", "scripts/grpcurl-session.sh"),
    ("sh", "curl -i", "here"),
    ("sh", "envd --listen", "here"),
];

#[test]
fn every_block_is_run_somewhere() {
    for block in readme::blocks() {
        let by = RUN_BY
            .iter()
            .filter(|(language, part, _)| block.language == *language && block.text.contains(part));
        assert_eq!(by.count(), 1, "a block of README.md that nothing runs:\n{}", block.text);
    }
}

#[test]
fn the_requests_of_curl() {
    if !able("curl", Command::new("curl").arg("--version").output().is_ok()) {
        return;
    }
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hostname");
    std::fs::write(&file, "a file\n").unwrap();
    let text = readme::block("curl -i").text;
    assert_eq!(text.matches("localhost:49983").count(), 3, "{text}");
    // Not every machine has this file.
    let script = text
        .replace("localhost:49983", &daemon.tcp())
        .replace("/etc/hostname", &file.display().to_string());
    let output = Command::new("sh").args(["-euc", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let output = String::from_utf8(output.stdout).unwrap();
    assert!(output.starts_with("HTTP/1.1 204 No Content\r\n"), "{output}");
    assert!(output.ends_with("\r\n\r\n{}a file\n"), "{output}");
}

#[test]
fn the_command_line_for_images() {
    let text = readme::block("envd --listen").text;
    let line = text
        .replacen("envd ", &format!("exec {} ", env!("CARGO_BIN_EXE_envd")), 1)
        .replace("tcp://0.0.0.0:49983", "tcp://127.0.0.1:0")
        .replace("--default-user user", &format!("--default-user {}", common::me().name))
        // The usual port is a guest's own daemon's.
        .replace("vsock://49983", &format!("vsock://{}", 200_000 + std::process::id()));
    assert!(line.contains("127.0.0.1:0") && line.contains("vsock://2"), "{line}");
    let line = format!("{} --no-clock --mmds=none", line.trim_end());
    let daemon = Daemon::spawn(Command::new("sh").args(["-euc", &line]));
    assert!(daemon.addresses().iter().any(|address| address.starts_with("tcp://")));
}
