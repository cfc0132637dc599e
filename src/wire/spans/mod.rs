//! The span of a request: around everything, the gate and CORS included, from the head of the request
//! to the end of its answer. It goes on with the trace of a caller who sends `traceparent`.
//!
//! Names and attributes are those of OpenTelemetry's semantic conventions for RPC and HTTP servers.
//! A span holds nothing that a caller chose: a path that is no method and no route is not told, and
//! queries, headers and messages never are.
//!
//! It is there with the cargo feature `otlp`, and without a collector ([`crate::telemetry`]) no span
//! is made. In other binaries there is a layer that does nothing.

#[cfg(feature = "otlp")]
mod traced;

#[cfg(feature = "otlp")]
pub use traced::{Requests, TARGET, Traced, rpc_ended};

#[cfg(not(feature = "otlp"))]
mod absent {
    use tonic::Code;

    use super::super::methods::Methods;

    /// A layer that does nothing: this binary has no traces.
    #[derive(Debug, Clone)]
    pub struct Requests;

    impl Requests {
        /// Of these methods and routes.
        pub fn new(_: &Methods, _: &[&'static str]) -> Self {
            Self
        }
    }

    impl<S> tower::Layer<S> for Requests {
        type Service = S;

        fn layer(&self, inner: S) -> S {
            inner
        }
    }

    /// The outcome of the RPC whose span this is.
    pub fn rpc_ended(_: Code) {}
}

#[cfg(not(feature = "otlp"))]
pub use absent::{Requests, rpc_ended};
