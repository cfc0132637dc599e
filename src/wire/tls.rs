//! TLS on TCP listeners: `tls://HOST:PORT?cert=PATH&key=PATH[&client_ca=PATH]`.
//!
//! rustls with ring, TLS 1.2 and 1.3, and ALPN for HTTP/2 and HTTP/1.1. With a `client_ca` a client
//! that shows no certificate of it does not get a connection. The files are read once, at the start.
//!
//! It is in the binary only with the cargo feature `tls`: ring needs a C compiler for the target,
//! and where envd is reached over vsock or through a proxy, TLS is somebody else's.

use std::path::PathBuf;

/// Where a listener's certificate and key are, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of clients; without them no client shows a certificate.
    pub client_ca: Option<PathBuf>,
}

/// Why a listener has no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The binary has none.
    #[error("this envd was built without TLS (the cargo feature `tls`)")]
    NotBuilt,
    /// A file holds no PEM, or cannot be read.
    #[error("'{}': {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What the files hold does not fit together.
    #[error("{0}")]
    Config(String),
}

#[cfg(not(feature = "tls"))]
mod absent {
    use std::convert::Infallible;

    use super::{Files, TlsError};

    /// There is none.
    #[derive(Debug, Clone)]
    pub struct Acceptor(Infallible);

    impl Acceptor {
        /// Always fails.
        ///
        /// # Errors
        /// [`TlsError::NotBuilt`].
        pub fn new(_: &Files) -> Result<Self, TlsError> {
            Err(TlsError::NotBuilt)
        }

        /// Never called.
        pub async fn accept(
            self,
            _: tokio::net::TcpStream,
        ) -> std::io::Result<(tokio::net::TcpStream, bool)> {
            match self.0 {}
        }
    }
}

#[cfg(not(feature = "tls"))]
pub use absent::Acceptor;
#[cfg(feature = "tls")]
pub use present::Acceptor;

#[cfg(feature = "tls")]
mod present {
    use std::{io, path::Path, sync::Arc};

    use tokio::net::TcpStream;
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{
            RootCertStore, ServerConfig,
            crypto::ring,
            pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
            server::WebPkiClientVerifier,
        },
        server::TlsStream,
    };

    use super::{Files, TlsError};

    /// Makes connections secret.
    #[derive(Clone)]
    pub struct Acceptor {
        acceptor: TlsAcceptor,
        /// Whether every client that gets through has shown a certificate.
        verifies: bool,
    }

    impl std::fmt::Debug for Acceptor {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Acceptor").field("verifies", &self.verifies).finish_non_exhaustive()
        }
    }

    impl Acceptor {
        /// Reads the files. Blocks.
        ///
        /// # Errors
        /// [`TlsError`], naming the file.
        pub fn new(files: &Files) -> Result<Self, TlsError> {
            let provider = Arc::new(ring::default_provider());
            let wrong = |error: &dyn std::fmt::Display| TlsError::Config(error.to_string());
            let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
                .map_err(|error| wrong(&error))?;
            let builder = match &files.client_ca {
                None => builder.with_no_client_auth(),
                Some(path) => {
                    let mut roots = RootCertStore::empty();
                    for certificate in certificates(path)? {
                        roots.add(certificate).map_err(|error| TlsError::File {
                            path: path.clone(),
                            why: error.to_string(),
                        })?;
                    }
                    let verifier =
                        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                            .build()
                            .map_err(|error| wrong(&error))?;
                    builder.with_client_cert_verifier(verifier)
                }
            };
            let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| TlsError::File {
                path: files.key.clone(),
                why: error.to_string(),
            })?;
            let mut config = builder
                .with_single_cert(certificates(&files.cert)?, key)
                .map_err(|error| wrong(&error))?;
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
            let acceptor = TlsAcceptor::from(Arc::new(config));
            Ok(Self { acceptor, verifies: files.client_ca.is_some() })
        }

        /// Greets a client; whether it has shown a certificate of the listener's authority.
        ///
        /// # Errors
        /// It does not speak TLS, or shows no such certificate where it must.
        pub async fn accept(self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, bool)> {
            let stream = self.acceptor.accept(stream).await?;
            Ok((stream, self.verifies))
        }
    }

    fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let wrong = |why: String| TlsError::File { path: path.to_owned(), why };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
            .map_err(|error| wrong(error.to_string()))?
            .collect();
        let certificates = certificates.map_err(|error| wrong(error.to_string()))?;
        match certificates.is_empty() {
            true => Err(wrong("it holds no certificate".to_owned())),
            false => Ok(certificates),
        }
    }
}
