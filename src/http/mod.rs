//! The REST routes: `/health` and `/files`.
//!
//! Errors have upstream's shape, `{"code":N,"message":"..."}`.

mod download;
mod upload;

pub use upload::UPLOAD_STALL;

use std::{path::PathBuf, sync::Arc};

use axum::{
    Router,
    extract::{Query, State, rejection::QueryRejection},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;

use crate::{
    blocking::Pool,
    fs::{FsError, Kind, path},
    guest::users::User,
    quote,
    sandbox::Sandbox,
    wire::error,
};

/// The routes.
pub fn router(sandbox: &Arc<Sandbox>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/files", get(download::download).post(upload::upload))
        .with_state(Arc::clone(sandbox))
}

/// Upstream's answer to a path that is no route.
pub async fn not_found() -> Response {
    error::not_found()
}

/// Alive and serving. Templates that make this wait for more are yet to come.
async fn health() -> Response {
    let no_store = HeaderValue::from_static("no-store");
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, no_store)]).into_response()
}

/// The query of `/files`. Signatures mean nothing while no access token can be set.
#[derive(Debug, Deserialize)]
struct FilesQuery {
    path: Option<String>,
    username: Option<String>,
}

type FilesParams = Result<Query<FilesQuery>, QueryRejection>;
type Shared = State<Arc<Sandbox>>;

/// An answer that is not a success.
#[derive(Debug)]
struct Refusal(StatusCode, String);

impl Refusal {
    fn bad(message: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, message.into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        error::rest(self.0, &self.1)
    }
}

impl From<FsError> for Refusal {
    fn from(error: FsError) -> Self {
        let status = match error.kind() {
            Kind::InvalidArgument => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Kind::ResourceExhausted => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

/// The query's parameters, each at most once.
fn query(params: FilesParams) -> Result<FilesQuery, Refusal> {
    match params {
        Ok(Query(query)) => Ok(query),
        Err(rejection) => Err(Refusal::bad(format!("invalid query: {}", rejection.body_text()))),
    }
}

/// The user whose files are meant: the query's, else the default.
fn user(sandbox: &Sandbox, query: &FilesQuery) -> Result<User, Refusal> {
    let name = query.username.as_ref().unwrap_or(&sandbox.defaults.user);
    sandbox.users.by_name(name).map_err(|error| {
        Refusal(StatusCode::UNAUTHORIZED, format!("error looking up user '{name}': {error}"))
    })
}

fn resolve(sandbox: &Sandbox, path: &str, user: &User) -> Result<PathBuf, Refusal> {
    path::resolve(path, user, sandbox.defaults.workdir.as_deref()).map_err(|error| {
        let path = quote::text(path);
        Refusal::bad(format!("error expanding and resolving path '{path}': {error}"))
    })
}

/// Runs file work where it may block.
async fn blocking<T: Send + 'static>(
    files: &Pool,
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    files.run(work).await.map_err(|busy| Refusal::from(FsError::from(busy)))?
}
