//! Calls of the watching thread to file systems that may not answer.
//!
//! One thread serves all watchers, so it must not make a call that may never return. While something
//! is mounted that a program or another machine serves, its calls keep out of such mounts
//! ([`keep_out_of_served`]). Those that meet one are made again by threads of a pool, and given up after
//! [`GIVE_UP`]; a mount that is known not to answer is not asked at all. Watches elsewhere cost what
//! they cost without such mounts.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
    time::Duration,
};

use nix::errno::Errno;

use crate::blocking::{MountBusy, Pool, can_servers_hang, keep_out_of_served, stand_on_path};

/// How long the watching thread waits for one call.
pub const GIVE_UP: Duration = Duration::from_secs(1);
/// The threads that make its calls, besides those that hang. It makes one call at a time.
const MAX_THREADS: usize = 2;

static POOL: LazyLock<Arc<Pool>> = LazyLock::new(|| Pool::new("watch-io", 0, MAX_THREADS));

/// Makes a call that concerns `path`, a second time if the first meets a mount that may hang.
/// `ETIMEDOUT` when its file system does not answer.
pub(super) fn call<T: Send + 'static>(
    path: &Path,
    work: impl Fn() -> T + Send + 'static,
) -> Result<T, Errno> {
    if !can_servers_hang() {
        return Ok(work());
    }
    if let Some(done) = keep_out_of_served(&work) {
        return Ok(done);
    }
    let path = path.to_owned();
    let work = move || {
        stand_on_path(&path)?;
        Ok::<_, MountBusy>(work())
    };
    match POOL.run_and_block(GIVE_UP, work) {
        Ok(Some(Ok(done))) => Ok(done),
        _ => Err(Errno::ETIMEDOUT),
    }
}
