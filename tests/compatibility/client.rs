//! HTTP/1.1 and Connect by hand, as plain as the checks need them.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::{
    common::PATIENCE,
    data::{Http, Rpc},
};

/// A response, its headers by names in lower case.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(*PATIENCE))?;
    stream.set_write_timeout(Some(*PATIENCE))?;
    Ok(stream)
}

/// Sends bytes and gives what comes until the end, or until `enough` says so.
pub(crate) fn exchange(
    address: &str,
    send: &[u8],
    half_close: bool,
    enough: impl Fn(&[u8]) -> bool,
) -> io::Result<Vec<u8>> {
    let mut stream = connect(address)?;
    stream.write_all(send)?;
    if half_close {
        stream.shutdown(Shutdown::Write)?;
    }
    let mut received = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let read = match stream.read(&mut piece) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        received.extend_from_slice(&piece[..read]);
        if read == 0 || enough(&received) {
            return Ok(received);
        }
    }
}

/// One request.
pub(crate) fn http(address: &str, request: &Http) -> io::Result<Response> {
    let Http { method, path, headers, body, .. } = request;
    let head = head(method, path, headers, body.len());
    let bytes = exchange(address, &[head.as_bytes(), body.as_bytes()].concat(), false, |_| false)?;
    let (status, headers, rest) =
        response_head(&bytes).ok_or_else(|| invalid(&bytes, "no response"))?;
    let chunked = headers.get("transfer-encoding").is_some_and(|value| value == "chunked");
    let body = if chunked {
        let (body, whole) = dechunk(rest);
        if !whole {
            return Err(invalid(&bytes, "a body that is cut"));
        }
        body
    } else {
        rest.to_owned()
    };
    Ok(Response { status, headers, body })
}

/// The answer to a call: what can be matched, and the code of its error.
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) code: Option<String>,
}

/// One call.
pub(crate) fn rpc(address: &str, call: &Rpc) -> io::Result<Answer> {
    let path = format!("/{}", call.method);
    let mut headers = call.headers.clone();
    headers.insert("Connect-Protocol-Version".to_owned(), "1".to_owned());
    let message = call.request.to_string().into_bytes();
    if !call.stream {
        headers.insert("Content-Type".to_owned(), "application/json".to_owned());
        let head = head("POST", &path, &headers, message.len());
        let bytes = exchange(address, &[head.as_bytes(), &message].concat(), false, |_| false)?;
        let (status, headers, rest) =
            response_head(&bytes).ok_or_else(|| invalid(&bytes, "no response"))?;
        let chunked = headers.contains_key("transfer-encoding");
        let body = if chunked { dechunk(rest).0 } else { rest.to_owned() };
        let answer: Value =
            serde_json::from_slice(&body).map_err(|_| invalid(&bytes, "no JSON"))?;
        let code = (status != 200).then(|| code_of(&answer));
        return Ok(Answer { text: answer.to_string(), code });
    }
    headers.insert("Content-Type".to_owned(), "application/connect+json".to_owned());
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let body = [&[0], length.to_be_bytes().as_slice(), &message].concat();
    let head = head("POST", &path, &headers, body.len());
    let wanted = call.messages.unwrap_or(usize::MAX);
    let come = |bytes: &[u8]| {
        let Some((200, _, rest)) = response_head(bytes) else { return Vec::new() };
        envelopes(&dechunk(rest).0)
    };
    let bytes = exchange(address, &[head.as_bytes(), &body].concat(), false, |bytes| {
        come(bytes).len() >= wanted
    })?;
    let mut answer = Answer { text: String::new(), code: None };
    let mut ended = false;
    for (flags, message) in come(&bytes) {
        let value: Value =
            serde_json::from_slice(&message).map_err(|_| invalid(&message, "no JSON"))?;
        answer.text.push_str(&format!("{value}\n"));
        if flags & 2 != 0 {
            ended = true;
            answer.code = value.get("error").map(code_of);
        }
        for channel in ["stdout", "stderr", "pty"] {
            if let Some(data) = value["event"]["data"][channel].as_str() {
                let data = STANDARD.decode(data).map_err(io::Error::other)?;
                let data = String::from_utf8_lossy(&data).into_owned();
                answer.text.push_str(&format!("{channel}: {data}\n"));
            }
        }
    }
    match ended || call.messages.is_some() {
        true => Ok(answer),
        false => Err(invalid(&bytes, "a stream that is cut")),
    }
}

fn code_of(error: &Value) -> String {
    error["code"].as_str().unwrap_or("none").to_owned()
}

fn head(method: &str, path: &str, headers: &BTreeMap<String, String>, length: usize) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.keys().any(|name| name.eq_ignore_ascii_case("host")) {
        head.push_str("Host: localhost\r\n");
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if length > 0 {
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    head + "\r\n"
}

/// The status, the headers and what has come behind them.
fn response_head(bytes: &[u8]) -> Option<(u16, BTreeMap<String, String>, &[u8])> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Some((status, headers, &bytes[end + 4..]))
}

/// What has come of a chunked body, and whether that is all.
fn dechunk(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") else {
            return (body, false);
        };
        let size = std::str::from_utf8(&bytes[..end]).ok();
        let Some(size) = size.and_then(|size| usize::from_str_radix(size.trim(), 16).ok()) else {
            return (body, false);
        };
        if size == 0 {
            return (body, true);
        }
        let Some(chunk) = bytes.get(end + 2..end + 2 + size) else { return (body, false) };
        body.extend_from_slice(chunk);
        bytes = bytes.get(end + 4 + size..).unwrap_or_default();
    }
}

/// The whole envelopes of a stream: flags and message.
fn envelopes(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut all = Vec::new();
    while let [flags, a, b, c, d, rest @ ..] = bytes {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let Some(message) = rest.get(..length) else { break };
        all.push((*flags, message.to_owned()));
        bytes = &rest[length..];
    }
    all
}

fn invalid(bytes: &[u8], what: &str) -> io::Error {
    io::Error::other(format!("{what}: {:?}", String::from_utf8_lossy(bytes)))
}
