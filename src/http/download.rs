//! `GET /files`: the content of one file, always as it is.
//!
//! Upstream compresses nearly every download, because nearly every client says that it accepts
//! gzip; on a link that is a socket away that only costs time. Here a download is sent
//! uncompressed, with its length.

use std::{fs::File, io::Read, path::Path, sync::Arc};

use axum::{
    Extension,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{FilesParams, Refusal, Shared, blocking, check_signature, query, resolve, user};
use crate::{
    access::Operation,
    blocking::Pool,
    fs::transfer,
    wire::{Body, gate::Granted},
};

/// Bytes read at a time. Each download that its client does not read holds one such chunk and one
/// that is being sent, and there may be as many downloads as calls.
const CHUNK: usize = 64 << 10;

/// Characters of RFC 8187's `attr-char` that may stay as they are in `filename*`.
const EXTENDED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b'-')
    .remove(b'.')
    .remove(b'^')
    .remove(b'_')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

pub(super) async fn download(
    State(sandbox): Shared,
    params: FilesParams,
    granted: Option<Extension<Granted>>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let query = query(params)?;
    check_signature(&sandbox, Operation::Read, &query, &headers, granted.as_deref())?;
    let user = user(&sandbox, &query)?;
    let path = resolve(&sandbox, query.path.as_deref().unwrap_or_default(), &user)?;

    let (reader, first, length, name) = blocking(&sandbox.files, move || {
        let (file, metadata) = transfer::open_read(&path)?;
        let mut reader = Reader { file, left: metadata.len() };
        if reader.left == 0 {
            // A file of /proc says that it is empty and is not.
            reader.left = u64::MAX;
        }
        let first = reader.next().map_err(|error| {
            Refusal(
                http::StatusCode::INTERNAL_SERVER_ERROR,
                format!("error reading file '{}': {error}", path.display()),
            )
        })?;
        let length = match metadata.len() {
            0 if !first.is_empty() => None,
            length => Some(length),
        };
        Ok((reader, first, length, path))
    })
    .await?;

    let mut headers = HeaderMap::new();
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    headers.insert(header::CONTENT_TYPE, content_type(&name, &first));
    if let Ok(value) = HeaderValue::try_from(disposition(&name)) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok((headers, body(&sandbox.files, reader, first)).into_response())
}

/// A file, read in chunks to the length that it had when it was opened.
struct Reader {
    file: File,
    left: u64,
}

impl Reader {
    /// The next bytes; empty at the end.
    fn next(&mut self) -> std::io::Result<Bytes> {
        let wanted = usize::try_from(self.left).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = BytesMut::zeroed(wanted);
        let mut filled = 0;
        while let Some(rest) = chunk.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read(rest) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        chunk.truncate(filled);
        self.left = self.left.saturating_sub(filled as u64);
        Ok(chunk.freeze())
    }
}

/// The first chunk, then the rest as the client takes it.
fn body(files: &Arc<Pool>, reader: Reader, first: Bytes) -> Body {
    if reader.left == 0 || first.is_empty() {
        return Body::from(first);
    }
    let files = Arc::clone(files);
    let rest = stream::try_unfold(reader, move |mut reader| {
        let files = Arc::clone(&files);
        async move {
            // Calls are bounded by the wire, and one that has begun shall come to its end.
            let read = files.run_next_step(move || {
                let chunk = reader.next();
                (reader, chunk)
            });
            let (reader, chunk) = read.await.map_err(std::io::Error::other)?;
            let chunk = chunk?;
            Ok::<_, std::io::Error>((!chunk.is_empty()).then_some((chunk, reader)))
        }
    });
    let first = stream::once(async { Ok(first) });
    Body::from_stream(futures_util::StreamExt::chain(first, rest))
}

/// By the name's extension, else text if the beginning looks like it.
fn content_type(path: &Path, first: &[u8]) -> HeaderValue {
    if let Some(mime) = mime_guess::from_path(path).first() {
        let charset = if mime.type_() == "text" { "; charset=utf-8" } else { "" };
        if let Ok(value) = HeaderValue::try_from(format!("{}{charset}", mime.essence_str())) {
            return value;
        }
    }
    let start = first.get(..512).unwrap_or(first);
    // A character cut at the end is still text.
    let text = match std::str::from_utf8(start) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    let control = |byte: &u8| *byte < 0x20 && !matches!(*byte, b'\t' | b'\n' | b'\r' | 0x0c | 0x1b);
    match text && !start.iter().any(control) {
        true => HeaderValue::from_static("text/plain; charset=utf-8"),
        false => HeaderValue::from_static("application/octet-stream"),
    }
}

/// `inline` with the base name, as RFC 6266 writes it.
fn disposition(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !name.is_empty() && name.bytes().all(token) {
        format!("inline; filename={name}")
    } else if name.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
        format!("inline; filename=\"{quoted}\"")
    } else {
        format!("inline; filename*=utf-8''{}", utf8_percent_encode(&name, EXTENDED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_disposition() {
        for (name, expected) in [
            ("/a/b.txt", "inline; filename=b.txt"),
            ("/a b", "inline; filename=\"a b\""),
            ("/a\"b", "inline; filename=\"a\\\"b\""),
            ("/ä", "inline; filename*=utf-8''%C3%A4"),
            ("/a\nb", "inline; filename*=utf-8''a%0Ab"),
        ] {
            assert_eq!(disposition(Path::new(name)), expected);
        }
    }

    #[test]
    fn a_chunk_is_small_enough_for_many_downloads() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(200_000).unwrap();
        let mut reader = Reader { file, left: 200_000 };
        let sizes: Vec<_> = std::iter::from_fn(|| Some(reader.next().unwrap().len()))
            .take_while(|size| *size > 0)
            .collect();
        assert_eq!(sizes, [65_536, 65_536, 65_536, 3_392]);
    }

    #[test]
    fn types_by_name_then_by_content() {
        let of = |name: &str, content: &[u8]| content_type(Path::new(name), content);
        assert_eq!(of("/a.json", b"{}"), "application/json");
        assert_eq!(of("/a.html", b""), "text/html; charset=utf-8");
        assert_eq!(of("/a", "text ä".as_bytes()), "text/plain; charset=utf-8");
        assert_eq!(of("/a", b"\x7fELF\x00\x01"), "application/octet-stream");
    }
}
