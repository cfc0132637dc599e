//! What a sandbox is told to be, checked before anything of it is done.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    access::Token,
    guest::{
        ca::Certificates,
        clock::Moment,
        nfs::{MAX_VOLUMES, NfsError, Volume},
    },
    quote,
};

/// What becomes of the access token.
#[derive(Debug, Clone, Default)]
pub enum TokenChange {
    /// Nothing.
    #[default]
    Keep,
    /// It is forgotten.
    Clear,
    /// It is this one.
    Set(Token),
}

impl TokenChange {
    /// The token that it brings.
    pub fn token(&self) -> Option<&Token> {
        match self {
            Self::Set(token) => Some(token),
            Self::Keep | Self::Clear => None,
        }
    }
}

/// Everything that a sandbox can be told, each part only if it is there.
#[derive(Debug, Default)]
pub struct Request {
    /// The access token.
    pub token: TokenChange,
    /// When the request was made, by the host's clock. One that is older than the last is stale.
    pub timestamp: Option<Moment>,
    /// All variables that the sandbox's owner sets for every process; those of before go.
    pub env: Option<BTreeMap<String, String>>,
    /// The user for calls that name none.
    pub default_user: Option<String>,
    /// Where relative paths and processes start.
    pub default_workdir: Option<String>,
    /// The address of the host's event service, as text: one that is none is only logged.
    pub events_ip: Option<String>,
    /// Certificates for the sandbox's programs to trust.
    pub certificates: Option<Certificates>,
    /// Volumes to mount.
    pub volumes: Vec<Volume>,
    /// Names the life of the sandbox in which the volumes are mounted.
    pub lifecycle_id: Option<String>,
}

/// What is wrong with a request, by the field's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Invalid {
    /// The field, as `/init` spells it.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl Invalid {
    /// This field is wrong for this reason.
    pub fn new(field: &'static str, why: impl Into<String>) -> Self {
        Self { field, why: why.into() }
    }
}

/// The variables, if every one can be given to a program.
///
/// # Errors
/// [`Invalid`], naming the variable and never its value.
pub fn env(env: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Invalid> {
    for (name, value) in &env {
        let shown = quote::text(name);
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Invalid::new("envVars", format!("{shown:?} is no name of a variable")));
        }
        if value.contains('\0') {
            return Err(Invalid::new("envVars", format!("the value of {shown:?} contains NUL")));
        }
    }
    Ok(env)
}

/// A name or path without NUL; an empty one is none.
///
/// # Errors
/// [`Invalid`].
pub fn text(field: &'static str, text: Option<String>) -> Result<Option<String>, Invalid> {
    match text {
        Some(text) if text.contains('\0') => Err(Invalid::new(field, "it contains NUL")),
        text => Ok(text.filter(|text| !text.is_empty())),
    }
}

/// The certificates; an empty text is none.
///
/// # Errors
/// [`Invalid`].
pub fn certificates(text: Option<String>) -> Result<Option<Certificates>, Invalid> {
    let text = text.filter(|text| !text.is_empty());
    let certificates = text.map(|text| Certificates::new(&text)).transpose();
    certificates.map_err(|error| Invalid::new("caBundle", error.to_string()))
}

/// The volumes.
///
/// # Errors
/// [`Invalid`].
pub fn volumes(pairs: Vec<(String, String)>) -> Result<Vec<Volume>, Invalid> {
    let wrong = |error: NfsError| Invalid::new("volumeMounts", error.to_string());
    if pairs.len() > MAX_VOLUMES {
        return Err(wrong(NfsError::TooMany(pairs.len())));
    }
    let volumes = pairs.into_iter().map(|(target, path)| Volume::new(target, path));
    volumes.collect::<Result<_, _>>().map_err(wrong)
}

/// The address of the event service, if the text is one.
pub fn address(text: &str) -> Option<IpAddr> {
    text.trim().parse().ok()
}
