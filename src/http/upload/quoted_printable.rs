//! Decodes quoted-printable content (RFC 2045, section 6.7) piece by piece.

/// The longest line; the RFC allows 76 characters.
const MAX_LINE: usize = 64 << 10;

/// What is not quoted-printable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    /// No two hexadecimal digits behind `=`.
    #[error("invalid hex byte 0x{0:02x} behind '='")]
    Escape(u8),
    /// A line that is longer than [`MAX_LINE`].
    #[error("a line is longer than {MAX_LINE} bytes")]
    Line,
}

/// A decoder; it keeps the line that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct QuotedPrintable(Vec<u8>);

impl QuotedPrintable {
    /// What the bytes, together with those before, are decoded to.
    ///
    /// # Errors
    /// [`Invalid`].
    pub(super) fn decode(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Invalid> {
        let mut decoded = Vec::with_capacity(bytes.len());
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.0.len() + piece.len() > MAX_LINE {
                return Err(Invalid::Line);
            }
            self.0.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                line(&self.0, &mut decoded)?;
                self.0.clear();
            }
        }
        Ok(decoded)
    }

    /// What the last line is decoded to, which nothing ends.
    ///
    /// # Errors
    /// [`Invalid`].
    pub(super) fn finish(&mut self) -> Result<Vec<u8>, Invalid> {
        let mut decoded = Vec::new();
        line(&std::mem::take(&mut self.0), &mut decoded)?;
        Ok(decoded)
    }
}

fn line(line: &[u8], decoded: &mut Vec<u8>) -> Result<(), Invalid> {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    let end = line.get(text.len()..).unwrap_or_default();
    // Spaces at the end of a line were added on the way.
    let text = text.trim_ascii_end();
    let (text, end) = match text.strip_suffix(b"=") {
        Some(text) => (text, &[][..]),
        None => (text, end),
    };
    let mut rest = text.iter().copied();
    while let Some(byte) = rest.next() {
        if byte != b'=' {
            decoded.push(byte);
            continue;
        }
        let mut value = 0;
        for _ in 0..2 {
            let digit = rest.next().unwrap_or(b'\n');
            let number =
                char::from(digit).to_digit(16).and_then(|number| u8::try_from(number).ok());
            value = value << 4 | number.ok_or(Invalid::Escape(digit))?;
        }
        decoded.push(value);
    }
    decoded.extend_from_slice(end);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_lines_whatever_ends_them() {
        let mut decoder = QuotedPrintable::default();
        assert_eq!(decoder.decode(b"a=3D\r\nb=\nc \t\n=e9").unwrap(), b"a=\r\nbc\n");
        assert_eq!(decoder.finish().unwrap(), b"\xe9");
        let error = decoder.decode(b"=4x\n").unwrap_err();
        assert_eq!(error.to_string(), "invalid hex byte 0x78 behind '='");
        assert_eq!(
            QuotedPrintable::default().decode(&vec![b'x'; MAX_LINE + 1]),
            Err(Invalid::Line)
        );
    }
}
