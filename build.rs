//! Compiles the protos without a `protoc`: protox parses them, tonic-prost-build generates the
//! services and messages, pbjson-build their proto3 JSON. The descriptor set is kept for gRPC
//! reflection and for the wire layer's table of methods.

#[path = "build/extensions.rs"]
mod extensions;

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 4] = [
    "proto/process/process.proto",
    "proto/filesystem/filesystem.proto",
    "proto/envd/v1/template.proto",
    "proto/envd/v1/system.proto",
];
const PACKAGES: [&str; 3] = [".process", ".filesystem", ".envd.v1"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("descriptors.bin"), &encoded)?;
    for package in PACKAGES {
        let package = package.trim_start_matches('.');
        let code = extensions::generate(&descriptors, package)?;
        fs::write(out.join(format!("{package}.extensions.rs")), code)?;
    }

    tonic_prost_build::configure()
        .build_transport(false)
        .codec_path("crate::wire::codec::DualCodec")
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        // pbjson's own ends its JSON in `+00:00`.
        .extern_path(".google.protobuf.Timestamp", "crate::proto::Timestamp")
        .bytes(".")
        .compile_fds(descriptors)?;

    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .ignore_unknown_fields()
        .ignore_unknown_enum_variants()
        .build(&PACKAGES)?;
    Ok(())
}
