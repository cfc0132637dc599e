//! Uploads that can be continued: what a broken stream has brought is kept for a while.
//!
//! A client names its upload. While a call writes it, no other can; when the call ends without a
//! commit, for whatever reason, the file waits here. The files have no names in the file system, so
//! a daemon that ends leaves nothing behind, and what was kept is gone with it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::{FsError, staged::Staged};

/// The uploads with a name at a time, in use or kept; a new one takes the place of the one that is kept for
/// longest. Each has an open file and directory.
pub const MAX_KEPT_UPLOADS: usize = 32;
/// How long an upload that nobody writes is kept.
pub const UPLOAD_KEPT: Duration = Duration::from_secs(600);
/// The longest name of an upload.
pub const MAX_UPLOAD_ID: usize = 64;

/// All named uploads.
#[derive(Debug, Default)]
pub struct Uploads {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<String, Slot>,
    /// How often something was kept: tells one keeping from another.
    keepings: u64,
}

/// A staged file, between the jobs that write it; none once it is committed.
pub type SharedStaged = Arc<Mutex<Option<Staged>>>;

#[derive(Debug)]
enum Slot {
    InUse,
    Kept(Kept, u64),
}

/// An upload that waits for its client.
#[derive(Debug, Clone)]
pub struct Kept {
    /// What has come.
    pub staged: SharedStaged,
    /// The path that it is for.
    pub path: PathBuf,
    /// The user that it is for.
    pub owner: u32,
}

/// What [`Uploads::take`] gives.
#[derive(Debug)]
pub struct Taken {
    /// What has come before; none of an upload that begins.
    pub kept: Option<Kept>,
    /// The upload that made room. To drop it may block.
    pub evicted: Option<Kept>,
}

impl State {
    /// Takes away the upload that has waited longest for its client.
    fn remove_oldest(&mut self) -> Option<(String, Kept)> {
        let kept = self.slots.iter().filter_map(|(id, slot)| match slot {
            Slot::Kept(_, number) => Some((*number, id.clone())),
            Slot::InUse => None,
        });
        let (_, oldest) = kept.min()?;
        match self.slots.remove(&oldest)? {
            Slot::Kept(kept, _) => Some((oldest, kept)),
            Slot::InUse => None,
        }
    }
}

impl Uploads {
    /// Nothing is kept yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes the upload `id` for a call: with what has come before, or none when it begins. It must
    /// be given back with [`Self::keep`] or [`Self::forget`].
    ///
    /// # Errors
    /// [`FsError::BadField`], [`FsError::UploadInUse`], [`FsError::UploadOfAnother`],
    /// [`FsError::TooManyUploads`].
    pub fn take(&self, id: &str, path: &Path, owner: u32) -> Result<Taken, FsError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if id.is_empty() || id.len() > MAX_UPLOAD_ID || !id.bytes().all(allowed) {
            return Err(FsError::BadField {
                field: "upload_id",
                why: format!("not 1 to {MAX_UPLOAD_ID} of A-Z a-z 0-9 . _ -"),
            });
        }
        let mut state = self.state.lock();
        let mut evicted = None;
        let kept = match state.slots.get(id) {
            None if state.slots.len() >= MAX_KEPT_UPLOADS => {
                evicted = state.remove_oldest();
                if evicted.is_none() {
                    return Err(FsError::TooManyUploads(MAX_KEPT_UPLOADS));
                }
                None
            }
            None => None,
            Some(Slot::InUse) => return Err(FsError::UploadInUse(id.to_owned())),
            Some(Slot::Kept(kept, _)) if kept.path == path && kept.owner == owner => {
                Some(kept.clone())
            }
            Some(Slot::Kept(..)) => return Err(FsError::UploadOfAnother(id.to_owned())),
        };
        state.slots.insert(id.to_owned(), Slot::InUse);
        let evicted = evicted.map(|(evicted, kept)| {
            tracing::info!(upload = evicted, "gave up an unfinished upload for a new one");
            kept
        });
        Ok(Taken { kept, evicted })
    }

    /// Gives an upload back unfinished; the number is for [`Self::expire`].
    pub fn keep(&self, id: &str, kept: Kept) -> u64 {
        let mut state = self.state.lock();
        state.keepings += 1;
        let number = state.keepings;
        state.slots.insert(id.to_owned(), Slot::Kept(kept, number));
        number
    }

    /// Ends an upload: it is committed, or cannot be.
    pub fn forget(&self, id: &str) {
        self.state.lock().slots.remove(id);
    }

    /// Gives up the upload that has waited longest, for its descriptor; whether there was one.
    pub fn evict_oldest(&self) -> bool {
        let Some((oldest, evicted)) = self.state.lock().remove_oldest() else { return false };
        drop(evicted);
        tracing::warn!(
            upload = oldest,
            "gave up an unfinished upload: there are no descriptors left"
        );
        true
    }

    /// Takes an upload away if it has been kept since [`Self::keep`] gave this number.
    pub fn expire(&self, id: &str, number: u64) -> Option<Kept> {
        let mut state = self.state.lock();
        match state.slots.get(id) {
            Some(Slot::Kept(kept, now)) if *now == number => {
                let kept = kept.clone();
                state.slots.remove(id);
                Some(kept)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_at_a_time_and_only_its_own() {
        let uploads = Uploads::new();
        let path = Path::new("/p");
        let kept = || Kept { staged: Arc::default(), path: path.to_owned(), owner: 1 };
        assert!(uploads.take("a", path, 1).unwrap().kept.is_none());
        assert!(matches!(uploads.take("a", path, 1), Err(FsError::UploadInUse(_))));
        let first = uploads.keep("a", kept());
        assert!(matches!(uploads.take("a", path, 2), Err(FsError::UploadOfAnother(_))));
        assert!(matches!(uploads.take("a", Path::new("/q"), 1), Err(FsError::UploadOfAnother(_))));
        assert!(uploads.take("a", path, 1).unwrap().kept.is_some());
        let second = uploads.keep("a", kept());
        assert!(uploads.expire("a", first).is_none());
        assert!(uploads.expire("a", second).is_some());
        assert!(uploads.take("a", path, 1).unwrap().kept.is_none());
        uploads.forget("a");
        assert!(uploads.state.lock().slots.is_empty());
        for bad in ["", "a b", "ä", &"x".repeat(MAX_UPLOAD_ID + 1)] {
            assert!(matches!(uploads.take(bad, path, 1), Err(FsError::BadField { .. })));
        }
        for number in 0..MAX_KEPT_UPLOADS {
            uploads.take(&number.to_string(), path, 1).unwrap();
        }
        assert!(matches!(uploads.take("more", path, 1), Err(FsError::TooManyUploads(_))));
        uploads.keep("7", kept());
        uploads.keep("3", kept());
        let taken = uploads.take("more", path, 1).unwrap();
        assert!(taken.kept.is_none() && taken.evicted.is_some());
        assert!(uploads.take("3", path, 1).unwrap().kept.is_some(), "the oldest had to go");
    }
}
