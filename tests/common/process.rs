//! Processes as a client sees them: requests that read well, and what a stream of events says.

use bytes::Bytes;
use envd::proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest,
    ListResponse, ProcessConfig, ProcessInfo, ProcessInput, ProcessSelector, Pty, SendInputRequest,
    SendInputResponse, SendSignalRequest, SendSignalResponse, Signal, StartRequest, StartResponse,
    UpdateRequest, UpdateResponse,
    process_event::{EndEvent, Event, StartEvent, data_event::Output},
    process_input::Input,
    process_selector::Selector,
    pty::Size,
};

use super::rpc::{Client, Failure, Messages, Msg};

pub const START: &str = "/process.Process/Start";
pub const CONNECT: &str = "/process.Process/Connect";
pub const LIST: &str = "/process.Process/List";
pub const UPDATE: &str = "/process.Process/Update";
pub const SEND_INPUT: &str = "/process.Process/SendInput";
pub const STREAM_INPUT: &str = "/process.Process/StreamInput";
pub const SEND_SIGNAL: &str = "/process.Process/SendSignal";
pub const CLOSE_STDIN: &str = "/process.Process/CloseStdin";

pub fn start(cmd: &str, args: &[&str]) -> StartRequest {
    StartRequest {
        process: Some(ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(ToString::to_string).collect(),
            cwd: Some("/".to_owned()),
            ..ProcessConfig::default()
        }),
        ..StartRequest::default()
    }
}

pub fn sh(script: &str) -> StartRequest {
    start("/bin/sh", &["-c", script])
}

/// Requests, put together in the order in which they read.
pub trait With: Sized {
    fn cwd(self, cwd: Option<&str>) -> Self;
    fn env(self, name: &str, value: &str) -> Self;
    fn tag(self, tag: &str) -> Self;
    fn pty(self, cols: u32, rows: u32) -> Self;
    fn no_stdin(self) -> Self;
}

impl With for StartRequest {
    fn cwd(mut self, cwd: Option<&str>) -> Self {
        self.process.as_mut().unwrap().cwd = cwd.map(str::to_owned);
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.process.as_mut().unwrap().envs.insert(name.to_owned(), value.to_owned());
        self
    }

    fn tag(mut self, tag: &str) -> Self {
        self.tag = Some(tag.to_owned());
        self
    }

    fn pty(mut self, cols: u32, rows: u32) -> Self {
        self.pty = Some(Pty { size: Some(Size { cols, rows }) });
        self
    }

    fn no_stdin(mut self) -> Self {
        self.stdin = Some(false);
        self
    }
}

pub fn pid(pid: u32) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Pid(pid)) })
}

pub fn tag(tag: &str) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Tag(tag.to_owned())) })
}

pub fn id(id: &str) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::ProcessId(id.to_owned())) })
}

pub fn to_stdin(data: impl Into<Bytes>) -> Option<ProcessInput> {
    Some(ProcessInput { input: Some(Input::Stdin(data.into())) })
}

pub fn to_pty(data: impl Into<Bytes>) -> Option<ProcessInput> {
    Some(ProcessInput { input: Some(Input::Pty(data.into())) })
}

/// The two responses that carry events.
pub trait Carries: Msg {
    fn event(self) -> Event;
}

impl Carries for StartResponse {
    fn event(self) -> Event {
        self.event.unwrap().event.unwrap()
    }
}

impl Carries for ConnectResponse {
    fn event(self) -> Event {
        self.event.unwrap().event.unwrap()
    }
}

/// What a process has said so far.
#[derive(Debug, Default, Clone)]
pub struct Said {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub keepalives: usize,
}

impl Said {
    pub fn len(&self) -> usize {
        self.stdout.len() + self.stderr.len() + self.pty.len()
    }

    pub fn add(&mut self, more: &Self) {
        self.stdout.extend_from_slice(&more.stdout);
        self.stderr.extend_from_slice(&more.stderr);
        self.pty.extend_from_slice(&more.pty);
    }

    pub fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn stderr(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }

    pub fn pty(&self) -> &str {
        std::str::from_utf8(&self.pty).unwrap()
    }
}

/// A subscription to a process, from Start or Connect.
pub struct Running<R> {
    pub pid: u32,
    pub start: StartEvent,
    pub said: Said,
    /// The offset of what comes next.
    pub at: u64,
    /// What it was told to be gone.
    pub gaps: Vec<(u64, u64)>,
    pub messages: Messages<R>,
}

impl<R: Carries> Running<R> {
    pub async fn of(mut messages: Messages<R>) -> Result<Self, Failure> {
        let first = messages.next().await?.expect("a first message").event();
        let Event::Start(start) = first else { panic!("first came {first:?}") };
        let (pid, at) = (start.pid, start.next_offset);
        Ok(Self { pid, start, said: Said::default(), at, gaps: Vec::new(), messages })
    }

    /// Takes one event; the end, if it was that.
    pub async fn step(&mut self) -> Result<Option<EndEvent>, Failure> {
        match self.messages.next().await?.expect("an end before the end").event() {
            Event::Data(data) => {
                assert_eq!(data.offset, self.at, "no byte is lost or told twice");
                let (to, bytes) = match data.output.unwrap() {
                    Output::Stdout(bytes) => (&mut self.said.stdout, bytes),
                    Output::Stderr(bytes) => (&mut self.said.stderr, bytes),
                    Output::Pty(bytes) => (&mut self.said.pty, bytes),
                };
                to.extend_from_slice(&bytes);
                self.at += bytes.len() as u64;
            }
            Event::Keepalive(_) => self.said.keepalives += 1,
            Event::End(end) => {
                assert!(self.messages.next().await?.is_none(), "the end is last");
                return Ok(Some(end));
            }
            Event::Start(_) => panic!("a second start"),
            Event::Gap(gap) => {
                assert!(self.gaps.is_empty() && gap.from == self.at && gap.from < gap.to);
                self.gaps.push((gap.from, gap.to));
                self.at = gap.to;
            }
        }
        Ok(None)
    }

    /// Goes on until `check` holds of what was said.
    pub async fn until(&mut self, check: impl Fn(&Said) -> bool) {
        while !check(&self.said) {
            if let Some(end) = self.step().await.unwrap() {
                panic!("it ended with {end:?} after {:?}", self.said);
            }
        }
    }

    /// Goes on until it has said `text` on stdout or its terminal.
    pub async fn until_it_says(&mut self, text: &str) {
        let has = |bytes: &[u8]| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        self.until(|said| has(&said.stdout) || has(&said.pty)).await;
    }

    pub async fn try_end(mut self) -> Result<(Said, EndEvent), Failure> {
        loop {
            if let Some(end) = self.step().await? {
                return Ok((self.said, end));
            }
        }
    }

    pub async fn end(self) -> (Said, EndEvent) {
        self.try_end().await.unwrap()
    }
}

/// The part of an end that upstream has too.
pub fn upstreams(end: &EndEvent) -> (i32, bool, String, Option<String>) {
    (end.exit_code, end.exited, end.status.clone(), end.error.clone())
}

pub async fn begin(client: &Client, request: &StartRequest) -> Running<StartResponse> {
    Running::of(client.stream(START, request).await.unwrap()).await.unwrap()
}

pub async fn run(client: &Client, request: &StartRequest) -> (Said, EndEvent) {
    begin(client, request).await.end().await
}

/// The stdout of a command that succeeds.
pub async fn stdout(client: &Client, request: &StartRequest) -> String {
    let (said, end) = run(client, request).await;
    assert_eq!((end.exit_code, said.stderr()), (0, ""), "{said:?}");
    String::from_utf8(said.stdout).unwrap()
}

pub async fn refused(client: &Client, request: &StartRequest) -> Failure {
    let messages = match client.stream::<_, StartResponse>(START, request).await {
        Ok(messages) => messages,
        Err(failure) => return failure,
    };
    match Running::of(messages).await {
        Ok(_) => panic!("it was started"),
        Err(failure) => failure,
    }
}

pub async fn connect(
    client: &Client,
    process: Option<ProcessSelector>,
) -> Result<Running<ConnectResponse>, Failure> {
    connect_from(client, process, None).await
}

pub async fn connect_from(
    client: &Client,
    process: Option<ProcessSelector>,
    from_offset: Option<u64>,
) -> Result<Running<ConnectResponse>, Failure> {
    Running::of(client.stream(CONNECT, &ConnectRequest { process, from_offset }).await?).await
}

pub async fn list(client: &Client) -> Vec<ProcessInfo> {
    let list: ListResponse = client.unary(LIST, &ListRequest::default()).await.unwrap();
    list.processes
}

pub async fn send(
    client: &Client,
    process: Option<ProcessSelector>,
    input: Option<ProcessInput>,
) -> Result<(), Failure> {
    let request = SendInputRequest { process, input, ..Default::default() };
    client.unary(SEND_INPUT, &request).await.map(|_: SendInputResponse| ())
}

pub async fn close_stdin(client: &Client, process: Option<ProcessSelector>) -> Result<(), Failure> {
    let request = CloseStdinRequest { process };
    client.unary(CLOSE_STDIN, &request).await.map(|_: CloseStdinResponse| ())
}

pub async fn signal(
    client: &Client,
    process: Option<ProcessSelector>,
    signal: Signal,
) -> Result<(), Failure> {
    let request = SendSignalRequest { process, signal: signal.into(), ..Default::default() };
    client.unary(SEND_SIGNAL, &request).await.map(|_: SendSignalResponse| ())
}

pub async fn kill(client: &Client, process: u32) {
    signal(client, pid(process), Signal::Sigkill).await.unwrap();
}

pub async fn resize(client: &Client, process: u32, cols: u32, rows: u32) -> Result<(), Failure> {
    let pty = Some(Pty { size: Some(Size { cols, rows }) });
    let request = UpdateRequest { process: pid(process), pty };
    client.unary(UPDATE, &request).await.map(|_: UpdateResponse| ())
}

pub fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into() }
}

/// The state letter of a process; `None` when there is none.
pub fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}
