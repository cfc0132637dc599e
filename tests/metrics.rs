//! What the machine uses, in JSON and for Prometheus.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Daemon, soon};
use serde_json::Value;

async fn get(daemon: &Daemon, path: &str) -> reqwest::Response {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    soon(path, client.get(daemon.url(path)).send()).await.unwrap()
}

#[tokio::test]
async fn upstreams_json_in_its_order() {
    let daemon = Daemon::start(&[]);
    let response = get(&daemon, "/metrics").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.headers()["cache-control"], "no-store");
    let text = response.text().await.unwrap();
    let names = [
        "ts",
        "cpu_count",
        "cpu_used_pct",
        "mem_total_mib",
        "mem_used_mib",
        "mem_total",
        "mem_used",
        "mem_cache",
        "disk_used",
        "disk_total",
    ];
    let mut rest = text.as_str();
    for name in names {
        let key = format!("\"{name}\":");
        let at = rest.find(&key).unwrap_or_else(|| panic!("{name} is not next in {rest}"));
        rest = &rest[at + key.len()..];
    }
    let figures: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(figures.as_object().unwrap().len(), names.len());
    let figure = |name: &str| figures[name].as_f64().unwrap();
    assert!((0.0..=100.0).contains(&figure("cpu_used_pct")));
    assert!(figure("cpu_count") >= 1.0);
    assert!(figure("mem_used") < figure("mem_total"));
    assert!(figure("disk_used") <= figure("disk_total"));
    assert_eq!(
        figures["mem_total"].as_u64().unwrap() >> 20,
        figures["mem_total_mib"].as_u64().unwrap()
    );
}

#[tokio::test]
async fn prometheus_text() {
    let daemon = Daemon::start(&[]);
    let response = get(&daemon, "/metrics/prometheus").await;
    assert_eq!(response.status(), 200);
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let text = response.text().await.unwrap();
    assert!(text.contains("\nenvd_processes 0\n"), "{text}");
    assert!(text.contains("envd_build_info{version="), "{text}");
}
