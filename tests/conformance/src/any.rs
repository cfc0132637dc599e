//! `google.protobuf.Any` with its proto3 JSON, for the messages that the suite puts into it.
//!
//! JSON writes the message's own fields beside its `@type`, so it needs to know the type.

use prost::{Message, Name};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, de::DeserializeOwned, ser};
use serde_json::{Map, Value};

use crate::proto;

/// A message of any type.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub(crate) struct Any {
    /// Its type: a URL that ends with the full name.
    #[prost(string, tag = "1")]
    pub(crate) type_url: String,
    /// The message, as protobuf.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

impl Any {
    /// Packs a message.
    pub(crate) fn pack<M: Message>(name: &str, message: &M) -> Self {
        Self {
            type_url: format!("type.googleapis.com/connectrpc.conformance.v1.{name}"),
            value: message.encode_to_vec(),
        }
    }

    fn name(url: &str) -> &str {
        url.rsplit("conformance.v1.").next().unwrap_or_default()
    }
}

impl Name for Any {
    const NAME: &'static str = "Any";
    const PACKAGE: &'static str = "google.protobuf";
}

fn to_json<M: Message + Default + Serialize>(bytes: &[u8]) -> Result<Value, String> {
    let message = M::decode(bytes).map_err(|error| error.to_string())?;
    serde_json::to_value(message).map_err(|error| error.to_string())
}

fn from_json<M: Message + DeserializeOwned>(value: Value) -> Result<Vec<u8>, String> {
    let message: M = serde_json::from_value(value).map_err(|error| error.to_string())?;
    Ok(message.encode_to_vec())
}

/// Runs one of the two functions above for the type of a name.
macro_rules! for_type {
    ($name:expr, $function:ident, $argument:expr) => {
        match $name {
            "UnaryRequest" => $function::<proto::UnaryRequest>($argument),
            "IdempotentUnaryRequest" => $function::<proto::IdempotentUnaryRequest>($argument),
            "ServerStreamRequest" => $function::<proto::ServerStreamRequest>($argument),
            "ClientStreamRequest" => $function::<proto::ClientStreamRequest>($argument),
            "BidiStreamRequest" => $function::<proto::BidiStreamRequest>($argument),
            "ConformancePayload.RequestInfo" => {
                $function::<proto::conformance_payload::RequestInfo>($argument)
            }
            other => Err(format!("no JSON for a message of type {other}")),
        }
    };
}

impl Serialize for Any {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = for_type!(Self::name(&self.type_url), to_json, self.value.as_slice());
        let Value::Object(mut fields) = value.map_err(ser::Error::custom)? else {
            return Err(ser::Error::custom("a message is no JSON object"));
        };
        fields.insert("@type".to_owned(), self.type_url.clone().into());
        fields.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Map::deserialize(deserializer)?;
        let Some(Value::String(type_url)) = fields.remove("@type") else {
            return Err(de::Error::custom("a message without @type"));
        };
        let value = for_type!(Self::name(&type_url), from_json, Value::Object(fields));
        Ok(Self { value: value.map_err(de::Error::custom)?, type_url })
    }
}
