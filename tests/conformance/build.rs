//! Compiles the suite's own protos, which come with the Go module that `make conformance` installs
//! and are not kept here: `CONFORMANCE_PROTO` names their directory.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=CONFORMANCE_PROTO");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let Ok(protos) = env::var("CONFORMANCE_PROTO") else {
        return Err("CONFORMANCE_PROTO is not set: run `make conformance`".into());
    };
    let dir = "connectrpc/conformance/v1";
    let files = [format!("{dir}/service.proto"), format!("{dir}/server_compat.proto")];
    let descriptors = protox::compile(files, [protos])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("descriptors.bin"), &encoded)?;
    tonic_prost_build::configure()
        .build_transport(false)
        .build_client(false)
        .codec_path("envd::wire::codec::DualCodec")
        .extern_path(".google.protobuf.Any", "crate::any::Any")
        .compile_fds(descriptors)?;
    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .extern_path(".google.protobuf.Any", "crate::any::Any")
        .ignore_unknown_fields()
        .build(&[".connectrpc.conformance.v1"])?;
    Ok(())
}
