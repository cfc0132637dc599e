//! Changes that a watcher has had no room for, merged: one state a name instead of many events.
//!
//! What they become is equivalent to the events that they came from: whoever applies either to the
//! same names (a CREATE adds its name; a REMOVE or RENAME takes its name away and all below it) ends
//! with the same names. A name can be told as removed that was never told as created.

use std::{
    collections::BTreeMap,
    ops::Bound,
    path::{Path, PathBuf},
};

use super::WatchKind;

/// The names of one watcher whose changes are merged. Beyond it changes are lost, which is declared
/// to whoever asked for rescans to be.
pub const MAX_MERGED_NAMES: usize = 1 << 18;

/// What happened to some names.
#[derive(Debug, Default)]
pub(super) struct Changes(BTreeMap<PathBuf, Change>);

/// What happened to one name, in this order.
#[derive(Debug, Default)]
struct Change {
    /// It went away: REMOVE or RENAME.
    left: Option<WatchKind>,
    created: bool,
    wrote: bool,
    chmod: bool,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Merges an event in; false when there is no room for its name.
    pub(super) fn apply(&mut self, rel: &Path, kind: WatchKind) -> bool {
        let leaves = matches!(kind, WatchKind::Remove | WatchKind::Rename);
        if leaves {
            // What was below has gone with it.
            let range = self.0.range::<Path, _>((Bound::Excluded(rel), Bound::Unbounded));
            let below: Vec<PathBuf> = range
                .map(|(path, _)| path)
                .take_while(|path| path.starts_with(rel))
                .cloned()
                .collect();
            for path in below {
                self.0.remove(&path);
            }
        }
        if !self.0.contains_key(rel) && self.0.len() >= MAX_MERGED_NAMES {
            return false;
        }
        let change = self.0.entry(rel.to_owned()).or_default();
        match kind {
            WatchKind::Create => change.created = true,
            WatchKind::Write => change.wrote = true,
            WatchKind::Chmod => change.chmod = true,
            WatchKind::Remove | WatchKind::Rename => {
                *change = Change { left: Some(kind), ..Change::default() };
            }
        }
        true
    }

    /// Takes up to about `limit` events out, a directory before what is in it.
    pub(super) fn take(&mut self, limit: usize) -> Vec<(PathBuf, WatchKind)> {
        let mut events = Vec::new();
        while events.len() < limit
            && let Some((path, change)) = self.0.pop_first()
        {
            let Change { left, created, wrote, chmod } = change;
            let kinds = [
                left,
                created.then_some(WatchKind::Create),
                (chmod && !created).then_some(WatchKind::Chmod),
                wrote.then_some(WatchKind::Write),
            ];
            events.extend(kinds.into_iter().flatten().map(|kind| (path.clone(), kind)));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn replay(names: &mut BTreeSet<PathBuf>, events: &[(PathBuf, WatchKind)]) {
        for (path, kind) in events {
            match kind {
                WatchKind::Create => {
                    names.insert(path.clone());
                }
                WatchKind::Remove | WatchKind::Rename => {
                    names.retain(|name| !name.starts_with(path));
                }
                WatchKind::Write | WatchKind::Chmod => {}
            }
        }
    }

    fn event() -> impl Strategy<Value = (PathBuf, WatchKind)> {
        let kinds = [
            WatchKind::Create,
            WatchKind::Write,
            WatchKind::Remove,
            WatchKind::Rename,
            WatchKind::Chmod,
        ];
        let path = "[ab](/[ab]){0,3}".prop_map(PathBuf::from);
        (path, proptest::sample::select(kinds.to_vec()))
    }

    proptest! {
        #[test]
        fn merged_changes_lead_to_the_same_names(
            first in proptest::collection::vec(event(), 0..12),
            events in proptest::collection::vec(event(), 0..40),
            cut in 1_usize..5,
        ) {
            let mut all = BTreeSet::new();
            replay(&mut all, &first);
            let mut merged = all.clone();
            replay(&mut all, &events);

            let mut changes = Changes::default();
            for (i, (path, kind)) in events.iter().enumerate() {
                prop_assert!(changes.apply(path, *kind));
                // Taken in part while more come.
                if i % 7 == 6 {
                    replay(&mut merged, &changes.take(cut));
                }
            }
            replay(&mut merged, &changes.take(usize::MAX));
            prop_assert_eq!(all, merged);
            prop_assert!(changes.is_empty());
        }
    }

    #[test]
    fn content_and_attributes_are_told_once() {
        let mut changes = Changes::default();
        let path = PathBuf::from("f");
        for _ in 0..3 {
            changes.apply(&path, WatchKind::Chmod);
            changes.apply(&path, WatchKind::Write);
        }
        let wanted = [(path.clone(), WatchKind::Chmod), (path, WatchKind::Write)];
        assert_eq!(changes.take(8), wanted);
    }

    #[test]
    fn there_is_room_for_so_many_names_and_always_for_those_it_has() {
        let mut changes = Changes::default();
        for i in 0..MAX_MERGED_NAMES {
            assert!(changes.apply(Path::new(&format!("d/{i}")), WatchKind::Create));
        }
        assert!(!changes.apply(Path::new("e"), WatchKind::Create));
        assert!(changes.apply(Path::new("d/1"), WatchKind::Remove));
        assert!(!changes.apply(Path::new("d"), WatchKind::Create));
        assert!(changes.apply(Path::new("d"), WatchKind::Remove), "what is below makes room");
        assert_eq!(changes.take(8), [(PathBuf::from("d"), WatchKind::Remove)]);
    }
}
