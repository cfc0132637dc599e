//! The service `process.Process`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    events::{self, Follow},
    identity, keepalive, limits, outcome, read, status, wait,
};
use crate::{
    fs::path,
    guest::users::User,
    process::{
        self, Attach, Found, KillScope, Selector, StartSpec, Stdio, Usage,
        journal::Bounds,
        options::{self, Options},
    },
    proto::process::{self as pb, process_selector, process_server::Process, stream_input_request},
    quote,
    sandbox::Sandbox,
    wire::timeout,
};

/// The service.
#[derive(Debug)]
pub struct Processes {
    sandbox: Arc<Sandbox>,
}

impl Processes {
    /// Serves a sandbox's processes.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    fn selector(selector: Option<pb::ProcessSelector>) -> Result<Selector, Status> {
        match selector.and_then(|selector| selector.selector) {
            Some(process_selector::Selector::Pid(pid)) => Ok(Selector::Pid(pid)),
            Some(process_selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag)),
            Some(process_selector::Selector::ProcessId(id)) => Ok(Selector::Id(id)),
            None => Err(Status::unimplemented(
                "invalid input type: the field `process` must select by pid, tag or process_id",
            )),
        }
    }

    fn live(&self, selector: Option<pb::ProcessSelector>) -> Result<Arc<process::Process>, Status> {
        let selector = Self::selector(selector)?;
        self.sandbox.processes.live(&selector).ok_or_else(|| not_found(&selector))
    }

    fn find(&self, selector: Option<pb::ProcessSelector>) -> Result<Found, Status> {
        let selector = Self::selector(selector)?;
        self.sandbox.processes.find(&selector).ok_or_else(|| not_found(&selector))
    }

    /// Writes, and returns how much input the process has been given in all.
    async fn write(
        process: &process::Process,
        input: Option<pb::ProcessInput>,
        offset: Option<u64>,
    ) -> Result<u64, Status> {
        use pb::process_input::Input;
        match input.and_then(|input| input.input) {
            Some(Input::Stdin(data)) => process
                .write_stdin(data, offset)
                .await
                .map_err(|error| status::of_input("stdin", &error)),
            Some(Input::Pty(data)) => process
                .write_pty(data, offset)
                .await
                .map_err(|error| status::of_input("tty", &error)),
            None => Err(Status::unimplemented(
                "invalid input type: the field `input` must have stdin or pty",
            )),
        }
    }

    fn spec(
        &self,
        request: pb::StartRequest,
        user: &User,
        timeout: Option<Duration>,
    ) -> Result<StartSpec, Status> {
        // As upstream: without one it is the empty command, which is not found.
        let config = request.process.unwrap_or_default();
        let defaults = self.sandbox.defaults.get();
        let cwd = config.cwd.as_deref().unwrap_or_default();
        let cwd = path::resolve(cwd, user, defaults.workdir.as_deref())
            .map_err(|error| status::of_files(&error))?;
        let requested_env: std::collections::BTreeMap<_, _> = config.envs.into_iter().collect();
        let env = defaults.environment(user, &requested_env);
        let stdio = match request.pty {
            Some(pty) => {
                let (cols, rows) = cells(pty.size);
                Stdio::Pty { cols, rows }
            }
            None => Stdio::Pipes { stdin: request.stdin.unwrap_or(true) },
        };
        let options = self.sandbox.processes.options();
        Ok(StartSpec {
            id: identity_of(request.process_id)?,
            output: bounds(request.output.unwrap_or_default(), options)?,
            cmd: config.cmd,
            args: config.args,
            requested_env,
            requested_cwd: config.cwd,
            env,
            cwd,
            user: user.clone(),
            stdio,
            tag: tag_of(request.tag)?,
            timeout,
            time_limit: limits::time_limit(request.timeout, request.kill_grace)?,
            limits: limits::limits(request.limits)?,
            charge: None,
        })
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Process for Processes {
    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        // Served by `super::list`, whose route comes before this service's.
        let _ = request;
        Err(Status::unimplemented("List is served elsewhere"))
    }

    type StartStream = EventStream<pb::StartResponse>;

    async fn start(
        &self,
        request: Request<pb::StartRequest>,
    ) -> Result<Response<Self::StartStream>, Status> {
        let user = identity::caller(request.extensions(), &self.sandbox)?;
        let (metadata, _, message) = request.into_parts();
        let interval = keepalive::interval(&metadata);
        // Of whatever protocol: this header, and no other, limits the life of the process.
        let timeout = timeout::connect(&metadata.into_headers())?.filter(|t| !t.is_zero());
        let stop = message.stop_on_disconnect;
        let spec = self.spec(message, &user, timeout)?;
        let processes = &self.sandbox.processes;
        let started = match stop {
            true => processes.start_tethered(spec).await,
            false => processes.start(spec).await.map(|(found, output)| (found, output, None)),
        };
        let (found, subscription, tether) = started.map_err(|error| status::of_start(&error))?;
        tracing::info!(pid = found.record().pid, user = user.name, "process started");
        let follow = Follow { subscription, starter: true, tether };
        let respond = |event| pb::StartResponse { event: Some(event) };
        Ok(Response::new(Box::pin(events::stream(&found, follow, interval, respond))))
    }

    type ConnectStream = EventStream<pb::ConnectResponse>;

    async fn connect(
        &self,
        request: Request<pb::ConnectRequest>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let interval = keepalive::interval(request.metadata());
        let message = request.into_inner();
        let found = self.find(message.process)?;
        let at = message.from_offset.map_or(Attach::Now, Attach::At);
        let subscription = found.subscribe(at).map_err(|error| status::of_offset(&error))?;
        let follow = Follow { subscription, starter: false, tether: None };
        let respond = |event| pb::ConnectResponse { event: Some(event) };
        Ok(Response::new(Box::pin(events::stream(&found, follow, interval, respond))))
    }

    async fn update(
        &self,
        request: Request<pb::UpdateRequest>,
    ) -> Result<Response<pb::UpdateResponse>, Status> {
        let message = request.into_inner();
        let process = self.live(message.process)?;
        if let Some(pty) = message.pty {
            let (cols, rows) = cells(pty.size);
            process.resize(cols, rows).map_err(|error| status::of_resize(&error))?;
        }
        Ok(Response::new(pb::UpdateResponse {}))
    }

    async fn stream_input(
        &self,
        request: Request<Streaming<pb::StreamInputRequest>>,
    ) -> Result<Response<pb::StreamInputResponse>, Status> {
        use stream_input_request::Event;
        let mut messages = request.into_inner();
        let (mut target, mut accepted_offset) = (None, 0);
        while let Some(message) = messages.message().await? {
            match message.event {
                Some(Event::Start(start)) => target = Some(self.live(start.process)?),
                Some(Event::Data(data)) => match &target {
                    Some(process) => {
                        accepted_offset = Self::write(process, data.input, data.offset).await?;
                    }
                    None => {
                        return Err(Status::failed_precondition(
                            "data came before a start event that selects the process",
                        ));
                    }
                },
                Some(Event::Keepalive(_)) => {}
                None => {
                    return Err(Status::unimplemented(
                        "invalid event type: the field `event` must have start, data or keepalive",
                    ));
                }
            }
        }
        Ok(Response::new(pb::StreamInputResponse { accepted_offset }))
    }

    async fn send_input(
        &self,
        request: Request<pb::SendInputRequest>,
    ) -> Result<Response<pb::SendInputResponse>, Status> {
        let message = request.into_inner();
        let process = self.live(message.process)?;
        let accepted_offset = Self::write(&process, message.input, message.offset).await?;
        Ok(Response::new(pb::SendInputResponse { accepted_offset }))
    }

    async fn send_signal(
        &self,
        request: Request<pb::SendSignalRequest>,
    ) -> Result<Response<pb::SendSignalResponse>, Status> {
        let message = request.into_inner();
        let process = self.live(message.process)?;
        let signal = match (message.number, message.signal) {
            (0, 0) => return Err(Status::unimplemented("invalid signal: SIGNAL_UNSPECIFIED")),
            // An enumeration carries other numbers than its own as well, in all but JSON.
            (0, signal @ 1..=64) => signal,
            (0, other) => return Err(Status::unimplemented(format!("invalid signal: {other}"))),
            (number, 0) => match i32::try_from(number) {
                Ok(number @ 1..=64) => number,
                _ => return Err(Status::unimplemented(format!("invalid signal: {number}"))),
            },
            (number, signal) => {
                return Err(Status::invalid_argument(format!(
                    "the fields `signal` and `number` exclude each other, and are {signal} and {number}"
                )));
            }
        };
        let sent = match pb::SignalScope::try_from(message.scope) {
            Ok(pb::SignalScope::Process) => match self.sandbox.processes.options().kill_scope {
                KillScope::Tree if signal == libc::SIGKILL => process.signal_tree(signal).await,
                _ => process.signal(signal),
            },
            Ok(pb::SignalScope::Group) => process.signal_group(signal),
            Ok(pb::SignalScope::Tree) => process.signal_tree(signal).await,
            Err(_) => {
                let why = format!("the field `scope` has no such value: {}", message.scope);
                return Err(Status::invalid_argument(why));
            }
        };
        sent.map_err(|error| status::of_signal(&error))?;
        Ok(Response::new(pb::SendSignalResponse {}))
    }

    async fn read(
        &self,
        request: Request<pb::ReadRequest>,
    ) -> Result<Response<pb::ReadResponse>, Status> {
        let message = request.into_inner();
        let found = self.find(message.process.clone())?;
        Ok(Response::new(read::read(&found, &message).await?))
    }

    async fn wait(
        &self,
        request: Request<pb::WaitRequest>,
    ) -> Result<Response<pb::WaitResponse>, Status> {
        let message = request.into_inner();
        let found = self.find(message.process.clone())?;
        Ok(Response::new(wait::wait(&self.sandbox.processes, &found, message).await?))
    }

    async fn close_stdin(
        &self,
        request: Request<pb::CloseStdinRequest>,
    ) -> Result<Response<pb::CloseStdinResponse>, Status> {
        let process = self.live(request.into_inner().process)?;
        process.close_stdin().map_err(|error| status::of_close(&error))?;
        Ok(Response::new(pb::CloseStdinResponse {}))
    }
}

/// A process as the caller may see it, without its request; and whether the caller may see the variables
/// of that.
pub(super) fn summary(
    found: &Found,
    usage: Option<Usage>,
    caller: Option<&User>,
) -> (pb::ProcessInfo, bool) {
    let record = found.record();
    let spec = &record.spec;
    let may_see = caller.is_some_and(|caller| caller.uid == 0 || caller.uid == spec.user.uid);
    let (earliest_offset, next_offset) = found.range();
    let ended = found.ended().map(|end| end.ending);
    let state = match ended {
        Some(_) => pb::ProcessState::Ended,
        None => pb::ProcessState::Running,
    };
    let summary = pb::ProcessInfo {
        config: None,
        pid: record.pid,
        tag: spec.tag.clone(),
        process_id: record.id.clone(),
        state: state.into(),
        started_at: Some(outcome::timestamp(record.started_at)),
        outcome: ended.as_ref().map(outcome::outcome),
        usage: usage.as_ref().map(outcome::usage),
        ended_at: ended.as_ref().map(|ending| outcome::timestamp(ending.exited_at)),
        user: spec.user.name.clone(),
        earliest_offset,
        next_offset,
    };
    (summary, may_see)
}

/// The longest identity that a client may choose.
const MAX_ID: usize = 128;

fn identity_of(id: String) -> Result<Option<String>, Status> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    match id.as_str() {
        "" => Ok(None),
        text if text.len() <= MAX_ID && text.bytes().all(fits) => Ok(Some(id)),
        text => Err(Status::invalid_argument(format!(
            "the field `process_id` is '{}': it may have 1 to {MAX_ID} of the characters A-Z a-z \
             0-9 . _ : -",
            quote::text(text)
        ))),
    }
}

/// The longest tag, in bytes.
const MAX_TAG: usize = 4096;

fn tag_of(tag: Option<String>) -> Result<Option<String>, Status> {
    match &tag {
        Some(text) if text.len() > MAX_TAG => Err(Status::invalid_argument(format!(
            "the field `tag` has {} bytes, and may have {MAX_TAG}",
            text.len()
        ))),
        _ => Ok(tag),
    }
}

/// How large the journal of a process may get.
fn bounds(output: pb::OutputOptions, options: &Options) -> Result<Bounds, Status> {
    let (least, most) = (options::MIN_OUTPUT_WINDOW, options::MAX_OUTPUT_WINDOW);
    let memory = match usize::try_from(output.memory_bytes).unwrap_or(usize::MAX) {
        0 => options.output_window,
        memory if (least..=most).contains(&memory) => memory,
        _ => {
            return Err(Status::invalid_argument(format!(
                "the field `output.memory_bytes` is {}, which is not between {least} and {most}",
                output.memory_bytes
            )));
        }
    };
    if output.spill_bytes > options::MAX_SPILL {
        return Err(Status::invalid_argument(format!(
            "the field `output.spill_bytes` is {}, and may be {} at most",
            output.spill_bytes,
            options::MAX_SPILL
        )));
    }
    let block = match pb::AtBound::try_from(output.at_bound) {
        Ok(pb::AtBound::DropOldest) => false,
        Ok(pb::AtBound::Block) => true,
        Err(_) => {
            return Err(Status::invalid_argument(format!(
                "the field `output.at_bound` is {}, which means nothing",
                output.at_bound
            )));
        }
    };
    Ok(Bounds { memory, disk: output.spill_bytes, block })
}

/// Columns and rows, cut to the 16 bits that the kernel has for them.
fn cells(size: Option<pb::pty::Size>) -> (u16, u16) {
    let cut = |cells: u32| u16::try_from(cells & 0xffff).unwrap_or(u16::MAX);
    size.map_or((0, 0), |size| (cut(size.cols), cut(size.rows)))
}

fn not_found(selector: &Selector) -> Status {
    Status::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag {tag} not found"),
        Selector::Id(id) => format!("process with process_id {id} not found"),
    })
}
