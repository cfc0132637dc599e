//! Who gets in: the access token in every protocol, signed URLs, trusted peers, and what a hostile
//! program inside the sandbox can find out.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    io::Write,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use common::{
    Daemon, able, is_root,
    rpc::{Client, WIRES, Wire},
    soon,
};
use envd::proto::process::{
    ListRequest, ListResponse, ProcessConfig, StartRequest, StartResponse, process_event::Event,
    process_event::data_event::Output,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const TOKEN: &str = "a-token-of-these-tests";
const LIST: &str = "/process.Process/List";
const START: &str = "/process.Process/Start";
const UNAUTHORISED: &str = "{\"code\":401,\"message\":\"unauthorized access, please provide a valid access token or method signing if supported\"}\n";
const NOT_INITIALISED: &str = "{\"code\":401,\"message\":\"envd not initialized\"}\n";

/// A daemon that has a token from the start.
fn locked(args: &[&str]) -> Daemon {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{TOKEN}").unwrap();
    let flag = format!("--access-token-file={}", file.path().display());
    let mut all = vec![flag.as_str()];
    all.extend(args);
    Daemon::start(&all)
}

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

async fn call(
    daemon: &Daemon,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> (StatusCode, String) {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let mut request = http().request(method, daemon.url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = soon(path, request.send()).await.unwrap();
    let status = response.status();
    (status, soon(path, response.text()).await.unwrap())
}

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

#[tokio::test]
async fn the_token_opens_every_protocol_and_nothing_else_does() {
    let daemon = locked(&[]);
    for wire in WIRES {
        let client = Client::new(&daemon, wire).with("x-access-token", TOKEN);
        let list: ListResponse = client.unary(LIST, &ListRequest::default()).await.unwrap();
        assert!(list.processes.is_empty(), "{wire:?}");
        let mut events =
            client.stream::<_, StartResponse>(START, &start("true", &[])).await.unwrap();
        while events.next().await.unwrap().is_some() {}
    }
    for wrong in [
        None,
        Some(""),
        Some("wrong"),
        Some("a-token-of-these-test"),
        Some("A-token-of-these-tests"),
    ] {
        // Native gRPC has a status of its own.
        let mut client = Client::new(&daemon, Wire::Grpc);
        if let Some(wrong) = wrong {
            client = client.with("x-access-token", wrong);
        }
        let failure =
            client.unary::<_, ListResponse>(LIST, &ListRequest::default()).await.unwrap_err();
        assert_eq!(failure.code, "unauthenticated", "{wrong:?}");
        assert!(failure.message.starts_with("unauthorized access"), "{failure:?}");
        let refused = client.stream::<_, StartResponse>(START, &start("true", &[])).await;
        assert_eq!(refused.err().unwrap().code, "unauthenticated", "{wrong:?}");

        for (path, kind) in [
            (LIST, "application/json"),
            (LIST, "application/proto"),
            (START, "application/connect+json"),
            (START, "application/connect+proto"),
            (START, "application/grpc-web+proto"),
            (START, "application/grpc-web-text"),
        ] {
            let mut headers = vec![("content-type", kind)];
            headers.extend(wrong.map(|wrong| ("x-access-token", wrong)));
            let (status, body) = call(&daemon, "POST", path, &headers).await;
            assert_eq!((status.as_u16(), body.as_str()), (401, UNAUTHORISED), "{kind} {wrong:?}");
        }
    }
    let client = Client::new(&daemon, Wire::Grpc).with("x-access-token", TOKEN);
    let list: ListResponse = client.unary(LIST, &ListRequest::default()).await.unwrap();
    assert!(list.processes.is_empty(), "a refused start started something");
}

#[tokio::test]
async fn rest_without_the_token_is_upstreams_four_and_probes() {
    let daemon = locked(&[]);
    for (method, path, expected) in [
        ("GET", "/health", 204),
        ("GET", "/livez", 204),
        ("HEAD", "/health", 401),
        ("POST", "/health", 401),
        ("GET", "/health/", 401),
        ("GET", "//health", 401),
        ("GET", "/metrics", 401),
        ("GET", "/metrics/prometheus", 401),
        ("GET", "/envs", 401),
        ("GET", "/init", 401),
        ("GET", "/no-such-route", 401),
        ("PUT", "/files", 401),
        ("DELETE", "/files", 401),
        ("POST", "/files/compose", 401),
        ("GET", "/process.Process/List", 401),
        ("OPTIONS", "/envs", 401),
    ] {
        let (status, body) = call(&daemon, method, path, &[]).await;
        assert_eq!(status.as_u16(), expected, "{method} {path}: {body}");
        if expected == 401 && method != "HEAD" {
            assert_eq!(body, UNAUTHORISED, "{method} {path}");
        }
    }
    // Files look at signatures, and /init at its own token.
    let (status, body) = call(&daemon, "GET", "/files?path=/etc/hostname", &[]).await;
    assert_eq!(status, 401);
    assert_eq!(body, "{\"code\":401,\"message\":\"missing signature query parameter\"}\n");
    let (status, body) = call(&daemon, "POST", "/init", &[]).await;
    assert_eq!((status.as_u16(), body.as_str()), (401, "access token reset not authorized"));
    for path in ["/envs", "/metrics", "/metrics/prometheus"] {
        let (status, _) = call(&daemon, "GET", path, &[("X-Access-Token", TOKEN)]).await;
        assert_eq!(status, 200, "{path}");
    }
    // The gate is before the look-up of a user, and CORS before the gate.
    let nobody = common::basic("no-such-user");
    let (_, body) = call(&daemon, "GET", "/envs", &[("authorization", &nobody)]).await;
    assert_eq!(body, UNAUTHORISED);
    let preflight = [("origin", "http://x"), ("access-control-request-method", "POST")];
    assert_eq!(call(&daemon, "OPTIONS", "/envs", &preflight).await.0, 204);
    let refused = http().get(daemon.url("/envs")).header("origin", "http://x").send();
    let refused = soon("a refusal", refused).await.unwrap();
    assert_eq!(refused.headers()["access-control-allow-origin"], "*");
    assert_eq!(refused.headers()["content-type"], "application/json; charset=utf-8");
    assert_eq!(refused.headers()["x-content-type-options"], "nosniff");
}

#[tokio::test]
async fn closed_until_initialised() {
    let after_handover = Daemon::start(&["-resume-handover", "-isnotfc"]);
    let strict = Daemon::start(&["--require-token", "-isnotfc"]);
    for daemon in [&after_handover, &strict] {
        for (method, path, expected) in [
            ("GET", "/health", 204),
            ("GET", "/livez", 204),
            ("GET", "/envs", 401),
            ("GET", "/files?path=/etc/hostname", 401),
            ("POST", "/files?path=/tmp/x", 401),
            ("GET", "/init", 401),
        ] {
            let (status, body) = call(daemon, method, path, &[("x-access-token", "x")]).await;
            assert_eq!(status.as_u16(), expected, "{method} {path}");
            if expected == 401 {
                assert_eq!(body, NOT_INITIALISED, "{method} {path}");
            }
        }
        let client = Client::new(daemon, Wire::Grpc);
        let refused = client.unary::<_, ListResponse>(LIST, &ListRequest::default()).await;
        assert_eq!(refused.unwrap_err().message, "envd not initialized");
        assert_eq!(call(daemon, "POST", "/init", &[]).await.0, 204);
    }
    // Upstream's is open then, as it has no token; the strict one waits for one.
    assert_eq!(call(&after_handover, "GET", "/envs", &[]).await.0, 200);
    assert_eq!(call(&strict, "GET", "/envs", &[]).await.1, NOT_INITIALISED);
    let init = http().post(strict.url("/init")).json(&json!({ "accessToken": "t" })).send();
    assert_eq!(soon("init", init).await.unwrap().status(), 204);
    assert_eq!(call(&strict, "GET", "/envs", &[]).await.1, UNAUTHORISED);
    assert_eq!(call(&strict, "GET", "/envs", &[("x-access-token", "t")]).await.0, 200);
}

fn sign(path: &str, operation: &str, user: &str, token: &str, expiration: Option<i64>) -> String {
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expiration) = expiration {
        text.push_str(&format!(":{expiration}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

#[tokio::test]
async fn signed_urls() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let daemon = locked(&[]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let now = i64::try_from(now).unwrap();
    let (soon_over, over) = (now + 600, now - 1);
    let file = dir.path().join("a b+c.txt");
    std::fs::write(&file, "content").unwrap();
    let path = file.to_str().unwrap();
    let me = common::me().name;
    let signature = |op, user, exp| sign(path, op, user, TOKEN, exp);
    let good = signature("read", "", None);
    let with_user = signature("read", &me, None);
    let with_end = signature("read", "", Some(soon_over));
    let ended = signature("read", "", Some(over));
    let for_writing = signature("write", "", None);
    let of_other = sign(path, "read", "", "other-token", None);
    for (user, signature, expiration, header, expected) in [
        (None, Some(&good), None, None, ""),
        (Some(me.as_str()), Some(&with_user), None, None, ""),
        (None, Some(&with_end), Some(soon_over.to_string()), None, ""),
        (None, None, None, Some(TOKEN), ""),
        // The header decides alone, if there is one.
        (None, Some(&of_other), None, Some(TOKEN), ""),
        (
            None,
            Some(&good),
            None,
            Some("wrong"),
            "access token present in header but does not match",
        ),
        (None, Some(&good), None, Some(""), ""),
        (None, None, None, None, "missing signature query parameter"),
        (None, Some(&of_other), None, None, "invalid signature"),
        (None, Some(&for_writing), None, None, "invalid signature"),
        (Some(me.as_str()), Some(&good), None, None, "invalid signature"),
        (None, Some(&with_end), None, None, "invalid signature"),
        (None, Some(&good), Some(soon_over.to_string()), None, "invalid signature"),
        (None, Some(&ended), Some(over.to_string()), None, "signature is already expired"),
        // A wrong one is told before an old one.
        (None, Some(&good), Some(over.to_string()), None, "invalid signature"),
        (None, Some(&good), Some("soon".to_owned()), None, "Invalid format"),
    ] {
        let mut query = vec![("path", path.to_owned())];
        query.extend(user.map(|user| ("username", user.to_owned())));
        query.extend(signature.map(|signature| ("signature", signature.clone())));
        query.extend(expiration.clone().map(|end| ("signature_expiration", end)));
        let mut url = reqwest::Url::parse(&daemon.url("/files")).unwrap();
        url.query_pairs_mut().extend_pairs(&query);
        let mut request = http().get(url);
        if let Some(token) = header {
            request = request.header("x-access-token", token);
        }
        let response = soon("a download", request.send()).await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        let case = format!("{user:?} {signature:?} {expiration:?} {header:?}: {text}");
        if expected.is_empty() {
            assert_eq!((status.as_u16(), text.as_str()), (200, "content"), "{case}");
        } else {
            assert_eq!(status, if expected == "Invalid format" { 400 } else { 401 }, "{case}");
            let body: Value = serde_json::from_str(&text).unwrap();
            assert!(body["message"].as_str().unwrap().starts_with(expected), "{case}");
        }
    }

    // Uploads: signed for writing, also without a path, as the SDK's uploadUrl() does.
    let upload = |path: Option<&str>, signature: &str, name: &str| {
        let mut url = reqwest::Url::parse(&daemon.url("/files")).unwrap();
        url.query_pairs_mut().extend_pairs(path.map(|path| ("path", path)));
        url.query_pairs_mut().append_pair("signature", signature);
        let part = reqwest::multipart::Part::text("new").file_name(name.to_owned());
        let form = reqwest::multipart::Form::new().part("file", part);
        http().post(url).multipart(form).send()
    };
    let target = dir.path().join("up").to_str().unwrap().to_owned();
    let signed = sign(&target, "write", "", TOKEN, None);
    let answer = soon("an upload", upload(Some(&target), &signed, "x")).await.unwrap();
    assert_eq!(answer.status(), 200);
    let signed = sign("", "write", "", TOKEN, None);
    let answer = soon("an upload", upload(None, &signed, &target)).await.unwrap();
    assert_eq!(answer.status(), 200);
    std::fs::remove_file(&target).unwrap();
    let signed = sign(&target, "read", "", TOKEN, None);
    let answer = soon("an upload", upload(Some(&target), &signed, "x")).await.unwrap();
    assert_eq!(answer.status(), 401);
    assert!(!std::path::Path::new(&target).exists());
}

#[tokio::test]
async fn signatures_are_over_the_text_as_it_is_decoded_and_not_as_it_is_resolved() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = locked(&[]);
    let base = dir.path().to_str().unwrap();
    for name in ["a:b", "ü/é", "a%2Fb", "a&b=c#d?e", " x ", "a+b", "日本語", "\u{1}", "x:read:root"]
    {
        let file = dir.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, name).unwrap();
        let path = format!("{base}//{name}");
        let mut url = reqwest::Url::parse(&daemon.url("/files")).unwrap();
        let signature = sign(&path, "read", "", TOKEN, None);
        url.query_pairs_mut().append_pair("path", &path).append_pair("signature", &signature);
        let answer = soon("a download", http().get(url.clone()).send()).await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert_eq!((status.as_u16(), text.as_str()), (200, name), "{name:?}");
        // Of the path that it leads to, or of the text in the URL, it is another.
        let resolved = sign(file.to_str().unwrap(), "read", "", TOKEN, None);
        let escaped: String =
            url.query_pairs_mut().clear().append_pair("", &path).finish().query().unwrap()[1..]
                .to_owned();
        for wrong in [resolved, sign(&escaped, "read", "", TOKEN, None)] {
            url.query_pairs_mut()
                .clear()
                .append_pair("path", &path)
                .append_pair("signature", &wrong);
            let answer = soon("a download", http().get(url.clone()).send()).await.unwrap();
            assert_eq!(answer.status(), 401, "{name:?}");
        }
    }
    // A number that fits no clock, and a parameter twice.
    for query in [
        "signature_expiration=99999999999999999999&signature=x",
        "signature_expiration=1.5&signature=x",
        "signature=x&signature=y",
        "path=/a&path=/b&signature=x",
    ] {
        let (status, text) = call(&daemon, "GET", &format!("/files?{query}"), &[]).await;
        assert_eq!(status, 400, "{query}: {text}");
        assert!(!text.contains(TOKEN), "{text}");
    }
    let end = i64::MIN;
    let signature = sign("", "read", "", TOKEN, Some(end));
    let mut url = reqwest::Url::parse(&daemon.url("/files")).unwrap();
    url.query_pairs_mut()
        .append_pair("signature_expiration", &end.to_string())
        .append_pair("signature", &signature);
    let answer = soon("a download", http().get(url).send()).await.unwrap();
    assert!(answer.text().await.unwrap().contains("signature is already expired"));
}

#[tokio::test]
async fn a_peer_is_trusted_by_its_uid_and_by_configuration_only() {
    let dir = tempfile::tempdir().unwrap();
    let own = nix::unistd::geteuid().as_raw();
    for (uid, trusted) in [(None, false), (Some(own + 1), false), (Some(own), true)] {
        let socket = dir.path().join(format!("s{uid:?}"));
        let listen = format!("--listen=unix://{}", socket.display());
        let flag = uid.map(|uid| format!("--trust-uid={uid}"));
        let mut args = vec![listen.as_str()];
        args.extend(flag.as_deref());
        let daemon = locked(&args);
        let list =
            Client::unix(&socket).unary::<_, ListResponse>(LIST, &ListRequest::default()).await;
        assert_eq!(list.is_ok(), trusted, "{uid:?}: {list:?}");
        // Whoever comes over TCP is nobody.
        let (status, _) = call(&daemon, "GET", "/envs", &[]).await;
        assert_eq!(status, 401, "{uid:?}");
    }
}

/// What a program prints, as another user.
async fn output_of(daemon: &Daemon, user: &str, script: &str) -> String {
    let client = Client::new(daemon, Wire::Grpc)
        .with("x-access-token", TOKEN)
        .with("authorization", &common::basic(user));
    let mut events =
        client.stream::<_, StartResponse>(START, &start("/bin/sh", &["-c", script])).await.unwrap();
    let mut text = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        if let Some(Event::Data(data)) = event.event.and_then(|event| event.event)
            && let Some(Output::Stdout(bytes) | Output::Stderr(bytes)) = data.output
        {
            text.extend_from_slice(&bytes);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn a_hostile_program_finds_no_token_and_cannot_stop_the_daemon() {
    let nobody = matches!(nix::unistd::User::from_name("nobody"), Ok(Some(_)));
    if !able("root and a user nobody", is_root() && nobody) {
        return;
    }
    let daemon = locked(&[]);
    let pid = daemon.pid();
    // Before and after the daemon has started something as this user.
    for _ in 0..2 {
        for file in [
            "environ",
            "mem",
            "maps",
            "auxv",
            "io",
            "syscall",
            "stack",
            "pagemap",
            "fd",
            "map_files",
        ] {
            let script = format!(
                "exec 2>&1; ls /proc/{pid}/{file}/ 2>/dev/null && echo OPEN; head -c 1 /proc/{pid}/{file} >/dev/null && echo OPEN"
            );
            let said = output_of(&daemon, "nobody", &script).await;
            assert!(!said.contains("OPEN"), "/proc/PID/{file}: {said}");
        }
        for signal in ["STOP", "TERM", "KILL", "QUIT", "ABRT"] {
            let said =
                output_of(&daemon, "nobody", &format!("kill -{signal} {pid} 2>&1; echo $?")).await;
            assert!(said.ends_with("1\n"), "SIG{signal}: {said}");
        }
        let everything =
            "cat /proc/*/environ /proc/*/cmdline /proc/self/mountinfo 2>/dev/null; env";
        let said = output_of(&daemon, "nobody", everything).await;
        assert!(!said.contains(TOKEN), "the token is there to read");
        // Children of the daemon get none of its descriptors.
        let said = output_of(&daemon, "nobody", "ls /proc/self/fd").await;
        assert!(said.split_whitespace().all(|fd| fd.parse::<u32>().unwrap() <= 3), "{said}");
    }
    assert_eq!(call(&daemon, "GET", "/health", &[]).await.0, 204);
}

/// Aborts a process that may write a core of any size; whether it did.
fn dumps_core(mut child: std::process::Child) -> bool {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGABRT).unwrap();
    let status = common::eventually("it ends", || child.try_wait().unwrap());
    std::os::unix::process::ExitStatusExt::core_dumped(&status)
}

#[test]
fn a_root_daemon_leaves_no_core_with_the_token_in_it() {
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };
    if !able("root", is_root()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The limit is inherited through the shell.
    let with_cores = |script: String| {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(format!("ulimit -c unlimited; {script}"));
        command.current_dir(dir.path()).stdin(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let control = with_cores("exec sleep 60".to_owned());
    common::eventually("it is sleep", || {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", control.id())).ok()?;
        (name == "sleep\n").then_some(())
    });
    if !able("a kernel that writes cores", dumps_core(control)) {
        return;
    }
    let envd = env!("CARGO_BIN_EXE_envd");
    let mut daemon = with_cores(format!("exec {envd} --listen tcp://127.0.0.1:0 --mmds=none"));
    let lines = BufReader::new(daemon.stderr.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line.contains("\"ready\""));
    assert!(ready, "the daemon ended early");
    assert!(!dumps_core(daemon), "it wrote a core");
}

#[tokio::test]
async fn the_token_is_neither_logged_nor_listed() {
    let daemon = locked(&["-verbose"]);
    let client = Client::new(&daemon, Wire::Connect { json: true }).with("x-access-token", TOKEN);
    let request = start("sleep", &["60"]);
    let mut events = client.stream::<_, StartResponse>(START, &request).await.unwrap();
    events.next().await.unwrap();
    let (_, listed) = call(
        &daemon,
        "POST",
        LIST,
        &[("content-type", "application/json"), ("x-access-token", TOKEN)],
    )
    .await;
    let (_, envs) = call(&daemon, "GET", "/envs", &[("x-access-token", TOKEN)]).await;
    call(&daemon, "GET", "/envs", &[("x-access-token", "wrong-token")]).await;
    for (current, next) in [(TOKEN, "another-secret"), ("wrong-token", "x"), (TOKEN, TOKEN)] {
        let body = json!({ "accessToken": next, "envVars": { "SECRET": "secret-variable" } });
        let init = http().post(daemon.url("/init")).header("x-access-token", current).json(&body);
        soon("init", init.send()).await.unwrap();
    }
    let log = daemon.wait_for_log("initialised");
    let log = serde_json::to_string(&log).unwrap();
    for secret in [TOKEN, "another-secret", "wrong-token", "secret-variable"] {
        for text in [&listed, &envs, &log] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}

#[tokio::test]
async fn no_web_page_reaches_a_loopback_daemon_without_a_token() {
    const JSON: (&str, &str) = ("content-type", "application/json");
    let foreign: &[&[(&str, &str)]] = &[
        // A page from elsewhere, a sandboxed frame, a file; a name that resolves to 127.0.0.1.
        &[("origin", "https://evil.example")],
        &[("origin", "http://localhost.evil.example")],
        &[("origin", "null")],
        &[("origin", "file://")],
        &[("host", "evil.example:49983")],
        &[("host", "127.0.0.1.nip.io")],
        &[("host", "evil.example"), ("origin", "http://evil.example")],
        // An image, a script or a link: without Origin.
        &[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")],
    ];
    let local: &[&[(&str, &str)]] = &[
        &[],
        &[("host", "localhost:49983")],
        &[("host", "LOCALHOST")],
        &[("host", "[::1]:49983")],
        &[("origin", "http://localhost:3000"), ("sec-fetch-site", "same-site")],
        &[("origin", "http://127.0.0.1:5173"), ("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")],
    ];
    let with = |headers: &[(&'static str, &'static str)]| [&[JSON][..], headers].concat();
    let preflight = ("access-control-request-method", "POST");
    let daemon = Daemon::start(&[]);
    for headers in foreign {
        for (method, path) in [("GET", "/health"), ("POST", LIST), ("POST", "/init")] {
            let (status, body) = call(&daemon, method, path, &with(headers)).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{path} {headers:?}: {body}");
            assert!(body.contains("access token"), "{body}");
        }
        let asked = [&[preflight][..], headers].concat();
        assert_eq!(call(&daemon, "OPTIONS", LIST, &asked).await.0, StatusCode::FORBIDDEN);
        // The native protocol too; a browser cannot even speak it.
        let mut grpc = Client::new(&daemon, Wire::Grpc);
        for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
            grpc = grpc.with(name, value);
        }
        if headers.iter().any(|(name, _)| *name != "host") {
            let refused = grpc.unary::<_, ListResponse>(LIST, &ListRequest::default()).await;
            assert_eq!(refused.unwrap_err().code, "permission_denied", "{headers:?}");
        }
    }
    for headers in local {
        let (status, body) = call(&daemon, "GET", "/envs", headers).await;
        assert_eq!(status, StatusCode::OK, "{headers:?}: {body}");
    }
    // With --require-token a page must not bring its own token either.
    let closed = Daemon::start(&["--require-token"]);
    let (status, _) = call(&closed, "POST", "/init", &with(foreign[0])).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    // With a token it is that which counts, as with upstream, and on every address of the machine.
    let locked = locked(&[]);
    let open = Daemon::start_with(&["--listen", "tcp://0.0.0.0:0"]);
    let port = open.tcp().rsplit_once(':').unwrap().1.to_owned();
    for headers in foreign {
        let known = [&[JSON, ("x-access-token", TOKEN)][..], headers].concat();
        assert_eq!(call(&locked, "GET", "/envs", &known).await.0, StatusCode::OK, "{headers:?}");
        let mut request = http().post(format!("http://127.0.0.1:{port}{LIST}")).body("{}");
        for (name, value) in with(headers) {
            request = request.header(name, value);
        }
        assert_eq!(soon("list", request.send()).await.unwrap().status(), 200, "{headers:?}");
    }
    let warned = |daemon: &Daemon| {
        let lines = daemon.wait_for_log("ready");
        let open = "there is no access token yet";
        lines.iter().filter(|line| line.to_string().contains(open)).count()
    };
    assert_eq!([&daemon, &closed, &locked, &open].map(warned), [0, 0, 0, 1]);
}
