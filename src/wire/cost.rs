//! What a message takes in memory once it is decoded, estimated from its bytes before that is done.
//!
//! Two bytes on the wire may become an empty string of 24 in a vector that doubles as it grows, so the size
//! of a message says little. [`Types`] knows every message's fields from the descriptors and walks the wire
//! format along them; unknown fields cost nothing, as they are skipped. JSON has more bytes for each value,
//! and is only counted. The estimates are upper bounds, but for the allocator's overhead.

use std::collections::HashMap;

use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

use super::codec::Format;

/// A string or a vector, and the least that the allocator gives for what is in it.
const STRING: usize = 24 + 32;
/// A scalar that may be absent.
const SCALAR: usize = 16;
/// A map, without what is in it.
const MAP: usize = 48;
/// A vector that grows has up to twice the room that it needs, and copies once more while it does.
const GROWTH: usize = 3;
/// How deep messages are followed; deeper ones count as text, which costs more than most.
const MAX_DEPTH: usize = 16;
/// What one value in JSON costs at most: the largest message of which there may be many.
const JSON_VALUE: usize = 128;
/// A field whose value is shared with the buffer that it came in (`bytes`).
const SHARED: usize = 32;

/// The messages that there are.
#[derive(Debug, Default)]
pub struct Types {
    messages: Vec<Message>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug, Default)]
struct Message {
    /// What one takes, without what it points to.
    size: usize,
    fields: HashMap<u32, Field>,
}

#[derive(Debug, Clone, Copy)]
struct Field {
    kind: Kind,
    repeated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scalar,
    Text,
    Bytes,
    Message(usize),
}

impl Types {
    /// Adds the messages of descriptors.
    pub fn add(&mut self, descriptors: &FileDescriptorSet) {
        let mut found = Vec::new();
        for file in &descriptors.file {
            let package = format!(".{}", file.package());
            for message in &file.message_type {
                collect(package.trim_end_matches('.'), message, &mut found);
            }
        }
        for (name, _) in &found {
            self.by_name.entry(name.clone()).or_insert_with(|| {
                self.messages.push(Message::default());
                self.messages.len() - 1
            });
        }
        for (name, message) in found {
            let fields: HashMap<_, _> = message
                .field
                .iter()
                .map(|field| (u32::try_from(field.number()).unwrap_or(0), self.field(field)))
                .collect();
            if let Some(known) = self.by_name.get(&name).and_then(|at| self.messages.get_mut(*at)) {
                known.fields = fields;
            }
        }
        for at in 0..self.messages.len() {
            let size = self.size(at, 0);
            if let Some(message) = self.messages.get_mut(at) {
                message.size = size;
            }
        }
    }

    fn field(&self, field: &FieldDescriptorProto) -> Field {
        let kind = match field.r#type() {
            Type::String => Kind::Text,
            Type::Bytes => Kind::Bytes,
            Type::Message | Type::Group => {
                self.by_name.get(field.type_name()).map_or(Kind::Text, |at| Kind::Message(*at))
            }
            _ => Kind::Scalar,
        };
        Field { kind, repeated: field.label() == Label::Repeated }
    }

    /// What a message takes by itself; those in it that there is one of are a part of it.
    fn size(&self, at: usize, depth: usize) -> usize {
        let Some(message) = self.messages.get(at).filter(|_| depth < MAX_DEPTH) else {
            return STRING;
        };
        let sizes = message.fields.values().map(|field| match field.kind {
            _ if field.repeated => MAP,
            Kind::Scalar => SCALAR,
            Kind::Text | Kind::Bytes => STRING,
            Kind::Message(other) => self.size(other, depth + 1) + 8,
        });
        // Oneofs and recursion make this too much; it is an estimate.
        sizes.sum::<usize>().min(4096) + 8
    }

    /// The message of this name, as descriptors write it (`.package.Name`).
    pub fn named(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// What a message of type `at` takes once it is decoded, beside its bytes.
    pub fn cost(&self, at: Option<usize>, format: Format, bytes: &[u8]) -> usize {
        match (format, at) {
            (Format::Json, _) => json(bytes),
            (Format::Proto, Some(at)) => self.walk(at, bytes, 0),
            // Of services that are not ours, with small messages.
            (Format::Proto, None) => bytes.len(),
        }
    }

    /// Stops where the bytes are no message: decoding stops there, too.
    fn walk(&self, at: usize, mut bytes: &[u8], depth: usize) -> usize {
        let Some(message) = self.messages.get(at).filter(|_| depth < MAX_DEPTH) else {
            return bytes.len().saturating_mul(STRING / 2);
        };
        let mut cost = message.size;
        while !bytes.is_empty() {
            let Some((number, wire_type)) = key(&mut bytes) else { break };
            let Some(value) = value(&mut bytes, wire_type) else { break };
            let Some(field) = message.fields.get(&number) else { continue };
            let content = match field.kind {
                Kind::Scalar => value.map_or(SCALAR, |packed| SCALAR.saturating_mul(packed.len())),
                Kind::Text => STRING.saturating_add(value.map_or(0, <[u8]>::len)),
                Kind::Bytes => SHARED,
                Kind::Message(other) => self.walk(other, value.unwrap_or_default(), depth + 1),
            };
            cost = cost.saturating_add(match field.repeated {
                true => content.saturating_mul(GROWTH),
                false => content,
            });
        }
        cost
    }
}

fn collect<'a>(
    prefix: &str,
    message: &'a DescriptorProto,
    found: &mut Vec<(String, &'a DescriptorProto)>,
) {
    let name = format!("{prefix}.{}", message.name());
    for nested in &message.nested_type {
        collect(&name, nested, found);
    }
    found.push((name, message));
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn key(bytes: &mut &[u8]) -> Option<(u32, u8)> {
    let key = varint(bytes)?;
    let wire_type = u8::try_from(key & 7).ok()?;
    Some((u32::try_from(key >> 3).ok()?, wire_type))
}

/// Takes a value; what is in it, if it has a length.
fn value<'a>(bytes: &mut &'a [u8], wire_type: u8) -> Option<Option<&'a [u8]>> {
    let skip = match wire_type {
        0 => {
            varint(bytes)?;
            return Some(None);
        }
        1 => 8,
        2 => usize::try_from(varint(bytes)?).ok()?,
        // Groups have no end that could be skipped to; their fields are skipped one by one.
        3 | 4 => 0,
        5 => 4,
        _ => return None,
    };
    let (taken, rest) = bytes.split_at_checked(skip)?;
    *bytes = rest;
    Some((wire_type == 2).then_some(taken))
}

/// What JSON costs: what is in its strings, and each of its values.
pub fn json(text: &[u8]) -> usize {
    let (mut values, mut inside) = (1_usize, 0_usize);
    let (mut quoted, mut escaped) = (false, false);
    for byte in text {
        inside += usize::from(quoted);
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' | b'[' | b'{' if !quoted => values += 1,
            _ => {}
        }
    }
    inside.saturating_add(values.saturating_mul(JSON_VALUE))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::{
        self,
        process::{ProcessConfig, SendInputRequest, StartRequest, process_input::Input},
    };

    fn types() -> Types {
        let mut types = Types::default();
        types.add(&FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap());
        types
    }

    fn cost(name: &str, message: &impl prost::Message) -> usize {
        let types = types();
        let at = types.named(name);
        assert!(at.is_some());
        types.cost(at, Format::Proto, &message.encode_to_vec())
    }

    #[test]
    fn many_empty_strings_cost_what_they_become() {
        let args = vec![String::new(); 1_000_000];
        let process = Some(ProcessConfig { args, ..Default::default() });
        let start = StartRequest { process, ..Default::default() };
        let estimate = cost(".process.StartRequest", &start);
        assert!(estimate > 24_000_000, "{estimate}");
        let text = serde_json::to_vec(&start).unwrap();
        assert!(json(&text) > 24_000_000);
    }

    #[test]
    fn what_is_ordinary_costs_about_its_size() {
        let args = vec!["x".repeat(100_000); 10];
        let process = Some(ProcessConfig { args, ..Default::default() });
        let start = StartRequest { process, ..Default::default() };
        assert!(cost(".process.StartRequest", &start) < 4 << 20);
        let input = Some(Input::Stdin(vec![b'x'; 1 << 20].into()));
        let input = Some(proto::process::ProcessInput { input });
        let send = SendInputRequest { input, ..Default::default() };
        // Its bytes are not copied.
        assert!(cost(".process.SendInputRequest", &send) < 16 << 10);
        assert!(json(b"{\"a\":\"[,,,,,,\\\",,,,{{{{\"}") < 1 << 10);
    }

    #[test]
    fn garbage_has_a_cost_and_an_end() {
        let (types, mut state) = (types(), 1_u32);
        for length in 0..2000 {
            let bytes: Vec<u8> = (0..length % 97)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state.to_be_bytes()[0]
                })
                .collect();
            types.cost(types.named(".process.StartRequest"), Format::Proto, &bytes);
            json(&bytes);
        }
    }
}
