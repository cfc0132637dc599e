//! What the host's metadata says of the sandbox: who it is.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use crate::{
    guest::{
        markers,
        mmds::{self, Document},
    },
    sandbox::Sandbox,
};

/// How long an initialisation waits for the host's metadata if it does not need it: the caller's
/// patience is 50 ms.
const BUDGET: Duration = Duration::from_millis(20);
/// How long the metadata is looked for afterwards, and at boot.
const SEARCH: Duration = Duration::from_secs(60);
/// The pauses of that search: the first, and the longest that it grows to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The host's metadata if it is to be had at once; else it is looked for after the answer.
pub(super) async fn at_once(sandbox: &Arc<Sandbox>) -> Option<Document> {
    let address = sandbox.setup.machine.mmds?;
    if let Ok(Ok(document)) = timeout(BUDGET, mmds::fetch(address)).await {
        return Some(document);
    }
    search(sandbox);
    None
}

/// Looks for the host's metadata for a while, on a task of its own. There is never a second one.
pub fn search(sandbox: &Arc<Sandbox>) {
    let Some(address) = sandbox.setup.machine.mmds else { return };
    if sandbox.setup.searching.swap(true, Ordering::AcqRel) {
        return;
    }
    let sandbox = Arc::clone(sandbox);
    tokio::spawn(async move {
        let end = Instant::now() + SEARCH;
        let mut pause = PAUSES.0;
        let found = loop {
            match mmds::fetch(address).await {
                Ok(document) => break Some(document),
                Err(error) if Instant::now() + pause >= end => {
                    tracing::info!(%error, "no metadata from the host");
                    break None;
                }
                Err(_) => sleep(pause).await,
            }
            pause = (pause * 2).min(PAUSES.1);
        };
        if let Some(document) = found {
            sandbox.defaults.update(|defaults| name(&mut defaults.own_env, &document));
            write_ids(&sandbox, &document).await;
        }
        sandbox.setup.searching.store(false, Ordering::Release);
    });
}

fn ids(document: &Document) -> impl Iterator<Item = (&'static str, &String)> {
    [(markers::SANDBOX_ID, &document.sandbox_id), (markers::TEMPLATE_ID, &document.template_id)]
        .into_iter()
        .filter(|(_, id)| !id.is_empty() && !id.contains('\0'))
}

/// Names the sandbox in its variables.
pub(super) fn name(env: &mut BTreeMap<String, String>, document: &Document) {
    for (name, id) in ids(document) {
        env.insert(name.to_owned(), id.clone());
    }
}

/// Names it in `/run/e2b`.
pub(super) async fn write_ids(sandbox: &Sandbox, document: &Document) {
    let ids: Vec<_> = ids(document).map(|(name, id)| (name, id.clone())).collect();
    for (name, id) in ids {
        write_marker(sandbox, name, id).await;
    }
}

/// Writes a file of `/run/e2b`; a sandbox without them works as well.
pub async fn write_marker(sandbox: &Sandbox, name: &'static str, value: String) {
    let root = sandbox.setup.machine.root.clone();
    let written = sandbox.files.run(move || markers::write(&root, name, &value)).await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(name, %error, "the file below /run/e2b is not written"),
        Err(error) => tracing::debug!(name, %error, "the file below /run/e2b is not written"),
    }
}
