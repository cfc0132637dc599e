//! envd is the daemon inside a sandbox: it runs processes and touches files for whoever owns the
//! sandbox, over gRPC, gRPC-Web, Connect and plain HTTP, on TCP, vsock and unix sockets.
//!
//! The map, from the wire inwards; imports go in this direction only:
//!
//! * [`wire`] turns bytes into calls: listeners, connections and their limits, the translation of
//!   Connect and gRPC-Web to gRPC, CORS. It knows no domain.
//! * [`api`] holds the RPC services: protobuf to domain, domain error to status.
//! * [`http`] holds the REST faces of the same domain: health and files.
//! * [`process`] is the domain of processes: spawn, output, input, ending, registry.
//! * [`fs`] is the domain of files: paths, entries, directories, transfers, watches.
//! * [`template`] runs the template's commands and knows whether it is ready; [`wait`] waits for the
//!   same conditions on the command line.
//! * [`sandbox`] is what those two share; [`access`] knows its token, and [`setup`] initialises it.
//! * [`guest`] knows the machine around them: its users, its boot, and its PID 1, which envd can
//!   be itself; and whom to tell that the daemon is ready.
//! * [`telemetry`] logs, and tells a collector.
//! * [`blocking`] runs what may block, [`slots`] bounds transfers, [`quote`] cuts what messages quote;
//!   anyone may use them.
//! * [`sys`] holds every `unsafe` block, each behind a safe function.
//! * [`config`] and [`daemon`] read the arguments and put the parts together.
//! * [`version`] says what this envd calls itself.
//! * [`proto`] is what build.rs generates from `proto/`.

pub mod access;
pub mod api;
pub mod blocking;
pub mod config;
pub mod daemon;
pub mod fs;
pub mod guest;
pub mod http;
pub mod process;
pub mod proto;
pub mod quote;
pub mod sandbox;
pub mod setup;
#[cfg(test)]
#[allow(dead_code, unreachable_pub)]
#[path = "../tests/common/skipped.rs"]
mod skipped;
pub mod slots;
mod sync;
pub mod sys;
pub mod telemetry;
pub mod template;
pub mod to_client;
pub mod version;
pub mod wait;
pub mod wire;
