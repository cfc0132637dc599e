//! Which protocol a call speaks, from its content type.
//!
//! | content type | protocol |
//! |---|---|
//! | `application/grpc[+proto\|+json]` | gRPC, over HTTP/2 or HTTP/1.1 with trailers |
//! | `application/grpc-web[-text][+proto\|+json]` | gRPC-Web |
//! | `application/proto`, `application/json` | Connect, unary methods |
//! | `application/connect+proto`, `application/connect+json` | Connect, streaming methods |
//!
//! JSON may carry `charset=utf-8`. Any other parameter is refused, as upstream does.

use http::{HeaderMap, HeaderValue, header};

use super::{codec::Format, methods::Method};

/// How messages are framed and errors told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// gRPC.
    Grpc,
    /// gRPC-Web; `text` is base64 over it.
    GrpcWeb {
        /// Whether bodies are base64.
        text: bool,
    },
    /// Connect, one message each way, without envelopes.
    ConnectUnary,
    /// Connect, with envelopes.
    ConnectStream,
}

/// A recognised protocol.
#[derive(Debug, Clone)]
pub struct Protocol {
    /// Its framing.
    pub framing: Framing,
    /// Its codec.
    pub format: Format,
    /// The content type to answer with: the client's own.
    pub content_type: HeaderValue,
}

impl Protocol {
    /// Recognises the protocol of a request to any method.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(header::CONTENT_TYPE).iter();
        let value = values.next()?;
        if values.next().is_some() {
            return None;
        }
        let (framing, format) = parse(value.to_str().ok()?)?;
        Some(Self { framing, format, content_type: value.clone() })
    }

    /// Whether `method` can be called in this protocol.
    pub fn fits(&self, method: Method) -> bool {
        let framed = match self.framing {
            Framing::Grpc | Framing::GrpcWeb { .. } => true,
            Framing::ConnectUnary => method.is_unary(),
            Framing::ConnectStream => !method.is_unary(),
        };
        framed && (method.json || self.format == Format::Proto)
    }

    /// Whether it is one of Connect's.
    pub fn is_connect(&self) -> bool {
        matches!(self.framing, Framing::ConnectUnary | Framing::ConnectStream)
    }

    /// The header that says how request messages are compressed, the one that says what the client
    /// accepts.
    pub fn encoding_headers(&self) -> (&'static str, &'static str) {
        match self.framing {
            Framing::Grpc | Framing::GrpcWeb { .. } => ("grpc-encoding", "grpc-accept-encoding"),
            Framing::ConnectUnary => ("content-encoding", "accept-encoding"),
            Framing::ConnectStream => ("connect-content-encoding", "connect-accept-encoding"),
        }
    }
}

/// The `Accept-Post` of a method: every content type that it can be called with, sorted.
pub fn accepted(method: Method) -> String {
    const JSON_TOO: [&str; 2] = ["json", "proto"];
    let formats = if method.json { &JSON_TOO[..] } else { &JSON_TOO[1..] };
    let mut types = Vec::new();
    for family in ["grpc", "grpc-web", "grpc-web-text"] {
        types.push(format!("application/{family}"));
        types.extend(formats.iter().map(|format| format!("application/{family}+{format}")));
    }
    let connect = if method.is_unary() { "" } else { "connect+" };
    types.extend(formats.iter().map(|format| format!("application/{connect}{format}")));
    types.sort();
    types.join(", ")
}

fn parse(content_type: &str) -> Option<(Framing, Format)> {
    let mut parts = content_type.split(';');
    let essence = parts.next()?.trim().to_ascii_lowercase();
    let subtype = essence.strip_prefix("application/")?;
    let (framing, format) = match subtype.split_once('+') {
        Some(("connect", format)) => (Framing::ConnectStream, format),
        Some((family, format)) => (grpc_family(family)?, format),
        None if matches!(subtype, "json" | "proto") => (Framing::ConnectUnary, subtype),
        None => (grpc_family(subtype)?, "proto"),
    };
    let format = match format {
        "proto" => Format::Proto,
        "json" => Format::Json,
        _ => return None,
    };
    for parameter in parts {
        let parameter = parameter.trim().to_ascii_lowercase().replace(['"', ' '], "");
        if format != Format::Json || parameter != "charset=utf-8" {
            return None;
        }
    }
    Some((framing, format))
}

fn grpc_family(name: &str) -> Option<Framing> {
    match name {
        "grpc" => Some(Framing::Grpc),
        "grpc-web" => Some(Framing::GrpcWeb { text: false }),
        "grpc-web-text" => Some(Framing::GrpcWeb { text: true }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types() {
        use Format::{Json, Proto};
        let known = [
            ("application/grpc", Framing::Grpc, Proto),
            ("application/grpc+json", Framing::Grpc, Json),
            ("application/grpc-web+proto", Framing::GrpcWeb { text: false }, Proto),
            ("application/grpc-web-text", Framing::GrpcWeb { text: true }, Proto),
            ("Application/JSON; charset=UTF-8", Framing::ConnectUnary, Json),
            ("application/proto", Framing::ConnectUnary, Proto),
            ("application/connect+json;charset=\"utf-8\"", Framing::ConnectStream, Json),
        ];
        for (text, framing, format) in known {
            assert_eq!(parse(text), Some((framing, format)), "{text}");
        }
        for unknown in [
            "",
            "text/plain",
            "application/connect",
            "application/json; charset=latin1",
            "application/json; boundary=x",
            "application/proto; charset=utf-8",
            "application/grpc+thrift",
            "application/+json",
        ] {
            assert_eq!(parse(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn accept_post_is_sorted_and_complete() {
        let stream = Method {
            client_stream: false,
            server_stream: true,
            json: true,
            large: false,
            input: None,
            transfer: false,
            extension: false,
            finite: false,
        };
        let accepted = accepted(stream);
        assert!(accepted.starts_with("application/connect+json, application/connect+proto, "));
        for one in accepted.split(", ") {
            assert!(parse(one).is_some(), "{one}");
        }
    }
}
