//! A certificate authority of the host, among those that the sandbox's programs trust.
//!
//! Programs read one bundle. The authority's certificates are put at its end, and beside it where
//! `update-ca-certificates` looks, so that a rebuild of the bundle keeps them. That copy also tells
//! which certificates to take out when others come, even after a restart.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use x509_cert::{
    certificate::{CertificateInner, Raw},
    der::Decode,
};

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
    #[error("it is not a PEM text of certificates: {0}")]
    NotPem(&'static str),
    /// One of them, counted from 1, is not a certificate of X.509 in DER.
    #[error("certificate {number} is not valid: {why}")]
    NotDer {
        /// Which.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
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
    /// Checks that each is a certificate of X.509; whether it is trustworthy, or valid today, is for
    /// those who use it. A single one that is not would make many libraries refuse the whole bundle.
    ///
    /// # Errors
    /// [`CaError::NotPem`], [`CaError::NotDer`].
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
            let Ok(der) = STANDARD.decode(encoded) else {
                return Err(CaError::NotPem("a certificate is not base64"));
            };
            count += 1;
            // The structure only: there are authorities with serial numbers or dates against the rules.
            CertificateInner::<Raw>::from_der(&der)
                .map_err(|error| CaError::NotDer { number: count, why: error.to_string() })?;
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
    let pem = certificates.0.as_bytes();
    let bundle_path = root.join(BUNDLE);
    let in_bundle = |source| CaError::File { path: BUNDLE, source };
    // Bytes: the comments of a bundle are in any encoding.
    let bundle = read(&bundle_path).map_err(in_bundle)?;
    let copy_path = root.join(COPY);
    let in_copy = |source| CaError::File { path: COPY, source };
    let previous = read(&copy_path).unwrap_or_default();

    if previous == pem && find(&bundle, pem).is_some() {
        return Ok(false);
    }
    let mut next = bundle;
    if let Some(at) = find(&next, &previous) {
        next.drain(at..at + previous.len());
    }
    if find(&next, pem).is_none() {
        if !next.is_empty() && !next.ends_with(b"\n") {
            next.push(b'\n');
        }
        next.extend_from_slice(pem);
    }
    if let Some(dir) = copy_path.parent() {
        fs::create_dir_all(dir).map_err(in_copy)?;
    }
    replace(&bundle_path, &next, MODE).map_err(in_bundle)?;
    replace(&copy_path, pem, MODE).map_err(in_copy)?;
    Ok(true)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BUNDLE + 1).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(length) if length <= MAX_BUNDLE => Ok(bytes),
        _ => Err(io::Error::other("it is too large to be a bundle")),
    }
}

/// Where some bytes begin; nothing is nowhere.
fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    match wanted.is_empty() {
        true => None,
        false => memchr::memmem::find(bytes, wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = include_str!("../../tests/common/pem/first.pem");
    const SECOND: &str = include_str!("../../tests/common/pem/second.pem");
    const OLD: &[u8] = b"# Latin-1: \xe4\nOLD";

    fn pem(der: &[u8]) -> String {
        format!("{BEGIN}\n{}\n{END}", STANDARD.encode(der))
    }

    fn der(pem: &str) -> Vec<u8> {
        let encoded = pem.replace(BEGIN, "").replace(END, "");
        STANDARD.decode(encoded.split_whitespace().collect::<String>()).unwrap()
    }

    #[test]
    fn what_is_not_a_certificate_is_refused() {
        let cut = FIRST.replace(END, "");
        let odd = FIRST.replacen("MII", "M?I", 1);
        for text in ["", "any text", BEGIN, &cut, &odd] {
            assert!(matches!(Certificates::new(text), Err(CaError::NotPem(_))), "{text}");
        }
        let good = der(FIRST);
        let without = |at: usize| [&good[..at], &good[at + 1..]].concat();
        let bad = [
            Vec::new(),
            b"x".to_vec(),
            // An empty SEQUENCE, and a key instead of a certificate.
            vec![0x30, 0],
            vec![0x30, 6, 2, 1, 0, 2, 1, 0],
            good[..good.len() - 1].to_vec(),
            [&good[..], b"\0"].concat(),
            without(3),
            without(20),
            without(good.len() / 2),
        ];
        for der in &bad {
            let error = Certificates::new(&pem(der)).unwrap_err();
            assert!(matches!(error, CaError::NotDer { number: 1, .. }), "{der:x?}: {error}");
            let error = Certificates::new(&format!("{FIRST}{}", pem(der))).unwrap_err();
            assert!(matches!(error, CaError::NotDer { number: 2, .. }), "{der:x?}: {error}");
        }
        let two = format!("# one\n{FIRST}\n# two\r\n{SECOND}\n\n");
        assert_eq!(Certificates::new(&two).unwrap().0, format!("{}\n", two.trim_end()));
    }

    #[test]
    fn the_new_replaces_the_old_and_the_rest_stays() {
        let root = tempfile::tempdir().unwrap();
        let first = Certificates::new(FIRST).unwrap();
        assert!(matches!(install(root.path(), &first), Err(CaError::File { path: BUNDLE, .. })));
        let bundle = root.path().join(BUNDLE);
        fs::create_dir_all(bundle.parent().unwrap()).unwrap();
        // Without a newline at its end, and not in UTF-8.
        fs::write(&bundle, OLD).unwrap();
        assert!(install(root.path(), &first).unwrap());
        assert!(!install(root.path(), &first).unwrap());
        let expected = [OLD, b"\n", FIRST.as_bytes()].concat();
        assert_eq!(fs::read(&bundle).unwrap(), expected);
        let second = Certificates::new(SECOND).unwrap();
        assert!(install(root.path(), &second).unwrap());
        let expected = [OLD, b"\n", SECOND.as_bytes()].concat();
        assert_eq!(fs::read(&bundle).unwrap(), expected);
        assert_eq!(fs::read_to_string(root.path().join(COPY)).unwrap(), SECOND);
        // A bundle that was built anew has them no more.
        fs::write(&bundle, [OLD, b"\n"].concat()).unwrap();
        assert!(install(root.path(), &second).unwrap());
        assert_eq!(fs::read(&bundle).unwrap(), expected);
    }
}
