//! `GET /envs`: the variables that every process gets. E2B's code interpreter asks for them.

use std::collections::BTreeMap;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, header};

use super::{NO_STORE, Shared};
use crate::wire::error;

pub(super) async fn envs(State(sandbox): Shared) -> Response {
    let defaults = sandbox.defaults.get();
    let env: BTreeMap<_, _> = defaults.env().collect();
    // Maps of strings always serialise.
    let mut text = error::without_html(serde_json::to_string(&env).unwrap_or_default());
    text.push('\n');
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json), (header::CACHE_CONTROL, NO_STORE)], text).into_response()
}
