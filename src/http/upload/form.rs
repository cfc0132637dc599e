//! A `multipart/form-data` body as a stream of parts (RFC 7578, RFC 2046 section 5.1), read as Go's
//! `mime/multipart` reads it: lines may end in LF alone if the first boundary does, and parts in
//! quoted-printable are decoded.
//!
//! At most one chunk of the body is in memory, and what is kept back of the one before because it may be
//! the beginning of a boundary. What stands between two contents is bounded by [`MAX_HEAD`].

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use memchr::memmem;

use super::{
    disposition::{Parameters, parse},
    quoted_printable::QuotedPrintable,
};

/// The most bytes between two contents: boundary and headers; and before the first boundary.
pub(super) const MAX_HEAD: usize = 64 << 10;

/// What is wrong with a form.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormError {
    /// No boundary where there must be one.
    #[error("multipart: NextPart: EOF")]
    NoBoundary,
    /// The body ends in the middle of a part.
    #[error("unexpected EOF")]
    Truncated,
    /// More than [`MAX_HEAD`].
    #[error("the headers of a part are longer than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// A line of a part's head.
    #[error("multipart: NextPart: malformed line in a part's headers: '{0}'")]
    Malformed(String),
    /// The content of a part in quoted-printable.
    #[error("quotedprintable: {0}")]
    QuotedPrintable(#[from] super::quoted_printable::Invalid),
    /// The body cannot be read.
    #[error("{0}")]
    Body(String),
}

/// What the head of a part says of it.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// `Content-Disposition`, if it is `form-data`.
    disposition: Option<Parameters>,
    quoted_printable: bool,
}

impl Head {
    /// The name of the form's field.
    pub(super) fn name(&self) -> Option<&[u8]> {
        self.disposition.as_ref()?.get("name")
    }

    /// The name of the file, as the client wrote it.
    pub(super) fn file_name(&self) -> Option<&[u8]> {
        self.disposition.as_ref()?.get("filename")
    }
}

/// A form that is being read.
pub(super) struct Form<S> {
    chunks: S,
    /// The body has ended; the buffer has what is left of it.
    ended: bool,
    buffer: BytesMut,
    /// `--` and the boundary.
    dashed: Vec<u8>,
    /// What ends lines, and the dashed boundary.
    delimiter: Vec<u8>,
    at: At,
    decoder: Option<QuotedPrintable>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first boundary.
    Preamble,
    /// The buffer begins with a dashed boundary.
    Boundary,
    /// In the content of a part, of which nothing has been read if `first`.
    Content { first: bool },
    /// Behind the last boundary.
    End,
}

/// Where the content of a part ends, as far as can be seen.
enum Found {
    /// So many bytes of content are in the buffer, and more may come.
    Content(usize),
    /// So many bytes of content, and then so many that end the line before the boundary.
    End(usize, usize),
}

impl<S, E> Form<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    /// Reads a form with this boundary.
    pub(super) fn new(chunks: S, boundary: &[u8]) -> Self {
        let dashed = [b"--", boundary].concat();
        let delimiter = [b"\r\n", &dashed[..]].concat();
        let (buffer, at) = (BytesMut::new(), At::Preamble);
        Self { chunks, ended: false, buffer, dashed, delimiter, at, decoder: None }
    }

    /// The head of the next part, whose content [`Self::chunk`] then returns; `None` behind the last one.
    /// What is left of the part before is skipped.
    ///
    /// # Errors
    /// See [`FormError`].
    pub(super) async fn next_part(&mut self) -> Result<Option<Head>, FormError> {
        // Skipped content is not decoded: whether it could be does not matter.
        self.decoder = None;
        while matches!(self.at, At::Content { .. }) {
            self.raw_chunk().await?;
        }
        if self.at == At::Preamble {
            self.skip_preamble().await?;
        }
        if self.at == At::End {
            return Ok(None);
        }
        let mut bounded = MAX_HEAD;
        self.fill_to(self.dashed.len() + 2).await?;
        self.buffer.advance(self.dashed.len());
        if self.buffer.starts_with(b"--") {
            self.at = At::End;
            return Ok(None);
        }
        let (line, end) = self.line(&mut bounded).await?;
        if !line.trim_ascii().is_empty() {
            return Err(FormError::NoBoundary);
        }
        self.delimiter = [end, &self.dashed].concat();
        let head = self.head(&mut bounded).await?;
        self.decoder = head.quoted_printable.then(QuotedPrintable::default);
        self.at = At::Content { first: true };
        Ok(Some(head))
    }

    /// More of the content of the part; `None` at its end.
    ///
    /// # Errors
    /// See [`FormError`].
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, FormError> {
        loop {
            let raw = self.raw_chunk().await?;
            let Some(decoder) = &mut self.decoder else {
                return Ok(raw);
            };
            let decoded = match raw {
                Some(raw) => decoder.decode(&raw)?,
                None => {
                    let last = decoder.finish()?;
                    self.decoder = None;
                    return Ok((!last.is_empty()).then(|| last.into()));
                }
            };
            if !decoded.is_empty() {
                return Ok(Some(decoded.into()));
            }
        }
    }

    async fn raw_chunk(&mut self) -> Result<Option<Bytes>, FormError> {
        loop {
            let At::Content { first } = self.at else {
                return Ok(None);
            };
            match self.find_end(first) {
                Found::End(0, line_end) => {
                    self.buffer.advance(line_end);
                    self.at = At::Boundary;
                    return Ok(None);
                }
                Found::Content(0) if self.ended => return Err(FormError::Truncated),
                Found::Content(0) => self.fill().await?,
                Found::Content(length) | Found::End(length, _) => {
                    self.at = At::Content { first: false };
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
            }
        }
    }

    fn find_end(&self, first: bool) -> Found {
        let buffer = &self.buffer[..];
        // A part without content may have its end right behind its head.
        if first && buffer.len() <= self.dashed.len() {
            if self.dashed.starts_with(buffer) && !self.ended {
                return Found::Content(0);
            }
        } else if first && buffer.starts_with(&self.dashed) {
            match self.is_boundary(self.dashed.len()) {
                Some(true) => return Found::End(0, 0),
                Some(false) => {}
                None => return Found::Content(0),
            }
        }
        let line_end = self.delimiter.len() - self.dashed.len();
        for at in memmem::find_iter(buffer, &self.delimiter) {
            match self.is_boundary(at + self.delimiter.len()) {
                Some(true) => return Found::End(at, line_end),
                Some(false) => {}
                None => return Found::Content(at),
            }
        }
        match self.ended {
            // What there is comes first, and then the error.
            true => Found::Content(buffer.len()),
            // The rest may be the beginning of a boundary.
            false => Found::Content(buffer.len().saturating_sub(self.delimiter.len())),
        }
    }

    /// Whether what stands in the buffer at `end` may come behind a boundary: content, or the boundary of a
    /// form inside, may begin with it. `None` until enough has come.
    fn is_boundary(&self, end: usize) -> Option<bool> {
        match (self.buffer.get(end), self.buffer.get(end + 1)) {
            (Some(b'-'), Some(next)) => Some(*next == b'-'),
            (Some(b'-'), None) => self.ended.then_some(false),
            (Some(b' ' | b'\t' | b'\r' | b'\n'), _) => Some(true),
            (Some(_), _) => Some(false),
            (None, _) => self.ended.then_some(true),
        }
    }

    /// Skips what stands before the first boundary, which begins a line.
    async fn skip_preamble(&mut self) -> Result<(), FormError> {
        let mut bounded = MAX_HEAD;
        loop {
            self.fill_to(self.dashed.len()).await?;
            if self.buffer.starts_with(&self.dashed) {
                self.at = At::Boundary;
                return Ok(());
            }
            self.line(&mut bounded).await?;
        }
    }

    async fn head(&mut self, bounded: &mut usize) -> Result<Head, FormError> {
        let mut lines: Vec<Vec<u8>> = Vec::new();
        loop {
            let (line, _) = self.line(bounded).await?;
            match lines.last_mut() {
                _ if line.is_empty() => break,
                Some(last) if line.starts_with(b" ") || line.starts_with(b"\t") => {
                    last.push(b' ');
                    last.extend_from_slice(line.trim_ascii());
                }
                _ => lines.push(line),
            }
        }
        let mut head = Head::default();
        for line in lines {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                let line = String::from_utf8_lossy(&line);
                return Err(FormError::Malformed(crate::quote::text(&line).into_owned()));
            };
            let (name, value) = line.split_at(colon);
            let value = value.get(1..).unwrap_or_default().trim_ascii();
            if name.eq_ignore_ascii_case(b"content-disposition") {
                let (kind, parameters) = parse(value);
                head.disposition = kind.eq_ignore_ascii_case(b"form-data").then_some(parameters);
            } else if name.eq_ignore_ascii_case(b"content-transfer-encoding") {
                head.quoted_printable = value.eq_ignore_ascii_case(b"quoted-printable");
            }
        }
        Ok(head)
    }

    /// The next line, and what ends it.
    async fn line(&mut self, bounded: &mut usize) -> Result<(Vec<u8>, &'static [u8]), FormError> {
        let mut searched = 0;
        let length = loop {
            let new = self.buffer.get(searched..).unwrap_or_default();
            if let Some(at) = memchr::memchr(b'\n', new) {
                break searched + at;
            }
            searched = self.buffer.len();
            if searched > *bounded {
                return Err(FormError::HeadTooLong);
            }
            if self.ended {
                return Err(FormError::NoBoundary);
            }
            self.fill().await?;
        };
        *bounded = bounded.checked_sub(length + 1).ok_or(FormError::HeadTooLong)?;
        let mut line = self.buffer.split_to(length).to_vec();
        self.buffer.advance(1);
        if line.last() != Some(&b'\r') {
            return Ok((line, b"\n"));
        }
        line.pop();
        Ok((line, b"\r\n"))
    }

    /// Reads until the buffer has so many bytes, or all that there are.
    async fn fill_to(&mut self, bytes: usize) -> Result<(), FormError> {
        while self.buffer.len() < bytes && !self.ended {
            self.fill().await?;
        }
        if self.buffer.len() < bytes.min(self.dashed.len()) {
            return Err(FormError::NoBoundary);
        }
        Ok(())
    }

    /// Reads one chunk more.
    async fn fill(&mut self) -> Result<(), FormError> {
        match self.chunks.next().await {
            Some(Ok(chunk)) if self.buffer.is_empty() => {
                self.buffer = chunk.try_into_mut().unwrap_or_else(|chunk| chunk[..].into());
            }
            Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
            Some(Err(error)) => return Err(FormError::Body(error.to_string())),
            None => self.ended = true,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    type Parts = Vec<(Option<Vec<u8>>, Option<Vec<u8>>, Vec<u8>)>;

    /// All parts of a body that comes in pieces of that size.
    fn read(body: &[u8], piece: usize) -> Result<Parts, FormError> {
        let chunks = body
            .chunks(piece.max(1))
            .map(|piece| Ok::<_, Infallible>(Bytes::copy_from_slice(piece)));
        let chunks: Vec<_> = chunks.collect();
        let mut form = Form::new(futures_util::stream::iter(chunks), b"XX");
        futures_util::FutureExt::now_or_never(async {
            let mut parts = Vec::new();
            while let Some(head) = form.next_part().await? {
                let mut content = Vec::new();
                while let Some(chunk) = form.chunk().await? {
                    content.extend_from_slice(&chunk);
                }
                let owned = |text: Option<&[u8]>| text.map(<[u8]>::to_vec);
                parts.push((owned(head.name()), owned(head.file_name()), content));
            }
            Ok(parts)
        })
        .unwrap()
    }

    fn part(
        name: &str,
        file: Option<&str>,
        content: &[u8],
    ) -> (Option<Vec<u8>>, Option<Vec<u8>>, Vec<u8>) {
        (Some(name.into()), file.map(Into::into), content.into())
    }

    const TWO: &str = "preamble\r\n--XX  \r\nContent-Disposition: form-data; name=\"file\"; filename=\"/a/b\"\r\n\
        Content-Type: text/plain\r\n\r\none\r\n--XXY\r\n\r\n--XX\r\ncontent-disposition:form-data;\r\n name=x\r\n\r\n\r\n--XX--\r\nepilogue";

    #[test]
    fn parts_come_whole_however_the_body_is_cut() {
        for piece in 1..=TWO.len() {
            let parts = read(TWO.as_bytes(), piece).unwrap();
            let wanted = [part("file", Some("/a/b"), b"one\r\n--XXY\r\n"), part("x", None, b"")];
            assert_eq!(parts, wanted, "{piece}");
        }
    }

    #[test]
    fn lines_may_end_in_lf_alone() {
        let body = TWO.replace("\r\n", "\n").replace("one\n", "one\r\n");
        for piece in [1, 7, body.len()] {
            let parts = read(body.as_bytes(), piece).unwrap();
            assert_eq!(parts[0], part("file", Some("/a/b"), b"one\r\n--XXY\n"), "{piece}");
            assert_eq!(parts.len(), 2);
        }
    }

    #[test]
    fn a_boundary_and_one_dash_is_content() {
        for content in ["--XX-foo\r\ny", "x\r\n--XX-foo\r\ny", "--XX-in\r\n\r\nz\r\n--XX-in--"] {
            let head = "--XX\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\n";
            let body = format!("{head}{content}\r\n--XX--\r\n");
            for piece in 1..=body.len() {
                let parts = read(body.as_bytes(), piece).unwrap();
                assert_eq!(parts, [part("file", None, content.as_bytes())], "{piece}");
            }
        }
    }

    #[test]
    fn an_empty_part_ends_right_behind_its_head() {
        let body = b"--XX\r\nContent-Disposition: form-data; name=file\r\n\r\n--XX--\r\n";
        for piece in 1..=body.len() {
            assert_eq!(read(body, piece).unwrap(), [part("file", None, b"")]);
        }
    }

    #[test]
    fn quoted_printable_is_decoded() {
        let body = b"--XX\r\nContent-Disposition: form-data; name=file\r\nContent-Transfer-Encoding: Quoted-Printable\r\n\r\na=3Db=\r\nc =C3=A9 \r\nd\r\n--XX--";
        for piece in 1..=body.len() {
            let parts = read(body, piece).unwrap();
            assert_eq!(parts[0].2, "a=bc é\r\nd".as_bytes(), "{piece}");
        }
    }

    #[test]
    fn what_is_broken_says_how() {
        let error = |body: &[u8]| read(body, 5).unwrap_err().to_string();
        assert_eq!(error(b""), "multipart: NextPart: EOF");
        assert_eq!(error(b"nothing"), "multipart: NextPart: EOF");
        assert_eq!(
            error(b"--XX\r\nno colon\r\n\r\n"),
            "multipart: NextPart: malformed line in a part's headers: 'no colon'"
        );
        assert_eq!(error(b"--XX\r\na: b\r\n\r\ncontent\r\n--X"), "unexpected EOF");
        let long = [b"--XX\r\na: ", &vec![b'x'; MAX_HEAD][..], b"\r\n\r\n"].concat();
        assert!(error(&long).contains("longer than"));
    }

    proptest! {
        #[test]
        fn any_content_survives(
            contents in prop::collection::vec(prop::collection::vec(prop::sample::select(b"\r\n-Xa".to_vec()), 0..40), 1..4),
            piece in 1_usize..50,
        ) {
            // What would be a boundary cannot be content.
            prop_assume!(contents.iter().all(|content| memmem::find(content, b"--XX").is_none()));
            let mut body = Vec::new();
            for content in &contents {
                body.extend_from_slice(b"--XX\r\nContent-Disposition: form-data; name=file\r\n\r\n");
                body.extend_from_slice(content);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"--XX--\r\n");
            let parts = read(&body, piece).unwrap();
            let read: Vec<_> = parts.into_iter().map(|(.., content)| content).collect();
            prop_assert_eq!(read, contents);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(prop::sample::select(b"\r\n-X:a=\";".to_vec()), 0..200), piece in 1_usize..50) {
            let _ = read(&[b"--XX\r\n", &bytes[..]].concat(), piece);
            let _ = read(&bytes, piece);
        }
    }
}
