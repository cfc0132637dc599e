//! The service `process.Process`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    identity,
    keepalive::{self, Source, Step},
    outcome, status,
};
use crate::{
    fs::path,
    guest::users::User,
    process::{self, Channel, Ending, Event, Found, Selector, StartSpec, Stdio, Subscription},
    proto::process::{
        self as pb, process_event::Event as PbEvent, process_event::data_event::Output,
        process_selector, process_server::Process, stream_input_request,
    },
    sandbox::Sandbox,
    sys,
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
            Some(process_selector::Selector::ProcessId(_)) => Err(Status::unimplemented("")),
            None => Err(Status::unimplemented(
                "invalid input type: the field `process` must select by pid or tag",
            )),
        }
    }

    fn live(&self, selector: Option<pb::ProcessSelector>) -> Result<Arc<process::Process>, Status> {
        let selector = Self::selector(selector)?;
        self.sandbox.processes.live(&selector).ok_or_else(|| not_found(&selector))
    }

    async fn write(
        process: &process::Process,
        input: Option<pb::ProcessInput>,
    ) -> Result<(), Status> {
        use pb::process_input::Input;
        match input.and_then(|input| input.input) {
            Some(Input::Stdin(data)) => {
                process.write_stdin(data).await.map_err(|error| status::of_input("stdin", &error))
            }
            Some(Input::Pty(data)) => {
                process.write_pty(data).await.map_err(|error| status::of_input("tty", &error))
            }
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
        let config = request.process.ok_or_else(|| {
            Status::invalid_argument("the field `process` is missing: there is nothing to start")
        })?;
        let defaults = &self.sandbox.defaults;
        let cwd = config.cwd.as_deref().unwrap_or_default();
        let cwd = path::resolve(cwd, user, defaults.workdir.as_deref())
            .map_err(|error| status::of_files(&error))?;
        let home = user.home.to_string_lossy().into_owned();
        let path = std::env::var("PATH").unwrap_or_else(|_| sys::DEFAULT_PATH.to_owned());
        let own = [("PATH", path), ("HOME", home)]
            .into_iter()
            .chain([("USER", user.name.clone()), ("LOGNAME", user.name.clone())])
            .map(|(name, value)| (name.to_owned(), value));
        let requested_env: std::collections::BTreeMap<_, _> = config.envs.into_iter().collect();
        let env = own
            .chain(defaults.env.iter().cloned())
            .chain(requested_env.iter().map(|(name, value)| (name.clone(), value.clone())))
            .collect();
        let stdio = match request.pty {
            Some(pty) => {
                let (cols, rows) = cells(pty.size);
                Stdio::Pty { cols, rows }
            }
            None => Stdio::Pipes { stdin: request.stdin.unwrap_or(true) },
        };
        Ok(StartSpec {
            cmd: config.cmd,
            args: config.args,
            requested_env,
            requested_cwd: config.cwd,
            env,
            cwd,
            user: user.clone(),
            stdio,
            tag: request.tag,
            timeout,
        })
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Process for Processes {
    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let processes = self.sandbox.processes.list().iter().map(|process| info(process)).collect();
        Ok(Response::new(pb::ListResponse { processes }))
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
        let spec = self.spec(message, &user, timeout)?;
        let (process, subscription) =
            self.sandbox.processes.start(spec).await.map_err(|error| status::of_start(&error))?;
        tracing::info!(pid = process.pid(), user = user.name, "process started");
        let follow = Follow { subscription, starter: true };
        let events = keepalive::stream(started(process.pid()), follow, interval);
        Ok(Response::new(Box::pin(wrap(events, |event| pb::StartResponse { event: Some(event) }))))
    }

    type ConnectStream = EventStream<pb::ConnectResponse>;

    async fn connect(
        &self,
        request: Request<pb::ConnectRequest>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let interval = keepalive::interval(request.metadata());
        let selector = Self::selector(request.into_inner().process)?;
        let found = self.sandbox.processes.find(&selector).ok_or_else(|| not_found(&selector))?;
        let respond = |event| pb::ConnectResponse { event: Some(event) };
        Ok(Response::new(match found {
            Found::Live(process) => {
                let follow = Follow { subscription: process.subscribe(), starter: false };
                let events = keepalive::stream(started(process.pid()), follow, interval);
                Box::pin(wrap(events, respond))
            }
            Found::Ended { pid, ending, .. } => {
                let events = [started(pid), ended(ending)].map(|event| Ok(respond(event)));
                Box::pin(futures_util::stream::iter(events))
            }
        }))
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
        let mut target = None;
        while let Some(message) = messages.message().await? {
            match message.event {
                Some(Event::Start(start)) => target = Some(self.live(start.process)?),
                Some(Event::Data(data)) => match &target {
                    Some(process) => Self::write(process, data.input).await?,
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
        Ok(Response::new(pb::StreamInputResponse { accepted_offset: 0 }))
    }

    async fn send_input(
        &self,
        request: Request<pb::SendInputRequest>,
    ) -> Result<Response<pb::SendInputResponse>, Status> {
        let message = request.into_inner();
        let process = self.live(message.process)?;
        Self::write(&process, message.input).await?;
        Ok(Response::new(pb::SendInputResponse { accepted_offset: 0 }))
    }

    async fn send_signal(
        &self,
        request: Request<pb::SendSignalRequest>,
    ) -> Result<Response<pb::SendSignalResponse>, Status> {
        let message = request.into_inner();
        let process = self.live(message.process)?;
        // Real-time signals have numbers only, which proto3 enums carry as well.
        let signal = match message.signal {
            0 => return Err(Status::unimplemented("invalid signal: SIGNAL_UNSPECIFIED")),
            signal @ 1..=64 => signal,
            other => return Err(Status::unimplemented(format!("invalid signal: {other}"))),
        };
        process.signal(signal).map_err(|error| status::of_signal(&error))?;
        Ok(Response::new(pb::SendSignalResponse {}))
    }

    async fn read(
        &self,
        _: Request<pb::ReadRequest>,
    ) -> Result<Response<pb::ReadResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn wait(
        &self,
        _: Request<pb::WaitRequest>,
    ) -> Result<Response<pb::WaitResponse>, Status> {
        Err(Status::unimplemented(""))
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

/// A subscriber's stream of events.
struct Follow {
    subscription: Subscription,
    /// Whether this is the stream of the call that started the process.
    starter: bool,
}

impl Source for Follow {
    type Message = pb::ProcessEvent;

    async fn next(&mut self) -> Option<Step<pb::ProcessEvent>> {
        Some(match self.subscription.next().await? {
            Event::Output { channel, data } => Step::Message(output(channel, data)),
            // The starter asked for the time limit, and hears that it was reached, not what the
            // kill looked like. Others see the ending.
            Event::End(ending) if self.starter && ending.timed_out => {
                Step::Error(Status::deadline_exceeded("context deadline exceeded"))
            }
            Event::End(ending) => Step::Last(ended(ending)),
            Event::Detached => Step::Error(Status::resource_exhausted(
                "this stream took no data while the process waited for it, and was let go; the process goes on",
            )),
        })
    }

    fn keepalive(&self) -> pb::ProcessEvent {
        event(PbEvent::Keepalive(pb::process_event::KeepAlive {}))
    }
}

fn wrap<T: 'static>(
    events: impl Stream<Item = Result<pb::ProcessEvent, Status>> + Send + 'static,
    respond: impl Fn(pb::ProcessEvent) -> T + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    use futures_util::StreamExt;
    events.map(move |event| event.map(&respond))
}

fn event(event: PbEvent) -> pb::ProcessEvent {
    pb::ProcessEvent { event: Some(event) }
}

fn started(pid: u32) -> pb::ProcessEvent {
    event(PbEvent::Start(pb::process_event::StartEvent { pid, ..Default::default() }))
}

fn output(channel: Channel, data: bytes::Bytes) -> pb::ProcessEvent {
    let output = match channel {
        Channel::Stdout => Output::Stdout(data),
        Channel::Stderr => Output::Stderr(data),
        Channel::Pty => Output::Pty(data),
    };
    event(PbEvent::Data(pb::process_event::DataEvent { output: Some(output), offset: 0 }))
}

fn ended(ending: Ending) -> pb::ProcessEvent {
    event(PbEvent::End(outcome::end_event(ending, 0)))
}

fn info(process: &process::Process) -> pb::ProcessInfo {
    pb::ProcessInfo {
        config: Some(pb::ProcessConfig {
            cmd: process.cmd().to_owned(),
            args: process.args().to_vec(),
            envs: process.requested_env().clone().into_iter().collect(),
            cwd: process.requested_cwd().map(str::to_owned),
        }),
        pid: process.pid(),
        tag: process.tag().map(str::to_owned),
        ..Default::default()
    }
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
    })
}
