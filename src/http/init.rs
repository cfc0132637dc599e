//! `POST /init`: the host tells the sandbox what it is.
//!
//! The body is read as Go reads it: keys in any case, unknown ones ignored, null as absent. What
//! does not parse is 400 without a body, as upstream answers it; what parses and makes no sense is
//! 400 with the field's name.

mod body;

use std::{sync::Arc, time::Duration};

use axum::extract::{Request, State};
use futures_util::StreamExt;
use http::{HeaderValue, Response, StatusCode, header};
use tokio::time::timeout;
use zeroize::Zeroizing;

pub use body::{InitBody, parse};

use super::Shared;
use crate::{
    guest::handover,
    sandbox::Sandbox,
    setup::{self, SetupError},
    version,
    wire::{Body, connection::Inner, cost, gate::Granted},
};

/// The most bytes of a request: certificates and variables.
const MAX_BODY: usize = 4 << 20;
/// The most bytes of an ordinary one. Of larger ones there are few at a time: anybody may send them,
/// and they wait in memory.
const ORDINARY_BODY: usize = 64 << 10;
/// A body grows by doubling.
const BODY_GROWTH: usize = 2;
/// How long it may take to come.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

// What strangers can make wait in memory.
const _: () =
    assert!(setup::MAX_REQUESTS * ORDINARY_BODY + setup::MAX_LARGE * MAX_BODY <= 64 << 20);
const _: () = assert!(setup::KEPT.0 * ORDINARY_BODY + setup::KEPT.1 * MAX_BODY <= 16 << 20);
/// The header with upstream's version, by which hosts decide what this envd can do.
const VERSION_HEADER: &str = "x-envd-version";

pub(super) async fn init(State(sandbox): Shared, request: Request) -> Response<Body> {
    let (status, text) = match answer(&sandbox, request).await {
        Ok(()) => (StatusCode::NO_CONTENT, String::new()),
        Err(refusal) => refusal,
    };
    let mut response = Response::new(Body::from(text.clone()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, HeaderValue::from_static(version::E2B));
    if let Some(taken) = &sandbox.handover
        && let Ok(report) = HeaderValue::try_from(taken.report.to_json())
    {
        headers.insert(handover::HEADER, report);
    }
    if status == StatusCode::NO_CONTENT {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    } else if !text.is_empty() {
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, plain);
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    }
    response
}

async fn answer(sandbox: &Arc<Sandbox>, request: Request) -> Result<(), (StatusCode, String)> {
    let bad = || (StatusCode::BAD_REQUEST, String::new());
    // The header with the token means nothing here; only the token in the body does.
    let granted = request.extensions().get() == Some(&Granted::ByPeer);
    let inner = request.extensions().get::<Inner>().is_some();
    let busy = || (StatusCode::SERVICE_UNAVAILABLE, "too many calls of /init at a time".to_owned());
    // Held to the end: what waits for its turn is in memory, too.
    let _place = sandbox.setup.place(inner).ok_or_else(busy)?;
    let memory = &sandbox.memory;
    let mut share = match granted {
        true => memory.requests().share(),
        false => memory.unproven(inner).share(),
    };
    let full =
        || (StatusCode::SERVICE_UNAVAILABLE, "too many calls of /init hold memory".to_owned());
    let mut large = None;
    let reading = async {
        let mut chunks = request.into_body().into_data_stream();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| bad())?;
            let length = body.len() + chunk.len();
            if length > MAX_BODY {
                return Err(bad());
            }
            if length > ORDINARY_BODY && large.is_none() {
                large = Some(sandbox.setup.place_of_large(inner).ok_or_else(busy)?);
            }
            share.hold(BODY_GROWTH * length).map_err(|_| full())?;
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    let body = timeout(BODY_PATIENCE, reading).await.unwrap_or_else(|_| Err(bad()))?;
    // To the end, as the place.
    let _held;
    let parsed = match body.is_empty() {
        true => InitBody::default(),
        false => {
            let parsed = if body.len() > ORDINARY_BODY {
                // Not on the runtime, where it would hold up everybody.
                let parsing = memory.decoders().run_next_step(move || {
                    share.hold(BODY_GROWTH * body.len() + cost::json(&body)).map_err(|_| full())?;
                    Ok((parse(&body), share))
                });
                parsing.await.map_err(|_| full())?
            } else {
                share.hold(BODY_GROWTH * body.len() + cost::json(&body)).map_err(|_| full())?;
                Ok((parse(&body), share))
            };
            let (parsed, held) = parsed?;
            _held = held;
            parsed.map_err(|error| {
                // Where it is wrong, and not what: the text might quote a secret.
                let (line, column, kind) = (error.line(), error.column(), error.classify());
                tracing::warn!(line, column, ?kind, "an /init that does not parse");
                bad()
            })?
        }
    };
    let request = parsed.request().map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    let report = setup::run(sandbox, request, granted).await.map_err(|error| {
        let status = match &error {
            SetupError::Refused(_) => StatusCode::UNAUTHORIZED,
            SetupError::Invalid(_) | SetupError::Failed(_) => StatusCode::BAD_REQUEST,
            SetupError::Busy(_) | SetupError::Broken => StatusCode::SERVICE_UNAVAILABLE,
        };
        tracing::warn!(%error, "not initialised");
        (status, error.to_string())
    })?;
    let took_us = u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX);
    // Not INFO: a resume writes nothing to the log.
    tracing::debug!(stale = report.stale, took_us, "initialised");
    Ok(())
}
