//! The same calls in every protocol, on every kind of socket.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{
    Daemon, noise,
    raw::Raw,
    rpc::{Client, Failure, Messages, WIRES, Wire},
};
use envd::proto::process::{
    CloseStdinRequest, CloseStdinResponse, ListRequest, ListResponse, ProcessConfig, ProcessInput,
    ProcessSelector, SendInputRequest, SendInputResponse, StartRequest, StartResponse,
    StreamInputRequest, StreamInputResponse, process_event::Event,
    process_event::data_event::Output, process_input::Input, process_selector::Selector,
    stream_input_request,
};

const START: &str = "/process.Process/Start";
const LIST: &str = "/process.Process/List";

fn start(cmd: &str, args: &[&str]) -> StartRequest {
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

fn pid(pid: u32) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Pid(pid)) })
}

fn stdin(data: &[u8]) -> Option<ProcessInput> {
    Some(ProcessInput { input: Some(Input::Stdin(data.to_vec().into())) })
}

async fn started(events: &mut Messages<StartResponse>) -> u32 {
    match events.next().await.unwrap().unwrap().event.unwrap().event.unwrap() {
        Event::Start(start) => start.pid,
        other => panic!("first came {other:?}"),
    }
}

/// Everything on stdout and stderr, and the end's exit code and status.
async fn outcome(mut events: Messages<StartResponse>) -> (Vec<u8>, Vec<u8>, i32, String) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match events.next().await.unwrap().expect("an end").event.unwrap().event.unwrap() {
            Event::Data(data) => match data.output.unwrap() {
                Output::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                Output::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                Output::Pty(_) => panic!("no terminal was asked for"),
            },
            Event::End(end) => {
                assert_eq!(events.next().await.unwrap(), None, "the end is last");
                return (stdout, stderr, end.exit_code, end.status);
            }
            Event::Keepalive(_) => {}
            Event::Start(_) => panic!("a second start"),
            Event::Gap(gap) => panic!("nobody asked for offsets: {gap:?}"),
        }
    }
}

#[tokio::test]
async fn a_command_in_every_protocol() {
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let request = start("/bin/sh", &["-c", "echo out; echo err >&2; exit 7"]);
        let mut events = client.stream(START, &request).await.unwrap();
        started(&mut events).await;
        let (stdout, stderr, code, status) = outcome(events).await;
        assert_eq!(stdout, b"out\n", "{wire:?}");
        assert_eq!(stderr, b"err\n", "{wire:?}");
        assert_eq!((code, status.as_str()), (7, "exit status 7"), "{wire:?}");
    }
}

#[tokio::test]
async fn random_bytes_through_cat_come_back_in_every_protocol() {
    let daemon = Daemon::start(&[]);
    let bytes = noise(64 << 10);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let mut events = client.stream(START, &start("cat", &[])).await.unwrap();
        let process = started(&mut events).await;
        for piece in bytes.chunks(10_000) {
            let request = SendInputRequest {
                process: pid(process),
                input: stdin(piece),
                ..Default::default()
            };
            let _: SendInputResponse =
                client.unary("/process.Process/SendInput", &request).await.unwrap();
        }
        let request = CloseStdinRequest { process: pid(process) };
        let _: CloseStdinResponse =
            client.unary("/process.Process/CloseStdin", &request).await.unwrap();
        let (stdout, _, code, _) = outcome(events).await;
        assert_eq!(code, 0, "{wire:?}");
        assert!(stdout == bytes, "{wire:?}: {} bytes came back changed", stdout.len());
    }
}

#[tokio::test]
async fn a_client_stream_in_every_protocol() {
    use stream_input_request::{DataEvent, Event, KeepAlive, StartEvent};
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let mut events = client.stream(START, &start("head", &["-c", "6"])).await.unwrap();
        let process = started(&mut events).await;
        let message = |event| StreamInputRequest { event: Some(event) };
        let messages = [
            message(Event::Start(StartEvent { process: pid(process) })),
            message(Event::Data(DataEvent { input: stdin(b"abc"), offset: None })),
            message(Event::Keepalive(KeepAlive {})),
            message(Event::Data(DataEvent { input: stdin(b"def"), offset: None })),
        ];
        let mut answer: Messages<StreamInputResponse> =
            client.streams("/process.Process/StreamInput", &messages).await.unwrap();
        assert!(answer.next().await.unwrap().is_some(), "{wire:?}");
        assert!(answer.next().await.unwrap().is_none(), "{wire:?}");
        assert_eq!(outcome(events).await.0, b"abcdef", "{wire:?}");
    }
}

#[tokio::test]
async fn errors_are_the_same_in_every_protocol() {
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let missing = CloseStdinRequest { process: pid(999_999_999) };
        let error = client
            .unary::<_, CloseStdinResponse>("/process.Process/CloseStdin", &missing)
            .await
            .unwrap_err();
        let message = "process with pid 999999999 not found".to_owned();
        assert_eq!(error, Failure { code: "not_found".into(), message }, "{wire:?}");

        let mut nowhere = start("true", &[]);
        if let Some(process) = &mut nowhere.process {
            process.cwd = Some("/no/such/ä".into());
        }
        let error = first_error(&client, &nowhere).await;
        assert_eq!(error.code, "invalid_argument", "{wire:?}");
        assert_eq!(error.message, "cwd '/no/such/ä' does not exist", "{wire:?}");

        let client = client.with("authorization", "Basic bm9ib2R5LWhlcmU6");
        let error = first_error(&client, &start("true", &[])).await;
        assert_eq!(error.code, "unauthenticated", "{wire:?}");
        assert_eq!(error.message, "invalid username: 'nobody-here'", "{wire:?}");
    }
}

#[tokio::test]
async fn grpc_over_http1_has_its_status_in_trailers() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::open(&daemon).await;
    let head = |method: &str, version: &str, te: &str| {
        format!(
            "POST /process.Process/{method} HTTP/{version}\r\nhost: localhost\r\n\
             content-type: application/grpc\r\n{te}transfer-encoding: chunked\r\n\r\n"
        )
    };
    // All on one connection: it stays in step.
    for _ in 0..2 {
        raw.send(head("List", "1.1", "te: gzip, Trailers\r\n")).await;
        raw.send_chunk(&[0; 5]).await;
        raw.send("0\r\n\r\n").await;
        let (status, fields) = raw.head().await;
        assert_eq!(status, 200, "{fields}");
        assert!(fields.lines().any(|line| line == "transfer-encoding: chunked"), "{fields}");
        let announced = fields.lines().find_map(|line| line.strip_prefix("trailer: ")).unwrap();
        assert!(announced.split(", ").any(|name| name == "grpc-status"), "{fields}");
        assert_eq!(raw.until(b"\r\n\r\n").await, b"5\r\n\0\0\0\0\0\r\n0\r\ngrpc-status: 0\r\n\r\n");

        // StartRequest { process: { cmd: "false" } }
        raw.send(head("Start", "1.1", "te: trailers\r\n")).await;
        raw.send_chunk(b"\0\0\0\0\x09\x0a\x07\x0a\x05false").await;
        raw.send("0\r\n\r\n").await;
        let (status, fields) = raw.head().await;
        assert_eq!(status, 200, "{fields}");
        // ProcessEvent { start: { pid } } and no extension field: one more is 2 bytes at least.
        let start = raw.chunk().await.unwrap();
        assert!(start.len() <= 5 + 10 && start.starts_with(&[0, 0, 0, 0]), "{start:?}");
        let rest = String::from_utf8(raw.until(b"\r\n\r\n").await).unwrap();
        assert!(rest.contains("exit status 1"), "{rest}");
        assert!(rest.ends_with("\r\n0\r\ngrpc-status: 0\r\n\r\n"), "{rest}");

        // An error without a message has its status in the head. ConnectRequest { process: {} }
        raw.send(head("Connect", "1.1", "te: trailers\r\n")).await;
        raw.send_chunk(&[0; 5]).await;
        raw.send("0\r\n\r\n").await;
        let answer = raw.answer().await;
        assert!(answer.head.lines().any(|line| line == "grpc-status: 12"), "{answer:?}");
    }
    // Without trailers there is no place for the status.
    for (version, te) in [("1.1", ""), ("1.1", "te: gzip\r\n"), ("1.0", "te: trailers\r\n")] {
        let mut raw = Raw::open(&daemon).await;
        raw.send(
            head("List", version, te).replace("transfer-encoding: chunked", "content-length: 5"),
        )
        .await;
        raw.send([0; 5]).await;
        assert_eq!(raw.head().await.0, 505, "HTTP/{version} {te}");
    }
}

async fn first_error(client: &Client, request: &StartRequest) -> Failure {
    match client.stream::<_, StartResponse>(START, request).await {
        Err(failure) => failure,
        Ok(mut events) => events.next().await.expect_err("the call fails"),
    }
}

#[tokio::test]
async fn the_deadline_of_a_start_is_the_life_of_its_process() {
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        // gRPC's own deadline ends the call alone; this header ends the process, in any protocol.
        let client = Client::new(&daemon, wire).with("connect-timeout-ms", "1000");
        let mut events = client.stream(START, &start("sleep", &["1000"])).await.unwrap();
        started(&mut events).await;
        let error = events.next().await.unwrap_err();
        assert_eq!(error.code, "deadline_exceeded", "{wire:?}");
        let client = Client::new(&daemon, wire);
        loop {
            let list: ListResponse = client.unary(LIST, &ListRequest::default()).await.unwrap();
            if list.processes.is_empty() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_process_outlives_its_client_and_is_found_again() {
    use envd::proto::process::{
        ConnectRequest, ConnectResponse, SendSignalRequest, SendSignalResponse, Signal,
    };
    let daemon = Daemon::start(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let mut request = start("cat", &[]);
        request.tag = Some("mine".into());
        let mut events = client.stream(START, &request).await.unwrap();
        let process = started(&mut events).await;
        drop(events);

        let list: ListResponse = client.unary(LIST, &ListRequest::default()).await.unwrap();
        assert_eq!(list.processes.len(), 1, "{wire:?}");
        assert_eq!(list.processes[0].pid, process, "{wire:?}");
        assert_eq!(list.processes[0].config.as_ref().unwrap().cmd, "cat", "{wire:?}");

        let tag = Some(ProcessSelector { selector: Some(Selector::Tag("mine".into())) });
        let request = ConnectRequest { process: tag.clone(), ..Default::default() };
        let mut again: Messages<ConnectResponse> =
            client.stream("/process.Process/Connect", &request).await.unwrap();
        let first = again.next().await.unwrap().unwrap().event.unwrap().event.unwrap();
        assert!(matches!(first, Event::Start(start) if start.pid == process), "{wire:?}");

        let request =
            SendInputRequest { process: tag.clone(), input: stdin(b"again"), ..Default::default() };
        let _: SendInputResponse =
            client.unary("/process.Process/SendInput", &request).await.unwrap();
        let data = again.next().await.unwrap().unwrap().event.unwrap().event.unwrap();
        assert!(
            matches!(&data, Event::Data(data)
            if data.output == Some(Output::Stdout(b"again"[..].into()))),
            "{wire:?}: {data:?}"
        );

        let request = SendSignalRequest {
            process: tag,
            signal: Signal::Sigterm.into(),
            ..Default::default()
        };
        let _: SendSignalResponse =
            client.unary("/process.Process/SendSignal", &request).await.unwrap();
        let end = again.next().await.unwrap().unwrap().event.unwrap().event.unwrap();
        let Event::End(end) = end else { panic!("{wire:?}: {end:?}") };
        assert_eq!((end.exit_code, end.exited), (-1, false), "{wire:?}");
        assert_eq!(end.status, "signal: terminated", "{wire:?}");
        assert_eq!(end.error.as_deref(), Some("signal: terminated"), "{wire:?}");
        assert!(again.next().await.unwrap().is_none(), "{wire:?}");
    }
}

#[tokio::test]
async fn a_gibibyte_streams_through_in_bounded_memory() {
    let daemon = Daemon::start(&[]);
    let client = Client::new(&daemon, Wire::Grpc);
    let request = start("head", &["-c", "1073741824", "/dev/zero"]);
    let mut events = client.stream(START, &request).await.unwrap();
    started(&mut events).await;
    let mut total = 0;
    loop {
        match events.next().await.unwrap().unwrap().event.unwrap().event.unwrap() {
            Event::Data(data) => match data.output {
                Some(Output::Stdout(bytes)) => total += bytes.len(),
                other => panic!("{other:?}"),
            },
            Event::End(end) => break assert_eq!(end.exit_code, 0),
            _ => {}
        }
    }
    assert_eq!(total, 1 << 30);
    let peak = daemon.memory("VmHWM");
    assert!(peak < 64 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn the_same_start_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("envd.sock");
    let listen = format!("unix://{}?mode=0620", socket.display());
    let mut daemon = Daemon::start_with(&["--listen", &listen]);
    let mode = std::os::unix::fs::PermissionsExt::mode(&socket.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o620);
    let client = Client::unix(&socket);
    let mut events = client.stream(START, &start("echo", &["hello"])).await.unwrap();
    started(&mut events).await;
    assert_eq!(outcome(events).await.0, b"hello\n");
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(!socket.exists(), "the socket is removed at the end");
}

#[tokio::test]
async fn health_and_reflection_over_grpc() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let daemon = Daemon::start(&[]);
    let channel = tonic::transport::Endpoint::from_shared(daemon.url("")).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "process.Process", "filesystem.Filesystem"] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, 1, "{service:?} is SERVING");
    }
    let mut reflection = ServerReflectionClient::new(channel);
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for service in ["process.Process", "filesystem.Filesystem", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{names:?}");
    }
}
