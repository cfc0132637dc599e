//! `GET /metrics`, upstream's JSON, and `GET /metrics/prometheus`, the same and the daemon's own
//! figures in Prometheus' text format (version 0.0.4).

use std::{fmt::Display, fmt::Write as _, sync::Arc};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

use super::{NO_STORE, Shared};
use crate::{
    guest::metrics::Metrics,
    sandbox::Sandbox,
    telemetry::{log, rate_limit},
};

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

pub(super) async fn json(State(sandbox): Shared) -> Response {
    match look(&sandbox).await {
        Some(metrics) => {
            // Numbers always serialise.
            let mut text = serde_json::to_string(&metrics).unwrap_or_default();
            text.push('\n');
            ([(header::CONTENT_TYPE, JSON), (header::CACHE_CONTROL, NO_STORE)], text)
                .into_response()
        }
        None => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, JSON)]).into_response(),
    }
}

pub(super) async fn prometheus(State(sandbox): Shared) -> Response {
    let Some(metrics) = look(&sandbox).await else {
        return (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, TEXT)]).into_response();
    };
    let text = exposition(&metrics, sandbox.processes.len());
    ([(header::CONTENT_TYPE, TEXT), (header::CACHE_CONTROL, NO_STORE)], text).into_response()
}

async fn look(sandbox: &Arc<Sandbox>) -> Option<Metrics> {
    let meter = Arc::clone(&sandbox.meter);
    let looked = sandbox.files.run(move || meter.look()).await;
    match looked {
        Ok(Ok(metrics)) => Some(metrics),
        Ok(Err(error)) => {
            tracing::warn!(%error, "no metrics");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "no metrics");
            None
        }
    }
}

fn exposition(metrics: &Metrics, processes: usize) -> String {
    let mut text = String::with_capacity(1024);
    let mut gauge = |name: &str, help: &str, value: &dyn Display| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    };
    gauge("envd_sandbox_cpus", "Processors of the sandbox.", &metrics.cpu_count);
    gauge(
        "envd_sandbox_cpu_used_percent",
        "Share of all processors that was busy since the look before.",
        &metrics.cpu_used_pct,
    );
    gauge("envd_sandbox_memory_bytes", "Memory of the sandbox.", &metrics.mem_total);
    gauge("envd_sandbox_memory_used_bytes", "Memory not available.", &metrics.mem_used);
    gauge("envd_sandbox_memory_cache_bytes", "Memory that caches files.", &metrics.mem_cache);
    gauge("envd_sandbox_disk_bytes", "Size of the root file system.", &metrics.disk_total);
    gauge("envd_sandbox_disk_used_bytes", "Used or reserved of it.", &metrics.disk_used);
    gauge("envd_processes", "Processes that envd started and that run.", &processes);
    let mut counter = |name: &str, help: &str, value: u64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
    };
    counter(
        "envd_log_lines_dropped_total",
        "Log lines that were lost because stderr did not take them.",
        log::dropped_lines(),
    );
    counter(
        "envd_log_lines_suppressed_total",
        "Log lines that were not written because too many of their kind came.",
        rate_limit::suppressed_lines(),
    );
    let version = crate::version::OWN;
    let _ = writeln!(
        text,
        "# HELP envd_build_info The running envd.\n# TYPE envd_build_info gauge\n\
         envd_build_info{{version=\"{version}\"}} 1"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_comment_or_a_sample() {
        let text = exposition(&Metrics { cpu_used_pct: 12.5, ..Metrics::default() }, 3);
        assert!(text.contains("\nenvd_sandbox_cpu_used_percent 12.5\n"), "{text}");
        assert!(text.contains("\nenvd_processes 3\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("envd_"), "{line}");
            value.parse::<f64>().unwrap();
        }
    }
}
