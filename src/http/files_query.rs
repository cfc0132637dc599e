//! The query of `/files`, as bytes: the name of a file need not be UTF-8.

use std::{
    borrow::Cow,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStringExt,
};

use percent_encoding::percent_decode;

use super::Refusal;
use crate::quote;

/// The permissions that `mode` may name: no set-id bits, and no sticky one.
const MODE_MASK: u32 = 0o777;

/// The query of `/files`; each parameter is there once at most.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FilesQuery {
    /// Percent-encoded bytes are the name, byte for byte.
    pub(super) path: Option<OsString>,
    pub(super) username: Option<String>,
    pub(super) signature: Option<String>,
    pub(super) signature_expiration: Option<String>,
    /// Of our own: whether an upload is answered once it is on the disk.
    pub(super) fsync: bool,
    /// Of our own: the permissions of a file that an upload makes, in octal.
    pub(super) mode: Option<u32>,
}

impl FilesQuery {
    /// Reads a query; parameters that are not known are ignored.
    ///
    /// # Errors
    /// 400 that names the parameter.
    pub(super) fn parse(query: &str) -> Result<Self, Refusal> {
        let mut parsed = Self::default();
        let mut fsync = None;
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode(name);
            let value = || decode(value);
            match &name[..] {
                b"path" => once("path", &mut parsed.path, OsString::from_vec(value()))?,
                b"username" => once("username", &mut parsed.username, text("username", value())?)?,
                b"signature" => {
                    once("signature", &mut parsed.signature, text("signature", value())?)?;
                }
                b"signature_expiration" => {
                    let value = text("signature_expiration", value())?;
                    once("signature_expiration", &mut parsed.signature_expiration, value)?;
                }
                b"fsync" => once("fsync", &mut fsync, boolean(&text("fsync", value())?)?)?,
                b"mode" => once("mode", &mut parsed.mode, mode(&text("mode", value())?)?)?,
                _ => {}
            }
        }
        parsed.fsync = fsync.unwrap_or_default();
        Ok(parsed)
    }

    /// The path, empty when there is none.
    pub(super) fn path(&self) -> &OsStr {
        self.path.as_deref().unwrap_or_default()
    }
}

/// `application/x-www-form-urlencoded`, whose `%` the wire has checked.
fn decode(text: &str) -> Vec<u8> {
    let text = match text.contains('+') {
        true => Cow::Owned(text.replace('+', " ")),
        false => Cow::Borrowed(text),
    };
    percent_decode(text.as_bytes()).collect()
}

fn once<T>(name: &str, there: &mut Option<T>, value: T) -> Result<(), Refusal> {
    match there.replace(value) {
        None => Ok(()),
        Some(_) => Err(Refusal::bad(format!("invalid query: duplicate parameter '{name}'"))),
    }
}

fn text(name: &str, value: Vec<u8>) -> Result<String, Refusal> {
    String::from_utf8(value)
        .map_err(|_| Refusal::bad(format!("invalid query: parameter '{name}' is not UTF-8")))
}

fn boolean(value: &str) -> Result<bool, Refusal> {
    value.parse().map_err(|_| {
        let value = quote::text(value);
        Refusal::bad(format!("invalid query: fsync must be true or false: got '{value}'"))
    })
}

fn mode(value: &str) -> Result<u32, Refusal> {
    let digits = value.strip_prefix("0o").unwrap_or(value);
    let octal = !digits.is_empty() && digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = octal.then(|| u32::from_str_radix(digits, 8).ok()).flatten();
    mode.map(|mode| mode & MODE_MASK).ok_or_else(|| {
        let value = quote::text(value);
        Refusal::bad(format!("invalid query: mode must be octal, as in 0644: got '{value}'"))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn parameters_are_decoded_once_and_paths_are_bytes() {
        let query =
            FilesQuery::parse("path=%2fa+b%2Bc%25%e9&x=y&username=%C3%A9&fsync=true&&mode=04755");
        let query = query.unwrap();
        assert_eq!(query.path().as_bytes(), b"/a b+c%\xe9");
        assert_eq!(query.username.as_deref(), Some("é"));
        assert!(query.fsync);
        assert_eq!(query.mode, Some(0o755));
        assert_eq!(FilesQuery::parse("").unwrap(), FilesQuery::default());
        assert_eq!(FilesQuery::parse("path").unwrap().path, Some(OsString::new()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (query, name) in [
            ("path=a&path=b", "path"),
            ("username=%ff", "username"),
            ("fsync=1", "fsync"),
            ("mode=rw", "mode"),
            ("mode=", "mode"),
            ("mode=%2B644", "mode"),
            ("mode=99999999999", "mode"),
        ] {
            let Refusal(status, text) = FilesQuery::parse(query).unwrap_err();
            assert_eq!(status, 400);
            assert!(text.contains(name), "{query}: {text}");
        }
    }
}
