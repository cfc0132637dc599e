//! What a file is called and what it is: the headers that say so.

use std::path::Path;

use http::HeaderValue;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// The bytes from the beginning of a file that tell what it is, Go's number.
pub(super) const SNIFFED: usize = 512;

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

/// What a file without a telling name begins with.
const BEGINNINGS: [(&[u8], &str); 9] = [
    (b"%PDF-", "application/pdf"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b\x08", "application/x-gzip"),
    (b"\0asm", "application/wasm"),
    (b"<?xml", "text/xml; charset=utf-8"),
];

/// By the name's extension, else by the beginning: a known one, or text if it looks like it.
pub(super) fn content_type(path: &Path, first: &[u8]) -> HeaderValue {
    if let Some(mime) = mime_guess::from_path(path).first() {
        let charset = if mime.type_() == "text" { "; charset=utf-8" } else { "" };
        if let Ok(value) = HeaderValue::try_from(format!("{}{charset}", mime.essence_str())) {
            return value;
        }
    }
    let start = first.get(..SNIFFED).unwrap_or(first);
    if let Some((_, kind)) = BEGINNINGS.iter().find(|(bytes, _)| start.starts_with(bytes)) {
        return HeaderValue::from_static(kind);
    }
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

/// Whether content of this type gets much smaller: text in any form. Images, archives, films and
/// what is unknown are compressed already, or may be.
pub(super) fn compresses(content_type: &HeaderValue) -> bool {
    let Ok(text) = content_type.to_str() else {
        return false;
    };
    let essence = text.split(';').next().unwrap_or_default().trim();
    essence.starts_with("text/")
        || essence.ends_with("+json")
        || essence.ends_with("+xml")
        || matches!(
            essence,
            "application/json"
                | "application/javascript"
                | "application/xml"
                | "application/x-sh"
                | "application/x-tar"
                | "application/sql"
                | "application/wasm"
        )
}

/// `inline` with the base name, as RFC 6266 writes it.
pub(super) fn disposition(path: &Path) -> String {
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
    fn types_by_name_then_by_content() {
        let of = |name: &str, content: &[u8]| content_type(Path::new(name), content);
        assert_eq!(of("/a.json", b"{}"), "application/json");
        assert_eq!(of("/a.html", b""), "text/html; charset=utf-8");
        assert_eq!(of("/a", "text ä".as_bytes()), "text/plain; charset=utf-8");
        assert_eq!(of("/a", b"\x7fELF\x00\x01"), "application/octet-stream");
        assert_eq!(of("/a", b"%PDF-1.7 ..."), "application/pdf");
        assert!(compresses(&of("/a.svg", b"")) && compresses(&of("/a", b"text")));
        assert!(!compresses(&of("/a.png", b"")) && !compresses(&of("/a", b"\0")));
    }
}
