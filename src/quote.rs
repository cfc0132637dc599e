//! What messages quote of a caller's own words: enough to know them again, and not all of them. An
//! error that repeats a command line of a megabyte is read by nobody, and is held in memory twice.

use std::{borrow::Cow, ffi::OsStr, path::Path};

/// The most bytes of one quoted text.
pub const MAX_QUOTED: usize = 1 << 10;

/// The text, cut to [`MAX_QUOTED`] bytes and marked where it was cut.
pub fn text(text: &str) -> Cow<'_, str> {
    let end = text.floor_char_boundary(MAX_QUOTED);
    match text.get(..end) {
        Some(start) if end < text.len() => Cow::Owned(format!("{start}…")),
        _ => Cow::Borrowed(text),
    }
}

/// The path, as [`text`].
pub fn path(path: &Path) -> String {
    text(&path.to_string_lossy()).into_owned()
}

/// The text, as [`text`] and on one line: control characters are escaped.
pub fn line(text: impl AsRef<OsStr>) -> String {
    let text = text.as_ref().to_string_lossy();
    self::text(&escaped(&text, MAX_QUOTED)).into_owned()
}

/// A message that may repeat a caller's words, on one line and of at most about 4 * [`MAX_QUOTED`] bytes.
pub fn message(message: &str) -> String {
    escaped(message, 4 * MAX_QUOTED)
}

/// The text with control characters and line separators escaped, until it is longer than `limit` bytes.
fn escaped(text: &str, limit: usize) -> String {
    let mut line = String::new();
    for char in text.chars() {
        match char.is_control() || matches!(char, '\u{2028}' | '\u{2029}') {
            true => line.extend(char.escape_default()),
            false => line.push(char),
        }
        if line.len() > limit {
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_long_is_cut_and_never_in_a_character() {
        let fits = "x".repeat(MAX_QUOTED);
        assert_eq!(text(&fits), fits);
        assert_eq!(text(&format!("{fits}y")), format!("{fits}…"));
        let cut = text(&"ä".repeat(MAX_QUOTED)).into_owned();
        assert_eq!(cut, format!("{}…", "ä".repeat(MAX_QUOTED / 2)));
        let odd = format!("x{}", "ä".repeat(MAX_QUOTED));
        assert_eq!(text(&odd), format!("x{}…", "ä".repeat((MAX_QUOTED - 1) / 2)));
    }

    #[test]
    fn one_line_whatever_is_in_it() {
        assert_eq!(line("a\nb\u{1b}\u{2028}ä"), "a\\nb\\u{1b}\\u{2028}ä");
        assert_eq!(message("a\nb"), "a\\nb");
        assert!(line("\n".repeat(MAX_QUOTED)).len() <= MAX_QUOTED + '…'.len_utf8());
    }
}
