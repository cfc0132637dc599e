//! `POST /init`: the host tells the sandbox what it is.
//!
//! The body is read as Go reads it: keys in any case, unknown ones ignored, null as absent. What
//! does not parse is 400 without a body, as upstream answers it; what parses and makes no sense is
//! 400 with the field's name.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use axum::extract::{Request, State};
use futures_util::StreamExt;
use http::{HeaderValue, Response, StatusCode, header};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::Shared;
use crate::{
    access::Token,
    guest::clock::Moment,
    sandbox::Sandbox,
    setup::{self, Invalid, SetupError, TokenChange},
    version,
    wire::{Body, connection::Inner, gate::Granted},
};

/// The most bytes of a request: certificates and variables.
const MAX_BODY: usize = 4 << 20;
/// The most bytes of an ordinary one. Of larger ones there are few at a time: anybody may send them,
/// and they wait in memory.
const ORDINARY_BODY: usize = 64 << 10;
/// How long it may take to come.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

// What strangers can make wait in memory.
const _: () =
    assert!(setup::MAX_REQUESTS * ORDINARY_BODY + setup::MAX_LARGE * MAX_BODY <= 64 << 20);
const _: () = assert!(setup::KEPT.0 * ORDINARY_BODY + setup::KEPT.1 * MAX_BODY <= 16 << 20);
/// The header with upstream's version, by which hosts decide what this envd can do.
const VERSION_HEADER: &str = "x-envd-version";

pub(super) async fn init(State(sandbox): Shared, request: Request) -> Response<Body> {
    let (status, text) = match answer(&sandbox, request).await {
        Ok(()) => (StatusCode::NO_CONTENT, String::new()),
        Err(refusal) => refusal,
    };
    let mut response = Response::new(Body::from(text.clone()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, HeaderValue::from_static(version::E2B));
    if status == StatusCode::NO_CONTENT {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    } else if !text.is_empty() {
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(header::CONTENT_TYPE, plain);
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    }
    response
}

async fn answer(sandbox: &Arc<Sandbox>, request: Request) -> Result<(), (StatusCode, String)> {
    let bad = || (StatusCode::BAD_REQUEST, String::new());
    // The header with the token means nothing here; only the token in the body does.
    let granted = request.extensions().get() == Some(&Granted::ByPeer);
    let inner = request.extensions().get::<Inner>().is_some();
    let busy = || (StatusCode::SERVICE_UNAVAILABLE, "too many calls of /init at a time".to_owned());
    // Held to the end: what waits for its turn is in memory, too.
    let _place = sandbox.setup.place(inner).ok_or_else(busy)?;
    let mut large = None;
    let reading = async {
        let mut chunks = request.into_body().into_data_stream();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| bad())?;
            let length = body.len() + chunk.len();
            if length > MAX_BODY {
                return Err(bad());
            }
            if length > ORDINARY_BODY && large.is_none() {
                large = Some(sandbox.setup.place_of_large(inner).ok_or_else(busy)?);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    let body = timeout(BODY_PATIENCE, reading).await.unwrap_or_else(|_| Err(bad()))?;
    let parsed = match body.is_empty() {
        true => InitBody::default(),
        false => parse(&body).map_err(|error| {
            // Where it is wrong, and not what: the text might quote a secret.
            let (line, column, kind) = (error.line(), error.column(), error.classify());
            tracing::info!(line, column, ?kind, "an /init that does not parse");
            bad()
        })?,
    };
    let request = parsed.request().map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    let report = setup::run(sandbox, request, granted).await.map_err(|error| {
        let status = match &error {
            SetupError::Refused(_) => StatusCode::UNAUTHORIZED,
            SetupError::Invalid(_) | SetupError::Failed { .. } => StatusCode::BAD_REQUEST,
            SetupError::Broken => StatusCode::SERVICE_UNAVAILABLE,
        };
        tracing::warn!(%error, "not initialised");
        (status, error.to_string())
    })?;
    let took_us = u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX);
    tracing::info!(stale = report.stale, took_us, "initialised");
    Ok(())
}

/// The body of a request.
#[derive(Debug, Default)]
pub struct InitBody {
    token: Option<Token>,
    timestamp: Option<Moment>,
    env: Option<BTreeMap<String, String>>,
    default_user: Option<String>,
    default_workdir: Option<String>,
    events_ip: Option<String>,
    certificates: Option<String>,
    volumes: Vec<VolumeJson>,
    lifecycle_id: Option<String>,
}

/// Reads a body.
///
/// # Errors
/// What is wrong with the JSON; its text may quote a value.
pub fn parse(body: &[u8]) -> Result<InitBody, serde_json::Error> {
    serde_json::from_slice(body)
}

impl InitBody {
    /// Checks what serde does not know.
    ///
    /// # Errors
    /// [`Invalid`], naming the field.
    pub fn request(self) -> Result<setup::Request, Invalid> {
        let volumes = self.volumes.into_iter().map(|volume| (volume.nfs_target, volume.path));
        Ok(setup::Request {
            token: self.token.map_or(TokenChange::Clear, TokenChange::Set),
            timestamp: self.timestamp,
            env: self.env.map(setup::env).transpose()?,
            default_user: setup::text("defaultUser", self.default_user)?,
            default_workdir: setup::text("defaultWorkdir", self.default_workdir)?,
            events_ip: self.events_ip.filter(|text| !text.is_empty()),
            certificates: setup::certificates(self.certificates)?,
            volumes: setup::volumes(volumes.collect())?,
            lifecycle_id: self.lifecycle_id,
        })
    }
}

#[derive(Debug, Default)]
struct VolumeJson {
    nfs_target: String,
    path: String,
}

/// A token as it stands in the JSON. One with a backslash is refused, as upstream refuses it: it
/// would have to be copied about to be unescaped.
struct TokenJson(Token);

impl<'de> Deserialize<'de> for TokenJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsIs;
        impl<'de> Visitor<'de> for AsIs {
            type Value = TokenJson;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an access token without escapes")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<TokenJson, E> {
                let token = Token::new(Zeroizing::new(text.to_owned()));
                token.map(TokenJson).map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, _: &str) -> Result<TokenJson, E> {
                Err(E::custom("the access token contains an escape"))
            }
        }
        deserializer.deserialize_str(AsIs)
    }
}

fn moment(timestamp: &pbjson_types::Timestamp) -> Moment {
    Moment { seconds: timestamp.seconds, nanos: u32::try_from(timestamp.nanos).unwrap_or(0) }
}

impl<'de> Deserialize<'de> for InitBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = InitBody;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<InitBody, A::Error> {
                let mut body = InitBody::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.to_ascii_lowercase().as_str() {
                        "accesstoken" => {
                            body.token = map.next_value::<Option<TokenJson>>()?.map(|json| json.0);
                        }
                        "timestamp" => {
                            let time = map.next_value::<Option<pbjson_types::Timestamp>>()?;
                            body.timestamp = time.as_ref().map(moment);
                        }
                        "envvars" => {
                            let env =
                                map.next_value::<Option<BTreeMap<String, Option<String>>>>()?;
                            body.env = env.map(|env| {
                                let filled = |value: Option<String>| value.unwrap_or_default();
                                env.into_iter().map(|(name, value)| (name, filled(value))).collect()
                            });
                        }
                        "defaultuser" => body.default_user = map.next_value()?,
                        "defaultworkdir" => body.default_workdir = map.next_value()?,
                        "hyperloopip" => body.events_ip = map.next_value()?,
                        "cabundle" => body.certificates = map.next_value()?,
                        "volumemounts" => {
                            let volumes = map.next_value::<Option<Vec<VolumeJson>>>()?;
                            body.volumes = volumes.unwrap_or_default();
                        }
                        "lifecycleid" => body.lifecycle_id = map.next_value()?,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(body)
            }

            // The JSON null is an object without fields, as in Go.
            fn visit_unit<E: de::Error>(self) -> Result<InitBody, E> {
                Ok(InitBody::default())
            }
        }
        deserializer.deserialize_any(Fields)
    }
}

impl<'de> Deserialize<'de> for VolumeJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = VolumeJson;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with nfs_target and path")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VolumeJson, A::Error> {
                let mut volume = VolumeJson::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.to_ascii_lowercase().as_str() {
                        "nfs_target" => {
                            volume.nfs_target = map.next_value::<Option<_>>()?.unwrap_or_default();
                        }
                        "path" => volume.path = map.next_value::<Option<_>>()?.unwrap_or_default(),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(volume)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_reads_it() {
        let body = parse(
            br#"{"ACCESSTOKEN":"t","EnvVars":{"A":"1","B":null},"unknown":[1,{}],"defaultUser":null,
                "timestamp":"2026-01-02T03:04:05.000000006+01:00","volumeMounts":null}"#,
        )
        .unwrap();
        assert!(body.token.as_ref().unwrap().is(b"t"));
        let env = body.env.clone().unwrap();
        assert_eq!(
            env.into_iter().collect::<Vec<_>>(),
            [("A".into(), "1".into()), ("B".into(), String::new())]
        );
        assert_eq!(body.timestamp, Some(Moment { seconds: 1_767_319_445, nanos: 6 }));
        assert!(parse(b"null").unwrap().token.is_none());
        for wrong in [
            &b"{"[..],
            b"[]",
            b"1",
            b"\"x\"",
            b"{} {}",
            br#"{"accessToken":""}"#,
            br#"{"accessToken":"a\u0062"}"#,
            br#"{"accessToken":1}"#,
            br#"{"timestamp":"yesterday"}"#,
            br#"{"timestamp":1}"#,
            br#"{"envVars":{"A":1}}"#,
            br#"{"envVars":[]}"#,
            br#"{"defaultUser":1}"#,
            br#"{"volumeMounts":{}}"#,
        ] {
            assert!(parse(wrong).is_err(), "{}", String::from_utf8_lossy(wrong));
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (body, field) in [
            (&br#"{"envVars":{"":"x"}}"#[..], "envVars"),
            (br#"{"envVars":{"A":"x\u0000"}}"#, "envVars"),
            (br#"{"defaultUser":"a\u0000"}"#, "defaultUser"),
            (br#"{"caBundle":"no certificate"}"#, "caBundle"),
            (br#"{"volumeMounts":[{"nfs_target":"x","path":"/a"}]}"#, "volumeMounts"),
            (br#"{"volumeMounts":[{}]}"#, "volumeMounts"),
        ] {
            let error = parse(body).unwrap().request().unwrap_err();
            assert_eq!(error.field, field);
            assert!(!error.to_string().contains("x\0"), "a value is told: {error}");
        }
    }

    #[test]
    fn an_absent_token_clears() {
        let request = parse(b"{}").unwrap().request().unwrap();
        assert!(matches!(request.token, TokenChange::Clear));
    }
}
