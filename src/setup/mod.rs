//! Initialising the sandbox: what `POST /init` and `envd.v1.System/Sync` do.
//!
//! The contract of this module:
//!
//! * **Everything is validated before anything is applied**, by whoever builds the [`Request`]. A
//!   request with a wrong field changes nothing.
//! * **Who may** is decided first: by the access token, by its hash in the host's metadata, or because
//!   there is no token yet ([`Access::authorise`]). An unauthorised request changes nothing. The
//!   metadata service costs a call 20 ms at most.
//! * **A stale request is a success that changes nothing**: the host repeats itself, and what was sent
//!   first may come last. One with a token that is not the stored one is refused, since a success would
//!   say that the token is set. Only who has proved to have the token, or sets the first one, moves the
//!   newest timestamp: a stranger cannot make the host's requests stale.
//! * **Token, variables, defaults and clock come first**, in one step under a lock that is never held
//!   while anything waits. So they follow the order of requests, and nothing that hangs delays them.
//! * **Then the machine's files and volumes, in parallel**, each with a deadline of its own
//!   ([`steps`]). If certificates or volumes fail the request fails, and what came first stays done;
//!   the host repeats it with the same timestamp. The name in `/etc/hosts` and the sandbox's ids are
//!   best effort; that they failed is in the report and in the log.
//! * **Once begun it is finished**, whether or not the client still waits.
//! * Nothing runs afterwards, but for at most a minute the search for the host's metadata where that
//!   was not to be had at once, and a mount or a file that still hangs.
//!
//! [`Access::authorise`]: crate::access::Access::authorise

mod metadata;
mod places;
mod report;
mod request;
mod steps;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

pub use metadata::{search as search_metadata, write_marker};
pub use places::PlaceOf;
pub use report::{Outcome, Report, Step};
pub use request::{
    Invalid, MAX_ADDRESS_BYTES, MAX_LIFECYCLE_ID_BYTES, MAX_PATH_BYTES, MAX_USER_BYTES,
    MAX_VARIABLE_BYTES, MAX_VARIABLES, Request, TokenChange, certificates, env, text, volumes,
};

use self::{
    metadata::Answer,
    places::Places,
    steps::{Rewrites, Steps},
};
use crate::{
    access::{InitRefused, Proof},
    blocking::Pool,
    guest::{
        clock::{self, Moment},
        markers,
        mmds::Document,
        nfs::{Ledger, MAX_VOLUMES},
    },
    sandbox::Sandbox,
};

/// The requests at a time, waiting for their turn included; more are refused.
pub const MAX_REQUESTS: usize = 512;
/// Of those, the ones that are larger than usual.
pub const MAX_LARGE: usize = 8;
/// How many more requests of both kinds there may be from outside the machine.
pub const KEPT: (usize, usize) = (64, 2);
/// Threads that mount: a server that does not answer holds one until the kernel gives up. Twice the
/// volumes of a request, so that those of one life of the sandbox do not hold up those of the next.
const MOUNT_THREADS: usize = 2 * MAX_VOLUMES;
/// Threads that rewrite files of the machine.
const FILE_THREADS: usize = 4;
/// The requests at a time whose certificates, volumes and files are put in place, whether or not
/// their clients still wait; others wait before anything of them is done.
const MAX_UNFINISHED: usize = 64;

/// Why the sandbox was not initialised.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The caller may not.
    #[error(transparent)]
    Refused(#[from] InitRefused),
    /// A field makes no sense.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Certificates or volumes could not be put in place. Token, variables, defaults and clock are as
    /// the request says.
    #[error("{0}")]
    Failed(String),
    /// As [`SetupError::Failed`], but they have not even been tried: something before them hangs.
    #[error("{0}")]
    Busy(String),
    /// The daemon is ending, or the task broke down.
    #[error("the initialisation was not finished")]
    Broken,
}

/// What the machine around allows.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Where `/etc` and `/run` are.
    pub root: PathBuf,
    /// Whether `/run/e2b` is written.
    pub writes_markers: bool,
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
    order: Mutex<Order>,
    unfinished: Arc<Semaphore>,
    rewrites: Rewrites,
    ledger: Arc<Ledger>,
    mounts: Arc<Pool>,
    /// For files of the machine: not those that callers' files wait for, which a file system that
    /// hangs may hold up.
    files: Arc<Pool>,
    searching: AtomicBool,
    /// Whether the metadata service has given a document since the daemon started.
    metadata_seen: AtomicBool,
    /// Whether a call of `/init` waits for what the search finds.
    late_wanted: AtomicBool,
    /// What it found, and when.
    late_document: Mutex<Option<(Instant, Document)>>,
    requests: Places,
    large: Places,
}

/// What orders requests. Its lock is held while token, variables, defaults and clock are set.
#[derive(Debug, Default)]
struct Order {
    /// The newest timestamp.
    newest: Option<Moment>,
    /// How many requests have been applied.
    applied: u64,
}

impl Setup {
    /// For a sandbox that has not been initialised.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            order: Mutex::default(),
            unfinished: Arc::new(Semaphore::new(MAX_UNFINISHED)),
            rewrites: Rewrites::default(),
            ledger: Arc::default(),
            mounts: Pool::new("mount", 0, MOUNT_THREADS),
            files: Pool::new("setup", 0, FILE_THREADS),
            searching: AtomicBool::new(false),
            metadata_seen: AtomicBool::new(false),
            late_wanted: AtomicBool::new(false),
            late_document: Mutex::default(),
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
    let begun = Instant::now();
    let known = granted || sandbox.access.is_current(request.token.token());
    let answer = match known {
        true => Answer::not_asked(sandbox),
        false => metadata::ask(sandbox).await,
    };
    let unfinished = match request.has_steps() {
        true => Some(Arc::clone(&setup.unfinished).acquire_owned().await),
        false => None,
    };
    let unfinished = unfinished.transpose().map_err(|_| SetupError::Broken)?;
    let Some(applied) = apply(sandbox, request, granted, &answer)? else {
        return Ok(Report { stale: true, took: begun.elapsed(), ..Report::default() });
    };
    let finishing = tokio::spawn(finish(Arc::clone(sandbox), applied, answer, known, unfinished));
    let mut report = finishing.await.unwrap_or(Err(SetupError::Broken))?;
    report.took = begun.elapsed();
    Ok(report)
}

/// A request whose token, variables, defaults and clock are set.
struct Applied {
    steps: Steps,
    report: Report,
}

/// Decides whether the request may be applied, and applies what cannot hang, in one step. `None` for
/// a stale one.
fn apply(
    sandbox: &Sandbox,
    mut request: Request,
    granted: bool,
    answer: &Answer,
) -> Result<Option<Applied>, SetupError> {
    let mut order = sandbox.setup.order.lock();
    let token = request.token.token();
    let proof = match granted {
        true => Proof::Token,
        false => sandbox.access.authorise(token, answer.hash())?,
    };
    if matches!((request.timestamp, order.newest), (Some(own), Some(newest)) if own < newest) {
        if token.is_some() && !sandbox.access.is_current(token) {
            return Err(InitRefused::Wrong.into());
        }
        sandbox.access.initialise();
        return Ok(None);
    }
    let moves_time = match proof {
        Proof::Token => true,
        Proof::NeverSet => token.is_some(),
        Proof::NotNeeded => false,
    };
    if let Some(timestamp) = request.timestamp.filter(|_| moves_time) {
        order.newest = Some(timestamp);
    }
    order.applied += 1;
    let steps = Steps::of(&mut request, order.applied);
    let mut report = Report::default();
    commit(sandbox, request, steps.events, answer.document(), &mut report);
    Ok(Some(Applied { steps, report }))
}

/// What neither fails nor hangs.
fn commit(
    sandbox: &Sandbox,
    request: Request,
    events: Option<IpAddr>,
    document: Option<&Document>,
    report: &mut Report,
) {
    let since = Instant::now();
    let applied = |news| Ok::<bool, Invalid>(news);
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
    if let Some(host) = request.timestamp.filter(|_| sandbox.setup.machine.sets_clock) {
        let since = Instant::now();
        report.note("clock", since, clock::set(host));
    }
    sandbox.access.initialise();
}

/// Puts in place what may fail or hang, and names the sandbox where that has not been done.
async fn finish(
    sandbox: Arc<Sandbox>,
    applied: Applied,
    answer: Answer,
    known: bool,
    _unfinished: Option<OwnedSemaphorePermit>,
) -> Result<Report, SetupError> {
    let Applied { steps, mut report } = applied;
    let identity = async {
        let answer = match known {
            // It had no need to ask before.
            true => metadata::ask(&sandbox).await,
            false => answer,
        };
        let document = answer.document()?;
        if known {
            sandbox.defaults.update(|defaults| metadata::name(&mut defaults.own_env, document));
        }
        metadata::write_ids(&sandbox, document).await;
        Some(known)
    };
    let since = Instant::now();
    let (done, named) = futures_util::join!(steps.run(&sandbox, &mut report), identity);
    if named == Some(true) {
        report.note("identity", since, Ok::<bool, Invalid>(true));
    }
    done.map(|()| report)
}
