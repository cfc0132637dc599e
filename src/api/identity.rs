//! Who calls: the user of HTTP Basic authentication.
//!
//! E2B's clients name the user that a call acts as in `Authorization: Basic base64("user:")`; the
//! password means nothing; but `user:group:`, which is a user with a group and no password, is taken
//! for that. A header of another scheme, or one that does not parse, names nobody,
//! and that is no error. A user that does not exist is an error on every route.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::future::{Either, Ready, ready};
use http::{HeaderMap, Request, Response, StatusCode, header};
use tonic::{Extensions, Status};
use tower::Service;

use crate::{
    guest::users::User,
    sandbox::{NoUser, Sandbox},
    wire::Body,
};

/// In a request's extensions: the user whom the caller named.
#[derive(Debug, Clone)]
struct Caller(Arc<User>);

/// The layer around the router.
#[derive(Debug, Clone)]
pub struct Identity<S> {
    inner: S,
    sandbox: Arc<Sandbox>,
}

impl<S> Identity<S> {
    /// Looks callers up in `sandbox`.
    pub fn new(inner: S, sandbox: Arc<Sandbox>) -> Self {
        Self { inner, sandbox }
    }
}

impl<S> Service<Request<Body>> for Identity<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(name) = basic_user(request.headers()) {
            match self.sandbox.user_named(&name) {
                Ok(user) => {
                    request.extensions_mut().insert(Caller(Arc::new(user)));
                }
                Err(error) => return Either::Right(ready(Ok(refusal(&request, &error)))),
            }
        }
        Either::Left(self.inner.call(request))
    }
}

/// The user that a call acts as: the one it names, else the default.
pub(super) fn caller(extensions: &Extensions, sandbox: &Sandbox) -> Result<Arc<User>, Status> {
    match extensions.get::<Caller>() {
        Some(Caller(user)) => Ok(Arc::clone(user)),
        None => sandbox
            .default_user()
            .map(Arc::new)
            .map_err(|error| Status::unauthenticated(error.message())),
    }
}

fn basic_user(headers: &HeaderMap) -> Option<String> {
    let (scheme, credentials) =
        headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(credentials).ok()?).ok()?;
    let (user, rest) = decoded.split_once(':')?;
    // A colon cannot be in the name of a user. An empty password behind a second one says that the
    // first belongs to the name: all clients of E2B send an empty password.
    match rest.strip_suffix(':').filter(|group| !group.is_empty() && !group.contains(':')) {
        Some(group) => Some(format!("{user}:{group}")),
        None => Some(user.to_owned()),
    }
}

fn refusal(request: &Request<Body>, error: &NoUser) -> Response<Body> {
    // The wire has turned every RPC into gRPC before it comes here.
    let rpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if rpc {
        return Status::unauthenticated(error.message()).into_http();
    }
    let text = serde_json::json!({ "code": "unauthenticated", "message": error.message() });
    let mut response = Response::new(Body::from(text.to_string()));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
