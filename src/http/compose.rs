//! `POST /files/compose`: one file from parts that were uploaded before.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    os::unix::ffi::OsStringExt,
    path::Path,
};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use futures_util::StreamExt;
use http::{StatusCode, header};
use serde::{Deserialize, Deserializer, Serialize, de::Visitor};

use super::{FilesQuery, Refusal, Shared, blocking, upload::too_many_uploads, user};
use crate::{
    fs::{
        FsError,
        compose::{self, Part},
        path,
    },
    quote,
    wire::{budget::Share, cost},
};

/// The request. Fields that are not known are ignored, as upstream does.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Request {
    source_paths: Option<Vec<FileName>>,
    destination: Option<FileName>,
    username: Option<String>,
}

/// A path, byte for byte: bytes that are not UTF-8 come as they are, or each as the lone surrogate that
/// Python's `os.fsdecode` makes of it (U+DC80 to U+DCFF; PEP 383).
#[derive(Debug, Default)]
struct FileName(OsString);

impl<'de> Deserialize<'de> for FileName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = FileName;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<FileName, E> {
                Ok(FileName(OsString::from_vec(without_surrogates(bytes))))
            }
        }
        // Of a string with what is not UTF-8 the parser gives the bytes, with surrogates as if they were
        // characters.
        deserializer.deserialize_bytes(Bytes)
    }
}

/// Puts back the bytes that stand as surrogates, each in three bytes.
fn without_surrogates(mut bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(bytes.len());
    while let [first, rest @ ..] = bytes {
        match bytes {
            [0xed, second @ 0xb2..=0xb3, third @ 0x80..=0xbf, rest @ ..] => {
                plain.push(second << 6 | third & 0x3f);
                bytes = rest;
            }
            _ => {
                plain.push(*first);
                bytes = rest;
            }
        }
    }
    plain
}

/// The most bytes of a request.
const MAX_BODY: usize = 2 << 20;

/// Reads a body, which borrows what it takes.
async fn read(body: Body, share: &mut Share) -> Result<BytesMut, Refusal> {
    let mut chunks = body.into_data_stream();
    let mut body = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|error| Refusal::bad(format!("invalid request body: {error}")))?;
        if body.len() + chunk.len() > MAX_BODY {
            let text = format!("the request body is larger than {MAX_BODY} bytes");
            return Err(Refusal(StatusCode::PAYLOAD_TOO_LARGE, text));
        }
        share.hold(body.len() + chunk.len()).map_err(|status| full(&status))?;
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn full(status: &tonic::Status) -> Refusal {
    Refusal(StatusCode::SERVICE_UNAVAILABLE, status.message().to_owned())
}

/// The answer.
#[derive(Debug, Serialize)]
struct Composed {
    name: String,
    path: String,
    r#type: &'static str,
}

pub(super) async fn compose(
    State(sandbox): Shared,
    request: axum::extract::Request,
) -> Result<Response, Refusal> {
    let mut share = sandbox.memory.requests().share();
    let body = read(request.into_body(), &mut share).await?;
    let parsing = move || {
        share.hold(body.len() + cost::json(&body)).map_err(|status| full(&status))?;
        // What stands behind the object is ignored, as upstream does.
        let request = serde_json::Deserializer::from_slice(&body).into_iter::<Request>().next();
        Ok::<_, Refusal>((request, share))
    };
    let decoders = sandbox.memory.decoders();
    let parsed = decoders.run_next_step(parsing).await.map_err(FsError::from)?;
    let (request, _share) = parsed?;
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
    if destination.0.is_empty() {
        return Err(Refusal::bad("destination is required"));
    }
    let query = FilesQuery { username: request.username, ..FilesQuery::default() };
    let user = user(&sandbox, &query)?;
    let defaults = sandbox.defaults.get();
    let resolve = |path: &OsStr| path::resolve(path, &user, defaults.workdir.as_deref());
    let to = resolve(&destination.0)
        .map_err(|error| Refusal::bad(format!("error resolving destination path: {error}")))?;
    let parts = sources.into_iter().map(|FileName(name)| match resolve(&name) {
        Ok(path) => Ok(Part { name: name.to_string_lossy().into_owned(), path }),
        Err(error) => {
            let name = quote::path(Path::new(&name));
            Err(Refusal::bad(format!("error resolving source path \"{name}\": {error}")))
        }
    });
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    // It waits for no client, so it cannot be too slow; whether it is evicted is not looked at.
    let slot = sandbox.uploads.take().await.ok_or_else(too_many_uploads)?;
    let actor = sandbox.actor(&user);
    let composed = blocking(&sandbox.files, move || {
        slot.use_here();
        compose::compose(&parts, &to, &actor)?;
        let name = path::base_name(&to).to_string_lossy().into_owned();
        Ok(Composed { name, path: to.to_string_lossy().into_owned(), r#type: "file" })
    });
    let mut text = serde_json::to_string(&composed.await?).unwrap_or_default();
    text.push('\n');
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_bytes_that_were_written() {
        for (json, wanted) in [
            (&br#"["/a"]"#[..], &b"/a"[..]),
            (b"[\"/caf\xe9\"]", b"/caf\xe9"),
            (br#"["/caf\udce9"]"#, b"/caf\xe9"),
            (br#"["/\udc80\udcff"]"#, b"/\x80\xff"),
            ("[\"/é\u{10ffff}\"]".as_bytes(), "/é\u{10ffff}".as_bytes()),
            (br#"["/\ud83d\ude00"]"#, "/😀".as_bytes()),
        ] {
            let names: Vec<FileName> = serde_json::from_slice(json).unwrap();
            assert_eq!(names[0].0.as_encoded_bytes(), wanted, "{}", json.escape_ascii());
        }
    }
}
