//! What a file is called and what it is: the headers that say so.

use std::{os::unix::ffi::OsStrExt, path::Path};

use http::HeaderValue;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use super::{mime_types::MimeTypes, sniff::sniff};

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

/// By the name's extension, else by the beginning, as Go's `http.ServeContent` does it.
pub(super) fn content_type(path: &Path, first: &[u8]) -> HeaderValue {
    let known = MimeTypes::of_guest().get(path);
    let known = known.and_then(|kind| HeaderValue::try_from(kind).ok());
    known.unwrap_or_else(|| HeaderValue::from_static(sniff(first)))
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
    let name = path.file_name().unwrap_or_default().as_bytes();
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let printable = |byte: &u8| (0x20..0x7f).contains(byte);
    if !name.iter().all(printable) {
        return format!("inline; filename*=utf-8''{}", percent_encode(name, EXTENDED));
    }
    let name = String::from_utf8_lossy(name);
    if !name.is_empty() && name.as_bytes().iter().all(token) {
        return format!("inline; filename={name}");
    }
    let quoted = name.replace('\\', "\\\\").replace('"', "\\\"");
    format!("inline; filename=\"{quoted}\"")
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
            ("/", "inline; filename=\"\""),
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
