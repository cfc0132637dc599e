//! Callers that the kernel vouches for: over vsock the host is context 2, whatever it says.
//!
//! Daemons that know no token and are closed without one run beside the guest's own, as its
//! commands; the first answers of each tell whom it lets in.

use std::path::PathBuf;

use envd::proto::process::{
    ListRequest, ListResponse, SendSignalRequest, SendSignalResponse,
    process_event::{Event, data_event::Output},
};

use crate::{
    checks::{events, next, of, root, sh, start},
    common::rpc::{Client, WIRES, Wire},
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
        let tcp = format!("tcp://127.0.0.1:{port}");
        let own = format!("vsock://{port}");
        let args = ["--listen", &tcp, "--listen", &own, "--require-token", "--trust-cid", cid];
        let apart = ["-isnotfc", "-no-cgroups", "--no-clock", "--mmds=none"];
        let client = root(address, Wire::Grpc);
        let daemon = start("envd", &[&args[..], &apart[..]].concat());
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

        let request = SendSignalRequest { process: of(pid), signal: 15, ..Default::default() };
        let _: SendSignalResponse =
            client.unary("/process.Process/SendSignal", &request).await.unwrap();
        while !matches!(next(&mut running).await, Event::End(_)) {}
    }
}
