//! The parts of an initialisation that may fail or hang: certificates, volumes and the name in
//! `/etc/hosts`. They run in parallel, each with a deadline of its own, after token, variables,
//! defaults and clock have been set.

use std::{
    mem,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use super::{Request, SetupError, report::Report, request::address};
use crate::{
    blocking::Pool,
    guest::{
        ca::{self, Certificates},
        hosts,
        nfs::{self, Volume},
    },
    quote,
    sandbox::Sandbox,
};

/// How long volumes may take to be mounted (upstream's).
const VOLUMES_DEADLINE: Duration = Duration::from_secs(10);
/// How long the certificates may take, waiting for those of requests before included.
const CERTIFICATES_DEADLINE: Duration = Duration::from_secs(5);
/// How long `/etc/hosts` may take.
const HOSTS_DEADLINE: Duration = Duration::from_secs(2);

/// What keeps rewrites of one file apart and in the order of requests: the number of the newest
/// request whose rewrite is done.
#[derive(Debug, Default)]
pub(super) struct Rewrites {
    certificates: Arc<Mutex<u64>>,
    hosts: Arc<Mutex<u64>>,
}

/// What one request has of these parts.
#[derive(Debug)]
pub(super) struct Steps {
    number: u64,
    certificates: Option<Certificates>,
    volumes: Vec<Volume>,
    lifecycle_id: String,
    /// The address of the host's event service.
    pub(super) events: Option<IpAddr>,
    /// What stands in its place and is no address.
    no_address: Option<String>,
}

/// Why a part was not put in place.
enum StepError {
    Failed(String),
    /// It has not even begun.
    Busy(String),
}

impl Steps {
    /// Takes them out of a request, which is the `number`th that is applied.
    pub(super) fn of(request: &mut Request, number: u64) -> Self {
        let text = request.events_ip.take();
        let events = text.as_deref().and_then(address);
        Self {
            number,
            certificates: request.certificates.take(),
            volumes: mem::take(&mut request.volumes),
            lifecycle_id: request.lifecycle_id.take().unwrap_or_default(),
            events,
            no_address: text.filter(|_| events.is_none()),
        }
    }

    /// Puts them in place, all at once.
    ///
    /// # Errors
    /// [`SetupError::Failed`] or [`SetupError::Busy`] when certificates or volumes could not be.
    pub(super) async fn run(
        self,
        sandbox: &Sandbox,
        report: &mut Report,
    ) -> Result<(), SetupError> {
        let since = Instant::now();
        let (certificates, volumes, hosts) = tokio::join!(
            install(sandbox, self.certificates, self.number),
            mount(sandbox, self.volumes, self.lifecycle_id),
            point(sandbox, self.events, self.no_address, self.number),
        );
        if let Some(done) = hosts {
            report.note("hosts", since, done.map_err(StepError::into_reason));
        }
        let mut failures = Vec::new();
        let mut is_busy = true;
        for (name, what, done) in [
            ("ca_bundle", "failed to install CA bundle", certificates.map(|done| done.map(Ok))),
            ("volumes", "failed to setup NFS volumes", volumes),
        ] {
            match done {
                None => {}
                Some(Ok(done)) => report.note(name, since, done),
                Some(Err(error)) => {
                    is_busy &= matches!(error, StepError::Busy(_));
                    failures.push(format!("{what}: {}", error.into_reason()));
                }
            }
        }
        match (failures.is_empty(), is_busy) {
            (true, _) => Ok(()),
            (false, true) => Err(SetupError::Busy(failures.join("; "))),
            (false, false) => Err(SetupError::Failed(failures.join("; "))),
        }
    }
}

impl StepError {
    fn into_reason(self) -> String {
        match self {
            Self::Failed(reason) | Self::Busy(reason) => reason,
        }
    }
}

async fn install(
    sandbox: &Sandbox,
    certificates: Option<Certificates>,
    number: u64,
) -> Option<Result<bool, StepError>> {
    let certificates = certificates?;
    let root = sandbox.setup.machine.root.clone();
    let work = move || ca::install(&root, &certificates).map_err(|error| error.to_string());
    let lock = &sandbox.setup.rewrites.certificates;
    Some(rewrite(sandbox, lock, number, CERTIFICATES_DEADLINE, work).await)
}

async fn point(
    sandbox: &Sandbox,
    events: Option<IpAddr>,
    no_address: Option<String>,
    number: u64,
) -> Option<Result<bool, StepError>> {
    if let Some(text) = no_address {
        let shown = quote::text(&text);
        return Some(Err(StepError::Failed(format!(
            "hyperloopIP: '{shown}' is not an IP address"
        ))));
    }
    let address = events?;
    let root = sandbox.setup.machine.root.clone();
    let work = move || hosts::point(&root, address).map_err(|error| format!("/etc/hosts: {error}"));
    Some(rewrite(sandbox, &sandbox.setup.rewrites.hosts, number, HOSTS_DEADLINE, work).await)
}

/// Rewrites a file, after the rewrites that have begun, and not at all if a newer request's is done.
async fn rewrite(
    sandbox: &Sandbox,
    lock: &Arc<Mutex<u64>>,
    number: u64,
    patience: Duration,
    work: impl FnOnce() -> Result<bool, String> + Send + 'static,
) -> Result<bool, StepError> {
    let deadline = Instant::now() + patience;
    let newest = timeout_at(deadline, Arc::clone(lock).lock_owned()).await.map_err(|_| {
        StepError::Busy(format!("an earlier call is not done within {} s", patience.as_secs()))
    })?;
    // The guard goes with the work: also a client that leaves lets no other in before it is done.
    let job = move || {
        let mut newest = newest;
        if *newest > number {
            return Ok(false);
        }
        let news = work()?;
        *newest = number;
        Ok(news)
    };
    let left = deadline.saturating_duration_since(Instant::now());
    in_time(&sandbox.setup.files, left, patience, job).await?.map_err(StepError::Failed)
}

/// Mounts volumes in parallel; those below another volume of the request after that one. What an
/// earlier call still mounts is left to it: a server that hangs fails the call that met it first, and
/// none after it.
async fn mount(
    sandbox: &Sandbox,
    volumes: Vec<Volume>,
    lifecycle_id: String,
) -> Option<Result<Result<bool, String>, StepError>> {
    if volumes.is_empty() {
        return None;
    }
    let life: Arc<str> = lifecycle_id.into();
    let mut left_to_others = Vec::new();
    let mut jobs = Vec::new();
    for group in nfs::groups(volumes) {
        let mut claims = Vec::new();
        let mut paths = Vec::new();
        for volume in group {
            let shown = volume.path.display().to_string();
            match sandbox.setup.ledger.claim(volume) {
                Some(claim) => {
                    claims.push(claim);
                    paths.push(shown);
                }
                None => left_to_others.push(shown),
            }
        }
        if claims.is_empty() {
            continue;
        }
        let life = Arc::clone(&life);
        jobs.push(async move {
            let job = move || nfs::mount_all(claims, &life).map_err(|error| error.to_string());
            let patience = VOLUMES_DEADLINE;
            match in_time(&sandbox.setup.mounts, patience, patience, job).await {
                Ok(done) => done.map_err(StepError::Failed),
                Err(StepError::Failed(reason)) => {
                    Err(StepError::Failed(format!("{}: {reason}", paths.join(", "))))
                }
                Err(StepError::Busy(reason)) => {
                    Err(StepError::Busy(format!("{}: {reason}", paths.join(", "))))
                }
            }
        });
    }
    let mut news = 0;
    let (mut failed, mut busy) = (Vec::new(), Vec::new());
    for done in join_all(jobs).await {
        match done {
            Ok(mounted) => news += mounted,
            Err(StepError::Failed(reason)) => failed.push(reason),
            Err(StepError::Busy(reason)) => busy.push(reason),
        }
    }
    Some(match (failed.is_empty(), busy.is_empty()) {
        (false, _) => {
            failed.append(&mut busy);
            Err(StepError::Failed(failed.join("; ")))
        }
        (true, false) => Err(StepError::Busy(busy.join("; "))),
        (true, true) if left_to_others.is_empty() => Ok(Ok(news > 0)),
        (true, true) => {
            Ok(Err(format!("an earlier call still mounts {}", left_to_others.join(", "))))
        }
    })
}

/// Runs `job` on a thread; `patience` is what `left` was at the beginning.
async fn in_time<T: Send + 'static>(
    pool: &Pool,
    left: Duration,
    patience: Duration,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StepError> {
    let begun = Arc::new(AtomicBool::new(false));
    let job = {
        let begun = Arc::clone(&begun);
        move || {
            begun.store(true, Ordering::Release);
            job()
        }
    };
    let seconds = patience.as_secs();
    match timeout(left, pool.run(job)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(busy)) => Err(StepError::Busy(busy.to_string())),
        Err(_) if begun.load(Ordering::Acquire) => {
            Err(StepError::Failed(format!("not done within {seconds} s")))
        }
        Err(_) => Err(StepError::Busy(format!("no thread was free within {seconds} s"))),
    }
}
