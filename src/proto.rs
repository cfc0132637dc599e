//! The generated messages and services, one module a protobuf package, and their descriptors.

mod timestamp;

pub use timestamp::Timestamp;

/// The encoded `FileDescriptorSet` of all that is below, for reflection and the method table.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Package `process`: E2B's process service.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod process {
    include!(concat!(env!("OUT_DIR"), "/process.rs"));
    include!(concat!(env!("OUT_DIR"), "/process.serde.rs"));
    include!(concat!(env!("OUT_DIR"), "/process.extensions.rs"));
}

/// Package `filesystem`: E2B's filesystem service.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod filesystem {
    include!(concat!(env!("OUT_DIR"), "/filesystem.rs"));
    include!(concat!(env!("OUT_DIR"), "/filesystem.serde.rs"));
    include!(concat!(env!("OUT_DIR"), "/filesystem.extensions.rs"));
}

/// Package `envd.v1`: envd's own services.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/envd.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/envd.v1.serde.rs"));
    include!(concat!(env!("OUT_DIR"), "/envd.v1.extensions.rs"));
}

/// The full name of the template service.
pub const TEMPLATE: &str = "envd.v1.Template";
/// The full name of the system service.
pub const SYSTEM: &str = "envd.v1.System";
/// The full name of the process service.
pub const PROCESS: &str = "process.Process";
/// The full name of the filesystem service.
pub const FILESYSTEM: &str = "filesystem.Filesystem";

/// The methods of [`PROCESS`] that upstream has.
pub const UPSTREAM_PROCESS: [&str; 8] =
    ["List", "Connect", "Start", "Update", "StreamInput", "SendInput", "SendSignal", "CloseStdin"];
/// The methods of [`FILESYSTEM`] that upstream has.
pub const UPSTREAM_FILESYSTEM: [&str; 9] = [
    "Stat",
    "MakeDir",
    "Move",
    "ListDir",
    "Remove",
    "WatchDir",
    "CreateWatcher",
    "GetWatcherEvents",
    "RemoveWatcher",
];
