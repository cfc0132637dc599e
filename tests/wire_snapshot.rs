//! The wire may grow and never change.
//!
//! `snapshots/wire.txt` holds every message field, enum value and method of our own protos, one a
//! line. A line that is there must stay true: no field is removed, renumbered, renamed or retyped.
//! A new one must be added to the file, so that every change of the wire is seen in review:
//! `UPDATE_SNAPSHOTS=1 cargo test --test wire_snapshot` writes the additions, never a removal.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fs, path::Path};

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

fn lines() -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in FileDescriptorSet::decode(envd::proto::DESCRIPTORS).unwrap().file {
        let package = file.package().to_owned();
        if package == "google.protobuf" {
            continue;
        }
        for message in &file.message_type {
            add_message(&mut lines, &package, message);
        }
        for each in &file.enum_type {
            add_enum(&mut lines, &package, each);
        }
        for service in &file.service {
            for method in &service.method {
                let stream = |on| if on { "stream " } else { "" };
                lines.insert(format!(
                    "rpc {package}.{}/{} ({}{}) -> {}{}",
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type(),
                    stream(method.server_streaming()),
                    method.output_type(),
                ));
            }
        }
    }
    lines
}

fn add_message(lines: &mut BTreeSet<String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    lines.insert(format!("message {name}"));
    for field in &message.field {
        let oneof = match (field.proto3_optional(), field.oneof_index) {
            (true, _) => "optional ".to_owned(),
            (false, Some(index)) => {
                format!("oneof({}) ", message.oneof_decl[usize::try_from(index).unwrap()].name())
            }
            (false, None) => String::new(),
        };
        let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
        lines.insert(format!(
            "field {name} {} = {}: {oneof}{repeated}{}",
            field.name(),
            field.number(),
            type_of(field)
        ));
    }
    for nested in &message.nested_type {
        add_message(lines, &name, nested);
    }
    for each in &message.enum_type {
        add_enum(lines, &name, each);
    }
}

fn add_enum(lines: &mut BTreeSet<String>, scope: &str, each: &EnumDescriptorProto) {
    for value in &each.value {
        let name = each.name();
        lines.insert(format!("enum {scope}.{name} {} = {}", value.name(), value.number()));
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        other => other.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

#[test]
fn the_wire_only_grows() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/wire.txt");
    let now = lines();
    let text = fs::read_to_string(&path).unwrap_or_default();
    let kept: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let lost: Vec<_> = kept.difference(&now).collect();
    assert!(lost.is_empty(), "clients rely on what is no longer so: {lost:#?}");
    let new: Vec<_> = now.difference(&kept).collect();
    if new.is_empty() {
        return;
    }
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        let all: Vec<_> = now.iter().map(String::as_str).collect();
        fs::write(&path, all.join("\n") + "\n").unwrap();
    } else {
        panic!("not in {} yet: {new:#?}", path.display());
    }
}

/// What E2B's clients were built from, written down by hand and independently of our protos.
#[test]
fn upstreams_numbers_are_ours() {
    let now = lines();
    for line in [
        "field process.ProcessEvent.EndEvent exit_code = 1: sint32",
        "field process.ProcessEvent.EndEvent error = 4: optional string",
        "field process.StartRequest stdin = 4: optional bool",
        "field process.StartRequest tag = 3: optional string",
        "field process.StreamInputRequest.DataEvent input = 2: .process.ProcessInput",
        "field process.ProcessInput pty = 2: oneof(input) bytes",
        "field process.PTY.Size rows = 2: uint32",
        "enum process.Signal SIGNAL_SIGTERM = 15",
        "rpc process.Process/StreamInput (stream .process.StreamInputRequest) -> .process.StreamInputResponse",
        "field filesystem.EntryInfo size = 4: int64",
        "field filesystem.EntryInfo modified_time = 9: .google.protobuf.Timestamp",
        "field filesystem.EntryInfo is_symlink = 12: bool",
        "field filesystem.WatchDirRequest allow_network_mounts = 4: bool",
        "enum filesystem.EventType EVENT_TYPE_CHMOD = 5",
        "rpc filesystem.Filesystem/WatchDir (.filesystem.WatchDirRequest) -> stream .filesystem.WatchDirResponse",
    ] {
        assert!(now.contains(line), "{line}");
    }
}
