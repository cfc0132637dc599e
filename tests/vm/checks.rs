//! What must be true of envd in a guest. Each check cleans up after itself.

use std::{collections::BTreeSet, ffi::OsStr, path::Path, process::Stdio, time::Duration};

use futures_util::{StreamExt, stream};

use envd::proto::{
    filesystem::{
        EventType, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, RemoveRequest,
        RemoveResponse, WatchDirRequest, WatchDirResponse, watch_dir_response,
    },
    process::{
        CloseStdinRequest, CloseStdinResponse, ListRequest, ListResponse, ProcessConfig,
        ProcessInput, ProcessSelector, Pty, SendInputRequest, SendInputResponse, StartRequest,
        StartResponse, UpdateRequest, UpdateResponse, process_event::Event,
        process_event::data_event::Output, process_input::Input, process_selector::Selector,
        pty::Size,
    },
};

use crate::{
    common::{
        in_time, noise,
        rpc::{Client, Messages, WIRES, Wire},
    },
    guest::Kind,
};

const START: &str = "/process.Process/Start";
/// Every file of a check is below this directory.
pub(crate) const PLACE: &str = "/tmp/vm-check";

/// How a command ended, and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: i32,
}

pub(crate) fn root(address: &str, wire: Wire) -> Client {
    Client::at(address, wire).with("authorization", "Basic cm9vdDo=")
}

pub(crate) fn start(command: &str, args: &[&str]) -> StartRequest {
    let process = ProcessConfig {
        cmd: command.to_owned(),
        args: args.iter().map(ToString::to_string).collect(),
        cwd: Some("/".to_owned()),
        ..ProcessConfig::default()
    };
    StartRequest { process: Some(process), stdin: Some(false), ..StartRequest::default() }
}

pub(crate) fn of(pid: u32) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Pid(pid)) })
}

pub(crate) async fn events(
    client: &Client,
    request: &StartRequest,
) -> (u32, Messages<StartResponse>) {
    let mut events = client.stream(START, request).await.unwrap();
    match next(&mut events).await {
        Event::Start(start) => (start.pid, events),
        other => panic!("first came {other:?}"),
    }
}

pub(crate) async fn next(events: &mut Messages<StartResponse>) -> Event {
    events.next().await.unwrap().expect("an end").event.unwrap().event.unwrap()
}

async fn outcome(mut events: Messages<StartResponse>) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match next(&mut events).await {
            Event::Data(data) => match data.output.unwrap() {
                Output::Stdout(bytes) | Output::Pty(bytes) => stdout.extend_from_slice(&bytes),
                Output::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            },
            Event::End(end) => return (stdout, stderr, end.exit_code),
            Event::Gap(gap) => panic!("nobody asked for offsets: {gap:?}"),
            Event::Keepalive(_) | Event::Start(_) => {}
        }
    }
}

async fn run(client: &Client, command: &str, args: &[&str]) -> Outcome {
    let (_, events) = events(client, &start(command, args)).await;
    let (stdout, stderr, code) = outcome(events).await;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Outcome { stdout: text(stdout), stderr: text(stderr), code }
}

/// A shell line as root that must succeed; gives what it printed.
pub(crate) async fn sh(address: &str, line: &str) -> String {
    let outcome = run(&root(address, Wire::Grpc), "sh", &["-c", line]).await;
    assert_eq!(outcome.code, 0, "{line}: {outcome:?}");
    outcome.stdout.trim().to_owned()
}

/// The longest that one answer may take, in the slowest of guests.
const ANSWER: Duration = Duration::from_secs(30);

/// Starts a command that ends the daemon, which so may never tell anything. What it does shows
/// elsewhere.
pub(crate) async fn fire(client: &Client, command: &str, args: &[&str]) {
    let request = start(command, args);
    let told = async {
        let events = client.stream::<_, StartResponse>(START, &request).await;
        let Ok(mut events) = events else { return };
        while let Ok(Some(_)) = events.next().await {}
    };
    // Nor need its connection.
    let _ = tokio::time::timeout(ANSWER, told).await;
}

/// The health, or an error after a time in which any guest answers: a connection of QEMU's user
/// network can be lost without a word while nobody listens behind it.
pub(crate) async fn health(address: &str) -> reqwest::Result<reqwest::Response> {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER).build()?;
    client.get(format!("http://{address}/health")).send().await
}

/// One request over plain HTTP.
pub(crate) async fn hello(address: &str) {
    assert_eq!(health(address).await.unwrap().status(), 204);
}

pub(crate) async fn commands(address: &str) {
    for wire in WIRES {
        let client = Client::at(address, wire);
        let outcome = run(&client, "sh", &["-c", "echo out; echo err >&2; exit 7"]).await;
        assert_eq!(
            (outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.code),
            ("out\n", "err\n", 7),
            "{wire:?}"
        );
    }
}

pub(crate) async fn cat(address: &str) {
    let bytes = noise(256 << 10);
    for wire in [Wire::Grpc, Wire::Connect { json: true }] {
        let client = Client::at(address, wire);
        let mut request = start("cat", &[]);
        request.stdin = Some(true);
        let (pid, events) = events(&client, &request).await;
        for piece in bytes.chunks(50_000) {
            let input = Some(ProcessInput { input: Some(Input::Stdin(piece.to_vec().into())) });
            let request = SendInputRequest { process: of(pid), input, ..Default::default() };
            let _: SendInputResponse =
                client.unary("/process.Process/SendInput", &request).await.unwrap();
        }
        let request = CloseStdinRequest { process: of(pid) };
        let _: CloseStdinResponse =
            client.unary("/process.Process/CloseStdin", &request).await.unwrap();
        assert!(outcome(events).await.0 == bytes, "{wire:?}: the bytes came back changed");
    }
}

pub(crate) async fn terminal(address: &str) {
    let client = Client::at(address, Wire::Connect { json: true });
    let size = |cols| Some(Pty { size: Some(Size { cols, rows: 24 }) });
    let line = "read -r go; stty size; test -t 0 && tty";
    let request = StartRequest { pty: size(80), ..start("sh", &["-c", line]) };
    let (pid, events) = events(&client, &request).await;
    let request = UpdateRequest { process: of(pid), pty: size(100) };
    let _: UpdateResponse = client.unary("/process.Process/Update", &request).await.unwrap();
    let input = Some(ProcessInput { input: Some(Input::Pty(b"go\n"[..].into())) });
    let request = SendInputRequest { process: of(pid), input, ..Default::default() };
    let _: SendInputResponse = client.unary("/process.Process/SendInput", &request).await.unwrap();
    let (screen, _, code) = outcome(events).await;
    let screen = String::from_utf8_lossy(&screen);
    assert_eq!(code, 0, "{screen}");
    for part in ["go\r\n", "24 100\r\n", "/dev/pts/"] {
        assert!(screen.contains(part), "{screen:?} has not {part:?}");
    }
}

pub(crate) async fn files(address: &str) {
    let bytes = noise(3 << 20);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{address}/files?path={PLACE}/deep/file&username=root");
    let upload = http
        .post(&url)
        .header("content-type", "application/octet-stream")
        .body(bytes.clone())
        .send()
        .await
        .unwrap();
    assert_eq!(upload.status(), 200);
    let download = http.get(&url).send().await.unwrap().bytes().await.unwrap();
    assert!(download == bytes, "the file came back changed");
    let client = root(address, Wire::Connect { json: false });
    let request = ListDirRequest { path: PLACE.into(), depth: 2, ..Default::default() };
    let list: ListDirResponse =
        client.unary("/filesystem.Filesystem/ListDir", &request).await.unwrap();
    let names: Vec<_> = list.entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["deep", "file"]);
    clean(&client).await;
}

/// Uploads a file of the host to the place of a check.
pub(crate) async fn put(address: &str, file: &Path, name: &str) {
    let bytes = std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{address}/files?path={PLACE}/{name}&username=root");
    let upload = http.post(&url).header("content-type", "application/octet-stream");
    assert_eq!(upload.body(bytes).send().await.unwrap().status(), 200, "{}", file.display());
}

async fn clean(client: &Client) {
    let request = RemoveRequest { path: PLACE.into() };
    let _: RemoveResponse = client.unary("/filesystem.Filesystem/Remove", &request).await.unwrap();
}

pub(crate) async fn watch(address: &str) {
    let client = root(address, Wire::Connect { json: true });
    let request = MakeDirRequest { path: PLACE.into() };
    let _: MakeDirResponse =
        client.unary("/filesystem.Filesystem/MakeDir", &request).await.unwrap();
    let request = WatchDirRequest { path: PLACE.into(), recursive: true, ..Default::default() };
    let mut watch: Messages<WatchDirResponse> =
        client.stream("/filesystem.Filesystem/WatchDir", &request).await.unwrap();
    let mut next = async || loop {
        let event = watch.next().await.unwrap().unwrap().event.unwrap();
        if let watch_dir_response::Event::Filesystem(event) = event {
            return (event.name.clone(), event.r#type());
        }
    };
    sh(address, &format!("mkdir -p {PLACE}/a/b && echo x > {PLACE}/a/b/c")).await;
    let mut wanted: BTreeSet<_> = ["a", "a/b", "a/b/c"].into_iter().map(str::to_owned).collect();
    while !wanted.is_empty() {
        if let (name, EventType::Create) = next().await {
            wanted.remove(&name);
        }
    }
    clean(&client).await;
}

/// The SDK's own programs, unchanged.
pub(crate) async fn python_sdk(address: &str) {
    let python = std::env::var_os("ENVD_VM_PYTHON").expect("ENVD_VM_PYTHON is set: use make vm");
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/sdk.py");
    let output = tokio::process::Command::new(python)
        .arg(program)
        .env("E2B_DEBUG", "true")
        .env("E2B_SANDBOX_URL", format!("http://{address}"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(180), output);
    let output = output.await.expect("the program ends").unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).ends_with("all of it works\n"), "{}", text(&output.stdout));
}

/// An example, as a user would run it: `vsock_uds` with its socket and port, `unix` with its socket.
pub(crate) async fn example(name: &str, to: &[&OsStr]) {
    let examples = std::env::var_os("ENVD_VM_EXAMPLES").expect("ENVD_VM_EXAMPLES: use make vm");
    let output = tokio::process::Command::new(Path::new(&examples).join(name))
        .args(to)
        .args(["echo", "through the example"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(ANSWER, output).await.expect("it ends").unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "through the example\n", "{output:?}");
}

/// Waits until the guest's driver has a vsock device again: before, the backend must not be called.
pub(crate) async fn vsock_is_back(address: &str) {
    let line = "for i in $(seq 600); do ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -q '^virtio' && exit 0; sleep 0.1; done; exit 1";
    sh(address, line).await;
}

/// Whom calls act as that name nobody.
pub(crate) async fn user(address: &str) {
    let client = Client::at(address, Wire::Grpc);
    let id = run(&client, "id", &[]).await.stdout;
    assert!(id.starts_with("uid=1000(user) gid=1000(user)"), "{id}");
    let home = run(&client, "bash", &["-l", "-c", "cd; pwd; sudo id -u; umask"]).await;
    assert_eq!(home.stdout, "/home/user\n0\n0022\n", "{home:?}");
}

/// The daemon's pid.
pub(crate) async fn daemon(address: &str, kind: Kind) -> String {
    let line = match kind {
        Kind::Systemd => "systemctl show -p MainPID --value envd",
        Kind::Openrc => "pgrep -x envd -P $(cat /run/supervise-envd.pid)",
        // PID 1 itself is the supervisor; the daemon is its child.
        Kind::Pid1 | Kind::Handover | Kind::Minimal => "pgrep -x -P 1 envd",
    };
    let daemon = sh(address, line).await;
    assert!(daemon.parse::<u32>().is_ok(), "{line}: {daemon:?}");
    daemon
}

/// The daemon is the last to be killed, and its processes are ordinary.
pub(crate) async fn protected(address: &str, kind: Kind) {
    let daemon = daemon(address, kind).await;
    let score = sh(address, &format!("cat /proc/{daemon}/oom_score_adj")).await;
    assert_eq!(score, "-1000");
    // Enough for the processes of `orphans`, and the same under each init.
    let files = format!("awk '/^Max open files/ {{ print $4 }}' /proc/{daemon}/limits");
    assert_eq!(sh(address, &files).await, "524288");
    assert_eq!(sh(address, "ulimit -Hn; ulimit -Sn").await, "524288\n1024");
    assert_eq!(sh(address, "cat /proc/self/oom_score_adj").await, "100");
    assert_eq!(sh(address, "nice").await, "0");
    if kind == Kind::Systemd {
        let properties = "-p NRestarts -p WatchdogUSec -p Type -p OOMPolicy -p Delegate";
        let shown = sh(address, &format!("systemctl show {properties} envd")).await;
        for line in ["Type=notify", "NRestarts=0", "OOMPolicy=continue", "Delegate=yes"] {
            assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
        }
        assert!(!shown.contains("WatchdogUSec=0"), "{shown}");
    }
}

/// A daemon that dies is started again.
pub(crate) async fn restarted(address: &str, kind: Kind) {
    let before = daemon(address, kind).await;
    fire(&root(address, Wire::Grpc), "sh", &["-c", &format!("kill -9 {before}")]).await;
    in_time("it answers again", async || health(address).await.ok()).await;
    assert_ne!(daemon(address, kind).await, before);
}

/// PID 1 is systemd, which has come up, with the daemon beside its own services.
pub(crate) async fn handed_over(address: &str) {
    assert_eq!(sh(address, "cat /proc/1/comm").await, "systemd");
    // It fails for what is not "running"; the units say why.
    let state = sh(address, "systemctl is-system-running --wait || true").await;
    let failed = sh(address, "systemctl --failed --no-legend --plain").await;
    assert_eq!((state.as_str(), failed.as_str()), ("running", ""));
    assert_eq!(sh(address, "systemctl is-active envd || true").await, "inactive");
    let daemon = daemon(address, Kind::Handover).await;
    assert_eq!(sh(address, &format!("cat /proc/{daemon}/cgroup")).await, "0::/envd");
}

pub(crate) async fn cgroups(address: &str) {
    let controllers = sh(address, "cat /sys/fs/cgroup/cgroup.controllers").await;
    for controller in ["cpu", "memory", "pids"] {
        assert!(controllers.split(' ').any(|one| one == controller), "{controllers}");
    }
    let enabled = sh(address, "cat /sys/fs/cgroup/cgroup.subtree_control").await;
    assert!(enabled.contains("memory") && enabled.contains("pids"), "{enabled}");
}

/// A FIFO through which shells wait: each takes one line of it, also one that comes late, because
/// the keeper holds it open.
struct Gate {
    client: Client,
    path: String,
    keeper: (u32, Messages<StartResponse>),
}

impl Gate {
    async fn new(address: &str, name: &str) -> Self {
        let client = root(address, Wire::Grpc);
        let path = format!("{PLACE}-{name}");
        let line = format!("mkfifo {path} && exec 3<>{path} && echo open && cat >&3");
        let request = StartRequest { stdin: Some(true), ..start("sh", &["-c", &line]) };
        let mut keeper = events(&client, &request).await;
        match next(&mut keeper.1).await {
            Event::Data(_) => Self { client, path, keeper },
            other => panic!("the FIFO: {other:?}"),
        }
    }

    /// Lets as many through.
    async fn open_for(&self, count: usize) {
        let input = Some(ProcessInput { input: Some(Input::Stdin(vec![b'\n'; count].into())) });
        let request = SendInputRequest { process: of(self.keeper.0), input, offset: None };
        let _: SendInputResponse =
            self.client.unary("/process.Process/SendInput", &request).await.unwrap();
    }

    /// When nobody waits any more.
    async fn remove(self) {
        let request = CloseStdinRequest { process: of(self.keeper.0) };
        let _: CloseStdinResponse =
            self.client.unary("/process.Process/CloseStdin", &request).await.unwrap();
        assert_eq!(outcome(self.keeper.1).await.2, 0);
        let request = RemoveRequest { path: self.path };
        let _: RemoveResponse =
            self.client.unary("/filesystem.Filesystem/Remove", &request).await.unwrap();
    }
}

/// Of processes: so many of our own, and so many that each have a hundred orphans.
pub(crate) struct Crowd {
    pub(crate) managed: i32,
    pub(crate) parents: usize,
}

/// Ten thousand orphans while a thousand processes of our own live, or as many as there is room for:
/// nobody's status is lost or taken for another's, and no zombie stays.
pub(crate) async fn orphans(address: &str, Crowd { managed, parents }: Crowd) {
    const ORPHANS_EACH: usize = 100;
    let client = root(address, Wire::Grpc);
    // One connection carries 256 calls at the same time. Each of them is answered before the next
    // is opened: `Guest::tcp` says why.
    let clients: Vec<_> = (0..5).map(|_| root(address, Wire::Grpc)).collect();
    for client in &clients {
        let _: ListResponse =
            client.unary("/process.Process/List", &ListRequest::default()).await.unwrap();
    }
    let exits = Gate::new(address, "exits").await;
    let lost = Gate::new(address, "lost").await;
    // Each waits, which costs nothing, and ends with its own code.
    let managed: Vec<_> = stream::iter(0..managed)
        .map(|number| {
            let (clients, gate) = (&clients, &exits.path);
            async move {
                let client = &clients[usize::try_from(number).unwrap() % clients.len()];
                let code = number % 256;
                let line = format!("read -r line < {gate}; exit {code}");
                (code, events(client, &start("sh", &["-c", &line])).await.1)
            }
        })
        .buffer_unordered(16)
        .collect()
        .await;
    let list: ListResponse =
        client.unary("/process.Process/List", &ListRequest::default()).await.unwrap();
    let keepers = 2;
    assert_eq!(list.processes.len(), managed.len() + keepers, "all of them live at the same time");

    // Each parent leaves its children behind, and they end when it is gone already.
    let line = format!(
        "i=0; while [ $i -lt {ORPHANS_EACH} ]; do read -r line < {} > /dev/null 2>&1 & i=$((i+1)); done",
        lost.path
    );
    let codes: Vec<_> = stream::iter(0..parents)
        .map(|_| async {
            let code = run(&client, "sh", &["-c", &line]).await.code;
            lost.open_for(ORPHANS_EACH).await;
            code
        })
        .buffer_unordered(4)
        .collect()
        .await;
    assert_eq!(codes, vec![0; parents]);

    exits.open_for(managed.len()).await;
    for (code, events) in managed {
        assert_eq!(outcome(events).await.2, code);
    }
    exits.remove().await;
    // The last ones may be on their way: to their end, and to PID 1's turn.
    let left =
        || async { sh(address, "ps -e -o stat=,ppid=,comm= | grep -E '^Z| 1 sh$' || true").await };
    in_time("every orphan ends and is reaped", async || left().await.is_empty().then_some(()))
        .await;
    lost.remove().await;
}

pub(crate) async fn units(address: &str) {
    assert_eq!(sh(address, "systemctl --failed --no-legend --plain").await, "");
}

pub(crate) async fn one_program(address: &str) {
    for wire in WIRES {
        let client = Client::at(address, wire);
        let outcome = run(&client, "/bin/busybox", &["echo", "all there is"]).await;
        assert_eq!((outcome.stdout.as_str(), outcome.code), ("all there is\n", 0), "{wire:?}");
    }
}

pub(crate) async fn nothing_else(address: &str, a_file: &str) {
    let client = Client::at(address, Wire::Grpc);
    for (command, code, text) in [
        ("bash", 127, "No such file or directory"),
        ("/bin/nope", 127, "No such file or directory"),
        ("/bin", 126, "Permission denied"),
        (a_file, 126, "Permission denied"),
    ] {
        let outcome = run(&client, command, &[]).await;
        assert_eq!(outcome.code, code, "{command}: {outcome:?}");
        assert!(outcome.stderr.contains(text), "{command}: {outcome:?}");
    }
}
