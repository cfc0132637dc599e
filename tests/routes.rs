//! Routes, methods, who is let in, and what browsers may read.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Daemon, basic, house::House, me};
use reqwest::{Method, Response, StatusCode};

#[tokio::test]
async fn health_is_told_and_not_cached() {
    let house = House::new();
    let response = house.call(Method::GET, "/health", &[]).await;
    assert_eq!(response.status(), 204);
    assert_eq!(response.headers()["cache-control"], "no-store");
    assert_eq!(response.bytes().await.unwrap(), "");
}

// Routes and headers.

#[tokio::test]
async fn routes_that_are_none() {
    let house = House::new();
    for (method, path) in [
        (Method::GET, "/"),
        (Method::GET, "/nothing"),
        (Method::GET, "/health/"),
        (Method::POST, "/filesystem.Filesystem"),
        (Method::POST, "/filesystem.Filesystem/"),
        (Method::POST, "/filesystem.Filesystem/Nothing"),
        (Method::POST, "/no.Service/Stat"),
    ] {
        let content = [("content-type", "application/json")];
        let response = house.call(method.clone(), path, &content).await;
        assert_eq!(response.status(), 404, "{method} {path}");
        assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8", "{path}");
        assert_eq!(response.text().await.unwrap(), "404 page not found\n", "{path}");
    }
    for (method, path, allowed) in [
        (Method::POST, "/health", &["GET"][..]),
        (Method::DELETE, "/files", &["GET", "POST"]),
        (Method::PUT, "/files", &["GET", "POST"]),
        (Method::GET, "/filesystem.Filesystem/Stat", &["POST"]),
        (Method::PUT, "/process.Process/Start", &["POST"]),
    ] {
        let response = house.call(method.clone(), path, &[]).await;
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow: Vec<_> = response.headers().get_all("allow").iter().collect();
        let allow = format!("{allow:?}");
        assert!(allowed.iter().all(|method| allow.contains(method)), "{path}: {allow}");
        assert_eq!(response.bytes().await.unwrap(), "", "{path}");
    }
    let text = [("content-type", "text/plain")];
    let response = house.call(Method::POST, "/filesystem.Filesystem/Stat", &text).await;
    assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let accepted = response.headers()["accept-post"].to_str().unwrap();
    let accepted: Vec<_> = accepted.split(", ").collect();
    assert!(accepted.is_sorted() && accepted.contains(&"application/json"), "{accepted:?}");
}

/// A version as numbers.
fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map(|part| part.parse().unwrap()).collect()
}

#[tokio::test]
async fn what_hangs_on_the_claimed_version_is_there() {
    let house = House::new();
    let claimed = numbers(envd::version::E2B);
    for (since, method, path) in [
        ("0.1.5", Method::GET, "/metrics"),
        ("0.2.0", Method::POST, "/init"),
        ("0.5.2", Method::POST, "/process.Process/CloseStdin"),
        ("0.5.7", Method::POST, "/files"),
        ("0.6.3", Method::POST, "/freeze"),
        ("0.6.3", Method::POST, "/unfreeze"),
        ("0.6.5", Method::POST, "/collapse"),
        ("0.6.6", Method::POST, "/fsfreeze"),
        ("0.6.6", Method::POST, "/fsthaw"),
        ("0.6.12", Method::POST, "/upgrade"),
    ] {
        let response = house.call(method, path, &[]).await;
        let is_there = response.status() != 404;
        assert!(is_there || claimed < numbers(since), "{path} is missing, and {since} is claimed");
    }
    // And of metrics what each version added.
    let metrics = house.call(Method::GET, "/metrics", &[]).await;
    let metrics: serde_json::Value = metrics.json().await.unwrap();
    for field in ["cpu_used_pct", "mem_used", "mem_total", "mem_cache", "disk_used", "disk_total"] {
        assert!(metrics[field].is_number(), "{field} in {metrics}");
    }
}

#[tokio::test]
async fn an_unknown_user_is_refused_everywhere() {
    let house = House::new();
    let header = [("authorization", basic("nobody-at-all"))];
    let header = header.each_ref().map(|(name, value)| (*name, value.as_str()));
    for (method, path) in [
        (Method::GET, "/health"),
        (Method::GET, "/files?path=/etc/passwd"),
        (Method::POST, "/files?path=/tmp/never"),
        (Method::GET, "/nothing"),
    ] {
        let response = house.call(method, path, &header).await;
        assert_eq!(response.status(), 401, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json", "{path}");
        let text = response.text().await.unwrap();
        let expected =
            r#"{"code":"unauthenticated","message":"invalid username: 'nobody-at-all'"}"#;
        assert_eq!(text, expected, "{path}");
    }
    let known = [("authorization", basic(&me().name))];
    let known = known.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(house.call(Method::GET, "/health", &known).await.status(), 204);
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

const TOKEN: &str = "token-of-the-sandbox";

/// Pages from elsewhere are served on loopback only where there is a token: tests/gate.rs has the rest.
fn with_token() -> House {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), TOKEN).unwrap();
    House::with(Daemon::start(&[&format!("--access-token-file={}", file.path().display())]))
}

#[tokio::test]
async fn preflights_of_browsers() {
    let house = with_token();
    let vary = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";
    let names = "x-access-token,Content-Type, X-Odd";
    for path in ["/health", "/files", "/filesystem.Filesystem/Stat", "/nothing"] {
        let headers = [
            ("origin", "https://example.com"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", names),
            // A preflight is answered before anybody asks who it is.
            ("authorization", "Basic bm9ib2R5LWF0LWFsbDo="),
        ];
        let response = house.call(Method::OPTIONS, path, &headers).await;
        assert_eq!(response.status(), 204, "{path}");
        for (name, value) in [
            ("vary", vary),
            ("access-control-allow-origin", "*"),
            ("access-control-allow-methods", "POST"),
            ("access-control-allow-headers", names),
            ("access-control-max-age", "7200"),
        ] {
            assert_eq!(header(&response, name), Some(value), "{path}");
        }
        assert_eq!(header(&response, "access-control-allow-credentials"), None);
        assert_eq!(response.bytes().await.unwrap(), "");
    }
    let page = ("origin", "https://example.com");
    for headers in [
        &[("access-control-request-method", "POST")][..],
        &[page, ("access-control-request-method", "TRACE")],
        &[page, ("access-control-request-method", "post")],
    ] {
        let response = house.call(Method::OPTIONS, "/files", headers).await;
        assert_eq!(response.status(), 204, "{headers:?}");
        assert_eq!(header(&response, "vary"), Some(vary));
        assert_eq!(header(&response, "access-control-allow-origin"), None, "{headers:?}");
        assert_eq!(header(&response, "access-control-allow-methods"), None, "{headers:?}");
        assert_eq!(header(&response, "access-control-max-age"), None, "{headers:?}");
    }
    let headers = [page, ("access-control-request-method", "GET")];
    let response = house.call(Method::OPTIONS, "/files", &headers).await;
    assert_eq!(header(&response, "access-control-allow-methods"), Some("GET"));
    assert_eq!(header(&response, "access-control-allow-headers"), None, "none was asked for");
}

#[tokio::test]
async fn answers_that_a_page_may_read() {
    let house = with_token();
    let exposed = "Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Location, Cache-Control, \
                   X-Content-Type-Options";
    let page = ("origin", "https://example.com");
    let unknown = ("authorization", "Basic bm9ib2R5LWF0LWFsbDo=");
    let token = ("x-access-token", TOKEN);
    for (method, path, headers, status) in [
        (Method::GET, "/health", &[page][..], 204),
        (Method::GET, "/files?path=/no/such", &[page], 401),
        (Method::GET, "/nothing", &[page, token], 404),
        (Method::DELETE, "/files", &[page, token], 405),
        (Method::GET, "/health", &[page, token, unknown], 401),
        (Method::GET, "/files?path=/no/such", &[page, token], 404),
    ] {
        let response = house.call(method, path, headers).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(header(&response, "access-control-allow-origin"), Some("*"), "{path}");
        assert_eq!(header(&response, "access-control-expose-headers"), Some(exposed), "{path}");
        assert_eq!(header(&response, "vary"), Some("Origin"), "{path}");
    }
    let response = house.call(Method::GET, "/health", &[]).await;
    assert_eq!(header(&response, "vary"), Some("Origin"));
    assert_eq!(header(&response, "access-control-allow-origin"), None);
    assert_eq!(header(&response, "access-control-expose-headers"), None);
}
