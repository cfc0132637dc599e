//! envd in a real guest: its own kernel, its own PID 1, a real cgroup v2, called over vsock and TCP.
//!
//! `make vm` builds what is needed and runs this; by hand:
//!
//! ```sh
//! scripts/vm.sh [SCENARIO...]     # systemd, openrc, pid1, handover, minimal, containers, boots, inside
//! ```
//!
//! Not part of `cargo test`, and without libtest: one boot serves many checks. The guest runs under
//! QEMU; its vsock device is served by vhost-device-vsock, in whose unix socket a host connects as
//! it does with Firecracker's. Everything lives in one temporary directory a boot and dies with
//! this process. The console of a guest whose check failed is printed.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr
)]

#[path = "../common/mod.rs"]
mod common;

mod checks;
mod container;
mod forward;
mod guest;
mod inside;
mod report;
mod trees;
mod trust;

use std::{process::ExitCode, time::Duration};

use checks::Crowd;
use guest::{Disk, Guest, Kind};
use report::Report;

/// Boots in a row that must all answer, unless ENVD_VM_BOOTS says how many.
const BOOTS: usize = 10;
/// Processes that a guest must cope with.
const CROWD: Crowd = Crowd { managed: 1000, parents: 100 };

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let all = ["systemd", "openrc", "pid1", "handover", "minimal", "containers", "boots", "inside"];
    let unknown: Vec<_> = wanted.iter().filter(|name| !all.contains(&name.as_str())).collect();
    assert!(unknown.is_empty(), "no such scenarios: {unknown:?}; there are {all:?}");
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|one| one == name);

    let mut report = Report::default();
    for kind in [Kind::Systemd, Kind::Openrc, Kind::Pid1, Kind::Handover] {
        if wants(kind.name()) {
            with_guest(&mut report, kind).await;
        }
    }
    if wants("minimal") {
        minimal(&mut report).await;
    }
    if wants("containers") {
        container::run(&mut report).await;
    }
    if wants("boots") {
        boots(&mut report, Kind::Systemd).await;
        boots(&mut report, Kind::Pid1).await;
    }
    if wants("inside") {
        inside::run(&mut report).await;
    }
    report.print();
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What envd is there for, in every protocol; anywhere with a Debian.
async fn main_job(report: &mut Report, place: &str, address: &str) {
    let at = |check: &str| format!("{place}: {check}");
    report.check(&at("a command in every protocol"), checks::commands(address)).await;
    report.check(&at("random bytes through cat"), checks::cat(address)).await;
    report.check(&at("a terminal"), checks::terminal(address)).await;
    report.check(&at("files"), checks::files(address)).await;
    report.check(&at("a watch"), checks::watch(address)).await;
    report.check(&at("the Python SDK"), checks::python_sdk(address)).await;
}

/// One boot, all checks over both transports, then an orderly power-off.
async fn with_guest(report: &mut Report, kind: Kind) {
    let name = kind.name();
    let boot = Guest::boot(kind, Disk::Copy);
    let Some(mut guest) = report.check(&format!("{name}: boots and answers"), boot).await else {
        return;
    };
    report.note(format!("{name}: {}", guest.timings()));
    let failed_before = report.failed();
    for (transport, address) in [("tcp", guest.tcp()), ("vsock", guest.vsock())] {
        main_job(report, &format!("{name}: {transport}"), &address).await;
    }
    let address = guest.tcp();
    let address = address.as_str();
    let own = |check: &str| format!("{name}: {check}");
    if kind == Kind::Handover {
        report.check(&own("systemd is PID 1"), checks::handed_over(address)).await;
    }
    report.check(&own("the user and sudo"), checks::user(address)).await;
    report.check(&own("the daemon is protected"), checks::protected(address, kind)).await;
    report.check(&own("cgroup v2 with controllers"), checks::cgroups(address)).await;
    let console = guest.console_text();
    let groups = trees::groups(address, kind, &console);
    if let Some(said) = report.check(&own("a command has its control group"), groups).await {
        println!("    {said}");
    }
    if kind == Kind::Systemd {
        let trust = trust::by_context(address, guest.vsock_socket());
        report.check(&own("vsock: whom a daemon trusts"), trust).await;
        let loopback = trust::loopback(address);
        report.check(&own("vsock: the kernel's own loopback"), loopback).await;
    }
    // One guest for each kind of base; and of PID 1, which reaps: systemd, and envd.
    if matches!(kind, Kind::Systemd | Kind::Pid1) {
        let idle = trees::Answers::of(address);
        let idle = report.check(&own("/health while nothing runs"), idle).await;
        let hog = trees::memory_hog(address);
        let hog = report.check(&own("a memory hog inside its limit"), hog).await;
        let bomb = trees::fork_bomb(address);
        let bomb = report.check(&own("a fork bomb inside its limit"), bomb).await;
        for (beside, answers) in [("nothing", idle), ("memory hogs", hog), ("a fork bomb", bomb)] {
            let Some(answers) = answers else { continue };
            println!("    {name}: /health beside {beside}: {answers}");
        }
        report.check(&own("orphans and statuses"), checks::orphans(address, CROWD)).await;
    }
    let socket = guest.vsock_socket();
    let to = [socket.as_os_str(), "49983".as_ref()];
    let example = checks::example("vsock_uds", &to);
    report.check(&own("vsock: the example client"), example).await;
    let replaced = async {
        guest.replace_vsock().await;
        checks::vsock_is_back(&guest.tcp()).await;
        checks::commands(&guest.vsock()).await;
    };
    report.check(&own("vsock: the device goes and comes back"), replaced).await;
    if kind == Kind::Systemd {
        report.check(&own("no unit failed"), checks::units(address)).await;
    }
    // Behind the hand-over nobody does it, as embedding.md says.
    if kind != Kind::Handover {
        report
            .check(&own("a daemon that dies is started again"), checks::restarted(address, kind))
            .await;
    }
    if report.failed() > failed_before {
        guest.print_console();
    }
    if report.check(&own("powers off in order"), guest.power_off()).await.is_none() {
        guest.print_console();
    }
    report.check(&own("the file system is clean"), async { guest.assert_clean() }).await;
}

/// Nothing but envd, the kernel's modules and one static program.
async fn minimal(report: &mut Report) {
    let boot = Guest::boot(Kind::Minimal, Disk::None);
    let Some(mut guest) = report.check("minimal: boots and answers", boot).await else { return };
    report.note(format!("minimal: {}", guest.timings()));
    let failed_before = report.failed();
    let address = guest.vsock();
    let program = checks::one_program(&address);
    report.check("minimal: vsock: the one program", program).await;
    let nothing = checks::nothing_else(&address, "/etc/envd/modules");
    report.check("minimal: vsock: what is not there", nothing).await;
    report.check("minimal: powers off in order", guest.power_off()).await;
    if report.failed() > failed_before {
        guest.print_console();
    }
}

async fn boots(report: &mut Report, kind: Kind) {
    let name = kind.name();
    let mut times = Vec::new();
    let boots = match std::env::var("ENVD_VM_BOOTS") {
        Ok(text) => text.parse().expect("ENVD_VM_BOOTS is a number"),
        Err(_) => BOOTS,
    };
    for boot in 1..=boots {
        let check = async {
            let guest = Guest::boot(kind, Disk::Snapshot).await;
            checks::hello(&guest.vsock()).await;
            checks::hello(&guest.tcp()).await;
            guest.answered()
        };
        let title = format!("boots: {name}: boot {boot} of {boots} answers");
        times.extend(report.check(&title, check).await);
    }
    for (transport, pick) in [("vsock", 0), ("tcp", 1)] {
        let mut of: Vec<Duration> =
            times.iter().map(|(v, t)| if pick == 0 { *v } else { *t }).collect();
        of.sort();
        if let (Some(min), Some(med), Some(max)) = (of.first(), of.get(of.len() / 2), of.last()) {
            report.note(format!(
                "{name}: start of the machine to first answer over {transport}: {:.2}/{:.2}/{:.2} s (min/median/max of {})",
                min.as_secs_f32(),
                med.as_secs_f32(),
                max.as_secs_f32(),
                of.len()
            ));
        }
    }
}
