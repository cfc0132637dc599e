//! Keeps web pages out of a daemon that only listens on loopback and has no token.
//!
//! A page that somebody opens in a browser can send requests to `localhost` (CSRF), and can make a
//! name of its own resolve to 127.0.0.1, so that the browser takes the daemon for that page's own
//! server (DNS rebinding). Whoever listens on loopback only has no other protection than that
//! programs of the machine alone reach the port, and a browser is one of them. So while there is no
//! token, a request over such a listener is answered with 403 unless
//!
//! * `Host` (`:authority`) names localhost or a loopback address, with any port,
//! * `Origin`, if there is one, does so too: a page of localhost is a program of the machine,
//! * and a browser does not say that another site asks (`Sec-Fetch-Site: cross-site`) where it sends
//!   no `Origin`: images, scripts, frames and links.
//!
//! With a token, and on every other listener, nothing of this is looked at, as upstream does not.
//! The answer is 403 in every protocol; clients of gRPC and Connect read `permission_denied`.
//! It stands in front of CORS, so a preflight gets it too.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::{Either, Ready, ready};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use tonic::Status;
use tower::Service;

use super::{
    Body, error,
    peer::{Peer, Trust},
    protocol::{Framing, Protocol},
    response::Writer,
};
use crate::access::Access;

/// How a browser says whose page asks (Fetch Metadata).
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// In a request's extensions: it came over a listener that is bound to a loopback address.
#[derive(Debug, Clone, Copy)]
pub struct ViaLoopback;

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Foreign {
    #[error(
        "the header Host names neither localhost nor a loopback address, and there is no access token"
    )]
    Host,
    #[error("requests of pages from elsewhere (header Origin) need an access token")]
    Origin,
    #[error("requests of other sites (header Sec-Fetch-Site) need an access token")]
    Site,
}

/// The layer.
#[derive(Debug, Clone)]
pub struct LoopbackGuard<S> {
    inner: S,
    access: Arc<Access>,
    trust: Arc<Trust>,
}

impl<S> LoopbackGuard<S> {
    /// Guards `inner` as long as `access` has no token. Peers that are trusted are let pass.
    pub fn new(inner: S, access: Arc<Access>, trust: Arc<Trust>) -> Self {
        Self { inner, access, trust }
    }
}

impl<S> Service<Request<Body>> for LoopbackGuard<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let extensions = request.extensions();
        let trusted = extensions.get::<Peer>().is_some_and(|peer| self.trust.includes(*peer));
        if extensions.get::<ViaLoopback>().is_some()
            && !trusted
            && !self.access.has_token()
            && let Err(foreign) = check(request.uri(), request.headers())
        {
            return Either::Right(ready(Ok(refuse(request.headers(), foreign))));
        }
        Either::Left(self.inner.call(request))
    }
}

/// 403 in every protocol; clients of native gRPC look for a status of their own besides.
fn refuse(headers: &HeaderMap, foreign: Foreign) -> Response<Body> {
    let why = foreign.to_string();
    match Protocol::of(headers) {
        Some(protocol) if protocol.framing == Framing::Grpc => {
            let mut response = Writer::plain(protocol).error(&Status::permission_denied(why));
            *response.status_mut() = StatusCode::FORBIDDEN;
            response
        }
        _ => error::rest(StatusCode::FORBIDDEN, &why),
    }
}

fn check(uri: &Uri, headers: &HeaderMap) -> Result<(), Foreign> {
    let is_local = |value: &HeaderValue| value.to_str().is_ok_and(is_loopback_authority);
    // Neither is there in HTTP/1.0, which no browser speaks.
    let authority_is_local =
        uri.authority().is_none_or(|authority| is_loopback_authority(authority.as_str()));
    if !authority_is_local || !headers.get_all(header::HOST).iter().all(is_local) {
        return Err(Foreign::Host);
    }
    let mut origins = headers.get_all(header::ORIGIN).iter().peekable();
    if origins.peek().is_some() {
        let is_local = |value: &HeaderValue| value.to_str().is_ok_and(is_loopback_origin);
        return if origins.all(is_local) { Ok(()) } else { Err(Foreign::Origin) };
    }
    if headers.get_all(FETCH_SITE).iter().any(|site| site == "cross-site") {
        return Err(Foreign::Site);
    }
    Ok(())
}

/// Whether an origin, `SCHEME://HOST[:PORT]`, is a page of this machine. `null` is nobody's.
fn is_loopback_origin(origin: &str) -> bool {
    let rest = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    rest.is_some_and(is_loopback_authority)
}

/// Whether `HOST[:PORT]` is localhost or a loopback address.
fn is_loopback_authority(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            let Ok(address) = address.parse::<Ipv6Addr>() else { return false };
            (Ok(IpAddr::V6(address)), rest)
        }
        None => {
            let end = authority.find(':').unwrap_or(authority.len());
            let (host, port) = authority.split_at(end);
            (host.parse::<IpAddr>().map_err(|_| host), port)
        }
    };
    let port_is_one = match port.strip_prefix(':') {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_digit()),
        None => port.is_empty(),
    };
    port_is_one
        && match host {
            Ok(address) => address.to_canonical().is_loopback(),
            // With the dot of the root zone it is the same name (RFC 1034, section 3.1).
            Err(name) => name.strip_suffix('.').unwrap_or(name).eq_ignore_ascii_case("localhost"),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_and_addresses_of_this_machine_are_local() {
        for local in [
            "localhost",
            "localhost:49983",
            "LocalHost:1",
            "localhost:",
            "localhost.",
            "localhost.:49983",
            "127.0.0.1",
            "127.0.0.1:49983",
            "127.9.9.9:80",
            "[::1]",
            "[::1]:49983",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert!(is_loopback_authority(local), "{local}");
            assert!(is_loopback_origin(&format!("http://{local}")), "{local}");
            assert!(is_loopback_origin(&format!("https://{local}")), "{local}");
        }
        for foreign in [
            "",
            ":80",
            "x",
            "evil.example:49983",
            "localhost.evil.example",
            "evil.localhost",
            "localhost..",
            ".localhost",
            "127.0.0.1.evil.example",
            "127.0.0.1.nip.io:49983",
            "user@localhost",
            "localhost:80@evil.example",
            "localhost/evil.example",
            "localhost evil.example",
            "localhost,evil.example",
            "0.0.0.0:49983",
            "[::]:49983",
            "192.168.0.1",
            "[::1",
            "[::1]x",
            "[127.0.0.1]",
            "::1",
            "2130706433",
            "0x7f.1",
        ] {
            assert!(!is_loopback_authority(foreign), "{foreign}");
            assert!(!is_loopback_origin(&format!("http://{foreign}")), "{foreign}");
        }
        for foreign in
            ["null", "", "localhost", "file://", "ftp://localhost", "chrome-extension://x"]
        {
            assert!(!is_loopback_origin(foreign), "{foreign}");
        }
    }

    #[test]
    fn each_header_is_looked_at_and_all_values_of_it() {
        let headers = |lines: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(*name, HeaderValue::from_static(value));
            }
            headers
        };
        let path = Uri::from_static("/files");
        let authority = |text| Uri::builder().scheme("http").authority(text).path_and_query("/");
        let host = ("host", "localhost:1");
        for (uri, lines, expected) in [
            (path.clone(), &[][..], Ok(())),
            (path.clone(), &[host], Ok(())),
            (authority("127.0.0.1:1").build().unwrap(), &[], Ok(())),
            (authority("evil.example").build().unwrap(), &[host], Err(Foreign::Host)),
            (path.clone(), &[host, ("host", "evil.example")], Err(Foreign::Host)),
            (path.clone(), &[host, ("origin", "http://localhost:3000")], Ok(())),
            (path.clone(), &[host, ("origin", "https://evil.example")], Err(Foreign::Origin)),
            (path.clone(), &[host, ("origin", "null")], Err(Foreign::Origin)),
            (
                path.clone(),
                &[host, ("origin", "http://localhost"), ("origin", "http://evil.example")],
                Err(Foreign::Origin),
            ),
            (path.clone(), &[host, ("sec-fetch-site", "none")], Ok(())),
            (path.clone(), &[host, ("sec-fetch-site", "same-origin")], Ok(())),
            (path.clone(), &[host, ("sec-fetch-site", "cross-site")], Err(Foreign::Site)),
            (
                path.clone(),
                &[host, ("sec-fetch-site", "cross-site"), ("origin", "http://127.0.0.1:3000")],
                Ok(()),
            ),
        ] {
            assert_eq!(check(&uri, &headers(lines)), expected, "{uri} {lines:?}");
        }
    }
}
