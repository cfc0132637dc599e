//! `POST /files/compose`: one file from parts that were uploaded before.

use axum::{
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use http::header;
use serde::{Deserialize, Serialize};

use super::{FilesQuery, Refusal, Shared, blocking, upload::too_many_uploads, user};
use crate::{
    fs::{
        compose::{self, Part},
        path,
    },
    quote,
};

/// The request. Fields that are not known are ignored, as upstream does.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Request {
    source_paths: Option<Vec<String>>,
    destination: Option<String>,
    username: Option<String>,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Composed {
    name: String,
    path: String,
    r#type: &'static str,
}

pub(super) async fn compose(State(sandbox): Shared, body: Bytes) -> Result<Response, Refusal> {
    // What stands behind the object is ignored, as upstream does.
    let request = serde_json::Deserializer::from_slice(&body).into_iter::<Request>().next();
    let request = match request {
        Some(Ok(request)) => request,
        Some(Err(error)) => return Err(Refusal::bad(format!("invalid request body: {error}"))),
        None => return Err(Refusal::bad("invalid request body: EOF")),
    };
    let sources = request.source_paths.unwrap_or_default();
    if sources.is_empty() {
        return Err(Refusal::bad("source_paths must not be empty"));
    }
    let destination = request.destination.unwrap_or_default();
    if destination.is_empty() {
        return Err(Refusal::bad("destination is required"));
    }
    let query = FilesQuery { username: request.username, ..FilesQuery::default() };
    let user = user(&sandbox, &query)?;
    let defaults = sandbox.defaults.get();
    let resolve = |path: &str| path::resolve(path, &user, defaults.workdir.as_deref());
    let to = resolve(&destination)
        .map_err(|error| Refusal::bad(format!("error resolving destination path: {error}")))?;
    let parts = sources.into_iter().map(|name| match resolve(&name) {
        Ok(path) => Ok(Part { name, path }),
        Err(error) => {
            let name = quote::text(&name);
            Err(Refusal::bad(format!("error resolving source path \"{name}\": {error}")))
        }
    });
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    // It waits for no client, so it cannot be too slow; whether it is evicted is not looked at.
    let slot = sandbox.uploads.take().await.ok_or_else(too_many_uploads)?;
    let composed = blocking(&sandbox.files, move || {
        let _slot = slot;
        compose::compose(&parts, &to, &user)?;
        let name = path::base_name(&to).to_string_lossy().into_owned();
        Ok(Composed { name, path: to.to_string_lossy().into_owned(), r#type: "file" })
    });
    let mut text = serde_json::to_string(&composed.await?).unwrap_or_default();
    text.push('\n');
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}
