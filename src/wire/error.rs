//! Errors in each protocol.
//!
//! Connect's codes are gRPC's by other names, with an HTTP status each
//! (<https://connectrpc.com/docs/protocol#error-codes>).

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use prost::Message;
use serde::Serialize;
use tonic::{Code, Status};

use super::Body;

/// `google.rpc.Status`, the content of `grpc-status-details-bin`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    code: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    message: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<DetailJson>,
}

#[derive(Serialize)]
struct DetailJson {
    r#type: String,
    value: String,
}

#[derive(Serialize)]
struct EndStreamJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorJson<'a>>,
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    metadata: serde_json::Map<String, serde_json::Value>,
}

/// Connect's name and HTTP status of a code.
pub fn connect_code(code: Code) -> (&'static str, StatusCode) {
    // 499 is nginx's "client closed request"; it is a valid status code.
    let closed = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
    match code {
        Code::Ok => ("ok", StatusCode::OK),
        Code::Cancelled => ("canceled", closed),
        Code::Unknown => ("unknown", StatusCode::INTERNAL_SERVER_ERROR),
        Code::InvalidArgument => ("invalid_argument", StatusCode::BAD_REQUEST),
        Code::DeadlineExceeded => ("deadline_exceeded", StatusCode::GATEWAY_TIMEOUT),
        Code::NotFound => ("not_found", StatusCode::NOT_FOUND),
        Code::AlreadyExists => ("already_exists", StatusCode::CONFLICT),
        Code::PermissionDenied => ("permission_denied", StatusCode::FORBIDDEN),
        Code::ResourceExhausted => ("resource_exhausted", StatusCode::TOO_MANY_REQUESTS),
        Code::FailedPrecondition => ("failed_precondition", StatusCode::BAD_REQUEST),
        Code::Aborted => ("aborted", StatusCode::CONFLICT),
        Code::OutOfRange => ("out_of_range", StatusCode::BAD_REQUEST),
        Code::Unimplemented => ("unimplemented", StatusCode::NOT_IMPLEMENTED),
        Code::Internal => ("internal", StatusCode::INTERNAL_SERVER_ERROR),
        Code::Unavailable => ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
        Code::DataLoss => ("data_loss", StatusCode::INTERNAL_SERVER_ERROR),
        Code::Unauthenticated => ("unauthenticated", StatusCode::UNAUTHORIZED),
    }
}

fn error_json(status: &Status) -> ErrorJson<'_> {
    let details = RpcStatus::decode(status.details()).map(|s| s.details).unwrap_or_default();
    let details = details.into_iter().map(|any| DetailJson {
        r#type: any.type_url.rsplit('/').next().unwrap_or_default().to_owned(),
        value: STANDARD_NO_PAD.encode(&any.value),
    });
    ErrorJson {
        code: connect_code(status.code()).0,
        message: status.message(),
        details: details.collect(),
    }
}

/// The body of a failed Connect unary call.
pub fn connect_unary_body(status: &Status) -> Vec<u8> {
    // Strings and vectors of strings always serialise.
    serde_json::to_vec(&error_json(status)).unwrap_or_default()
}

/// The content of the envelope that ends a Connect stream.
pub fn connect_end_stream(status: &Status, trailers: &HeaderMap) -> Vec<u8> {
    let mut metadata = serde_json::Map::new();
    for name in trailers.keys() {
        let values = trailers.get_all(name).iter();
        let values = values.map(|value| String::from_utf8_lossy(value.as_bytes()).into());
        metadata.insert(name.as_str().to_owned(), serde_json::Value::Array(values.collect()));
    }
    let error = (status.code() != Code::Ok).then(|| error_json(status));
    serde_json::to_vec(&EndStreamJson { error, metadata }).unwrap_or_default()
}

/// JSON as Go's encoder writes it, so that a browser never takes the text for HTML.
pub fn without_html(mut json: String) -> String {
    for (character, escape) in [('<', "\\u003c"), ('>', "\\u003e"), ('&', "\\u0026")] {
        json = json.replace(character, escape);
    }
    json
}

/// The whole answer to a plain HTTP request, in the shape of upstream's REST errors:
/// `{"code":N,"message":"..."}` and a newline.
pub fn rest(status: StatusCode, message: &str) -> Response<Body> {
    #[derive(Serialize)]
    struct RestError<'a> {
        code: u16,
        message: &'a str,
    }
    let error = RestError { code: status.as_u16(), message };
    let mut body = without_html(serde_json::to_string(&error).unwrap_or_default());
    body.push('\n');
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Upstream's answer to a path that is not there.
pub fn not_found() -> Response<Body> {
    let mut response = Response::new(Body::from("404 page not found\n"));
    *response.status_mut() = StatusCode::NOT_FOUND;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
        .headers_mut()
        .insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
