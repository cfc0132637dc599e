//! What the host's metadata says of the sandbox: who it is, and the hash of its token.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use crate::{
    access::HostHash,
    guest::{
        markers,
        mmds::{self, Document},
    },
    sandbox::Sandbox,
};

/// How long an initialisation waits for the host's metadata, also where its token has to be checked:
/// the caller's patience is 50 ms, and it retries.
const BUDGET: Duration = Duration::from_millis(20);
/// How long a document that came too late for the call that asked for it serves those that retry.
const LATE_ANSWER_LIFE: Duration = Duration::from_secs(1);
/// How long the metadata is looked for afterwards, and at boot.
const SEARCH: Duration = Duration::from_secs(60);
/// The pauses of that search: the first, and the longest that it grows to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What the metadata service has said to one initialisation.
#[derive(Debug)]
pub(super) enum Answer {
    /// It was not asked, or there is none, or it has never answered since boot.
    Nothing,
    /// Its document.
    Document(Document),
    /// It has answered since boot, but not now in time.
    Late,
}

impl Answer {
    /// What that means for the caller's token.
    pub(super) fn hash(&self) -> HostHash<'_> {
        match self {
            Self::Document(Document { token_hash, .. }) if !token_hash.is_empty() => {
                HostHash::Hash(token_hash)
            }
            Self::Document(_) | Self::Nothing => HostHash::None,
            Self::Late => HostHash::NoAnswer,
        }
    }

    pub(super) fn document(&self) -> Option<&Document> {
        match self {
            Self::Document(document) => Some(document),
            Self::Nothing | Self::Late => None,
        }
    }

    /// For a call that had no need to ask.
    pub(super) fn not_asked(sandbox: &Sandbox) -> Self {
        match sandbox.setup.metadata_seen.load(Ordering::Acquire) {
            true => Self::Late,
            false => Self::Nothing,
        }
    }
}

/// Asks the service, for [`BUDGET`] at most. Without an answer it is looked for in the background,
/// and what is found serves those that retry.
pub(super) async fn ask(sandbox: &Arc<Sandbox>) -> Answer {
    let setup = &sandbox.setup;
    let Some(address) = setup.machine.mmds else { return Answer::Nothing };
    match timeout(BUDGET, mmds::fetch(address)).await {
        Ok(Ok(document)) => {
            setup.metadata_seen.store(true, Ordering::Release);
            return Answer::Document(document);
        }
        Ok(Err(error)) => tracing::debug!(%error, "no metadata for an initialisation"),
        Err(_) => tracing::debug!("the metadata service did not answer within 20 ms"),
    }
    let late = setup.late_document.lock().clone();
    // What the search at boot finds is no answer to this call.
    setup.late_wanted.store(true, Ordering::Release);
    search(sandbox);
    match late {
        Some((found, document)) if found.elapsed() < LATE_ANSWER_LIFE => Answer::Document(document),
        _ => Answer::not_asked(sandbox),
    }
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
            sandbox.setup.metadata_seen.store(true, Ordering::Release);
            if sandbox.setup.late_wanted.swap(false, Ordering::AcqRel) {
                *sandbox.setup.late_document.lock() = Some((Instant::now(), document.clone()));
            }
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
    let machine = &sandbox.setup.machine;
    if !machine.writes_markers {
        return;
    }
    let root = machine.root.clone();
    let written = sandbox.setup.files.run(move || markers::write(&root, name, &value)).await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(name, %error, "the file below /run/e2b is not written"),
        Err(error) => tracing::debug!(name, %error, "the file below /run/e2b is not written"),
    }
}
