//! One tonic service, two codecs.
//!
//! tonic's generated server code builds its codec with `Default` inside the future of each call.
//! [`scope`] runs that future with the call's [`Format`] and [`Extensions`] in a task-local variable,
//! and [`DualCodec::default`] reads them there; the encoder and decoder then carry it themselves, so a
//! stream may outlive the scope. That place in the generated code is no documented promise of
//! tonic: its version is pinned exactly, and the conformance suite fails if it moves.
//!
//! Without a scope (a tonic client, say) the codec is plain protobuf, extension fields included.

use std::{future::Future, marker::PhantomData};

use bytes::{Buf, BufMut, Bytes};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use super::extensions::{Extensible, Extensions};

/// How messages are written inside their envelopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Binary protobuf.
    #[default]
    Proto,
    /// Proto3 JSON.
    Json,
}

tokio::task_local! {
    static CALL: (Format, Extensions);
}

/// Runs a service call whose messages are in `format`; `extensions` says whether its answers have
/// extension fields.
pub async fn scope<F: Future>(format: Format, extensions: Extensions, call: F) -> F::Output {
    CALL.scope((format, extensions), call).await
}

/// The format of the call that this runs in, and whether its caller asks for extension fields.
pub fn current() -> (Format, Extensions) {
    CALL.try_with(Clone::clone).unwrap_or_else(|_| (Format::default(), Extensions::new(true)))
}

/// Reads one message.
///
/// # Errors
/// `invalid_argument`.
pub fn decode<U>(format: Format, message: Bytes) -> Result<U, Status>
where
    U: prost::Message + DeserializeOwned + Default,
{
    let failed = |error: &dyn std::fmt::Display| {
        Status::invalid_argument(format!("unmarshal message: {error}"))
    };
    match format {
        Format::Proto => U::decode(message).map_err(|error| failed(&error)),
        // An envelope of length zero is an empty message, as upstream takes it.
        Format::Json if message.is_empty() => Ok(U::default()),
        Format::Json => from_json(&message).map_err(|error| failed(&error)),
    }
}

/// The codec that build.rs gives to every service.
#[derive(Debug)]
pub struct DualCodec<T, U> {
    format: Format,
    extensions: Extensions,
    messages: PhantomData<fn() -> (T, U)>,
}

impl<T, U> Default for DualCodec<T, U> {
    fn default() -> Self {
        let (format, extensions) = current();
        Self { format, extensions, messages: PhantomData }
    }
}

impl<T, U> Codec for DualCodec<T, U>
where
    T: prost::Message + Serialize + Extensible + Send + 'static,
    U: prost::Message + DeserializeOwned + Extensible + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = DualEncoder<T>;
    type Decoder = DualDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        let extensions = self.extensions.clone();
        DualEncoder { format: self.format, extensions, message: PhantomData }
    }

    fn decoder(&mut self) -> Self::Decoder {
        let extensions = self.extensions.clone();
        DualDecoder { format: self.format, extensions, message: PhantomData }
    }
}

/// Writes messages in the call's format.
#[derive(Debug)]
pub struct DualEncoder<T> {
    format: Format,
    extensions: Extensions,
    message: PhantomData<fn() -> T>,
}

impl<T: prost::Message + Serialize + Extensible> Encoder for DualEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let failed =
            |error: &dyn std::fmt::Display| Status::internal(format!("marshal message: {error}"));
        let message = self.extensions.filter(message);
        match self.format {
            Format::Proto => message.encode(buf).map_err(|error| failed(&error)),
            Format::Json => {
                serde_json::to_writer(buf.writer(), &message).map_err(|error| failed(&error))
            }
        }
    }
}

/// Reads messages in the call's format.
#[derive(Debug)]
pub struct DualDecoder<U> {
    format: Format,
    extensions: Extensions,
    message: PhantomData<fn() -> U>,
}

impl<U> Decoder for DualDecoder<U>
where
    U: prost::Message + DeserializeOwned + Extensible + Default,
{
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // tonic hands over one contiguous message, but says so nowhere: copy_to_bytes is free where it
        // is, and right where it is not.
        let message = buf.copy_to_bytes(buf.remaining());
        let request = decode(self.format, message)?;
        self.extensions.note(&request);
        Ok(Some(request))
    }
}

/// The largest message that is read a second time. As a tree of values it takes thirty times its
/// size; and who writes `null` and `1.0` does it by hand.
const MAX_REREAD_BYTES: usize = 256 << 10;

/// Reads proto3 JSON (<https://protobuf.dev/programming-guides/json/>).
///
/// The generated code is stricter than the format: it refuses `null` for a field that is not
/// optional, and `1.0` for an integer. A message that it refuses is therefore read once more with
/// both written as it wants them; if that fails too, the error names the field.
fn from_json<U: DeserializeOwned>(message: &[u8]) -> Result<U, String> {
    let first = match serde_json::from_slice(message) {
        Ok(message) => return Ok(message),
        Err(error) => error,
    };
    if message.len() > MAX_REREAD_BYTES {
        return Err(first.to_string());
    }
    // A field that is there twice would be there once after another reading.
    if !first.is_data() || first.to_string().starts_with("duplicate field") {
        return Err(first.to_string());
    }
    let mut value: Value = serde_json::from_slice(message).map_err(|error| error.to_string())?;
    normalise(&mut value);
    serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string() {
        path if path == "." => error.into_inner().to_string(),
        path => format!("field {path}: {}", error.into_inner()),
    })
}

/// Removes fields that are `null`, and makes integers of numbers that are whole.
fn normalise(value: &mut Value) {
    /// Up to here every whole number is a `f64` (2^53).
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(normalise);
        }
        Value::Array(items) => items.iter_mut().for_each(normalise),
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= EXACT);
            if let Some(whole) = float.and_then(|float| format!("{float:.0}").parse::<i64>().ok()) {
                *number = whole.into();
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{filesystem::ListDirRequest, process::StartRequest};

    #[test]
    fn whole_floats_and_nulls_are_what_the_format_says() {
        for text in [
            r#"{"path":"/","depth":2}"#,
            r#"{"path":"/","depth":"2"}"#,
            r#"{"path":"/","depth":2.0}"#,
            r#"{"path":"/","depth":2e0,"unknown":{"deep":[1.5,null]}}"#,
        ] {
            let request: ListDirRequest = from_json(text.as_bytes()).unwrap();
            assert_eq!((request.path.as_str(), request.depth), ("/", 2), "{text}");
        }
        let request: ListDirRequest = from_json(br#"{"path":null,"depth":null}"#).unwrap();
        assert_eq!(request, ListDirRequest::default());
    }

    #[test]
    fn errors_name_the_field() {
        for (text, field) in [
            (r#"{"process":{"cmd":7}}"#, "process.cmd"),
            (r#"{"pty":{"size":{"cols":1.5}}}"#, "pty.size.cols"),
            (r#"{"pty":{"size":{"cols":-1}}}"#, "pty.size.cols"),
            (r#"{"process":{"args":["a",{}]}}"#, "process.args[1]"),
        ] {
            let error = from_json::<StartRequest>(text.as_bytes()).unwrap_err();
            assert!(error.starts_with(&format!("field {field}: ")), "{text}: {error}");
        }
        let twice = from_json::<ListDirRequest>(br#"{"depth":1,"depth":1.0}"#).unwrap_err();
        assert!(twice.starts_with("duplicate field"), "{twice}");
    }
}
