//! Messages in both codecs: what parses as JSON survives the way through protobuf and back.
#![no_main]

use envd::proto::{filesystem, process};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use serde::{Serialize, de::DeserializeOwned};

fn round_trip<M: Message + Default + PartialEq + Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<M>(bytes) {
        let binary = message.encode_to_vec();
        assert!(M::decode(binary.as_slice()).unwrap() == message);
        let json = serde_json::to_vec(&message).unwrap();
        assert!(serde_json::from_slice::<M>(&json).unwrap() == message);
    }
    if let Ok(message) = M::decode(bytes) {
        // Not every number of an enum has a name, so JSON may refuse; it must not panic.
        let _ = serde_json::to_vec(&message);
    }
}

fuzz_target!(|bytes: &[u8]| {
    round_trip::<process::StartRequest>(bytes);
    round_trip::<process::StreamInputRequest>(bytes);
    round_trip::<process::SendSignalRequest>(bytes);
    round_trip::<process::StartResponse>(bytes);
    round_trip::<filesystem::ListDirResponse>(bytes);
    round_trip::<filesystem::WatchDirRequest>(bytes);
});
