//! A certificate authority of the host, among those that the sandbox's programs trust.
//!
//! Programs read one bundle. The authority's certificates are put at its end, and beside it where
//! `update-ca-certificates` looks, so that a rebuild of the bundle keeps them. That copy also tells
//! which certificates to take out when others come, even after a restart.

use std::{fs, io, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};

use super::replace::replace;

/// The bundle of Debian's and Alpine's `ca-certificates`.
pub const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";
/// Where the authority's own copy is.
pub const COPY: &str = "usr/local/share/ca-certificates/e2b-ca.crt";
/// The most bytes of certificates that are taken.
pub const MAX_BYTES: usize = 1 << 20;
/// The most bytes of a bundle that is rewritten; usual ones have 230 KB.
const MAX_BUNDLE: u64 = 16 << 20;

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
const MODE: u32 = 0o644;

/// Why certificates are not installed.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The text holds none, or something else.
    #[error("it is no PEM text of certificates: {0}")]
    NotPem(&'static str),
    /// A file could not be read or replaced.
    #[error("{path}: {source}")]
    File {
        /// The file, below the root.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Certificates in PEM, one or more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates(String);

impl Certificates {
    /// Checks the form; whether they are any good is for those who use them.
    ///
    /// # Errors
    /// [`CaError::NotPem`].
    pub fn new(text: &str) -> Result<Self, CaError> {
        if text.len() > MAX_BYTES {
            return Err(CaError::NotPem("it is longer than 1 MiB"));
        }
        let mut rest = text;
        let mut count = 0;
        while let Some(start) = rest.find(BEGIN) {
            let body = rest.get(start + BEGIN.len()..).unwrap_or_default();
            let end = body.find(END).ok_or(CaError::NotPem("a certificate has no end"))?;
            let encoded: String = body.get(..end).unwrap_or_default().split_whitespace().collect();
            match STANDARD.decode(encoded) {
                Ok(der) if !der.is_empty() => count += 1,
                _ => return Err(CaError::NotPem("a certificate is not base64")),
            }
            rest = body.get(end + END.len()..).unwrap_or_default();
        }
        match count {
            0 => Err(CaError::NotPem("it has no BEGIN CERTIFICATE")),
            _ => Ok(Self(format!("{}\n", text.trim_end()))),
        }
    }
}

/// Puts certificates into the bundle below `root`, instead of those that it put there before;
/// whether that was news. Blocks.
///
/// # Errors
/// [`CaError::File`]: among others, there is no bundle.
pub fn install(root: &Path, certificates: &Certificates) -> Result<bool, CaError> {
    let Certificates(pem) = certificates;
    let bundle_path = root.join(BUNDLE);
    let in_bundle = |source| CaError::File { path: BUNDLE, source };
    let length = fs::metadata(&bundle_path).map_err(in_bundle)?.len();
    if length > MAX_BUNDLE {
        return Err(in_bundle(io::Error::other("it is too large to be a bundle")));
    }
    let bundle = fs::read_to_string(&bundle_path).map_err(in_bundle)?;
    let copy_path = root.join(COPY);
    let in_copy = |source| CaError::File { path: COPY, source };
    let previous = fs::read_to_string(&copy_path).unwrap_or_default();

    if previous == *pem && bundle.contains(pem.as_str()) {
        return Ok(false);
    }
    let mut next = match previous.is_empty() {
        true => bundle,
        false => bundle.replacen(&previous, "", 1),
    };
    if !next.contains(pem.as_str()) {
        if !next.is_empty() && !next.ends_with('\n') {
            next.push('\n');
        }
        next.push_str(pem);
    }
    if let Some(dir) = copy_path.parent() {
        fs::create_dir_all(dir).map_err(in_copy)?;
    }
    replace(&bundle_path, next.as_bytes(), MODE).map_err(in_bundle)?;
    replace(&copy_path, pem.as_bytes(), MODE).map_err(in_copy)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(content: &str) -> String {
        format!("{BEGIN}\n{}\n{END}", STANDARD.encode(content))
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let cut = pem("x").replace(END, "");
        for text in ["", "any text", BEGIN, &cut, &pem("x").replace("eA==", "?"), &pem("")] {
            assert!(Certificates::new(text).is_err(), "{text}");
        }
        let two = format!("# one\n{}\n# two\n{}\n\n", pem("one"), pem("two"));
        assert_eq!(Certificates::new(&two).unwrap().0, format!("{}\n", two.trim_end()));
    }

    #[test]
    fn the_new_replaces_the_old_and_the_rest_stays() {
        let root = tempfile::tempdir().unwrap();
        let first = Certificates::new(&pem("first")).unwrap();
        assert!(matches!(install(root.path(), &first), Err(CaError::File { path: BUNDLE, .. })));
        let bundle = root.path().join(BUNDLE);
        fs::create_dir_all(bundle.parent().unwrap()).unwrap();
        // Without a newline at its end.
        fs::write(&bundle, pem("old")).unwrap();
        assert!(install(root.path(), &first).unwrap());
        assert!(!install(root.path(), &first).unwrap());
        let expected = format!("{}\n{}\n", pem("old"), pem("first"));
        assert_eq!(fs::read_to_string(&bundle).unwrap(), expected);
        let second = Certificates::new(&pem("second")).unwrap();
        assert!(install(root.path(), &second).unwrap());
        let expected = format!("{}\n{}\n", pem("old"), pem("second"));
        assert_eq!(fs::read_to_string(&bundle).unwrap(), expected);
        assert_eq!(fs::read_to_string(root.path().join(COPY)).unwrap(), pem("second") + "\n");
        // A bundle that was built anew has them no more.
        fs::write(&bundle, pem("old") + "\n").unwrap();
        assert!(install(root.path(), &second).unwrap());
        assert_eq!(fs::read_to_string(&bundle).unwrap(), expected);
    }
}
