//! The parameters of `Content-Disposition` and `Content-Type`, as bytes: names of files need not be UTF-8.
//!
//! As Go's `mime.ParseMediaType` reads them: in a quoted value a backslash quotes a special character, and
//! stands for itself before any other; `name*=charset'language'value` and `name*0=`, `name*1*=` are those of
//! RFC 2231. Percent signs in a plain value mean nothing.

use std::collections::BTreeMap;

/// The characters that a backslash quotes (RFC 2045, section 5.1).
const SPECIAL: &[u8] = br#"()<>@,;:\"/[]?="#;

/// The most pieces of one value.
const MAX_PIECES: usize = 256;

/// Parameters by their names in lower case.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters(BTreeMap<String, Vec<u8>>);

impl Parameters {
    /// The value of a parameter.
    pub(super) fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

/// What stands before the first `;`, and the parameters behind it. Of two with one name the first counts.
pub(super) fn parse(value: &[u8]) -> (&[u8], Parameters) {
    let end = value.iter().position(|byte| *byte == b';').unwrap_or(value.len());
    let (kind, mut rest) = value.split_at(end);
    let mut raw = BTreeMap::new();
    loop {
        rest = rest.trim_ascii_start();
        rest = rest.strip_prefix(b";").unwrap_or(rest).trim_ascii_start();
        if rest.is_empty() {
            break;
        }
        let end = rest.iter().position(|byte| matches!(byte, b'=' | b';')).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let name = String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase();
        let value;
        (value, rest) = match after.strip_prefix(b"=").map(<[u8]>::trim_ascii_start) {
            Some(after) => match after.strip_prefix(b"\"") {
                Some(quoted) => unquote(quoted),
                None => {
                    let end = after.iter().position(|byte| *byte == b';').unwrap_or(after.len());
                    let (token, rest) = after.split_at(end);
                    (token.trim_ascii().to_vec(), rest)
                }
            },
            None => (Vec::new(), after),
        };
        raw.entry(name).or_insert(value);
    }
    (kind.trim_ascii(), Parameters(decode(raw)))
}

/// A value up to its closing quote, and what stands behind that.
fn unquote(quoted: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut value = Vec::new();
    let mut bytes = quoted.iter().copied().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return (value, quoted.get(at + 1..).unwrap_or_default()),
            b'\\' => match quoted.get(at + 1) {
                Some(next) if SPECIAL.contains(next) => {
                    value.push(*next);
                    bytes.next();
                }
                _ => value.push(byte),
            },
            _ => value.push(byte),
        }
    }
    (value, &[])
}

/// Puts values in pieces together, and decodes those that say that they are encoded.
fn decode(mut raw: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let starred: Vec<String> = raw.keys().filter(|name| name.contains('*')).cloned().collect();
    for name in starred {
        let base = name.split('*').next().unwrap_or_default().to_owned();
        let value = match raw.get(&format!("{base}*")) {
            Some(value) => extended(value),
            None => pieces(&raw, &base),
        };
        raw.remove(&name);
        // It says more than a plain one, which is there for those who do not know it.
        if let Some(value) = value {
            raw.insert(base, value);
        }
    }
    raw
}

fn pieces(raw: &BTreeMap<String, Vec<u8>>, base: &str) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    for number in 0..MAX_PIECES {
        if let Some(plain) = raw.get(&format!("{base}*{number}")) {
            whole.extend_from_slice(plain);
        } else if let Some(encoded) = raw.get(&format!("{base}*{number}*")) {
            match number {
                0 => whole.extend(extended(encoded)?),
                _ => whole.extend(percent_encoding::percent_decode(encoded)),
            }
        } else {
            return (number > 0).then_some(whole);
        }
    }
    Some(whole)
}

/// `charset'language'value`; `None` in another charset than UTF-8 or ASCII.
fn extended(value: &[u8]) -> Option<Vec<u8>> {
    let mut parts = value.splitn(3, |byte| *byte == b'\'');
    let charset = parts.next()?;
    let known = [&b"utf-8"[..], b"us-ascii"].iter().any(|name| charset.eq_ignore_ascii_case(name));
    let encoded = parts.nth(1).filter(|_| known)?;
    Some(percent_encoding::percent_decode(encoded).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_name(parameters: &str) -> Option<String> {
        let value = format!("form-data; name=\"file\"; {parameters}");
        let (kind, parameters) = parse(value.as_bytes());
        assert_eq!((kind, parameters.get("name")), (&b"form-data"[..], Some(&b"file"[..])));
        parameters.get("filename").map(|name| String::from_utf8_lossy(name).into_owned())
    }

    #[test]
    fn names_of_files_are_what_their_senders_meant() {
        for (parameters, wanted) in [
            (r#"filename="/a b/c;d+e%41.txt""#, "/a b/c;d+e%41.txt"),
            (r#"filename="two\\slashes""#, r"two\slashes"),
            (r#"filename="one\slash""#, r"one\slash"),
            (r#"filename="esc\"quote""#, r#"esc"quote"#),
            (r#"filename="q%22uote""#, "q%22uote"),
            (r#"filename="end\""#, r#"end""#),
            (r#"FileName = "x" "#, "x"),
            (r"filename=/plain/name ; x=y", "/plain/name"),
            ("filename*=UTF-8''/d/%E7%8E%B0x", "/d/现x"),
            ("filename=\"plain\"; filename*=utf-8'en'%C3%A9", "é"),
            ("filename*=utf-8''%C3%A9; filename=\"plain\"", "é"),
            ("filename=\"plain\"; filename*=latin1''%E9", "plain"),
            ("filename*0=\"a b\"; filename*1*=%20c; filename*2=d", "a b cd"),
            ("filename=first; filename=second", "first"),
        ] {
            assert_eq!(file_name(parameters).as_deref(), Some(wanted), "{parameters}");
        }
        assert_eq!(file_name("x=y"), None);
        assert_eq!(file_name("filename*=bad"), None);
        let (_, parameters) = parse(b"form-data; filename=\"caf\xe9\"");
        assert_eq!(parameters.get("filename"), Some(&b"caf\xe9"[..]));
    }
}
