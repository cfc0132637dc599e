//! Initialising the sandbox: what `POST /init` and `envd.v1.System/Sync` do.
//!
//! The contract of this module:
//!
//! * **Who may** is decided before anything is looked at: by the access token, by its hash in the
//!   host's metadata, or because there is no token yet ([`Access::authorise`]). An unauthorised
//!   request changes nothing.
//! * **One at a time.** Others wait for their turn, and are forgotten when their client leaves.
//! * **A stale request is a success that changes nothing**: the host repeats itself, and what was
//!   sent first may come last.
//! * **All or nothing, as far as the machine allows.** The request is checked as a whole, then
//!   volumes and certificates, which can fail, are put in place, and only when they are, the token,
//!   the variables and the defaults are replaced. The clock and the name in `/etc/hosts` are a help;
//!   that they failed is in the report and in the log.
//! * **Once begun it is finished**, whether or not the client still waits.
//! * Nothing runs afterwards, but for at most a minute the search for the host's metadata where that
//!   was not to be had at once.
//!
//! [`Access::authorise`]: crate::access::Access::authorise

mod metadata;
mod report;
mod request;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout},
};

pub use metadata::{search as search_metadata, write_marker};
pub use report::{Outcome, Report, Step};
pub use request::{Invalid, Request, TokenChange, address, certificates, env, text, volumes};

use crate::{
    access::InitRefused,
    blocking::Pool,
    guest::{
        ca,
        clock::{self, Moment},
        hosts, markers,
        mmds::{self, Document},
        nfs::{self, Ledger},
    },
    sandbox::Sandbox,
};

/// How long volumes may take to be mounted (upstream's).
const VOLUMES_PATIENCE: Duration = Duration::from_secs(10);
/// The requests at a time, waiting for their turn included; more are refused.
pub const MAX_REQUESTS: usize = 512;
/// Of those, the ones that are larger than usual.
pub const MAX_LARGE: usize = 8;
/// How many more requests of both kinds there may be from outside the machine.
pub const KEPT: (usize, usize) = (64, 2);
/// Threads that mount: a server that does not answer holds one until the kernel gives up.
const MOUNT_THREADS: usize = 2;

/// Why the sandbox was not initialised.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The caller may not.
    #[error(transparent)]
    Refused(#[from] InitRefused),
    /// A field makes no sense.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A step failed; nothing but what stands before it in the order was done.
    #[error("failed to {step}: {reason}")]
    Failed {
        /// The step, as upstream words it.
        step: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// The daemon is ending, or the task broke down.
    #[error("the initialisation was not finished")]
    Broken,
}

/// What the machine around allows.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Where `/etc` and `/run` are.
    pub root: PathBuf,
    /// Whether the clock is set.
    pub sets_clock: bool,
    /// Where cgroup v2 is mounted, if it is.
    pub cgroup_root: PathBuf,
    /// Where the host's metadata is, if there is any.
    pub mmds: Option<SocketAddr>,
}

/// The state behind initialisations.
#[derive(Debug)]
pub struct Setup {
    machine: Machine,
    turn: Arc<Semaphore>,
    /// The newest timestamp; only who has the turn changes it.
    last: Mutex<Option<Moment>>,
    ledger: Arc<Mutex<Ledger>>,
    mounts: Arc<Pool>,
    searching: AtomicBool,
    requests: Places,
    large: Places,
}

/// Places for requests, and more of them for callers from outside the machine: those inside cannot keep
/// out the host.
#[derive(Debug)]
struct Places {
    all: Semaphore,
    inner: Semaphore,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct PlaceOf<'a> {
    _all: SemaphorePermit<'a>,
    _inner: Option<SemaphorePermit<'a>>,
}

impl Places {
    fn new(inner: usize, kept: usize) -> Self {
        Self { all: Semaphore::new(inner + kept), inner: Semaphore::new(inner) }
    }

    fn take(&self, inner: bool) -> Option<PlaceOf<'_>> {
        let inner = match inner {
            true => Some(self.inner.try_acquire().ok()?),
            false => None,
        };
        Some(PlaceOf { _all: self.all.try_acquire().ok()?, _inner: inner })
    }
}

impl Setup {
    /// For a sandbox that has not been initialised.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            turn: Arc::new(Semaphore::new(1)),
            last: Mutex::default(),
            ledger: Arc::default(),
            mounts: Pool::new("mount", 0, MOUNT_THREADS),
            searching: AtomicBool::new(false),
            requests: Places::new(MAX_REQUESTS, KEPT.0),
            large: Places::new(MAX_LARGE, KEPT.1),
        }
    }

    /// A place for a request, one of [`MAX_REQUESTS`] or [`KEPT`]. `inner` says that it comes from inside.
    pub fn place(&self, inner: bool) -> Option<PlaceOf<'_>> {
        self.requests.take(inner)
    }

    /// As well, for a large one, one of [`MAX_LARGE`] or [`KEPT`].
    pub fn place_of_large(&self, inner: bool) -> Option<PlaceOf<'_>> {
        self.large.take(inner)
    }

    /// The machine that it sets up.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
}

/// Initialises the sandbox. `granted` says that the caller has proved already to be allowed
/// everything.
///
/// # Errors
/// [`SetupError`].
pub async fn run(
    sandbox: &Arc<Sandbox>,
    request: Request,
    granted: bool,
) -> Result<Report, SetupError> {
    let setup = &sandbox.setup;
    // Asked before the turn: a host that is slow to answer holds up nobody else.
    let known = granted || sandbox.access.is_current(request.token.token());
    let document = match setup.machine.mmds {
        Some(address) if !known => match mmds::fetch(address).await {
            Ok(document) => Some(document),
            Err(error) => {
                tracing::warn!(%error, "the access token cannot be checked against its hash");
                None
            }
        },
        _ => None,
    };
    let turn = Arc::clone(&setup.turn).acquire_owned().await.map_err(|_| SetupError::Broken)?;
    if !granted {
        let hash = document.as_ref().map(|document| document.token_hash.as_str());
        sandbox.access.authorise(request.token.token(), hash)?;
    }
    let sandbox = Arc::clone(sandbox);
    let working = tokio::spawn(async move {
        // Until it is done, whoever waits for it.
        let _turn = turn;
        apply(&sandbox, request, document).await
    });
    working.await.unwrap_or(Err(SetupError::Broken))
}

async fn apply(
    sandbox: &Arc<Sandbox>,
    request: Request,
    document: Option<Document>,
) -> Result<Report, SetupError> {
    let begun = Instant::now();
    let setup = &sandbox.setup;
    let is_stale = matches!(
        (request.timestamp, *setup.last.lock()),
        (Some(timestamp), Some(last)) if timestamp < last
    );
    if is_stale {
        sandbox.access.initialise();
        return Ok(Report { stale: true, took: begun.elapsed(), ..Report::default() });
    }
    let mut report = Report::default();
    volumes_of(sandbox, &request, &mut report).await?;
    certificates_of(sandbox, &request, &mut report).await?;
    if let Some(host) = request.timestamp.filter(|_| setup.machine.sets_clock) {
        let since = Instant::now();
        report.note("clock", since, clock::set(host));
    }
    let events = hosts_of(sandbox, &request, &mut report).await;
    let document = match document {
        Some(document) => Some(document),
        None => metadata::at_once(sandbox).await,
    };
    commit(sandbox, request, events, document.as_ref(), &mut report);
    if let Some(document) = &document {
        metadata::write_ids(sandbox, document).await;
    }
    report.took = begun.elapsed();
    Ok(report)
}

/// What cannot fail, in one go.
fn commit(
    sandbox: &Sandbox,
    request: Request,
    events: Option<IpAddr>,
    document: Option<&Document>,
    report: &mut Report,
) {
    let since = Instant::now();
    let applied = |news| Ok::<bool, Invalid>(news);
    sandbox.defaults.update(|defaults| {
        if let Some(env) = request.env {
            let news = env != defaults.user_env;
            defaults.user_env = env;
            report.note("env", since, applied(news));
        }
        if let Some(user) = request.default_user {
            let news = user != defaults.user;
            defaults.user = user;
            report.note("default_user", since, applied(news));
        }
        if let Some(workdir) = request.default_workdir {
            let news = defaults.workdir.as_ref() != Some(&workdir);
            defaults.workdir = Some(workdir);
            report.note("default_workdir", since, applied(news));
        }
        if let Some(address) = events {
            let url = match address {
                IpAddr::V4(address) => format!("http://{address}"),
                IpAddr::V6(address) => format!("http://[{address}]"),
            };
            defaults.own_env.insert(markers::EVENTS_ADDRESS.to_owned(), url);
        }
        if let Some(document) = document {
            metadata::name(&mut defaults.own_env, document);
            report.note("identity", since, applied(true));
        }
    });
    match request.token {
        TokenChange::Keep => {}
        TokenChange::Clear => {
            sandbox.access.set(None);
            report.note("access_token", since, applied(true));
        }
        TokenChange::Set(token) => {
            let news = !sandbox.access.is_current(Some(&token));
            sandbox.access.set(Some(token));
            report.note("access_token", since, applied(news));
        }
    }
    if let Some(timestamp) = request.timestamp {
        *sandbox.setup.last.lock() = Some(timestamp);
    }
    sandbox.access.initialise();
}

async fn volumes_of(
    sandbox: &Sandbox,
    request: &Request,
    report: &mut Report,
) -> Result<(), SetupError> {
    if request.volumes.is_empty() {
        return Ok(());
    }
    let since = Instant::now();
    let failed = |reason: String| SetupError::Failed { step: "setup NFS volumes", reason };
    let (volumes, life) = (request.volumes.clone(), request.lifecycle_id.clone());
    let ledger = Arc::clone(&sandbox.setup.ledger);
    let mounted = sandbox.setup.mounts.run(move || {
        // A run that still hangs has the ledger; it is not waited for.
        let mut ledger = ledger.try_lock().ok_or("volumes are being mounted already")?;
        nfs::mount_all(&volumes, life.as_deref(), &mut ledger).map_err(|error| error.to_string())
    });
    let mounted = timeout(VOLUMES_PATIENCE, mounted).await;
    let mounted = mounted.map_err(|_| failed("not done within 10 s".to_owned()))?;
    let news = mounted.map_err(|busy| failed(busy.to_string()))?.map_err(failed)?;
    report.note("volumes", since, Ok::<bool, Invalid>(news > 0));
    Ok(())
}

async fn certificates_of(
    sandbox: &Sandbox,
    request: &Request,
    report: &mut Report,
) -> Result<(), SetupError> {
    let Some(certificates) = request.certificates.clone() else { return Ok(()) };
    let since = Instant::now();
    let failed = |reason: String| SetupError::Failed { step: "install CA bundle", reason };
    let root = sandbox.setup.machine.root.clone();
    let installed = sandbox.files.run(move || ca::install(&root, &certificates)).await;
    let installed = installed.map_err(|busy| failed(busy.to_string()))?;
    let news = installed.map_err(|error| failed(error.to_string()))?;
    report.note("ca_bundle", since, Ok::<bool, Invalid>(news));
    Ok(())
}

async fn hosts_of(sandbox: &Sandbox, request: &Request, report: &mut Report) -> Option<IpAddr> {
    let text = request.events_ip.as_deref()?;
    let since = Instant::now();
    let Some(address) = address(text) else {
        let why =
            Invalid::new("hyperloopIP", format!("'{}' is no address", crate::quote::text(text)));
        report.note("hosts", since, Err(why));
        return None;
    };
    let root = sandbox.setup.machine.root.clone();
    let pointed = sandbox.files.run(move || hosts::point(&root, address)).await;
    let pointed = pointed.map_err(|busy| busy.to_string());
    let pointed = pointed.and_then(|done| done.map_err(|error| format!("/etc/hosts: {error}")));
    report.note("hosts", since, pointed);
    Some(address)
}
