//! The service `envd.v1.System`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use nix::sys::{
    resource::{Resource, getrlimit},
    utsname::uname,
};
use tokio::time::{Instant, sleep_until};
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::outcome::{duration, span, timestamp};
use crate::{
    access::Token,
    guest::{clock::Moment, metrics::Meter},
    process,
    proto::v1::{
        self as pb, info_response::Limits, ports_response::Port, sync_response,
        sync_response::step::Outcome as PbOutcome, system_server::System,
    },
    sandbox::{MAX_UPLOADS, Sandbox},
    setup::{self, Invalid, Outcome, Report, SetupError, TokenChange},
    version,
    wire::gate::Granted,
};

/// The shortest time between two answers of `Metrics`.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// The longest: a day.
const MAX_INTERVAL: Duration = Duration::from_secs(86_400);

/// What this envd has. Names are only ever added; a client may ask for what it needs.
const FEATURES: [&str; 14] = [
    "access-token",
    "grpc",
    "grpc-web",
    "connect",
    "init",
    "metrics",
    "ports",
    "prometheus",
    "signed-urls",
    "sync",
    "system",
    "template",
    "trusted-peers",
    "vsock",
];

/// The service.
#[derive(Debug)]
pub struct Systems {
    sandbox: Arc<Sandbox>,
}

impl Systems {
    /// Serves a sandbox's machine.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<pb::MetricsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl System for Systems {
    async fn info(
        &self,
        _: Request<pb::InfoRequest>,
    ) -> Result<Response<pb::InfoResponse>, Status> {
        let sandbox = Arc::clone(&self.sandbox);
        let info = self.sandbox.files.run(move || info(&sandbox)).await;
        info.map(Response::new).map_err(|busy| Status::resource_exhausted(busy.to_string()))
    }

    type MetricsStream = Answers;

    async fn metrics(
        &self,
        request: Request<pb::MetricsRequest>,
    ) -> Result<Response<Answers>, Status> {
        let interval = span("interval", request.into_inner().interval)?;
        if interval.is_some_and(|time| !(MIN_INTERVAL..=MAX_INTERVAL).contains(&time)) {
            return Err(Status::invalid_argument(
                "the field `interval` is not between 0.1 s and 86400 s",
            ));
        }
        let Some(interval) = interval else {
            let once = look(&self.sandbox, Arc::clone(&self.sandbox.meter)).await;
            return Ok(Response::new(Box::pin(futures_util::stream::iter([once]))));
        };
        // Of its own: others who look meanwhile change nothing for this stream.
        let meter = Arc::new(Meter::new());
        let sandbox = Arc::clone(&self.sandbox);
        let state = (sandbox, meter, Instant::now());
        let answers =
            futures_util::stream::unfold(state, move |(sandbox, meter, next)| async move {
                sleep_until(next).await;
                let answer = look(&sandbox, Arc::clone(&meter)).await;
                // From now: whoever is slow to take them gets fewer, not all at once.
                Some((answer, (sandbox, meter, Instant::now() + interval)))
            });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn ports(
        &self,
        _: Request<pb::PortsRequest>,
    ) -> Result<Response<pb::PortsResponse>, Status> {
        let looked = self.sandbox.files.run(process::ports::open).await;
        let (open, truncated) =
            looked.map_err(|busy| Status::resource_exhausted(busy.to_string()))?;
        let ports = open.into_iter().map(|open| Port {
            port: open.address.port().into(),
            address: open.address.ip().to_string(),
            pid: open.pid,
            command: open.command,
        });
        Ok(Response::new(pb::PortsResponse { ports: ports.collect(), truncated }))
    }

    async fn sync(
        &self,
        request: Request<pb::SyncRequest>,
    ) -> Result<Response<pb::SyncResponse>, Status> {
        let granted = request.extensions().get::<Granted>().is_some();
        let request = wanted(request.into_inner())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let report = setup::run(&self.sandbox, request, granted).await.map_err(|error| {
            tracing::warn!(%error, "not initialised");
            let text = error.to_string();
            match error {
                SetupError::Refused(_) => Status::unauthenticated(text),
                SetupError::Invalid(_) => Status::invalid_argument(text),
                SetupError::Failed(_) => Status::failed_precondition(text),
                SetupError::Busy(_) | SetupError::Broken => Status::unavailable(text),
            }
        })?;
        Ok(Response::new(done(report)))
    }
}

/// Blocks for a moment.
fn info(sandbox: &Sandbox) -> pb::InfoResponse {
    let (kernel, architecture) = uname().map_or_else(
        |_| (String::new(), String::new()),
        |name| {
            let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
            (text(name.release()), text(name.machine()))
        },
    );
    let root = sandbox.setup.machine().cgroup_root.join("cgroup.controllers");
    let controllers = std::fs::read_to_string(&root).ok();
    let limits = &sandbox.limits;
    pb::InfoResponse {
        version: version::OWN.to_owned(),
        e2b_version: version::E2B.to_owned(),
        commit: version::COMMIT.to_owned(),
        kernel,
        architecture,
        started_at: Some(timestamp(sandbox.started)),
        features: FEATURES
            .into_iter()
            .chain(cfg!(feature = "tls").then_some("tls"))
            .chain(cfg!(feature = "otlp").then_some("otlp"))
            .map(str::to_owned)
            .collect(),
        cgroup_root: controllers
            .is_some()
            .then(|| sandbox.setup.machine().cgroup_root.to_string_lossy().into_owned()),
        cgroup_controllers: controllers
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        user: sandbox.users.own_name(),
        is_root: nix::unistd::geteuid().is_root(),
        limits: Some(Limits {
            connections: number(limits.connections),
            message_bytes: number(limits.message_bytes),
            processes: number(sandbox.processes.options().max_processes),
            uploads: number(MAX_UPLOADS),
            open_files: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
        }),
    }
}

fn number(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

async fn look(sandbox: &Sandbox, meter: Arc<Meter>) -> Result<pb::MetricsResponse, Status> {
    let looked = sandbox.files.run(move || meter.look()).await;
    let looked = looked.map_err(|busy| Status::resource_exhausted(busy.to_string()))?;
    let metrics = looked.map_err(|error| Status::internal(format!("no metrics: {error}")))?;
    Ok(pb::MetricsResponse {
        time: Some(timestamp(std::time::SystemTime::now())),
        cpu_count: metrics.cpu_count,
        cpu_used_percent: metrics.cpu_used_pct,
        memory_total: metrics.mem_total,
        memory_used: metrics.mem_used,
        memory_cache: metrics.mem_cache,
        disk_total: metrics.disk_total,
        disk_used: metrics.disk_used,
        processes: u32::try_from(sandbox.processes.len()).unwrap_or(u32::MAX),
    })
}

/// The request in the domain's words.
fn wanted(message: pb::SyncRequest) -> Result<setup::Request, Invalid> {
    // Into a text that is wiped, before anything else can fail.
    let token = match message.access_token.map(Zeroizing::new) {
        None => TokenChange::Keep,
        Some(text) if text.is_empty() => TokenChange::Clear,
        Some(text) => Token::new(text)
            .map(TokenChange::Set)
            .map_err(|error| Invalid::new("access_token", error.to_string()))?,
    };
    let timestamp = match message.timestamp {
        None => None,
        Some(time) => match u32::try_from(time.nanos) {
            Ok(nanos) if nanos < 1_000_000_000 => Some(Moment { seconds: time.seconds, nanos }),
            _ => return Err(Invalid::new("timestamp", "it is no moment")),
        },
    };
    let env = message
        .env
        .map(|env| setup::env("env", env.variables.into_iter().collect()))
        .transpose()?;
    let volumes = message.volumes.into_iter().map(|volume| (volume.nfs_target, volume.path));
    Ok(setup::Request {
        token,
        timestamp,
        env,
        default_user: setup::text(
            "default_user",
            Some(message.default_user),
            setup::MAX_USER_BYTES,
        )?,
        default_workdir: setup::text(
            "default_workdir",
            Some(message.default_workdir),
            setup::MAX_PATH_BYTES,
        )?,
        events_ip: setup::text("events_ip", Some(message.events_ip), setup::MAX_ADDRESS_BYTES)?,
        certificates: setup::certificates("ca_bundle", Some(message.ca_bundle))?,
        volumes: setup::volumes("volumes", volumes.collect())?,
        lifecycle_id: setup::text(
            "lifecycle_id",
            Some(message.lifecycle_id),
            setup::MAX_LIFECYCLE_ID_BYTES,
        )?,
    })
}

fn done(report: Report) -> pb::SyncResponse {
    let steps = report.steps.into_iter().map(|step| {
        let (outcome, error) = match step.outcome {
            Outcome::Applied => (PbOutcome::Applied, String::new()),
            Outcome::Unchanged => (PbOutcome::Unchanged, String::new()),
            Outcome::Failed(error) => (PbOutcome::Failed, error),
        };
        sync_response::Step {
            name: step.name.to_owned(),
            outcome: outcome.into(),
            error,
            took: Some(duration(step.took)),
        }
    });
    pb::SyncResponse {
        stale: report.stale,
        steps: steps.collect(),
        took: Some(duration(report.took)),
        version: version::OWN.to_owned(),
    }
}
