//! The deadlines that clients send along.
//!
//! * Connect: `Connect-Timeout-Ms`, at most ten digits
//!   (<https://connectrpc.com/docs/protocol#timeouts>). Zero and negative numbers, which upstream
//!   accepts, mean that the time is over already.
//! * gRPC and gRPC-Web: `grpc-timeout`, at most eight digits and a unit
//!   (gRPC over HTTP/2, "Timeout").

use std::time::Duration;

use http::HeaderMap;
use tonic::Status;

/// Connect's header.
pub const CONNECT_TIMEOUT: &str = "connect-timeout-ms";
/// gRPC's header.
pub const GRPC_TIMEOUT: &str = "grpc-timeout";

/// Connect's deadline, if the client sent one.
///
/// # Errors
/// `invalid_argument` when the header is no number of milliseconds.
pub fn connect(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get(CONNECT_TIMEOUT) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    if text.len() > 10 {
        return Err(invalid(CONNECT_TIMEOUT, "more than 10 characters"));
    }
    let milliseconds =
        text.parse::<i64>().map_err(|_| invalid(CONNECT_TIMEOUT, "not a whole number"))?;
    Ok(Some(Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0))))
}

/// gRPC's deadline, if the client sent one.
///
/// # Errors
/// `invalid_argument` when the header is not one to eight digits and a unit of `HMSmun`.
pub fn grpc(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    let Some((at, unit)) = text.char_indices().next_back() else {
        return Err(invalid(GRPC_TIMEOUT, "empty"));
    };
    let digits = text.get(..at).unwrap_or_default();
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(invalid(GRPC_TIMEOUT, "not one to eight digits"));
    }
    let amount: u64 = digits.parse().map_err(|_| invalid(GRPC_TIMEOUT, "not a number"))?;
    let timeout = match unit {
        'H' => Duration::from_secs(amount * 3600),
        'M' => Duration::from_secs(amount * 60),
        'S' => Duration::from_secs(amount),
        'm' => Duration::from_millis(amount),
        'u' => Duration::from_micros(amount),
        'n' => Duration::from_nanos(amount),
        _ => return Err(invalid(GRPC_TIMEOUT, "an unknown unit")),
    };
    Ok(Some(timeout))
}

/// What a call gets whose time is over.
pub(super) fn exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

fn invalid(header: &str, what: &str) -> Status {
    Status::invalid_argument(format!("parse timeout: {header}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(
            http::HeaderName::from_static(name),
            http::HeaderValue::from_static(value),
        )])
    }

    #[test]
    fn connect_timeouts() {
        let parse = |value| connect(&headers(CONNECT_TIMEOUT, value)).map_err(|s| s.code());
        assert_eq!(connect(&HeaderMap::new()).unwrap(), None);
        assert_eq!(parse("1500"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(parse("0"), Ok(Some(Duration::ZERO)));
        assert_eq!(parse("-1"), Ok(Some(Duration::ZERO)));
        for bad in ["", "1.5", "x", "12345678901", "1s"] {
            assert_eq!(parse(bad), Err(tonic::Code::InvalidArgument), "{bad:?}");
        }
    }

    #[test]
    fn grpc_timeouts() {
        let parse = |value| grpc(&headers(GRPC_TIMEOUT, value)).map_err(|s| s.code());
        assert_eq!(parse("2S"), Ok(Some(Duration::from_secs(2))));
        assert_eq!(parse("99999999H"), Ok(Some(Duration::from_secs(99_999_999 * 3600))));
        assert_eq!(parse("5m"), Ok(Some(Duration::from_millis(5))));
        for bad in ["", "S", "5", "123456789S", "-1S", "5x", "1.5S"] {
            assert_eq!(parse(bad), Err(tonic::Code::InvalidArgument), "{bad:?}");
        }
    }
}
