//! The table of methods, made from the descriptors at start.
//!
//! The layer must know of each method whether its request and response are streams: Connect has
//! other content types for those, and a single-message request is checked to be one.

use std::collections::{HashMap, HashSet};

use prost::Message;
use prost_types::FileDescriptorSet;

use super::{cost::Types, shutdown::Phase};

/// Which sides of a method are streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// Many request messages.
    pub client_stream: bool,
    /// Many response messages.
    pub server_stream: bool,
    /// Whether the service also speaks JSON.
    pub json: bool,
    /// Whether its messages may be as large as the server allows, and not only
    /// [`super::MAX_ORDINARY_BYTES`].
    pub large: bool,
    /// The type of its requests, in [`Methods::types`].
    pub input: Option<usize>,
    /// Whether its stream carries a file, and not what happens: the shutdown of the daemon gives such
    /// a call the time that unary calls have.
    pub transfer: bool,
    /// Whether upstream does not have it: who calls it knows the extensions.
    pub extension: bool,
    /// Whether its stream ends by itself, as the results of a search do.
    pub finite: bool,
}

impl Method {
    /// One message each way.
    pub fn is_unary(self) -> bool {
        !self.client_stream && !self.server_stream
    }

    /// Whether its stream carries what happens, for as long as the client listens.
    pub fn is_events(self) -> bool {
        self.server_stream && !self.transfer && !self.finite
    }

    /// The phase of a shutdown at which a call of it ends.
    pub fn ends_at(self) -> Phase {
        if self.is_unary() || self.transfer { Phase::Ending } else { Phase::Draining }
    }
}

/// All methods by their path, `/package.Service/Method`.
#[derive(Debug, Default)]
pub struct Methods {
    by_path: HashMap<String, Method>,
    services: HashSet<String>,
    types: Types,
}

impl Methods {
    /// Adds every service of an encoded `FileDescriptorSet`; `json` tells whether their code is
    /// built on [`super::codec::DualCodec`].
    ///
    /// # Errors
    /// When the bytes are no descriptor set.
    pub fn add(mut self, descriptors: &[u8], json: bool) -> Result<Self, prost::DecodeError> {
        let descriptors = FileDescriptorSet::decode(descriptors)?;
        self.types.add(&descriptors);
        for file in descriptors.file {
            let package = file.package.unwrap_or_default();
            for service in file.service {
                let name = service.name.unwrap_or_default();
                let name = if package.is_empty() { name } else { format!("{package}.{name}") };
                for method in service.method {
                    let path = format!("/{name}/{}", method.name());
                    let method = Method {
                        client_stream: method.client_streaming(),
                        server_stream: method.server_streaming(),
                        json,
                        large: false,
                        input: self.types.named(method.input_type()),
                        transfer: false,
                        extension: true,
                        finite: false,
                    };
                    self.by_path.insert(path, method);
                }
                self.services.insert(name);
            }
        }
        Ok(self)
    }

    /// Lets one method have messages as large as the server allows: one whose messages are data,
    /// which is as large decoded as it was before. Of others a few bytes may become a hundred.
    pub fn allow_large(mut self, path: &str) -> Self {
        if let Some(method) = self.by_path.get_mut(path) {
            method.large = true;
        }
        self
    }

    /// The types of all messages.
    pub fn types(&self) -> &Types {
        &self.types
    }

    /// Marks a method whose stream carries a file.
    pub fn mark_transfer(mut self, path: &str) -> Self {
        if let Some(method) = self.by_path.get_mut(path) {
            method.transfer = true;
        }
        self
    }

    /// Marks a method whose stream ends by itself: a client that has closed its sending side gets all of it.
    pub fn mark_finite(mut self, path: &str) -> Self {
        if let Some(method) = self.by_path.get_mut(path) {
            method.finite = true;
        }
        self
    }

    /// Marks the methods of one service that upstream has as well; all others are extensions.
    pub fn mark_upstream(mut self, service: &str, methods: &[&str]) -> Self {
        for method in methods {
            if let Some(method) = self.by_path.get_mut(&format!("/{service}/{method}")) {
                method.extension = false;
            }
        }
        self
    }

    /// The paths of all methods.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.by_path.keys().map(String::as_str)
    }

    /// The method at a path.
    pub fn get(&self, path: &str) -> Option<Method> {
        self.by_path.get(path).copied()
    }

    /// Whether a path lies under a known service, whatever its method.
    pub fn has_service_of(&self, path: &str) -> bool {
        let service = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        self.services.contains(service)
    }
}
