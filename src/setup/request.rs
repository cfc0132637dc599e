//! What a sandbox is told to be, checked before anything of it is done.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use crate::{
    access::Token,
    guest::{
        ca::Certificates,
        clock::Moment,
        nfs::{MAX_VOLUMES, NfsError, Volume},
    },
    quote,
};

/// The most bytes of a user's name with a group's: twice LOGIN_NAME_MAX and the colon.
pub const MAX_USER_BYTES: usize = 513;
/// The most bytes of a path, without the NUL at its end (PATH_MAX of the kernel).
pub const MAX_PATH_BYTES: usize = 4095;
/// The most bytes of the address of the event service. One that is no address is only logged.
pub const MAX_ADDRESS_BYTES: usize = 256;
/// The most bytes of the id of a life.
pub const MAX_LIFECYCLE_ID_BYTES: usize = 1024;
/// The most variables: each costs a multiple of its text in memory.
pub const MAX_VARIABLES: usize = 16_384;
/// The most bytes of `NAME=VALUE`: the kernel refuses every program with a longer one
/// (MAX_ARG_STRLEN of execve(2), 32 pages of 4 KiB with the NUL at the end).
pub const MAX_VARIABLE_BYTES: usize = (128 << 10) - 1;

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
    /// The address of the host's event service, as text: what is not an address is only logged.
    pub events_ip: Option<String>,
    /// Certificates for the sandbox's programs to trust.
    pub certificates: Option<Certificates>,
    /// Volumes to mount.
    pub volumes: Vec<Volume>,
    /// Names the life of the sandbox in which the volumes are mounted.
    pub lifecycle_id: Option<String>,
}

impl Request {
    /// Whether it has parts that take their time ([`super::steps`]).
    pub(super) fn has_steps(&self) -> bool {
        self.certificates.is_some() || !self.volumes.is_empty() || self.events_ip.is_some()
    }
}

/// What is wrong with a request, by the name of the field in the caller's protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Invalid {
    /// The field.
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
pub fn env(
    field: &'static str,
    env: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, Invalid> {
    let wrong = |why: String| Err(Invalid::new(field, why));
    if env.len() > MAX_VARIABLES {
        return wrong(format!("{} variables: there can be {MAX_VARIABLES}", env.len()));
    }
    for (name, value) in &env {
        let shown = quote::text(name);
        if name.is_empty() || name.contains(['=', '\0']) {
            return wrong(format!("{shown:?} is not a valid name of a variable"));
        }
        if value.contains('\0') {
            return wrong(format!("the value of {shown:?} contains NUL"));
        }
        if name.len() + 1 + value.len() > MAX_VARIABLE_BYTES {
            return wrong(format!(
                "{shown:?} with its value has more than {MAX_VARIABLE_BYTES} bytes: no program could be started"
            ));
        }
    }
    Ok(env)
}

/// A text of at most `max` bytes without NUL; an empty one is none.
///
/// # Errors
/// [`Invalid`].
pub fn text(
    field: &'static str,
    text: Option<String>,
    max: usize,
) -> Result<Option<String>, Invalid> {
    match text {
        Some(text) if text.len() > max => {
            Err(Invalid::new(field, format!("it has {} bytes, and at most {max} fit", text.len())))
        }
        Some(text) if text.contains('\0') => Err(Invalid::new(field, "it contains NUL")),
        text => Ok(text.filter(|text| !text.is_empty())),
    }
}

/// The certificates; an empty text is none.
///
/// # Errors
/// [`Invalid`].
pub fn certificates(
    field: &'static str,
    text: Option<String>,
) -> Result<Option<Certificates>, Invalid> {
    let text = text.filter(|text| !text.is_empty());
    let certificates = text.map(|text| Certificates::new(&text)).transpose();
    certificates.map_err(|error| Invalid::new(field, error.to_string()))
}

/// The volumes.
///
/// # Errors
/// [`Invalid`].
pub fn volumes(field: &'static str, pairs: Vec<(String, String)>) -> Result<Vec<Volume>, Invalid> {
    let wrong = |error: NfsError| Invalid::new(field, error.to_string());
    if pairs.len() > MAX_VOLUMES {
        return Err(wrong(NfsError::TooMany(pairs.len())));
    }
    let volumes = pairs.into_iter().map(|(target, path)| Volume::new(target, path));
    let volumes = volumes.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let mut paths = HashSet::new();
    match volumes.iter().find(|volume| !paths.insert(&volume.path)) {
        Some(twice) => Err(wrong(NfsError::Twice(twice.path.display().to_string()))),
        None => Ok(volumes),
    }
}

/// The address of the event service, if the text is one.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    text.trim().parse().ok()
}
