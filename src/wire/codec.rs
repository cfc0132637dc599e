//! One tonic service, two codecs.
//!
//! tonic's generated server code builds its codec with `Default` inside the future of each call.
//! [`scope`] runs that future with the call's [`Format`] in a task-local variable, and
//! [`DualCodec::default`] reads it there; the encoder and decoder then carry it themselves, so a
//! stream may outlive the scope. That place in the generated code is no documented promise of
//! tonic: its version is pinned exactly, and the conformance suite fails if it moves.
//!
//! Without a scope (a tonic client, say) the codec is plain protobuf.

use std::{future::Future, marker::PhantomData};

use bytes::{Buf, BufMut};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

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
    static FORMAT: Format;
}

/// Runs a service call whose messages are in `format`.
pub async fn scope<F: Future>(format: Format, call: F) -> F::Output {
    FORMAT.scope(format, call).await
}

/// The codec that build.rs gives to every service.
#[derive(Debug)]
pub struct DualCodec<T, U> {
    format: Format,
    messages: PhantomData<fn() -> (T, U)>,
}

impl<T, U> Default for DualCodec<T, U> {
    fn default() -> Self {
        let format = FORMAT.try_with(|format| *format).unwrap_or_default();
        Self { format, messages: PhantomData }
    }
}

impl<T, U> Codec for DualCodec<T, U>
where
    T: prost::Message + Serialize + Send + 'static,
    U: prost::Message + DeserializeOwned + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = DualEncoder<T>;
    type Decoder = DualDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        DualEncoder { format: self.format, message: PhantomData }
    }

    fn decoder(&mut self) -> Self::Decoder {
        DualDecoder { format: self.format, message: PhantomData }
    }
}

/// Writes messages in the call's format.
#[derive(Debug)]
pub struct DualEncoder<T> {
    format: Format,
    message: PhantomData<fn() -> T>,
}

impl<T: prost::Message + Serialize> Encoder for DualEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let failed =
            |error: &dyn std::fmt::Display| Status::internal(format!("marshal message: {error}"));
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
    message: PhantomData<fn() -> U>,
}

impl<U: prost::Message + DeserializeOwned + Default> Decoder for DualDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let failed = |error: &dyn std::fmt::Display| {
            Status::invalid_argument(format!("unmarshal message: {error}"))
        };
        match self.format {
            Format::Proto => U::decode(buf).map(Some).map_err(|error| failed(&error)),
            // An envelope of length zero is an empty message, as upstream takes it.
            Format::Json if !buf.has_remaining() => Ok(Some(U::default())),
            Format::Json => {
                // tonic hands over one contiguous message, but says so nowhere: copy_to_bytes is
                // free where it is, and right where it is not.
                let message = buf.copy_to_bytes(buf.remaining());
                serde_json::from_slice(&message).map(Some).map_err(|error| failed(&error))
            }
        }
    }
}
