//! The daemon's life: build the parts, listen, serve, end in order.
//!
//! Once it serves it tells so: in its log, to the service manager, and to the host if that is asked
//! for. On SIGTERM or SIGINT it stops accepting, ends streams and processes ([`ending`]), and leaves
//! with status 0 within a second, or after the grace that the operator gives unary calls.

mod ending;
mod launch;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ::http::{Request, Response, StatusCode, Uri};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tower::{Layer, Service, ServiceExt};
use zeroize::Zeroizing;

use crate::{
    access::{Access, Token, Verdict},
    api,
    blocking::{JobSlots, Pool},
    config::Config,
    fs::{leftovers, transfer::Writers, watch::Hub},
    guest::{boot::Times, handover, limits, markers, metrics::Meter, notify, users::Users},
    http,
    process::{self, Groups, Manager},
    sandbox::{Defaults, DefaultsCell, MAX_LISTINGS, MAX_SEARCHES, MAX_UPLOADS, Sandbox},
    setup::{self, Machine, Setup},
    slots::Slots,
    sys::fs_credentials,
    template::{self, Template},
    version,
    wire::{
        self, Body, Limits,
        listen::{self, Address, ListenError, Listener, Place},
        memory::Memory,
        server::Server,
        shutdown::Shutdown,
        spans::Requests,
    },
};

/// The pause between two looks at whether uploads have cleaned up, at the end.
const CLEANUP_PAUSE: Duration = Duration::from_millis(2);

/// How long the end waits in any case for calls that were cut to leave their files in order. A file
/// system that hangs must not hold the exit.
const MIN_CLEANUP_TIME: Duration = Duration::from_millis(50);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A listener cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// All listeners are optional and none can be had.
    #[error("none of the optional listeners can be had")]
    NoListener,
    /// The default user is none, or one that the daemon may not act as.
    #[error("--default-user: {0}")]
    DefaultUser(String),
    /// The access token cannot be had.
    #[error("--access-token-file: '{}': {why}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The descriptors in the binary are broken.
    #[error("the descriptors in this binary cannot be read: {0}")]
    Descriptors(String),
    /// No signals can be received.
    #[error("cannot receive signals: {0}")]
    Signals(std::io::Error),
}

/// Serves until a signal ends it.
///
/// # Errors
/// [`DaemonError`] when it cannot start.
pub async fn run(config: Config) -> Result<Ended, DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;

    let limits = Limits {
        message_bytes: config.max_message_bytes,
        buffered_bytes: config.max_buffered_bytes,
        connections: config.max_connections,
        idle_timeout: config.idle_timeout,
        header_timeout: config.header_timeout,
        stall_timeout: config.stall_timeout,
    };
    let sandbox = sandbox(&config, &limits)?;
    let writers = Arc::clone(&sandbox.writers);
    let processes = Arc::clone(&sandbox.processes);
    let (router, methods) =
        api::router(&sandbox).map_err(|error| DaemonError::Descriptors(error.to_string()))?;
    let router = router.merge(http::router(&sandbox)).fallback(http::not_found);
    let requests = Requests::new(&methods, &http::ROUTES);
    let identity = api::identity::Identity::new(router, Arc::clone(&sandbox));
    let access = Arc::clone(&sandbox.access);
    let (shutdown, phases) = Shutdown::new();
    let trust = config.trust.clone();
    let service = wire::stack(identity, methods, &limits, &sandbox.memory, access, trust, phases);
    let service = requests.layer(service);

    announce(&sandbox, !config.is_not_fc).await;

    let listeners = bind(&config.listen).await?;
    if listeners.is_empty() {
        return Err(DaemonError::NoListener);
    }
    let (stop, stopped) = watch::channel(false);
    let server = Server::new(service.clone(), limits, sandbox.memory.clone(), stopped);
    let idle = Arc::downgrade(&server);
    sandbox
        .processes
        .on_exhaustion(move || idle.upgrade().is_some_and(|server| server.evict_idle()));
    let stalled = Arc::downgrade(&server);
    sandbox.memory.on_shortage(move || {
        if let Some(server) = stalled.upgrade() {
            server.evict_stalled();
        }
    });
    let retaining = Arc::downgrade(&sandbox.processes);
    sandbox.files.before_each_job(move || {
        if let Some(retaining) = retaining.upgrade() {
            retaining.spare_descriptors();
        }
    });
    let mut addresses = Vec::new();
    let mut open = false;
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let address = listener.local();
        tracing::info!(address, "listening");
        open |= listener.is_open_to_the_network();
        addresses.push(address);
        accepting.spawn(Arc::clone(&server).accept(listener));
    }
    if open && sandbox.access.verdict(None) == Verdict::Open {
        tracing::warn!(
            "there is no access token yet: whoever reaches the port runs commands; \
             --require-token closes the daemon until it has one"
        );
    }
    let manager = notify::Manager::from_env().map(Arc::new);
    let template = launch::template(&sandbox);
    sandbox.memory.started();
    tell_ready(&sandbox, &addresses, config.ready, manager.clone(), service).await;

    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    let asked = Instant::now();
    if let Some(template) = template {
        template.abort();
    }
    if let Some(manager) = manager {
        manager.stopping().await;
    }
    stop.send_replace(true);
    // They end at once, and take the files of unix sockets with them.
    while accepting.join_next().await.is_some() {}
    let again = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let policy =
        ending::Policy { grace: config.shutdown_grace, keep_processes: config.keep_processes };
    ending::end(&shutdown, &sandbox.processes, policy, || server.drained(), again).await;
    Ok(Ended { writers, processes, by: ending::exit_by(asked, policy) })
}

/// A daemon that no longer serves.
#[derive(Debug)]
pub struct Ended {
    writers: Arc<Writers>,
    processes: Arc<Manager>,
    by: Instant,
}

impl Ended {
    /// What is left of the time for the end: for telemetry, for threads that block, and for uploads.
    pub fn left(&self) -> Duration {
        self.by.saturating_duration_since(Instant::now()).max(MIN_CLEANUP_TIME)
    }

    /// Blocks until the uploads that were cut have left their files in order and the output of
    /// processes is removed from the disk, or the time is over. The runtime must have dropped its
    /// tasks.
    pub fn clean_up(self) {
        let deadline = Instant::now() + self.left();
        // On a thread of its own: that disk may hang.
        let (done, removed) = std::sync::mpsc::channel::<()>();
        let processes = self.processes;
        let removing = std::thread::Builder::new().spawn(move || {
            processes.clean_up();
            drop(done);
        });
        while self.writers.live() > 0 {
            if Instant::now() >= deadline {
                tracing::warn!(uploads = self.writers.live(), "uploads are still being written");
                return;
            }
            std::thread::sleep(CLEANUP_PAUSE);
        }
        if removing.is_ok() {
            // It ends when the sender is dropped.
            let _ = removed.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

/// Tells everybody who wants to know, and goes on giving signs of life to a manager that wants
/// them.
async fn tell_ready<S>(
    sandbox: &Arc<Sandbox>,
    addresses: &[String],
    host: Option<Address>,
    manager: Option<Arc<notify::Manager>>,
    service: S,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    let times = Times::now();
    let Times { kernel_us, init_us, ready_us } = times;
    tracing::info!(version = version::OWN, kernel_us, init_us, ready_us, "ready");
    if let Some(manager) = manager {
        manager.ready().await;
        launch::tell_manager(sandbox, Arc::clone(&manager));
        tokio::spawn(async move { manager.watch(|| is_alive(service.clone())).await });
    }
    if let Some(host) = host {
        launch::tell_host(sandbox, times, addresses, host);
    }
}

/// Whether a call through everything but the sockets is answered: a heartbeat that does not take
/// the way of the calls stays green while they hang.
async fn is_alive<S>(service: S) -> bool
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static("/livez");
    let Ok(response) = service.oneshot(request).await;
    response.status() == StatusCode::NO_CONTENT
}

fn sandbox(config: &Config, wire: &Limits) -> Result<Arc<Sandbox>, DaemonError> {
    limits::protect_from_oom_killer();
    let users = Arc::new(Users::system());
    let own = users.own_name();
    if !nix::unistd::geteuid().is_root() {
        tracing::warn!(user = own, "running without root: calls can act only as this user");
    }
    let token = config.access_token_file.as_deref().map(token).transpose()?;
    let access = Access::new(token, config.require_token, config.resume_handover);
    let handover = config.resume_handover.then(|| handover::take(&config.guest_root));
    // They were delivered while the sandbox ran, after its command line was written.
    let (user, workdir) =
        handover.clone().map(|taken| (taken.user, taken.workdir)).unwrap_or_default();
    let defaults = Defaults {
        user: user.or_else(|| config.default_user.clone()).unwrap_or(own),
        workdir: workdir.or_else(|| config.default_workdir.clone()),
        user_env: BTreeMap::new(),
        own_env: [(markers::SANDBOX.to_owned(), (!config.is_not_fc).to_string())].into(),
    };
    let machine = Machine {
        root: config.guest_root.clone(),
        writes_markers: !config.no_markers,
        sets_clock: !config.no_clock,
        cgroup_root: config.cgroup_root.clone(),
        mmds: config.mmds,
    };
    // An image whose template is broken is reached all the same, to be looked into.
    let mut kill_scope = config.kill_scope;
    let template = match template::config::load(config.template.as_deref()) {
        Ok(template) => {
            kill_scope = kill_scope.or_else(|| template.as_ref()?.kill_scope);
            Template::new(template)
        }
        Err(error) => {
            tracing::error!(%error, "the template has failed");
            Template::broken(error.to_string())
        }
    };
    fs_credentials::remember_own();
    let files = Pool::for_files();
    let state = process::StopNotes::state(&config.guest_root);
    leftovers::keep_notes(&state);
    files.run_later(move || leftovers::remove_left(&state));
    let nofile = limits::raise_open_files();
    let stop_notes = Some(process::StopNotes::directory(&config.guest_root));
    let kill_scope = kill_scope.unwrap_or_default();
    let options = process::Options { nofile, stop_notes, kill_scope, ..config.processes.clone() };
    let watches = Hub::new(Arc::clone(&users), Arc::clone(&files), config.watches);
    let sandbox = Sandbox {
        processes: Manager::with(options, groups(config)),
        writers: Writers::beside(Arc::clone(&watches)),
        watches,
        users,
        file_access: config.file_access,
        files,
        uploads: Slots::new(MAX_UPLOADS),
        listings: JobSlots::new(MAX_LISTINGS),
        searches: Slots::new(MAX_SEARCHES),
        handover,
        access: Arc::new(access),
        template: Arc::new(template),
        limits: wire.clone(),
        memory: Memory::new(wire.buffered_bytes),
        started: SystemTime::now(),
        setup: Setup::new(machine),
        meter: Arc::new(Meter::new()),
        defaults: DefaultsCell::new(defaults),
    };
    match sandbox.default_user() {
        Ok(user) => tracing::info!(user = user.name, "default user"),
        // With a user given, a typing error must not wait for the first call.
        Err(error) if config.default_user.is_some() => {
            return Err(DaemonError::DefaultUser(error.message()));
        }
        Err(error) => tracing::warn!(error = error.message(), "calls must name a user"),
    }
    Ok(Arc::new(sandbox))
}

/// The control groups for processes, and a word about what they offer.
fn groups(config: &Config) -> Groups {
    if config.no_cgroups {
        return Groups::none("this envd runs with -no-cgroups");
    }
    let groups = Groups::find(&config.cgroup_root);
    match groups.base() {
        Ok(base) => {
            let controllers = groups.controllers().join(" ");
            tracing::info!(base = %base.display(), controllers, "control groups");
        }
        Err(why) => tracing::info!(why, "no control groups: trees are not limited"),
    }
    groups
}

/// Tells programs in the sandbox that it is one, and looks for what the host says of it.
async fn announce(sandbox: &Arc<Sandbox>, firecracker: bool) {
    setup::write_marker(sandbox, markers::SANDBOX, firecracker.to_string()).await;
    setup::search_metadata(sandbox);
}

/// The first line of a file that holds the access token.
fn token(path: &Path) -> Result<Token, DaemonError> {
    let wrong = |why: String| DaemonError::Token { path: path.to_owned(), why };
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let text = Zeroizing::new(text);
    let text = std::str::from_utf8(&text).map_err(|_| wrong("it is not UTF-8".to_owned()))?;
    let line = text.lines().next().unwrap_or_default().trim();
    Token::new(Zeroizing::new(line.to_owned())).map_err(|error| wrong(error.to_string()))
}

async fn bind(addresses: &[Address]) -> Result<Vec<Listener>, ListenError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let v6_only = match address.place {
            Place::Tcp { port, .. } => {
                addresses.iter().any(|other| listen::is_v4_wildcard(other, port))
            }
            _ => false,
        };
        match listen::bind(address, v6_only).await {
            Ok(bound) => listeners.extend(bound),
            Err(error) if address.optional => tracing::warn!(%error, "going on without it"),
            Err(error) => return Err(error),
        }
    }
    Ok(listeners)
}
