//! `GET /health`: whether the template is ready. `GET /livez`: whether the daemon lives.
//!
//! Both go the way of every call, so what they say is true of the others too.

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use super::{NO_STORE, Shared};
use crate::{api::timestamp, proto::Timestamp};

/// Why the sandbox is not healthy.
#[derive(Debug, Serialize)]
struct Unhealthy {
    state: &'static str,
    since: Timestamp,
    attempts: u32,
    last_error: Option<String>,
}

/// Alive: a call comes through to here, and the pools that calls go through run what they are given.
/// It says nothing of the template.
pub(super) async fn livez(State(sandbox): Shared) -> Response {
    match sandbox.dead_pool().await {
        None => no_content(),
        Some(pool) => {
            tracing::error!(pool, "not alive: no thread of the pool returns from its call");
            let text = format!("no thread of the pool '{pool}' returns from its call\n");
            let headers = [(header::CACHE_CONTROL, NO_STORE)];
            (StatusCode::SERVICE_UNAVAILABLE, headers, text).into_response()
        }
    }
}

fn no_content() -> Response {
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, NO_STORE)]).into_response()
}

/// 204 as upstream's, once the template is ready.
pub(super) async fn health(State(sandbox): Shared) -> Response {
    if sandbox.template.is_healthy() {
        return no_content();
    }
    let status = sandbox.template.status();
    let unhealthy = Unhealthy {
        state: status.state.name(),
        since: timestamp(status.since),
        attempts: status.attempts,
        last_error: status.last_error,
    };
    // Strings and numbers always serialise.
    let mut text = serde_json::to_string(&unhealthy).unwrap_or_default();
    text.push('\n');
    let json = HeaderValue::from_static("application/json");
    let headers = [(header::CONTENT_TYPE, json), (header::CACHE_CONTROL, NO_STORE)];
    (StatusCode::SERVICE_UNAVAILABLE, headers, text).into_response()
}
