//! TLS on TCP listeners, as curl sees it; with the cargo feature `tls`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use common::{Daemon, able};

/// Runs openssl, which is silent when it works.
fn openssl(dir: &Path, args: &str) {
    let output =
        Command::new("openssl").args(args.split_whitespace()).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, a server and a client that it has signed, and a client that it has not.
fn certificates(dir: &Path) {
    let new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(dir, &format!("req -x509 {new} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca"));
    openssl(
        dir,
        &format!("req -x509 {new} -keyout other.key -out other.pem -days 2 -subj /CN=other"),
    );
    fs::write(dir.join("ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1").unwrap();
    for name in ["server", "client"] {
        openssl(dir, &format!("req {new} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        openssl(
            dir,
            &format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem \
                 -days 2 -extfile ext"
            ),
        );
    }
}

/// curl's exit code, and the status and HTTP version that it saw.
fn curl(dir: &Path, args: &[&str], url: &str) -> (Option<i32>, String) {
    let output = Command::new("curl")
        .args(["-s", "-o", "/dev/null", "-w", "%{http_code} %{http_version}", "--noproxy", "*"])
        .args(["--cacert", "ca.pem", "--max-time", "30"])
        .args(args)
        .arg(url)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

fn can_run() -> bool {
    let there = ["openssl", "curl"].iter().all(|tool| {
        let version = if *tool == "openssl" { "version" } else { "--version" };
        Command::new(tool).arg(version).output().is_ok()
    });
    able("openssl and curl", there)
}

fn url(daemon: &Daemon, path: &str) -> String {
    let address = daemon.addresses().iter().find_map(|address| address.strip_prefix("tls://"));
    format!("https://{}{path}", address.unwrap())
}

#[test]
fn http_1_and_2_over_tls_and_nothing_else() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let at = dir.path().display();
    let listen = format!("tls://127.0.0.1:0?cert={at}/server.pem&key={at}/server.key");
    let daemon = Daemon::start_with(&["--listen", &listen]);
    let health = url(&daemon, "/health");
    assert_eq!(curl(dir.path(), &["--http1.1"], &health), (Some(0), "204 1.1".to_owned()));
    assert_eq!(curl(dir.path(), &["--http2"], &health), (Some(0), "204 2".to_owned()));
    let plain = health.replace("https", "http");
    assert_ne!(curl(dir.path(), &["--http1.1"], &plain).0, Some(0));
    assert_eq!(curl(dir.path(), &["--http2"], &health), (Some(0), "204 2".to_owned()));
}

#[test]
fn a_client_without_the_right_certificate_gets_no_connection_and_one_with_it_can_be_trusted() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    fs::write(dir.path().join("token"), "a-token").unwrap();
    let at = dir.path().display();
    let listen =
        format!("tls://127.0.0.1:0?cert={at}/server.pem&key={at}/server.key&client_ca={at}/ca.pem");
    let token = format!("--access-token-file={at}/token");
    let client = ["--cert", "client.pem", "--key", "client.key"];
    for (trust, status) in [(&[][..], "401 2"), (&["--trust-certificates"][..], "200 2")] {
        let mut args = vec!["--listen", listen.as_str(), token.as_str()];
        args.extend(trust);
        let daemon = Daemon::start_with(&args);
        let envs = url(&daemon, "/envs");
        assert_eq!(curl(dir.path(), &client, &envs), (Some(0), status.to_owned()));
        for wrong in [&[][..], &["--cert", "other.pem", "--key", "other.key"]] {
            let (code, seen) = curl(dir.path(), wrong, &envs);
            assert_ne!(code, Some(0), "{wrong:?}");
            assert!(seen.starts_with("000"), "{seen}");
        }
    }
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("empty"), "").unwrap();
    let at = dir.path().display();
    for (cert, key) in [("none", "none"), ("empty", "empty")] {
        let listen = format!("tls://127.0.0.1:0?cert={at}/{cert}&key={at}/{key}");
        let output = Daemon::command(&["--listen", &listen]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(&format!("{at}/")), "{said}");
    }
}
