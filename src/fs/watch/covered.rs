//! Which directories are watched: for those who could make a change in two ways.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

/// The watched directories, by the watcher's id.
#[derive(Debug, Default)]
pub(super) struct Covered(Mutex<HashMap<u64, (PathBuf, bool)>>);

/// One of them, while it is held.
#[derive(Debug)]
pub(super) struct Cover {
    covered: Arc<Covered>,
    id: u64,
}

impl Covered {
    pub(super) fn add(self: &Arc<Self>, id: u64, path: &Path, recursive: bool) -> Cover {
        self.0.lock().insert(id, (path.to_owned(), recursive));
        Cover { covered: Arc::clone(self), id }
    }

    /// Whether a change in `dir` is told to somebody. It may block, as any look at a path.
    pub(super) fn has(&self, dir: &Path) -> bool {
        let watched: Vec<_> = self.0.lock().values().cloned().collect();
        if watched.is_empty() {
            return false;
        }
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let dir = real(dir);
        watched.iter().any(|(path, recursive)| {
            let path = real(path);
            dir == path || (*recursive && dir.starts_with(path))
        })
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        self.covered.0.lock().remove(&self.id);
    }
}
