//! A process that is not to outlive the interest in it.

use std::sync::Arc;

use super::Process;

/// Kills the tree of its process when it is dropped before [`Tether::release`].
#[derive(Debug)]
pub struct Tether(Option<Arc<Process>>);

impl Tether {
    pub(super) fn new(process: &Arc<Process>) -> Self {
        Self(Some(Arc::clone(process)))
    }

    /// Lets go of it: it has ended by itself.
    pub fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            tracing::info!(pid = process.pid(), "its client has gone: the process is killed");
            process.kill_tree();
        }
    }
}
