//! The memory that requests may take together, and the threads that decode what is large.
//!
//! | account | size | who borrows |
//! |---|---|---|
//! | [`Memory::requests`] | `--max-buffered-bytes` | requests, what they are decoded to, and answers that wait to be sent |
//! | [`Memory::downloads`] | a quarter of that, on top of it | pieces of files that wait to be sent |
//! | [`Memory::unproven`] | [`MAX_UNPROVEN_BYTES`] | requests that have not shown the token: heads, and bodies of `/init` |

use std::sync::Arc;

use bytes::Bytes;

use super::{
    budget::{Budget, Shortage},
    trim::Trimmer,
};
use crate::blocking::Pool;

/// The most bytes of requests that have not shown the token, over all connections.
pub const MAX_UNPROVEN_BYTES: usize = 32 << 20;
/// Of those, the ones for peers from outside the sandbox.
const UNPROVEN_OUTSIDE: usize = 12 << 20;
/// The share of the buffer that downloads have on top of it, one in so many.
const DOWNLOADS_PART: usize = 4;
/// The messages that are decoded at a time off the runtime.
pub const MAX_DECODERS: usize = 2;
/// Messages above this size are decoded off the runtime.
pub const LARGE_MESSAGE: usize = 64 << 10;

/// See the module; clones share everything.
#[derive(Debug, Clone)]
pub struct Memory {
    requests: Budget,
    downloads: Budget,
    unproven_inside: Budget,
    unproven_outside: Budget,
    decoders: Arc<Pool>,
    trimmer: Arc<Trimmer>,
    shortage: Arc<Shortage>,
}

impl Memory {
    /// With a buffer of so many bytes.
    pub fn new(buffered_bytes: usize) -> Self {
        let shortage = Arc::default();
        let downloads = Budget::undivided(buffered_bytes / DOWNLOADS_PART);
        Self {
            requests: Budget::new(buffered_bytes).relieved_by(&shortage),
            downloads: downloads.relieved_by(&shortage),
            unproven_inside: Budget::undivided(MAX_UNPROVEN_BYTES - UNPROVEN_OUTSIDE),
            unproven_outside: Budget::undivided(UNPROVEN_OUTSIDE),
            decoders: Pool::new("decode", 1, MAX_DECODERS),
            trimmer: Arc::default(),
            shortage,
        }
    }

    /// Has `relief` called when requests and answers, or downloads, hold all that they may: what a client
    /// that takes nothing holds can be freed. The first one stays.
    pub fn on_shortage(&self, relief: impl Fn() + Send + Sync + 'static) {
        self.shortage.set(relief);
    }

    /// Remembers how much the daemon takes that does nothing.
    pub fn started(&self) {
        self.trimmer.started();
    }

    /// Notes that a call or a connection has ended: what it held may be returned to the kernel.
    pub fn freed(&self) {
        self.trimmer.note(&self.decoders);
    }

    /// What requests and answers borrow from.
    pub fn requests(&self) -> &Budget {
        &self.requests
    }

    /// What downloads borrow from.
    pub fn downloads(&self) -> &Budget {
        &self.downloads
    }

    /// What a request borrows from that has not shown the token; `inside` says that its peer is a program
    /// of the sandbox.
    pub fn unproven(&self, inside: bool) -> &Budget {
        if inside { &self.unproven_inside } else { &self.unproven_outside }
    }

    /// The threads that decode large messages.
    pub fn decoders(&self) -> &Arc<Pool> {
        &self.decoders
    }
}

/// Bytes that drop a guard, such as their [`Share`](super::budget::Share), with the last slice of them.
pub fn charged<G: Send + 'static>(bytes: impl AsRef<[u8]> + Send + 'static, guard: G) -> Bytes {
    struct Charged<B, G>(B, #[allow(dead_code)] G);
    impl<B: AsRef<[u8]>, G> AsRef<[u8]> for Charged<B, G> {
        fn as_ref(&self) -> &[u8] {
            self.0.as_ref()
        }
    }
    Bytes::from_owner(Charged(bytes, guard))
}
