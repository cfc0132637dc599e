//! Generates an implementation of `wire::extensions::Extensible` for every message.
//!
//! Which fields are extensions is read from the descriptors, so a new field is covered by its
//! number alone.

use std::{collections::HashMap, error::Error, fmt::Write};

use heck::{ToSnakeCase, ToUpperCamelCase};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// The first number of extension fields.
const FIRST_EXTENSION: i32 = 100;

/// Upstream's own fields that are newer than the protocol version that the daemon claims
/// (`version::E2B`), as the message and the field. They are extensions until the claim includes them.
const NEWER: [(&str, &str); 1] = [("filesystem.EntryInfo", "is_symlink")];

type Messages<'a> = HashMap<String, (&'a DescriptorProto, String)>;

/// The implementations for one package, to be included in its module.
pub(crate) fn generate(set: &FileDescriptorSet, package: &str) -> Result<String, Box<dyn Error>> {
    let mut messages = Messages::new();
    for file in &set.file {
        for message in &file.message_type {
            collect(&mut messages, file.package(), "", message);
        }
    }
    let mut code = String::new();
    let mut own: Vec<_> = set
        .file
        .iter()
        .filter(|file| file.package() == package)
        .flat_map(|file| &file.message_type)
        .flat_map(|message| names(package, message))
        .collect();
    own.sort();
    for name in own {
        let (message, path) = messages.get(&name).ok_or("a message without a descriptor")?;
        implement(&mut code, &messages, &name, message, path)?;
    }
    Ok(code)
}

/// Records a message and those inside of it by their full names, with their Rust paths.
fn collect<'a>(
    messages: &mut Messages<'a>,
    scope: &str,
    module: &str,
    message: &'a DescriptorProto,
) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        let module = format!("{module}{}::", message.name().to_snake_case());
        collect(messages, &name, &module, nested);
    }
    let path = format!("{module}{}", message.name().to_upper_camel_case());
    messages.insert(name, (message, path));
}

/// The full names of a message and those inside of it, without the entries of maps.
fn names(scope: &str, message: &DescriptorProto) -> Vec<String> {
    if is_map_entry(message) {
        return Vec::new();
    }
    let name = format!("{scope}.{}", message.name());
    let nested = message.nested_type.iter().flat_map(|nested| names(&name, nested));
    let mut all: Vec<_> = nested.collect();
    all.push(name);
    all
}

fn is_map_entry(message: &DescriptorProto) -> bool {
    message.options.as_ref().is_some_and(|options| options.map_entry())
}

fn is_extension(message: &str, field: &FieldDescriptorProto) -> bool {
    field.number() >= FIRST_EXTENSION || NEWER.contains(&(message, field.name()))
}

/// Whether extension fields may be inside of a field: it is a message of our own protos.
fn is_nested(messages: &Messages<'_>, field: &FieldDescriptorProto) -> bool {
    let name = field.type_name().trim_start_matches('.');
    field.r#type() == Type::Message
        && !name.starts_with("google.protobuf.")
        && messages.get(name).is_some_and(|(message, _)| !is_map_entry(message))
}

fn implement(
    code: &mut String,
    messages: &Messages<'_>,
    name: &str,
    message: &DescriptorProto,
    path: &str,
) -> Result<(), Box<dyn Error>> {
    let (mut has, mut clear) = (Vec::new(), String::new());
    let of_oneof = |field: &FieldDescriptorProto| match field.proto3_optional() {
        true => None,
        false => field.oneof_index,
    };
    for field in message.field.iter().filter(|field| of_oneof(field).is_none()) {
        let rust = identifier(field.name());
        if is_extension(name, field) {
            has.push(format!("crate::wire::extensions::is_set(&self.{rust})"));
            writeln!(clear, "self.{rust} = ::core::default::Default::default();")?;
        } else if is_nested(messages, field) {
            has.push(format!("self.{rust}.iter().any(|each| each.has_extensions())"));
            writeln!(clear, "self.{rust}.iter_mut().for_each(|each| each.clear_extensions());")?;
        } else if field.r#type() == Type::Message && field.label() == Label::Repeated {
            let inner = field.type_name().trim_start_matches('.');
            let values = messages.get(inner).and_then(|(entry, _)| entry.field.get(1));
            if values.is_some_and(|value| is_nested(messages, value)) {
                return Err(format!("{name}.{}: a map of messages", field.name()).into());
            }
        }
    }
    for (index, oneof) in message.oneof_decl.iter().enumerate() {
        let index = i32::try_from(index)?;
        let (mut has_arms, mut clear_arms) = (String::new(), String::new());
        let module =
            path.rsplit_once("::").map_or(String::new(), |(module, _)| module.to_owned() + "::");
        let kind = format!(
            "{module}{}::{}",
            message.name().to_snake_case(),
            oneof.name().to_upper_camel_case()
        );
        let rust = identifier(oneof.name());
        for field in message.field.iter().filter(|field| of_oneof(field) == Some(index)) {
            let variant = format!("{kind}::{}", field.name().to_upper_camel_case());
            if is_extension(name, field) {
                writeln!(has_arms, "Some({variant}(_)) => true,")?;
                writeln!(clear_arms, "Some({variant}(_)) => self.{rust} = None,")?;
            } else if is_nested(messages, field) {
                writeln!(has_arms, "Some({variant}(each)) => each.has_extensions(),")?;
                writeln!(clear_arms, "Some({variant}(each)) => each.clear_extensions(),")?;
            }
        }
        if !has_arms.is_empty() {
            has.push(format!("match &self.{rust} {{ {has_arms} _ => false }}"));
            writeln!(clear, "match &mut self.{rust} {{ {clear_arms} _ => {{}} }}")?;
        }
    }
    let has = if has.is_empty() { "false".to_owned() } else { has.join(" || ") };
    writeln!(
        code,
        "impl crate::wire::extensions::Extensible for {path} {{
            fn has_extensions(&self) -> bool {{ {has} }}
            fn clear_extensions(&mut self) {{ {clear} }}
        }}"
    )?;
    Ok(())
}

/// A field's name in Rust.
fn identifier(name: &str) -> String {
    match name {
        "type" | "match" | "move" | "ref" | "in" | "where" | "use" | "loop" => format!("r#{name}"),
        _ => name.to_snake_case(),
    }
}
