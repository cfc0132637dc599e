//! The REST routes: `/health`, `/livez`, `/files`, `/init`, `/envs` and `/metrics`.
//!
//! Errors have upstream's shape, `{"code":N,"message":"..."}`.

mod compose;
pub mod download;
mod envs;
mod files_query;
mod health;
pub mod init;
mod metrics;
mod upload;

pub use upload::UPLOAD_STALL;

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::{
    access::{Operation, Signed},
    blocking::Pool,
    fs::{FsError, Kind, path},
    guest::users::User,
    quote,
    sandbox::Sandbox,
    wire::{
        error,
        gate::{self, Granted},
    },
};
use files_query::FilesQuery;

/// The paths of the routes.
pub const ROUTES: [&str; 8] = [
    "/health",
    "/livez",
    "/files",
    "/files/compose",
    "/init",
    "/envs",
    "/metrics",
    "/metrics/prometheus",
];

/// The routes.
pub fn router(sandbox: &Arc<Sandbox>) -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/files", get(download::download).post(upload::upload))
        .route("/files/compose", post(compose::compose))
        .route("/init", post(init::init))
        .route("/envs", get(envs::envs))
        .route("/metrics", get(metrics::json))
        .route("/metrics/prometheus", get(metrics::prometheus))
        .with_state(Arc::clone(sandbox))
}

/// For answers that are true for a moment only.
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// Upstream's answer to a path that is no route.
pub async fn not_found() -> Response {
    error::not_found()
}

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
            // Upstream's status whatever the kernel said.
            _ if matches!(
                error,
                FsError::CheckPath { .. }
                    | FsError::OpenForReading { .. }
                    | FsError::OpenForWriting(_)
            ) =>
            {
                StatusCode::INTERNAL_SERVER_ERROR
            }
            Kind::InvalidArgument => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Kind::ResourceExhausted | Kind::Unresponsive => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

/// Whether the request may touch files: by its token, its signature, or its peer.
fn check_signature(
    sandbox: &Sandbox,
    operation: Operation,
    query: &FilesQuery,
    headers: &HeaderMap,
    granted: Option<&Granted>,
) -> Result<(), Refusal> {
    let expiration = match query.signature_expiration.as_deref() {
        None => None,
        Some(text) => Some(text.parse::<i64>().map_err(|_| {
            Refusal::bad(format!(
                "Invalid format for parameter signature_expiration: error binding string \
                 parameter: strconv.ParseInt: parsing {:?}: invalid syntax",
                quote::text(text)
            ))
        })?),
    };
    if granted == Some(&Granted::ByPeer) {
        return Ok(());
    }
    let signed = Signed {
        operation,
        path: query.path().as_bytes(),
        username: query.username.as_deref().unwrap_or_default(),
        expiration,
        signature: query.signature.as_deref(),
    };
    let checked = sandbox.access.check(gate::token(headers), signed);
    checked.map_err(|error| Refusal(StatusCode::UNAUTHORIZED, error.to_string()))
}

/// The user whose files are meant: the query's, else the default.
fn user(sandbox: &Sandbox, query: &FilesQuery) -> Result<User, Refusal> {
    let defaults = sandbox.defaults.get();
    let name = query.username.as_ref().unwrap_or(&defaults.user);
    sandbox.users.by_name(name).map_err(|error| {
        Refusal(StatusCode::UNAUTHORIZED, format!("error looking up user '{name}': {error}"))
    })
}

fn resolve(sandbox: &Sandbox, path: &OsStr, user: &User) -> Result<PathBuf, Refusal> {
    path::resolve(path, user, sandbox.defaults.get().workdir.as_deref()).map_err(|error| {
        let path = quote::path(Path::new(path));
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
