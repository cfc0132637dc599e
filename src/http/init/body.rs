//! The body of `/init`, read as Go's encoding/json reads it.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use zeroize::Zeroizing;

use crate::{
    access::Token,
    guest::clock::Moment,
    setup::{self, Invalid, TokenChange},
};

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
