//! Whole request bodies in every protocol: whatever comes, a gRPC body or a status comes out.
#![no_main]

use bytes::Bytes;
use envd::{
    proto::DESCRIPTORS,
    wire::{
        Body, budget::Budget, envelope::Encoding, methods::Methods, protocol::Protocol,
        request::Reader,
    },
};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

const TYPES: [&str; 8] = [
    "application/grpc",
    "application/grpc+json",
    "application/grpc-web",
    "application/grpc-web-text",
    "application/proto",
    "application/json",
    "application/connect+proto",
    "application/connect+json",
];
const LIMIT: usize = 1 << 12;

static METHODS: LazyLock<Arc<Methods>> = LazyLock::new(|| {
    let methods = Methods::default().add(DESCRIPTORS, true);
    Arc::new(methods.expect("the descriptors that were compiled in"))
});

fuzz_target!(|input: (u8, bool, bool, u8, &[u8])| {
    let (kind, gzip, single, step, bytes) = input;
    let kind = TYPES[usize::from(kind) % TYPES.len()];
    let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
    let Some(protocol) = Protocol::of(&headers) else { panic!("{kind} is known") };
    let encoding = if gzip { Encoding::Gzip } else { Encoding::Identity };
    let path = if single { "/process.Process/Start" } else { "/process.Process/StreamInput" };
    let reader = Reader {
        protocol,
        encoding,
        limit: LIMIT,
        stall_timeout: Duration::from_secs(60),
        methods: Arc::clone(&METHODS),
        method: METHODS.get(path).unwrap(),
    };
    let chunks: Vec<_> = bytes
        .chunks(usize::from(step) + 1)
        .map(|chunk| Ok::<_, std::io::Error>(Bytes::copy_from_slice(chunk)))
        .collect();
    let body = Body::from_stream(stream::iter(chunks));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut share = Budget::new(1 << 16).share();
        let body = match single {
            true => reader.single(body, &mut share).await,
            false => Ok(reader.stream(body, share)),
        };
        let Ok(body) = body else { return };
        if let Ok(collected) = body.collect().await {
            // What comes out is whole envelopes without flags.
            let mut rest = collected.to_bytes();
            while !rest.is_empty() {
                assert_eq!(rest[0], 0);
                let length = u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]) as usize;
                assert!(length <= LIMIT);
                let _ = rest.split_to(5 + length);
            }
        }
    });
});
