//! The body of `/init`, read as Go's encoding/json reads it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use zeroize::Zeroizing;

use crate::{
    access::Token,
    guest::{clock::Moment, nfs::MAX_VOLUMES},
    setup::{self, Invalid, MAX_VARIABLES, TokenChange},
};

/// The fields, as hosts spell them.
const FIELDS: [&str; 9] = [
    "accessToken",
    "timestamp",
    "envVars",
    "defaultUser",
    "defaultWorkdir",
    "hyperloopIP",
    "caBundle",
    "volumeMounts",
    "lifecycleID",
];

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
    /// Why the request is refused, if that was found while it was read.
    refused: Option<Invalid>,
}

/// Reads a body. A field that is refused whatever else stands there is reported by
/// [`InitBody::request`].
///
/// # Errors
/// What is wrong with the JSON; its text may quote a value.
pub fn parse(body: &[u8]) -> Result<InitBody, serde_json::Error> {
    let notes = Notes { field: Cell::new("body"), refused: RefCell::default() };
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = Fields(&notes).deserialize(&mut json);
    let error = match parsed.and_then(|body| json.end().map(|()| body)) {
        Ok(body) => return Ok(body),
        Err(error) => error,
    };
    let refused = match notes.refused.take() {
        // Go would replace such bytes; in a token or a certificate that is another one.
        None if std::str::from_utf8(body).is_err() => {
            Some(Invalid::new(notes.field.get(), "it is not UTF-8"))
        }
        refused => refused,
    };
    match refused {
        Some(_) => Ok(InitBody { refused, ..InitBody::default() }),
        None => Err(error),
    }
}

/// What is known of a body that cannot be read to its end.
struct Notes {
    /// The field that is being read.
    field: Cell<&'static str>,
    refused: RefCell<Option<Invalid>>,
}

impl Notes {
    /// Ends the reading: more of this field is not even held in memory.
    fn refuse<E: de::Error>(&self, why: String) -> E {
        *self.refused.borrow_mut() = Some(Invalid::new(self.field.get(), why));
        E::custom("refused")
    }
}

impl InitBody {
    /// Checks what serde does not know.
    ///
    /// # Errors
    /// [`Invalid`], naming the field.
    pub fn request(self) -> Result<setup::Request, Invalid> {
        if let Some(refused) = self.refused {
            return Err(refused);
        }
        let volumes = self.volumes.into_iter().map(|volume| (volume.nfs_target, volume.path));
        Ok(setup::Request {
            token: self.token.map_or(TokenChange::Clear, TokenChange::Set),
            timestamp: self.timestamp,
            env: self.env.map(|env| setup::env("envVars", env)).transpose()?,
            default_user: setup::text("defaultUser", self.default_user, setup::MAX_USER_BYTES)?,
            default_workdir: setup::text(
                "defaultWorkdir",
                self.default_workdir,
                setup::MAX_PATH_BYTES,
            )?,
            events_ip: setup::text("hyperloopIP", self.events_ip, setup::MAX_ADDRESS_BYTES)?,
            certificates: setup::certificates("caBundle", self.certificates)?,
            volumes: setup::volumes("volumeMounts", volumes.collect())?,
            lifecycle_id: setup::text(
                "lifecycleID",
                self.lifecycle_id,
                setup::MAX_LIFECYCLE_ID_BYTES,
            )?,
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

/// The body, field by field.
struct Fields<'a>(&'a Notes);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = InitBody;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<InitBody, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = InitBody;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<InitBody, A::Error> {
        let notes = self.0;
        let mut body = InitBody::default();
        while let Some(key) = map.next_key::<String>()? {
            let key = key.to_ascii_lowercase();
            let field = FIELDS.iter().find(|field| field.eq_ignore_ascii_case(&key));
            notes.field.set(field.copied().unwrap_or("body"));
            match key.as_str() {
                "accesstoken" => {
                    body.token = map.next_value::<Option<TokenJson>>()?.map(|json| json.0);
                }
                "timestamp" => {
                    let time = map.next_value::<Option<pbjson_types::Timestamp>>()?;
                    body.timestamp = time.as_ref().map(moment);
                }
                "envvars" => body.env = map.next_value_seed(Nullable(Env(notes)))?,
                "defaultuser" => body.default_user = map.next_value()?,
                "defaultworkdir" => body.default_workdir = map.next_value()?,
                "hyperloopip" => body.events_ip = map.next_value()?,
                "cabundle" => body.certificates = map.next_value()?,
                "volumemounts" => {
                    body.volumes =
                        map.next_value_seed(Nullable(Volumes(notes)))?.unwrap_or_default();
                }
                "lifecycleid" => body.lifecycle_id = map.next_value()?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            notes.field.set("body");
        }
        Ok(body)
    }

    // The JSON null is an object without fields, as in Go.
    fn visit_unit<E: de::Error>(self) -> Result<InitBody, E> {
        Ok(InitBody::default())
    }
}

/// `null` as absent.
struct Nullable<V>(V);

impl<'de, V: Visitor<'de>> DeserializeSeed<'de> for Nullable<V> {
    type Value = Option<V::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Nullable<V> {
    type Value = Option<V::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self.0).map(Some)
    }
}

/// Variables, at most [`MAX_VARIABLES`].
struct Env<'a>(&'a Notes);

impl<'de> Visitor<'de> for Env<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut env = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<String, Option<String>>()? {
            env.insert(name, value.unwrap_or_default());
            if env.len() > MAX_VARIABLES {
                return Err(self.0.refuse(format!("more than {MAX_VARIABLES} variables")));
            }
        }
        Ok(env)
    }
}

/// Volumes, at most [`MAX_VOLUMES`].
struct Volumes<'a>(&'a Notes);

impl<'de> Visitor<'de> for Volumes<'_> {
    type Value = Vec<VolumeJson>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of volumes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut volumes = Vec::new();
        while let Some(volume) = seq.next_element()? {
            if volumes.len() == MAX_VOLUMES {
                return Err(self.0.refuse(format!("more than {MAX_VOLUMES} volumes")));
            }
            volumes.push(volume);
        }
        Ok(volumes)
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
            (b"{\"CABUNDLE\":\"x\xff\"}", "caBundle"),
            (b"{\"defaultUser\":\"x\xff\"}", "defaultUser"),
            (b"{\"envVars\":{\"A\":\"x\xff\"}}", "envVars"),
            (b"{\"envVars\":{\"x\xff\":\"\"}}", "envVars"),
            (b"{\"volumeMounts\":[{\"path\":\"\xff\"}]}", "volumeMounts"),
            (b"{\"accessToken\":\"x\xff\"}", "accessToken"),
            (b"{\"defaultUser\":\"x\",\"\xff\":1}", "body"),
        ] {
            let error = parse(body).unwrap().request().unwrap_err();
            assert_eq!(error.field, field);
            assert!(!error.to_string().contains("x\0"), "a value is told: {error}");
        }
        // What is ignored may be anything.
        parse(b"{\"unknown\":\"\xff\"}").unwrap().request().unwrap();
    }

    #[test]
    fn every_field_has_a_bound() {
        let request = |field: &str, length: usize| {
            let body = serde_json::json!({ field: "x".repeat(length) }).to_string();
            parse(body.as_bytes()).unwrap().request()
        };
        for (field, most) in [
            ("defaultUser", setup::MAX_USER_BYTES),
            ("defaultWorkdir", setup::MAX_PATH_BYTES),
            ("hyperloopIP", setup::MAX_ADDRESS_BYTES),
            ("lifecycleID", setup::MAX_LIFECYCLE_ID_BYTES),
        ] {
            request(field, most).unwrap();
            assert_eq!(request(field, most + 1).unwrap_err().field, field);
        }
        let variables = |count: usize| {
            let env: BTreeMap<_, _> = (0..count).map(|n| (format!("V{n}"), "")).collect();
            parse(serde_json::json!({ "envVars": env }).to_string().as_bytes()).unwrap().request()
        };
        variables(MAX_VARIABLES).unwrap();
        assert_eq!(variables(MAX_VARIABLES + 1).unwrap_err().field, "envVars");
        let variable = |length: usize| {
            let body = serde_json::json!({ "envVars": { "N": "x".repeat(length) } }).to_string();
            parse(body.as_bytes()).unwrap().request()
        };
        variable(setup::MAX_VARIABLE_BYTES - 2).unwrap();
        assert_eq!(variable(setup::MAX_VARIABLE_BYTES - 1).unwrap_err().field, "envVars");
        let volumes = |count: usize| {
            let volumes: Vec<_> = (0..count)
                .map(|n| serde_json::json!({ "nfs_target": "h:/x", "path": format!("/m/{n}") }))
                .collect();
            parse(serde_json::json!({ "volumeMounts": volumes }).to_string().as_bytes())
                .unwrap()
                .request()
        };
        volumes(MAX_VOLUMES).unwrap();
        assert_eq!(volumes(MAX_VOLUMES + 1).unwrap_err().field, "volumeMounts");
        let twice = br#"{"volumeMounts":[{"nfs_target":"h:/x","path":"/a"},{"nfs_target":"h:/y","path":"/a/"}]}"#;
        assert_eq!(parse(twice).unwrap().request().unwrap_err().field, "volumeMounts");
    }

    #[test]
    fn an_absent_token_clears() {
        let request = parse(b"{}").unwrap().request().unwrap();
        assert!(matches!(request.token, TokenChange::Clear));
    }
}
