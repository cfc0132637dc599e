//! Templates: when a sandbox is ready, who is told, and what becomes of those that never are.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    Daemon, able, eventually, in_time,
    rpc::{Client, Messages, WIRES, Wire},
    soon,
};
use envd::proto::{
    process::{ListRequest, ListResponse},
    v1::{
        GetTemplateRequest, GetTemplateResponse, TemplateState, WatchTemplateRequest,
        WatchTemplateResponse, watch_template_response::Event, watch_template_response::output,
    },
};
use serde_json::{Value, json};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const GET: &str = "/envd.v1.Template/Get";
const WATCH: &str = "/envd.v1.Template/Watch";
const SERVING: i32 = 1;
const NOT_SERVING: i32 = 2;

/// A directory for a template and what its commands touch.
struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new(template: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // A login shell reads what is in the home; a test does not want to know what that is.
        let home = "[env]\nHOME = \"DIR\"\n";
        let template = match template.contains("[env]\n") {
            true => template.replace("[env]\n", home),
            false => format!("{template}\n{home}"),
        };
        let template = template.replace("DIR", dir.path().to_str().unwrap());
        fs::write(dir.path().join("template.toml"), template).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn boot_with(&self, args: &[&str]) -> Daemon {
        let flag = format!("--template={}", self.path("template.toml").display());
        let mut all = vec![flag.as_str()];
        all.extend(args);
        Daemon::start(&all)
    }

    fn boot(&self) -> Daemon {
        self.boot_with(&[])
    }
}

async fn get(daemon: &Daemon, path: &str) -> (u16, String) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response = soon(path, client.get(daemon.url(path)).send()).await.unwrap();
    assert_eq!(response.headers()["cache-control"], "no-store");
    (response.status().as_u16(), response.text().await.unwrap())
}

/// What `/health` says: 204, or the JSON of 503.
async fn health(daemon: &Daemon) -> Option<Value> {
    match get(daemon, "/health").await {
        (204, body) if body.is_empty() => None,
        (503, body) => Some(serde_json::from_str(&body).unwrap()),
        other => panic!("{other:?}"),
    }
}

async fn probe(daemon: &Daemon, service: &str) -> i32 {
    let endpoint = tonic::transport::Endpoint::from_shared(daemon.url("")).unwrap();
    let channel = soon("connecting", endpoint.connect()).await.unwrap();
    let request = HealthCheckRequest { service: service.to_owned() };
    soon("a probe", HealthClient::new(channel).check(request)).await.unwrap().into_inner().status
}

async fn status(daemon: &Daemon) -> GetTemplateResponse {
    let client = Client::new(daemon, Wire::Connect { json: true });
    client.unary(GET, &GetTemplateRequest {}).await.unwrap()
}

fn state(template: &GetTemplateResponse) -> TemplateState {
    template.status.as_ref().unwrap().state()
}

async fn until(daemon: &Daemon, wanted: TemplateState) -> GetTemplateResponse {
    let what = format!("the template is {wanted:?}");
    in_time(&what, async || {
        let template = status(daemon).await;
        (state(&template) == wanted).then_some(template)
    })
    .await
}

async fn watch(daemon: &Daemon, wire: Wire) -> Messages<WatchTemplateResponse> {
    let client = Client::new(daemon, wire);
    client.stream(WATCH, &WatchTemplateRequest { until_settled: true }).await.unwrap()
}

async fn next(events: &mut Messages<WatchTemplateResponse>) -> Option<Event> {
    Some(events.next().await.unwrap()?.event.expect("an event"))
}

/// Whether a process runs; a zombie does not.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().filter(|text| text.ends_with('\n'))
}

#[tokio::test]
async fn ready_on_every_face_at_the_same_moment_and_not_before() {
    // The service takes as long as the test wants.
    let image = Image::new(
        "start = \"echo starting; until [ -e DIR/go ]; do sleep 0.02; done; touch DIR/up; exec sleep 1000\"\n\
         ready = { file = \"DIR/up\" }",
    );
    let daemon = image.boot();
    let mut events = watch(&daemon, Wire::Grpc).await;
    let Some(Event::Snapshot(first)) = next(&mut events).await else { panic!("no snapshot first") };
    assert_eq!(first.missed, 0);
    until(&daemon, TemplateState::Waiting).await;

    let unhealthy = health(&daemon).await.expect("503 before it is ready");
    assert_eq!(unhealthy["state"], "waiting");
    assert!(unhealthy["since"].as_str().unwrap().contains('T'), "{unhealthy}");
    in_time("an attempt has failed", async || {
        let unhealthy = health(&daemon).await.unwrap();
        let error = unhealthy["last_error"].as_str()?;
        assert!(
            unhealthy["attempts"].as_u64().unwrap() >= 1 && error.contains("/up'"),
            "{unhealthy}"
        );
        Some(())
    })
    .await;
    assert_eq!(get(&daemon, "/livez").await.0, 204);
    assert_eq!(probe(&daemon, "").await, NOT_SERVING);
    assert_eq!(probe(&daemon, "envd.v1.Template").await, NOT_SERVING);
    for service in ["process.Process", "filesystem.Filesystem", "envd.v1.System"] {
        assert_eq!(probe(&daemon, service).await, SERVING, "{service} can be called");
    }
    // Calls are served meanwhile.
    let list: ListResponse = Client::new(&daemon, Wire::Grpc)
        .unary("/process.Process/List", &ListRequest::default())
        .await
        .unwrap();
    let start_pid = status(&daemon).await.status.unwrap().start_pid.unwrap();
    assert!(list.processes.iter().any(|process| {
        process.pid == start_pid && process.tag.as_deref() == Some("template-start")
    }));

    let endpoint = tonic::transport::Endpoint::from_shared(daemon.url("")).unwrap();
    let mut health_client = HealthClient::new(endpoint.connect().await.unwrap());
    let request = HealthCheckRequest { service: String::new() };
    let mut watching = health_client.watch(request).await.unwrap().into_inner();
    assert_eq!(watching.message().await.unwrap().unwrap().status, NOT_SERVING);

    fs::write(image.path("go"), "").unwrap();
    let mut said = Vec::new();
    loop {
        match next(&mut events).await.expect("ready comes") {
            Event::Changed(changed) if changed.state() == TemplateState::Ready => break,
            Event::Output(output) if output.source() == output::Source::Start => {
                if let Some(output::Data::Stdout(bytes)) = output.data {
                    said.extend_from_slice(&bytes);
                }
            }
            _ => {}
        }
    }
    // Whoever is told can rely on it everywhere.
    assert_eq!(health(&daemon).await, None);
    assert_eq!(probe(&daemon, "").await, SERVING);
    assert_eq!(probe(&daemon, "envd.v1.Template").await, SERVING);
    assert_eq!(watching.message().await.unwrap().unwrap().status, SERVING);
    assert_eq!(next(&mut events).await, None, "it has settled");
    let template = status(&daemon).await;
    assert!(template.present);
    let last = template.attempts.last().unwrap();
    assert!(last.took.is_some() && last.error.is_none(), "{last:?}");
    // Not every watcher was there when it said so.
    assert!(said.is_empty() || said == b"starting\n");
}

#[tokio::test]
async fn without_a_template_it_is_ready_from_the_beginning() {
    let daemon = Daemon::start(&[]);
    assert_eq!(health(&daemon).await, None);
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let template: GetTemplateResponse =
            client.unary(GET, &GetTemplateRequest {}).await.unwrap();
        assert!(!template.present && template.attempts.is_empty(), "{wire:?}");
        assert_eq!(state(&template), TemplateState::Ready, "{wire:?}");
        let mut events = watch(&daemon, wire).await;
        assert!(matches!(next(&mut events).await, Some(Event::Snapshot(_))), "{wire:?}");
        assert_eq!(next(&mut events).await, None, "{wire:?}");
    }
    let failure = tonic::transport::Endpoint::from_shared(daemon.url("")).unwrap().connect().await;
    let request = HealthCheckRequest { service: "no.Such".to_owned() };
    let failure = HealthClient::new(failure.unwrap()).check(request).await.unwrap_err();
    assert_eq!(failure.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn the_attempts_and_their_output_are_streamed() {
    let image = Image::new(
        "ready = \"echo try $(( $(cat DIR/n 2>/dev/null || echo 0) + 1 )); echo no >&2; echo x >> DIR/lines; \
         [ $(wc -l < DIR/lines) -ge 3 ]\"\ninterval = \"20ms\"",
    );
    let daemon = image.boot();
    let template = until(&daemon, TemplateState::Ready).await;
    assert_eq!(template.status.as_ref().unwrap().attempts, 3);
    let errors: Vec<_> = template.attempts.iter().map(|attempt| attempt.error.clone()).collect();
    assert_eq!(errors, [Some("exit status 1".to_owned()), Some("exit status 1".to_owned()), None]);
    for attempt in &template.attempts {
        let output = String::from_utf8_lossy(&attempt.output);
        assert!(output.contains("try 1\n") && output.contains("no\n"), "{output}");
    }
    // A ready command alone, without a start command, is a template too.
    assert_eq!(template.status.unwrap().start_pid, None);
}

#[tokio::test]
async fn one_that_never_comes_up_has_failed_and_says_why() {
    let image = Image::new(
        "start = \"exec sleep 1000\"\nready = [\"/bin/sh\", \"-c\", \"exit 4\"]\ninterval = \"10m\"\n\
         timeout = \"2s\"",
    );
    let daemon = image.boot();
    let mut events = watch(&daemon, Wire::GrpcWeb { text: true, json: false }).await;
    let mut last = None;
    while let Some(event) = next(&mut events).await {
        last = Some(event);
    }
    let reason = match last.unwrap() {
        Event::Changed(status) => status.reason.unwrap(),
        Event::Snapshot(snapshot) => snapshot.status.unwrap().reason.unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(reason, "ready command timed out after 2s: exit status 4");
    let unhealthy = health(&daemon).await.unwrap();
    assert_eq!((&unhealthy["state"], &unhealthy["last_error"]), (&json!("failed"), &json!(reason)));
    assert_eq!(probe(&daemon, "").await, NOT_SERVING);
    assert_eq!(get(&daemon, "/livez").await.0, 204);
    // It can be looked into: the service is left running.
    let start_pid = status(&daemon).await.status.unwrap().start_pid.unwrap();
    assert!(runs(&start_pid.to_string()));
}

#[tokio::test]
async fn a_ready_command_that_hangs_is_killed_with_its_tree() {
    let image = Image::new(
        "ready = \"[ -e DIR/good ] && exit 0; echo $$ >> DIR/pids; sleep 1001 & echo $! >> DIR/pids; \
         sh -c 'sleep 1002; true' & echo $! >> DIR/pids; echo said; sleep 1003\"\n\
         interval = \"10ms\"\nattempt_timeout = \"1s\"",
    );
    let daemon = image.boot();
    let first = in_time("an attempt was given up that had begun", async || {
        let template = status(&daemon).await;
        let mut attempts = template.attempts.into_iter();
        attempts.find(|attempt| attempt.error.is_some() && image.path("pids").exists())
    })
    .await;
    assert!(
        first.error.unwrap().starts_with("not done within 1s"),
        "it says how long it was given"
    );
    fs::write(image.path("good"), "").unwrap();
    until(&daemon, TemplateState::Ready).await;
    for pid in read(&image.path("pids")).unwrap().lines() {
        eventually("it is killed", || (!runs(pid)).then_some(()));
    }
}

#[tokio::test]
async fn a_hanging_ready_command_dies_with_the_whole_time_and_so_do_its_children() {
    let image = Image::new(
        "ready = \"sleep 1001 & echo $! > DIR/child; echo $$ > DIR/shell; sleep 1003\"\ntimeout = \"2s\"",
    );
    let daemon = image.boot();
    let pids = ["child", "shell"].map(|name| eventually("it hangs", || read(&image.path(name))));
    assert!(pids.iter().all(|pid| runs(pid)));
    let failed = until(&daemon, TemplateState::Failed).await;
    let reason = failed.status.unwrap().reason.unwrap();
    assert!(reason.starts_with("ready command timed out after 2s: not done within"), "{reason}");
    for pid in pids {
        eventually("it is killed", || (!runs(&pid)).then_some(()));
    }
}

#[tokio::test]
async fn a_start_command_that_ends_badly_fails_the_template_and_a_good_end_does_not() {
    let image =
        Image::new("start = \"echo the reason >&2; exit 3\"\nready = { file = \"DIR/never\" }");
    let daemon = image.boot();
    let failed = until(&daemon, TemplateState::Failed).await.status.unwrap();
    assert_eq!(failed.reason.unwrap(), "start command failed: exit status 3: the reason");
    assert_eq!((failed.start_pid, failed.restarts), (None, 0));

    let image =
        Image::new("start = \"(sleep 0.2; touch DIR/up) & exit 0\"\nready = { file = \"DIR/up\" }");
    let daemon = image.boot();
    until(&daemon, TemplateState::Ready).await;
    assert_eq!(health(&daemon).await, None);

    // Also when it was ready already.
    let image = Image::new("start = \"exec sleep 1000\"\nready = { delay = \"1ms\" }");
    let daemon = image.boot();
    let pid = until(&daemon, TemplateState::Ready).await.status.unwrap().start_pid.unwrap();
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    let failed = until(&daemon, TemplateState::Failed).await.status.unwrap();
    assert_eq!(failed.reason.unwrap(), "start command failed: signal: killed");
    assert_eq!(health(&daemon).await.unwrap()["state"], "failed");

    // And one that cannot even be started.
    let image = Image::new("start = [\"/no/such/program\"]\nready = { file = \"DIR/never\" }");
    let daemon = image.boot();
    let failed = until(&daemon, TemplateState::Failed).await.status.unwrap();
    assert!(failed.reason.as_ref().unwrap().contains("No such file"), "{failed:?}");
    let image = Image::new("start = \"true\"\nuser = \"no-such-user\"");
    let daemon = image.boot();
    let failed = until(&daemon, TemplateState::Failed).await.status.unwrap();
    assert!(failed.reason.as_ref().unwrap().contains("'no-such-user'"), "{failed:?}");
}

#[tokio::test]
async fn on_failure_it_is_started_again_and_becomes_ready() {
    let image = Image::new(
        "start = \"[ -e DIR/second ] || { touch DIR/second; exit 1; }; touch DIR/up; exec sleep 1000\"\n\
         ready = { file = \"DIR/up\" }\nrestart = \"on-failure\"",
    );
    let daemon = image.boot();
    let ready = until(&daemon, TemplateState::Ready).await.status.unwrap();
    assert_eq!(ready.restarts, 1);
    // And again after it was ready.
    let pid = ready.start_pid.unwrap();
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    let again = in_time("it is ready again", async || {
        let status = status(&daemon).await.status.unwrap();
        (status.state() == TemplateState::Ready && status.restarts == 2).then_some(status)
    })
    .await;
    assert_ne!(again.start_pid, Some(pid));
}

#[tokio::test]
async fn restarts_end_with_the_time() {
    let image = Image::new(
        "start = \"exit 1\"\nready = { file = \"DIR/never\" }\nrestart = \"on-failure\"\ntimeout = \"5s\"",
    );
    let daemon = image.boot();
    let failed = until(&daemon, TemplateState::Failed).await.status.unwrap();
    let reason = failed.reason.unwrap();
    assert!(reason.starts_with("ready command timed out after 5s"), "{reason}");
    assert!(reason.ends_with("start command failed: exit status 1"), "{reason}");
}

#[tokio::test]
async fn a_daemon_that_ends_starts_nothing_again() {
    let image = Image::new(
        "start = \"echo x >> DIR/starts; exec sleep 1000\"\nready = { file = \"DIR/starts\" }\n\
         restart = \"on-failure\"",
    );
    let mut daemon = image.boot_with(&["--shutdown-grace", "3"]);
    let pid = until(&daemon, TemplateState::Ready).await.status.unwrap().start_pid.unwrap();
    // A call that keeps it draining while its service ends with it, as systemd has it.
    let client = Client::new(&daemon, Wire::Grpc);
    let request = WatchTemplateRequest { until_settled: false };
    let mut events: Messages<WatchTemplateResponse> = client.stream(WATCH, &request).await.unwrap();
    assert!(matches!(next(&mut events).await, Some(Event::Snapshot(_))));
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait_for_log("SIGTERM: draining");
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(daemon.wait().success());
    assert_eq!(fs::read_to_string(image.path("starts")).unwrap(), "x\n");
}

#[tokio::test]
async fn health_can_mean_life() {
    let image = Image::new("ready = { file = \"DIR/never\" }\nhealth = \"live\"");
    let daemon = image.boot();
    until(&daemon, TemplateState::Waiting).await;
    assert_eq!(health(&daemon).await, None);
    assert_eq!(probe(&daemon, "").await, SERVING);
    assert_eq!(probe(&daemon, "envd.v1.Template").await, NOT_SERVING);
}

#[tokio::test]
async fn a_template_can_wait_for_init_and_has_its_variables() {
    let image = Image::new(
        "start = \"echo $FROM_INIT $OWN > DIR/out; exec sleep 1000\"\nready = { file = \"DIR/out\" }\n\
         start_after = \"init\"\nworkdir = \"DIR\"\n[env]\nOWN = \"mine\"",
    );
    let daemon = image.boot();
    assert_eq!(health(&daemon).await.unwrap()["state"], "starting");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({ "envVars": { "FROM_INIT": "given", "OWN": "over" } });
    let answer = soon("init", client.post(daemon.url("/init")).json(&body).send()).await.unwrap();
    assert_eq!(answer.status(), 204);
    until(&daemon, TemplateState::Ready).await;
    let out = eventually("it has written", || read(&image.path("out")));
    assert_eq!(out, "given mine\n");
}

#[tokio::test]
async fn a_broken_template_leaves_the_sandbox_reachable() {
    let image = Image::new("strat = \"x\"");
    let daemon = image.boot();
    let unhealthy = health(&daemon).await.unwrap();
    assert_eq!(unhealthy["state"], "failed");
    assert!(unhealthy["last_error"].as_str().unwrap().contains("strat"), "{unhealthy}");
    assert_eq!(get(&daemon, "/livez").await.0, 204);
}

#[tokio::test]
async fn why_a_file_is_broken_is_told_without_what_it_holds() {
    let image = Image::new("start = \"exec sleep 1000\"");
    fs::create_dir(image.path("template.d")).unwrap();
    fs::write(image.path("template.d/9.toml"), "[env]\nKEY = \"secret-of-the-image").unwrap();
    let daemon = image.boot();
    // Everybody may ask, without a token.
    let unhealthy = health(&daemon).await.unwrap();
    let why = unhealthy["last_error"].as_str().unwrap();
    assert!(why.contains("9.toml") && why.contains("line 2"), "{unhealthy}");
    let status = status(&daemon).await.status.unwrap();
    let log = serde_json::to_string(&daemon.wait_for_log("ready")).unwrap();
    for text in [unhealthy.to_string(), format!("{status:?}"), log] {
        assert!(!text.contains("secret-of"), "{text}");
    }
}

#[tokio::test]
async fn a_flood_of_output_that_nobody_takes_holds_up_nothing() {
    let image = Image::new(
        "start = \"exec yes flood\"\nready = [\"/bin/sh\", \"-c\", \"yes | head -c 3000000\"]",
    );
    let daemon = image.boot();
    // Who watches and does not read.
    let watching = watch(&daemon, Wire::Connect { json: true }).await;
    let template = until(&daemon, TemplateState::Ready).await;
    assert_eq!(template.attempts.last().unwrap().output.len(), 4096);
    let grown = daemon.memory("VmRSS");
    assert!(grown < 128 << 10, "{grown} KiB");
    assert_eq!(get(&daemon, "/health").await.0, 204);
    drop(watching);
}

#[tokio::test]
async fn e2bs_helper_strings() {
    let tools = ["/bin/bash", "ss", "curl", "pgrep"];
    let there = tools.iter().all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !able("bash, ss, curl and pgrep", there) {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Daemon::start(&[]);
    let url = server.url("/metrics");
    for (helper, good) in [
        (format!("[ -n \"$(ss -Htuln sport = :{port})\" ]"), true),
        (format!("curl -s -o /dev/null -w \"%{{http_code}}\" {url} | grep -q \"200\""), true),
        (format!("curl -s -o /dev/null -w \"%{{http_code}}\" {url} | grep -q \"404\""), false),
        ("pgrep envd > /dev/null".to_owned(), true),
        ("[ -f /proc/self/status ]".to_owned(), true),
        ("[ -f /no/such/file ]".to_owned(), false),
        ("sleep 1".to_owned(), true),
    ] {
        let image =
            Image::new(&format!("ready = '''{helper}'''\ninterval = \"10ms\"\ntimeout = \"30s\""));
        let daemon = image.boot();
        if good {
            until(&daemon, TemplateState::Ready).await;
        } else {
            let unready = in_time(&helper, async || {
                let template = status(&daemon).await;
                template.attempts.iter().find(|attempt| attempt.error.is_some()).cloned()
            });
            assert_eq!(unready.await.error.unwrap(), "exit status 1", "{helper}");
        }
    }
}

#[tokio::test]
async fn native_conditions() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Daemon::start(&[]);
    for condition in [
        format!("{{ port = {port} }}"),
        format!("{{ url = \"{}\" }}", server.url("/metrics")),
        format!("{{ url = \"{}\", status = 404 }}", server.url("/nothing")),
        "{ process = \"envd\" }".to_owned(),
        "{ file = \"/proc/self/status\" }".to_owned(),
        "{ delay = \"10ms\" }".to_owned(),
    ] {
        let image = Image::new(&format!("ready = {condition}"));
        until(&image.boot(), TemplateState::Ready).await;
    }
    let image = Image::new(&format!("ready = {{ url = \"{}\" }}", server.url("/nothing")));
    let daemon = image.boot();
    let error =
        in_time("it was asked", async || status(&daemon).await.status.unwrap().last_error).await;
    assert!(error.ends_with("answered 404, not 200"), "{error}");
}

fn wait(args: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_envd")).arg("wait").args(args).output().unwrap();
    assert!(output.stdout.is_empty());
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn envd_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("port:{}", listener.local_addr().unwrap().port());
    let server = Daemon::start(&[]);
    let url = format!("url:{}", server.url("/health"));
    let (code, said) = wait(&[
        &port,
        &url,
        "--status",
        "204",
        "file:/proc/self/status",
        "process:envd",
        "delay:1ms",
    ]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains(&port) && said.contains("file:/proc/self/status after "), "{said}");
    assert_eq!(wait(&[&port, "--quiet"]), (0, String::new()));
    drop(listener);
    let (code, said) = wait(&[&port, "--timeout", "3s", "--interval=5ms"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("nobody listens") && said.contains("not within 3s"), "{said}");
    for args in [&["port:0"][..], &[], &["--what"], &["nonsense"]] {
        let (code, said) = wait(args);
        assert_eq!(code, 2, "{said}");
        assert!(said.ends_with("\nTry 'envd wait --help'\n"), "{said}");
    }
    let help = Command::new(env!("CARGO_BIN_EXE_envd")).args(["wait", "--help"]).output().unwrap();
    assert!(help.status.success() && help.stderr.is_empty());
    assert!(help.stdout.starts_with(b"Usage: envd wait"));
}

#[tokio::test]
async fn the_service_manager_hears_ready_at_once_and_signs_of_life_while_the_template_is_not() {
    let image = Image::new("ready = { file = \"DIR/up\" }");
    let socket = image.path("notify");
    let manager = tokio::net::UnixDatagram::bind(&socket).unwrap();
    let mut heard = Vec::new();
    let mut until_heard = async |text: &str| {
        while !heard.iter().any(|line: &String| line == text) {
            let mut bytes = [0; 512];
            let length = soon(text, manager.recv(&mut bytes)).await.unwrap();
            heard.push(String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned());
        }
        std::mem::take(&mut heard)
    };
    let flag = format!("--template={}", image.path("template.toml").display());
    let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0", &flag]);
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "40000");
    let daemon = tokio::task::spawn_blocking(move || Daemon::spawn(&mut command)).await.unwrap();
    assert_eq!(until_heard("READY=1").await, ["READY=1"]);
    until_heard("STATUS=template waiting").await;
    until_heard("WATCHDOG=1").await;
    until_heard("WATCHDOG=1").await;
    assert_eq!(health(&daemon).await.unwrap()["state"], "waiting");
    fs::write(image.path("up"), "").unwrap();
    until_heard("STATUS=template ready").await;
}

#[tokio::test]
async fn the_host_is_told_at_once_and_again_when_the_template_is_ready() {
    let image = Image::new("ready = { file = \"DIR/up\" }");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ready = format!("--ready=tcp://{}", listener.local_addr().unwrap());
    let hear = async || {
        let (mut stream, _) = soon("the daemon calls", listener.accept()).await.unwrap();
        let mut text = String::new();
        soon("a line", tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text))
            .await
            .unwrap();
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let flag = format!("--template={}", image.path("template.toml").display());
    let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0", &flag, &ready]);
    let _daemon = tokio::task::spawn_blocking(move || Daemon::spawn(&mut command)).await.unwrap();
    let first = hear().await;
    assert!(first["state"] == "starting" || first["state"] == "waiting", "{first}");
    fs::write(image.path("up"), "").unwrap();
    let second = hear().await;
    assert_eq!(second["state"], "ready", "{second}");
    assert_eq!(second["addresses"], first["addresses"]);
}
