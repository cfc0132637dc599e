//! envd as the first process of a container, run by Podman: Debian from the Dockerfile of
//! `make image`, and nothing but envd and one static program.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::{
    checks::{self, Crowd},
    common::in_time,
    guest::{Kind, free_port},
    report::Report,
};

/// Where the container sees the directory that it shares with the host.
const SHARED: &str = "/run/envd";
/// What an engine's default limits leave room for.
const CROWD: Crowd = Crowd { managed: 100, parents: 10 };

/// Both images, or a word about what this machine lacks for them.
pub(crate) async fn run(report: &mut Report) {
    let podman = match std::env::var("ENVD_VM_NO_CONTAINERS") {
        Ok(why) => return report.skip("containers", &why),
        Err(_) => PathBuf::from(std::env::var_os("ENVD_VM_PODMAN").expect("use make vm")),
    };
    debian(report, &podman).await;
    scratch(report, &podman).await;
}

async fn debian(report: &mut Report, podman: &Path) {
    let at = |check: &str| format!("containers: Debian: {check}");
    let failed_before = report.failed();
    let own = ["-isnotfc", "--default-user", "user"];
    let listeners = ["--listen", "tcp://0.0.0.0:49983", "--listen", "unix:///run/envd/envd.sock"];
    let start = async { Container::run(podman, "debian", &[&own[..], &listeners[..]].concat()) };
    let Some(container) = report.check(&at("starts"), start).await else { return };
    let address = container.address.as_str();
    report.check(&at("answers"), answers(address)).await;
    crate::main_job(report, "containers: Debian", address).await;
    report.check(&at("the user and sudo"), checks::user(address)).await;
    report.check(&at("orphans and statuses"), checks::orphans(address, CROWD)).await;
    let socket = container.shared.path().join("envd.sock");
    let to = [socket.as_os_str()];
    let example = checks::example("unix", &to);
    report.check(&at("a unix socket: the example client"), example).await;
    let restarted = checks::restarted(address, Kind::Pid1);
    report.check(&at("a daemon that dies is started again"), restarted).await;
    report.check(&at("stops in order"), async { container.stop() }).await;
    let removed = async { assert!(!socket.exists(), "{} is left", socket.display()) };
    report.check(&at("the unix socket is removed"), removed).await;
    container.print_log_if(report.failed() > failed_before);
}

async fn scratch(report: &mut Report, podman: &Path) {
    let at = |check: &str| format!("containers: scratch: {check}");
    let failed_before = report.failed();
    let start = async { Container::run(podman, "scratch", &[]) };
    let Some(container) = report.check(&at("starts"), start).await else { return };
    let address = container.address.as_str();
    report.check(&at("answers"), answers(address)).await;
    let program = checks::one_program(address);
    report.check(&at("the one program"), program).await;
    let nothing = checks::nothing_else(address, "/etc/passwd");
    report.check(&at("what is not there"), nothing).await;
    report.check(&at("files"), checks::files(address)).await;
    report.check(&at("stops in order"), async { container.stop() }).await;
    container.print_log_if(report.failed() > failed_before);
}

async fn answers(address: &str) {
    let health = in_time("it answers", async || checks::health(address).await.ok()).await;
    assert_eq!(health.status(), 204);
}

/// A container, removed on drop.
struct Container {
    podman: PathBuf,
    name: String,
    /// `HOST:PORT` that leads to envd.
    address: String,
    /// What the container has as [`SHARED`].
    shared: TempDir,
}

impl Container {
    /// Runs an image of `scripts/vm.sh`.
    fn run(podman: &Path, image: &str, arguments: &[&str]) -> Self {
        let port = free_port();
        let container = Self {
            podman: podman.to_owned(),
            name: format!("envd-{image}-{port}"),
            address: format!("127.0.0.1:{port}"),
            shared: tempfile::tempdir().unwrap(),
        };
        let publish = format!("127.0.0.1:{port}:49983");
        let volume = format!("{}:{SHARED}", container.shared.path().display());
        let image = format!("localhost/envd-{image}");
        let mut line = vec!["run", "-d", "--name", &container.name, "-p", &publish, "-v", &volume];
        line.push(&image);
        line.extend(arguments);
        container.podman(&line);
        container
    }

    /// The engine asks, and envd powers off: with 0, before the engine would kill it.
    fn stop(&self) {
        self.podman(&["stop", "--time", "60", &self.name]);
        let state = self.podman(&[
            "inspect",
            "--format",
            "{{.State.Status}} {{.State.ExitCode}}",
            &self.name,
        ]);
        assert_eq!(String::from_utf8_lossy(&state.stdout).trim(), "exited 0");
    }

    fn podman(&self, line: &[&str]) -> Output {
        let output = Command::new(&self.podman).args(line).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn print_log_if(&self, failed: bool) {
        if failed {
            let log = self.podman(&["logs", &self.name]);
            println!("--- log of {}", self.name);
            println!(
                "{}{}",
                String::from_utf8_lossy(&log.stdout),
                String::from_utf8_lossy(&log.stderr)
            );
            println!("---");
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let mut remove = Command::new(&self.podman);
        let _ = remove.args(["rm", "-f", "--time", "0", &self.name]).output();
    }
}
