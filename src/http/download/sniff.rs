//! What content is, by its first bytes: the algorithm of <https://mimesniff.spec.whatwg.org/>, as Go's
//! `http.DetectContentType` has it.

/// The bytes from the beginning of a file that are looked at.
const SNIFFED: usize = 512;

const TEXT: &str = "text/plain; charset=utf-8";
const BINARY: &str = "application/octet-stream";

/// HTML begins with one of these behind white space, in any case, and then a space or `>`.
const HTML: [&[u8]; 17] = [
    b"<!DOCTYPE HTML",
    b"<HTML",
    b"<HEAD",
    b"<SCRIPT",
    b"<IFRAME",
    b"<H1",
    b"<DIV",
    b"<FONT",
    b"<TABLE",
    b"<A",
    b"<STYLE",
    b"<TITLE",
    b"<B",
    b"<BODY",
    b"<BR",
    b"<P",
    b"<!--",
];

/// What content begins with, in the order of the comparison.
const EXACT: [(&[u8], &str); 26] = [
    (b"%PDF-", "application/pdf"),
    (b"%!PS-Adobe-", "application/postscript"),
    (b"\xfe\xff", "text/plain; charset=utf-16be"),
    (b"\xff\xfe", "text/plain; charset=utf-16le"),
    (b"\xef\xbb\xbf", TEXT),
    (b"\x00\x00\x01\x00", "image/x-icon"),
    (b"\x00\x00\x02\x00", "image/x-icon"),
    (b"BM", "image/bmp"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"\x89PNG\x0d\x0a\x1a\x0a", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"ID3", "audio/mpeg"),
    (b"OggS\x00", "application/ogg"),
    (b"MThd\x00\x00\x00\x06", "audio/midi"),
    (b"\x1a\x45\xdf\xa3", "video/webm"),
    (b"\x00\x01\x00\x00", "font/ttf"),
    (b"OTTO", "font/otf"),
    (b"ttcf", "font/collection"),
    (b"wOFF", "font/woff"),
    (b"wOF2", "font/woff2"),
    (b"\x1f\x8b\x08", "application/x-gzip"),
    (b"PK\x03\x04", "application/zip"),
    (b"Rar!\x1a\x07\x00", "application/x-rar-compressed"),
    (b"Rar!\x1a\x07\x01\x00", "application/x-rar-compressed"),
    (b"\x00asm", "application/wasm"),
];

/// Formats in containers: what stands at the beginning, and 8 bytes behind it.
const CONTAINERS: [(&[u8], &[u8], &str); 4] = [
    (b"RIFF", b"WEBPVP", "image/webp"),
    (b"FORM", b"AIFF", "audio/aiff"),
    (b"RIFF", b"AVI ", "video/avi"),
    (b"RIFF", b"WAVE", "audio/wave"),
];

/// The type of content that begins so.
pub(super) fn sniff(content: &[u8]) -> &'static str {
    let start = content.get(..SNIFFED).unwrap_or(content);
    let text = start.trim_ascii_start();
    if HTML.iter().any(|tag| is_tag(text, tag)) {
        return "text/html; charset=utf-8";
    }
    if text.starts_with(b"<?xml") {
        return "text/xml; charset=utf-8";
    }
    let exact = EXACT.iter().find(|(beginning, _)| start.starts_with(beginning));
    if let Some((_, kind)) = exact {
        return kind;
    }
    let at = |offset: usize, bytes: &[u8]| {
        start.get(offset..).is_some_and(|rest| rest.starts_with(bytes))
    };
    let container = CONTAINERS.iter().find(|(first, second, _)| at(0, first) && at(8, second));
    if let Some((.., kind)) = container {
        return kind;
    }
    // The end of an Embedded OpenType font's head.
    if at(34, b"LP") && start.get(..34).is_some_and(|head| head.iter().all(|byte| *byte == 0)) {
        return "application/vnd.ms-fontobject";
    }
    if is_mp4(start) {
        return "video/mp4";
    }
    let binary = |byte: &u8| matches!(byte, 0..=0x08 | 0x0b | 0x0e..=0x1a | 0x1c..=0x1f);
    if text.iter().any(binary) { BINARY } else { TEXT }
}

fn is_tag(text: &[u8], tag: &[u8]) -> bool {
    let same = text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag));
    same && matches!(text.get(tag.len()), Some(b' ' | b'>'))
}

/// A box of type `ftyp` with a brand that begins with `mp4`.
fn is_mp4(start: &[u8]) -> bool {
    let Some((length, rest)) = start.split_first_chunk::<4>() else { return false };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if start.len() < length || !length.is_multiple_of(4) || !rest.starts_with(b"ftyp") {
        return false;
    }
    let brands = start.get(8..length).unwrap_or_default().chunks(4).enumerate();
    // The second is a version.
    brands.filter(|(number, _)| *number != 1).any(|(_, brand)| brand.starts_with(b"mp4"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_what_go_takes_it_for() {
        for (content, wanted) in [
            (&b""[..], TEXT),
            ("ä text\n".as_bytes(), TEXT),
            (b"caf\xe9 latin", TEXT),
            (b"\x1b[1m terminal", TEXT),
            (b"\x7fELF\x02\x01", BINARY),
            (b"text\0", BINARY),
            (b" \n<!doctype html>", "text/html; charset=utf-8"),
            (b"<pre>", TEXT),
            (b"<P>x", "text/html; charset=utf-8"),
            (b"\n<?xml version", "text/xml; charset=utf-8"),
            (b"%PDF-1.7", "application/pdf"),
            (b"\xef\xbb\xbfbom", TEXT),
            (b"RIFF\x01\x02\x03\x04WAVEfmt ", "audio/wave"),
            (b"RIFF\x01\x02\x03\x04WEBPVP8 ", "image/webp"),
            (b"\0\0\0\x14ftypisom\0\0\x02\0mp41", "video/mp4"),
            (b"\0\0\0\x14ftypisom\0\0\x02\0qt  ", BINARY),
            (b"wOF2\0", "font/woff2"),
            (b"PK\x03\x04", "application/zip"),
        ] {
            assert_eq!(sniff(content), wanted, "{}", content.escape_ascii());
        }
        // Only the beginning counts.
        assert_eq!(sniff(&[&[b'x'; SNIFFED][..], b"\0"].concat()), TEXT);
    }
}
