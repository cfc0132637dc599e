//! Who may call: the sandbox's access token, and what is signed with it.
//!
//! The contract of this module:
//!
//! * The token is set by `/init` and its RPC twin. While there is none everybody is served, as
//!   upstream does, unless the daemon was told to stay closed ([`Access::new`]).
//! * Every comparison takes the same time whatever is wrong ([`subtle`]); only lengths can be told
//!   from it.
//! * A token is wiped from memory when it is replaced, never printed (its `Debug` is a constant)
//!   and handed out to nobody.
//!
//! It knows no HTTP: [`crate::wire::gate`] asks it for each request, and the routes of files for
//! their signatures.

use std::{
    fmt,
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use parking_lot::RwLock;
use sha2::{Digest, Sha256, Sha512};
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// The most bytes of a token: it travels in a header.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// A secret that opens the sandbox.
#[derive(Clone)]
pub struct Token(Zeroizing<String>);

/// What makes a text no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// the access token is empty
    #[error("the access token is empty")]
    Empty,
    /// It would not fit into a header.
    #[error("the access token has more than {MAX_TOKEN_BYTES} bytes")]
    TooLong,
}

impl Token {
    /// A token of this text.
    ///
    /// # Errors
    /// [`TokenError`]; the text is wiped all the same.
    pub fn new(text: Zeroizing<String>) -> Result<Self, TokenError> {
        match text.len() {
            0 => Err(TokenError::Empty),
            length if length > MAX_TOKEN_BYTES => Err(TokenError::TooLong),
            _ => Ok(Self(text)),
        }
    }

    /// Whether it is this one.
    pub fn is(&self, presented: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(presented).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What the gate says of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// There is no token, and everybody is served.
    Open,
    /// The caller has the token.
    Known,
    /// There is a token, and the caller has not got it.
    Unknown,
    /// Nobody is served before the sandbox has been initialised.
    NotInitialised,
}

/// What the host's metadata service says about the right token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostHash<'a> {
    /// Nothing: there is no such service, or its document has no hash.
    None,
    /// SHA-512 of the token in hexadecimal; that of the empty text where there shall be none.
    Hash(&'a str),
    /// The service has answered since boot, and did not answer in time now. So it may have a hash,
    /// and whoever keeps it from answering must not gain by that.
    NoAnswer,
}

/// What an authorised initialisation has proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// That its caller has the token: the stored one, or the one whose hash the host gave; or it
    /// came from a trusted peer.
    Token,
    /// Nothing, and there has never been a token.
    NeverSet,
    /// Nothing, but no token is needed now.
    NotNeeded,
}

/// Why the sandbox is not initialised. The texts are upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InitRefused {
    /// access token reset not authorized
    #[error("access token reset not authorized")]
    Reset,
    /// access token validation failed
    #[error("access token validation failed")]
    Wrong,
}

/// Why a signature is none. The texts are upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// access token present in header but does not match
    #[error("access token present in header but does not match")]
    WrongToken,
    /// missing signature query parameter
    #[error("missing signature query parameter")]
    Missing,
    /// invalid signature
    #[error("invalid signature")]
    Invalid,
    /// signature is already expired
    #[error("signature is already expired")]
    Expired,
}

/// What a signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A download.
    Read,
    /// An upload.
    Write,
}

/// What was signed, as it stands in the query of the URL.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// What may be done.
    pub operation: Operation,
    /// The path, unresolved; empty when there is none.
    pub path: &'a [u8],
    /// The user's name; empty when there is none.
    pub username: &'a str,
    /// The last moment of its validity, in seconds since 1970.
    pub expiration: Option<i64>,
    /// The signature.
    pub signature: Option<&'a str>,
}

/// The token and what depends on it.
#[derive(Debug)]
pub struct Access {
    state: RwLock<State>,
    /// Whether a sandbox without a token is closed.
    require_token: bool,
    initialised: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    token: Option<Token>,
    /// Whether there has ever been one since the daemon started.
    ever_set: bool,
    /// Whether nobody is served before the next initialisation.
    closed: bool,
}

impl Access {
    /// The access of a sandbox. With `require_token` nobody is served while there is no token;
    /// with `handed_over` nobody before the first initialisation.
    pub fn new(token: Option<Token>, require_token: bool, handed_over: bool) -> Self {
        let state = RwLock::new(State { ever_set: token.is_some(), token, closed: handed_over });
        Self { state, require_token, initialised: watch::Sender::new(false) }
    }

    /// What the gate says of a caller who presents this token.
    pub fn verdict(&self, presented: Option<&[u8]>) -> Verdict {
        let state = self.state.read();
        match &state.token {
            Some(token) if presented.is_some_and(|presented| token.is(presented)) => Verdict::Known,
            Some(_) => Verdict::Unknown,
            None if state.closed || self.require_token => Verdict::NotInitialised,
            None => Verdict::Open,
        }
    }

    /// Whether a token is set.
    pub fn has_token(&self) -> bool {
        self.state.read().token.is_some()
    }

    /// Whether this is the token that is set.
    pub fn is_current(&self, token: Option<&Token>) -> bool {
        let state = self.state.read();
        matches!((&state.token, token), (Some(current), Some(token)) if current.is(token.0.as_bytes()))
    }

    /// Whether whoever brings this token may initialise the sandbox, and what that proves.
    ///
    /// # Errors
    /// [`InitRefused`].
    pub fn authorise(
        &self,
        token: Option<&Token>,
        host: HostHash<'_>,
    ) -> Result<Proof, InitRefused> {
        let (is_set, ever_set) = {
            let state = self.state.read();
            (state.token.is_some(), state.ever_set)
        };
        let unproved = if ever_set { Proof::NotNeeded } else { Proof::NeverSet };
        let proof = match host {
            _ if self.is_current(token) => Some(Proof::Token),
            // That there shall be no token is proved by nobody: everybody can send none.
            HostHash::Hash(hash) => hash_matches(token, hash).then_some(if token.is_some() {
                Proof::Token
            } else {
                unproved
            }),
            HostHash::None => (!is_set).then_some(unproved),
            HostHash::NoAnswer => None,
        };
        proof.ok_or(match token {
            None => InitRefused::Reset,
            Some(_) => InitRefused::Wrong,
        })
    }

    /// Replaces the token; the old one is wiped.
    pub fn set(&self, token: Option<Token>) {
        let mut state = self.state.write();
        state.ever_set |= token.is_some();
        state.token = token;
    }

    /// The sandbox has been initialised.
    pub fn initialise(&self) {
        self.state.write().closed = false;
        self.initialised.send_replace(true);
    }

    /// Says when the sandbox has been initialised for the first time.
    pub fn initialised(&self) -> watch::Receiver<bool> {
        self.initialised.subscribe()
    }

    /// Checks a request for files, which the gate lets pass: by the token in its header, or else by
    /// its signature.
    ///
    /// # Errors
    /// [`SignatureError`].
    pub fn check(&self, header: Option<&[u8]>, signed: Signed<'_>) -> Result<(), SignatureError> {
        let state = self.state.read();
        let Some(token) = &state.token else { return Ok(()) };
        if let Some(presented) = header.filter(|presented| !presented.is_empty()) {
            return if token.is(presented) { Ok(()) } else { Err(SignatureError::WrongToken) };
        }
        let signature = signed.signature.ok_or(SignatureError::Missing)?;
        let expected = sign(token, signed);
        if !bool::from(expected.as_bytes().ct_eq(signature.as_bytes())) {
            return Err(SignatureError::Invalid);
        }
        match signed.expiration {
            Some(expiration) if expiration < now() => Err(SignatureError::Expired),
            _ => Ok(()),
        }
    }
}

/// `v1_` and the SHA-256 of `path:operation:username:token[:expiration]`.
fn sign(token: &Token, signed: Signed<'_>) -> Zeroizing<String> {
    let operation = match signed.operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut digest = Sha256::new();
    for part in [signed.path, operation.as_bytes(), signed.username.as_bytes()] {
        digest.update(part);
        digest.update(":");
    }
    digest.update(token.0.as_bytes());
    if let Some(expiration) = signed.expiration {
        digest.update(format!(":{expiration}"));
    }
    Zeroizing::new(format!("v1_{}", STANDARD_NO_PAD.encode(digest.finalize())))
}

fn hash_matches(token: Option<&Token>, hash: &str) -> bool {
    let digest = Sha512::digest(token.map_or(&[][..], |token| token.0.as_bytes()));
    let mut expected = String::with_capacity(2 * digest.len());
    for byte in digest {
        // Writing to a string does not fail.
        let _ = write!(expected, "{byte:02x}");
    }
    expected.as_bytes().ct_eq(hash.as_bytes()).into()
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::new(Zeroizing::new(text.to_owned())).unwrap()
    }

    fn sha512(text: &str) -> String {
        Sha512::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn who_may_initialise() {
        use HostHash::{Hash, NoAnswer, None as Nothing};
        use InitRefused::{Reset, Wrong};
        let (of_t, of_r, of_none) = (sha512("t"), sha512("r"), sha512(""));
        let (of_t, of_r, of_none) = (Hash(&of_t), Hash(&of_r), Hash(&of_none));
        for (stored, brought, host, expected) in [
            (Some("t"), Some("t"), Nothing, Ok(Proof::Token)),
            (Some("t"), Some("t"), of_r, Ok(Proof::Token)),
            (Some("t"), Some("t"), NoAnswer, Ok(Proof::Token)),
            (Some("t"), Some("r"), of_r, Ok(Proof::Token)),
            (Some("t"), None, of_none, Ok(Proof::NotNeeded)),
            (None, Some("r"), of_r, Ok(Proof::Token)),
            (None, None, of_none, Ok(Proof::NeverSet)),
            (None, Some("r"), Nothing, Ok(Proof::NeverSet)),
            (None, None, Nothing, Ok(Proof::NeverSet)),
            (None, Some("r"), NoAnswer, Err(Wrong)),
            (None, None, NoAnswer, Err(Reset)),
            (None, Some("r"), of_t, Err(Wrong)),
            (None, None, of_t, Err(Reset)),
            (Some("t"), Some("r"), Nothing, Err(Wrong)),
            (Some("t"), Some("r"), NoAnswer, Err(Wrong)),
            (Some("t"), Some("r"), of_none, Err(Wrong)),
            (Some("t"), Some("r"), Hash("nonsense"), Err(Wrong)),
            (Some("t"), None, Nothing, Err(Reset)),
            (Some("t"), None, NoAnswer, Err(Reset)),
            (Some("t"), None, of_t, Err(Reset)),
        ] {
            let access = Access::new(stored.map(token), false, false);
            let brought = brought.map(token);
            let found = access.authorise(brought.as_ref(), host);
            assert_eq!(found, expected, "{stored:?} {brought:?} {host:?}");
        }
    }

    #[test]
    fn a_token_that_was_cleared_was_set_once() {
        let access = Access::new(None, false, false);
        assert_eq!(access.authorise(None, HostHash::None), Ok(Proof::NeverSet));
        access.set(Some(token("t")));
        access.set(None);
        let other = token("other");
        assert_eq!(access.authorise(Some(&other), HostHash::None), Ok(Proof::NotNeeded));
    }

    #[test]
    fn closed_until_initialised_or_until_there_is_a_token() {
        let open = Access::new(None, false, false);
        assert_eq!(open.verdict(None), Verdict::Open);
        let handed_over = Access::new(None, false, true);
        assert_eq!(handed_over.verdict(Some(b"x")), Verdict::NotInitialised);
        handed_over.initialise();
        assert_eq!(handed_over.verdict(None), Verdict::Open);
        let required = Access::new(None, true, false);
        required.initialise();
        assert_eq!(required.verdict(None), Verdict::NotInitialised);
        required.set(Some(token("t")));
        assert_eq!(required.verdict(Some(b"t")), Verdict::Known);
        for wrong in [None, Some(&b""[..]), Some(b"T"), Some(b"tt"), Some(b" t")] {
            assert_eq!(required.verdict(wrong), Verdict::Unknown, "{wrong:?}");
        }
    }

    #[test]
    fn signatures_are_upstreams() {
        let signed = Signed {
            operation: Operation::Read,
            path: b"/home/user/a b.txt",
            username: "user",
            expiration: None,
            signature: None,
        };
        // As openssl computes it.
        let expected = "v1_ae/PFK68iY0J3Y2sR1eBCM5nRuIgB8rBOQabN6OIhEQ";
        let found = sign(&token("secret"), signed);
        assert_eq!(found.as_str(), expected);
        let access = Access::new(Some(token("secret")), false, false);
        let with = |signature, expiration| Signed { signature, expiration, ..signed };
        assert_eq!(access.check(None, with(Some(&found), None)), Ok(()));
        assert_eq!(access.check(None, with(None, None)), Err(SignatureError::Missing));
        assert_eq!(access.check(None, with(Some(&found), Some(1))), Err(SignatureError::Invalid));
        let old = sign(&token("secret"), with(None, Some(1)));
        assert_eq!(access.check(None, with(Some(&old), Some(1))), Err(SignatureError::Expired));
        assert_eq!(access.check(Some(b"secret"), with(None, None)), Ok(()));
        let wrong = access.check(Some(b"x"), with(Some(&found), None));
        assert_eq!(wrong, Err(SignatureError::WrongToken));
    }

    #[test]
    fn a_token_is_not_printed() {
        let access = Access::new(Some(token("very-secret")), false, false);
        assert!(!format!("{access:?} {:?}", token("very-secret")).contains("very-secret"));
        assert_eq!(Token::new(Zeroizing::default()).unwrap_err(), TokenError::Empty);
        let long = Zeroizing::new("x".repeat(MAX_TOKEN_BYTES + 1));
        assert_eq!(Token::new(long).unwrap_err(), TokenError::TooLong);
    }
}
