//! Which volumes are mounted for which life of the sandbox: a volume is mounted again when the sandbox
//! begins another.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use parking_lot::Mutex;

use super::{NfsError, Volume, remount, table};

/// Volumes by the paths that the host names; of one path, one thread at a time mounts.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<HashMap<PathBuf, Entry>>);

/// The volumes that are remembered. Beyond it, those that are not mounted any more are forgotten.
const MANY: usize = 1024;

#[derive(Debug)]
enum Entry {
    /// Somebody has a [`Claim`].
    Claimed,
    Mounted(Mounted),
}

#[derive(Debug)]
struct Mounted {
    life: String,
    /// Where, behind all links: finding that out again might hang.
    place: PathBuf,
}

/// The right to mount at one path, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    ledger: Arc<Ledger>,
    volume: Volume,
    mounted: Option<Mounted>,
}

impl Ledger {
    /// The right to mount a volume; `None` while somebody else has it, as one whose server hangs.
    pub fn claim(self: &Arc<Self>, volume: Volume) -> Option<Claim> {
        let mut entries = self.0.lock();
        if entries.len() >= MANY {
            entries.retain(|_, entry| match entry {
                Entry::Claimed => true,
                Entry::Mounted(mounted) => table::is_mounted(&mounted.place),
            });
        }
        let mounted = match entries.insert(volume.path.clone(), Entry::Claimed) {
            None => None,
            Some(Entry::Mounted(mounted)) => Some(mounted),
            Some(Entry::Claimed) => return None,
        };
        Some(Claim { ledger: Arc::clone(self), volume, mounted })
    }
}

impl Claim {
    /// Mounts the volume unless it is mounted for this life; whether that was news. Blocks, for as
    /// long as the server lets the kernel wait.
    ///
    /// # Errors
    /// [`NfsError::Step`].
    pub(super) fn mount(self, life: &str) -> Result<bool, NfsError> {
        self.mount_with(life, remount)
    }

    fn mount_with(
        mut self,
        life: &str,
        remount: impl FnOnce(&Volume) -> Result<PathBuf, NfsError>,
    ) -> Result<bool, NfsError> {
        let known = self.mounted.take();
        if let Some(mounted) = known.filter(|mounted| mounted.life == life)
            && table::is_mounted(&mounted.place)
        {
            self.mounted = Some(mounted);
            return Ok(false);
        }
        let place = remount(&self.volume)?;
        self.mounted = Some(Mounted { life: life.to_owned(), place });
        Ok(true)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut entries = self.ledger.0.lock();
        match self.mounted.take() {
            Some(mounted) => entries.insert(self.volume.path.clone(), Entry::Mounted(mounted)),
            None => entries.remove(&self.volume.path),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn volume() -> Volume {
        Volume::new("h:/x".to_owned(), "/mnt/volume".to_owned()).unwrap()
    }

    #[test]
    fn one_at_a_time_and_once_a_life() {
        let ledger = Arc::new(Ledger::default());
        let claim = ledger.claim(volume()).unwrap();
        assert!(ledger.claim(volume()).is_none(), "it is being mounted");
        // What is always mounted stands for the volume, as behind a link.
        let mounted = |_: &Volume| Ok(PathBuf::from("/proc"));
        let never = |_: &Volume| -> Result<PathBuf, NfsError> { panic!("it is mounted") };
        assert!(claim.mount_with("one", mounted).unwrap());
        assert!(!ledger.claim(volume()).unwrap().mount_with("one", never).unwrap());
        // A claim that was not used changes nothing.
        drop(ledger.claim(volume()));
        assert!(!ledger.claim(volume()).unwrap().mount_with("one", never).unwrap());
        assert!(ledger.claim(volume()).unwrap().mount_with("two", mounted).unwrap());
        let failing = |_: &Volume| {
            let source = io::Error::other("refused");
            Err(NfsError::Step { what: "mount", path: "/mnt/volume".into(), source })
        };
        ledger.claim(volume()).unwrap().mount_with("three", failing).unwrap_err();
        assert!(ledger.claim(volume()).unwrap().mount_with("two", mounted).unwrap());
        // Somebody has unmounted it.
        let elsewhere = |_: &Volume| Ok(PathBuf::from("/proc/self"));
        assert!(ledger.claim(volume()).unwrap().mount_with("four", elsewhere).unwrap());
        assert!(ledger.claim(volume()).unwrap().mount_with("four", mounted).unwrap());
    }
}
