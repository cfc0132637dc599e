//! Callers that the kernel vouches for: over vsock the host is context 2, whatever it says.
//!
//! Daemons that know no token and are closed without one run beside the guest's own, as its
//! commands; the first answers of each tell whom it lets in.

use std::path::{Path, PathBuf};

use envd::proto::process::{
    ListRequest, ListResponse, SendSignalRequest, SendSignalResponse, StartResponse,
    process_event::{Event, data_event::Output},
};

use crate::{
    checks::{self, events, next, of, root, sh, start},
    common::rpc::{Client, Messages, WIRES, Wire},
    forward,
};

/// The vsock port of a daemon that trusts the host.
const TRUSTS_HOST: u16 = 49990;
/// The vsock port of a daemon that trusts another machine.
const TRUSTS_OTHER: u16 = 49991;

const LIST: &str = "/process.Process/List";

/// The host needs no token over vsock where its context is trusted, and needs one where only another
/// is; a TCP peer always does.
pub(crate) async fn by_context(address: &str, vsock: PathBuf) {
    for (port, cid, passes) in [(TRUSTS_HOST, "2", true), (TRUSTS_OTHER, "3", false)] {
        let daemon = Closed::start(address, port, cid).await;
        let host = forward::listen(vsock.clone(), port.into()).await;
        if passes {
            for wire in WIRES {
                let list: ListResponse = Client::at(&host, wire)
                    .unary(LIST, &ListRequest::default())
                    .await
                    .unwrap_or_else(|failure| panic!("{wire:?}: {failure:?}"));
                assert!(list.processes.is_empty(), "{wire:?}: {list:?}");
            }
        } else {
            let http = reqwest::Client::builder().no_proxy().build().unwrap();
            let call = http.post(format!("http://{host}{LIST}")).body("{}");
            let call = call.header("content-type", "application/json").send().await.unwrap();
            assert_eq!(call.status(), 401, "context {cid} alone is trusted");
        }
        let call = format!(
            "curl -s -o /dev/null -w '%{{http_code}}' -H 'content-type: application/json' -d '{{}}' http://127.0.0.1:{port}{LIST}"
        );
        assert_eq!(sh(address, &call).await, "401", "over TCP nobody is trusted");
        daemon.stop().await;
    }
}

/// `examples/vsock.rs` in the guest, over AF_VSOCK and the kernel's loopback (context 1): the
/// guest's own daemon answers it, and one that trusts the host takes nobody in the guest for it.
pub(crate) async fn loopback(address: &str) {
    let kernels = std::env::var_os("ENVD_VM_KERNELS").expect("ENVD_VM_KERNELS is set: use make vm");
    let release = sh(address, "uname -r").await;
    let module = find_module(Path::new(&kernels), &release);
    let examples = std::env::var_os("ENVD_VM_EXAMPLES").expect("ENVD_VM_EXAMPLES: use make vm");
    checks::put(address, &module, "vsock_loopback.ko").await;
    checks::put(address, &Path::new(&examples).join("vsock"), "vsock").await;
    let place = checks::PLACE;
    sh(address, &format!("insmod {place}/vsock_loopback.ko && chmod +x {place}/vsock")).await;

    let own = format!("{place}/vsock 1 49983 sh -c 'echo over vsock; exit 7' || echo $?");
    assert_eq!(sh(address, &own).await, "over vsock\n7");
    let daemon = Closed::start(address, TRUSTS_HOST, "2").await;
    let closed = format!("! {place}/vsock 1 {TRUSTS_HOST} true 2>&1");
    let said = sh(address, &closed).await;
    assert!(said.contains("Unauthenticated"), "{said}");
    daemon.stop().await;

    // The kernel keeps a closed connection, and so the module, for some seconds.
    let unload =
        "for i in $(seq 600); do rmmod vsock_loopback 2>&1 && exit 0; sleep 0.1; done; exit 1";
    sh(address, &format!("rm -r {place}; {unload}")).await;
}

/// The module of that very kernel, among the kernels that images were built with.
fn find_module(kernels: &Path, release: &str) -> PathBuf {
    let inside = format!("lib/modules/{release}/kernel/net/vmw_vsock/vsock_loopback.ko");
    let kernels = std::fs::read_dir(kernels).unwrap();
    let mut modules = kernels.map(|kernel| kernel.unwrap().path().join(&inside));
    modules.find(|module| module.exists()).unwrap_or_else(|| panic!("no kernel has {inside}"))
}

/// A daemon in the guest beside its own, as a command of that one: closed without a token, and
/// knowing none.
struct Closed {
    client: Client,
    pid: u32,
    running: Messages<StartResponse>,
}

impl Closed {
    /// Waits until it is ready on that port, over TCP and over vsock.
    async fn start(address: &str, port: u16, trusted_cid: &str) -> Self {
        let tcp = format!("tcp://127.0.0.1:{port}");
        let own = format!("vsock://{port}");
        let args = ["--listen", &tcp, "--listen", &own, "--require-token"];
        let trust = ["--trust-cid", trusted_cid];
        let apart = ["-isnotfc", "-no-cgroups", "--no-clock", "--mmds=none"];
        let client = root(address, Wire::Grpc);
        let daemon = start("envd", &[&args[..], &trust[..], &apart[..]].concat());
        let (pid, mut running) = events(&client, &daemon).await;
        let mut log = String::new();
        while !log.contains("\"message\":\"ready\"") {
            match next(&mut running).await {
                Event::Data(data) => match data.output.unwrap() {
                    Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => {
                        log.push_str(&String::from_utf8_lossy(&bytes));
                    }
                },
                Event::Keepalive(_) => {}
                other => panic!("after {log} came {other:?}"),
            }
        }
        Self { client, pid, running }
    }

    async fn stop(mut self) {
        let request = SendSignalRequest { process: of(self.pid), signal: 15, ..Default::default() };
        let _: SendSignalResponse =
            self.client.unary("/process.Process/SendSignal", &request).await.unwrap();
        while !matches!(next(&mut self.running).await, Event::End(_)) {}
    }
}
