//! Processes, as a client sees them: what they are started with, what goes in, what comes out, and
//! how they end.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    time::{Duration, Instant},
};

use common::{
    Daemon, able_as_root, able_at_home, basic, eventually,
    house::House,
    in_time, me, noise,
    process::*,
    raw::Raw,
    rpc::{Client, Failure, Wire, envelope},
};
use envd::proto::process::{
    ProcessSelector, SendSignalRequest, SendSignalResponse, Signal, StartRequest, StartResponse,
    StreamInputRequest, StreamInputResponse, UpdateRequest, UpdateResponse,
    process_event::{Event, data_event::Output},
    stream_input_request,
};
use tempfile::TempDir;

/// More than a pipe and its reader hold.
const MORE_THAN_A_PIPE: usize = 1 << 20;

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

/// The daemon still does its work.
async fn is_well(daemon: &Daemon) {
    assert_eq!(stdout(&client(daemon), &start("echo", &["well"])).await, "well\n");
}

fn write_script(path: &Path, content: &str, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A directory that anybody may enter.
fn open_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn kill_stranger(pid: &str) {
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

// What a process is started with.

fn variables(text: &str) -> BTreeMap<&str, &str> {
    text.lines().map(|line| line.split_once('=').unwrap()).collect()
}

#[tokio::test]
async fn the_environment_is_these_variables_and_no_other() {
    for (args, e2b) in [(&[][..], "true"), (&["-isnotfc"], "false")] {
        let daemon = Daemon::start(args);
        let user = me();
        let path = std::env::var("PATH").unwrap();
        let request = start("env", &[]).cwd(Some("/usr/./")).env("MINE", "a = b");
        let text = stdout(&client(&daemon), &request).await;
        let expected = BTreeMap::from([
            ("PATH", path.as_str()),
            ("HOME", user.dir.to_str().unwrap()),
            ("USER", &user.name),
            ("LOGNAME", &user.name),
            ("E2B_SANDBOX", e2b),
            ("PWD", "/usr"),
            ("MINE", "a = b"),
        ]);
        assert_eq!(variables(&text), expected);
        assert_eq!(text.lines().count(), expected.len(), "each of them once");
    }
}

#[tokio::test]
async fn the_requests_environment_wins() {
    let daemon = Daemon::start(&[]);
    let dir = open_dir();
    write_script(&dir.path().join("mine"), "#!/bin/sh\necho $HOME $USER $E2B_SANDBOX\n", 0o755);
    let request = start("mine", &[])
        .env("PATH", dir.path().to_str().unwrap())
        .env("HOME", "/elsewhere")
        .env("USER", "somebody")
        .env("E2B_SANDBOX", "mine");
    // Found on the PATH of the request, too.
    assert_eq!(stdout(&client(&daemon), &request).await, "/elsewhere somebody mine\n");
}

#[tokio::test]
async fn the_working_directory() {
    if !able_at_home() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let home = fs::canonicalize(me().dir).unwrap();
    let below = tempfile::tempdir_in(&home).unwrap();
    let name = below.path().file_name().unwrap().to_str().unwrap();
    let (home, below) = (home.to_str().unwrap(), below.path().to_str().unwrap());
    for (cwd, expected) in [
        (None, home),
        (Some(""), home),
        (Some("~"), home),
        (Some("/usr/bin"), "/usr/bin"),
        (Some(name), below),
        (Some(&format!("~/{name}")), below),
        (Some(&format!("./x/../{name}")), below),
    ] {
        let request = start("/bin/pwd", &["-P"]).cwd(cwd);
        assert_eq!(stdout(&client, &request).await, format!("{expected}\n"), "{cwd:?}");
        let (said, end) = run(&client, &request.pty(80, 24)).await;
        assert_eq!((said.pty(), end.exit_code), (format!("{expected}\r\n").as_str(), 0), "{cwd:?}");
    }
}

#[tokio::test]
async fn a_wrong_working_directory_is_told_for_pipes_and_terminals_alike() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let user = me();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let other = format!(
        "failed to expand path '' for user '{}': cannot expand user-specific home dir",
        user.name
    );
    for request in [start("true", &[]), start("true", &[]).pty(80, 24)] {
        let error = refused(&client, &request.clone().cwd(Some(missing))).await;
        let text = format!("cwd '{missing}' does not exist");
        assert_eq!(error, failure("invalid_argument", text));
        let error = refused(&client, &request.clone().cwd(Some("no-such-dir-here"))).await;
        let text = format!("cwd '{}/no-such-dir-here' does not exist", user.dir.display());
        assert_eq!(error, failure("invalid_argument", text));
        let error = refused(&client, &request.clone().cwd(Some("~other/x"))).await;
        assert_eq!(error, failure("invalid_argument", &other));
        let error = refused(&client, &request.cwd(file.to_str())).await;
        assert_eq!(error.code, "invalid_argument");
        assert!(error.message.contains(file.to_str().unwrap()), "{error:?}");
        assert!(error.message.ends_with(": not a directory"), "{error:?}");
    }
    assert_eq!(list(&client).await, [], "nothing was started");
}

#[tokio::test]
async fn a_default_working_directory() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fs::canonicalize(tmp.path()).unwrap();
    let daemon = Daemon::start(&["--default-workdir", dir.to_str().unwrap()]);
    let client = client(&daemon);
    for cwd in [None, Some("")] {
        let text = stdout(&client, &start("pwd", &[]).cwd(cwd)).await;
        assert_eq!(text, format!("{}\n", dir.display()));
    }
    assert_eq!(stdout(&client, &start("pwd", &[]).cwd(Some("/usr"))).await, "/usr\n");
}

#[tokio::test]
async fn the_user_of_basic_authentication() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("nobody");
    let (uid, gid) = (nobody.uid.to_string(), nobody.gid.to_string());
    let client = client(&daemon).with("authorization", &basic("nobody"));
    let script = "id -u; id -g; id -G; echo $USER $LOGNAME $HOME";
    for request in [sh(script), sh(script).pty(80, 24)] {
        let (said, end) = run(&client, &request).await;
        assert_eq!(end.exit_code, 0, "{said:?}");
        let text = [said.stdout(), said.pty()].concat().replace('\r', "");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], [&uid, &gid]);
        assert!(!lines[2].split(' ').any(|group| group == "0"), "root's groups stay: {text}");
        assert_eq!(lines[3], format!("nobody nobody {}", nobody.dir.display()));
    }

    // They cannot enter what only root may, and it is not entered before they become nobody.
    let dir = tempfile::tempdir().unwrap();
    fs::DirBuilder::new().mode(0o700).create(dir.path().join("roots")).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let error = refused(&client, &start("pwd", &[]).cwd(dir.path().join("roots").to_str())).await;
    assert_eq!(error.code, "invalid_argument");
    assert!(error.message.ends_with("permission denied"), "{error:?}");
}

#[tokio::test]
async fn a_user_who_does_not_exist() {
    let daemon = Daemon::start(&[]);
    for user in ["nobody-at-all", ""] {
        let client = client(&daemon).with("authorization", &basic(user));
        let error = refused(&client, &start("true", &[])).await;
        assert_eq!(error, failure("unauthenticated", format!("invalid username: '{user}'")));
    }
    // What is no Basic header names nobody.
    for header in ["Bearer abc", "Basic !", "Basic bm9ib2R5"] {
        let client = client(&daemon).with("authorization", header);
        assert_eq!(stdout(&client, &start("id", &["-un"])).await, format!("{}\n", me().name));
    }
}

#[tokio::test]
async fn a_child_has_its_three_descriptors_and_no_other() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(begin(&client, &start("cat", &[])).await);
        others.push(begin(&client, &start("cat", &[]).pty(80, 24)).await);
    }
    // The fourth is the directory that ls itself reads.
    let text = stdout(&client, &start("ls", &["-l", "/proc/self/fd"])).await;
    assert_eq!(text.matches(" -> ").count(), 4, "{text}");
    assert_eq!(text.matches("pipe:").count(), 3, "{text}");
    let (said, _) = run(&client, &start("ls", &["-l", "/proc/self/fd"]).pty(80, 24)).await;
    assert_eq!(said.pty().matches(" -> ").count(), 4, "{said:?}");
    assert_eq!(said.pty().matches("/dev/pts/").count(), 3, "{said:?}");
    for other in others {
        kill(&client, other.pid).await;
    }
}

#[tokio::test]
async fn signals_are_as_a_program_expects_them() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let text =
        stdout(&client, &start("grep", &["-E", "^Sig(Blk|Ign):", "/proc/self/status"])).await;
    assert_eq!(text, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

#[tokio::test]
async fn without_stdin_there_is_dev_null() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let text = stdout(&client, &start("readlink", &["/proc/self/fd/0"]).no_stdin()).await;
    assert_eq!(text, "/dev/null\n");
    assert_eq!(stdout(&client, &start("cat", &[]).no_stdin()).await, "");

    let process = begin(&client, &start("sleep", &["1000"]).no_stdin()).await;
    let error = send(&client, pid(process.pid), to_stdin("x")).await.unwrap_err();
    let text = "error writing to stdin: stdin not enabled or closed";
    assert_eq!(error, failure("internal", text));
    close_stdin(&client, pid(process.pid)).await.unwrap();
    kill(&client, process.pid).await;
    process.end().await;
}

// How it ends.

#[tokio::test]
async fn exit_codes_in_words() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    for code in [0, 1, 7, 126, 255] {
        let (_, end) = run(&client, &sh(&format!("exit {code}"))).await;
        let status = format!("exit status {code}");
        let error = (code != 0).then(|| status.clone());
        assert_eq!(upstreams(&end), (code, true, status, error));
    }
}

#[tokio::test]
async fn deaths_by_signal_in_words() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    for (number, name) in [
        (1, "hangup"),
        (2, "interrupt"),
        (3, "quit"),
        (4, "illegal instruction"),
        (5, "trace/breakpoint trap"),
        (6, "aborted"),
        (7, "bus error"),
        (8, "floating point exception"),
        (9, "killed"),
        (10, "user defined signal 1"),
        (11, "segmentation fault"),
        (12, "user defined signal 2"),
        (13, "broken pipe"),
        (14, "alarm clock"),
        (15, "terminated"),
        (24, "CPU time limit exceeded"),
        (25, "file size limit exceeded"),
        (26, "virtual timer expired"),
        (27, "profiling timer expired"),
        (29, "I/O possible"),
        (31, "bad system call"),
        (34, "signal 34"),
    ] {
        let script = format!("ulimit -c 0; kill -{number} $$; sleep 1000");
        let (_, end) = run(&client, &sh(&script).cwd(Some("/tmp"))).await;
        assert_eq!((end.exit_code, end.exited), (-1, false), "{number}");
        // Where cores go to a program, the limit above means nothing.
        let status = end.status.strip_suffix(" (core dumped)").unwrap_or(&end.status);
        assert_eq!(status, format!("signal: {name}"));
        assert_eq!(end.error, Some(end.status), "{number}");
    }
}

#[tokio::test]
async fn commands_that_cannot_be_executed() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let dir = open_dir();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    write_script(Path::new(&at("not-executable")), "#!/bin/sh\n", 0o644);
    for (cmd, code, text) in [
        ("no-such-command-here".to_owned(), 127, "No such file or directory"),
        (at("missing"), 127, "No such file or directory"),
        ("-no-such-option".to_owned(), 127, "No such file or directory"),
        ("echo hello".to_owned(), 127, "No such file or directory"),
        (at("not-executable"), 126, "Permission denied"),
        (at(""), 126, "Permission denied"),
    ] {
        // A directory on the PATH that may not be entered would be another reason.
        let request = start(&cmd, &["arg"]).env("PATH", "/usr/bin:/bin");
        let (said, end) = run(&client, &request).await;
        assert_eq!(end.exit_code, code, "{cmd}");
        assert_eq!((end.exited, end.status), (true, format!("exit status {code}")), "{cmd}");
        assert!(said.stderr().contains(&cmd) && said.stderr().contains(text), "{said:?}");
        assert_eq!(said.stdout(), "");
        let (said, end) = run(&client, &request.pty(80, 24)).await;
        assert_eq!(end.exit_code, code, "{cmd}");
        assert!(said.pty().contains(&cmd) && said.pty().contains(text), "{said:?}");
    }
}

#[tokio::test]
async fn commands_with_odd_names_are_found() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let dir = open_dir();
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    for name in ["-n", "--help", "two words", "$HOME", "a;b"] {
        write_script(&dir.path().join(name), "#!/bin/sh\necho \"$#: $*\"\n", 0o755);
        let request = start(name, &["-x", "a  b", "$HOME"]).env("PATH", &path);
        assert_eq!(stdout(&client, &request).await, "3: -x a  b $HOME\n", "{name:?}");
    }
    // As a shell does it, and execvp(3).
    write_script(&dir.path().join("plain"), "echo plain $1\n", 0o755);
    assert_eq!(stdout(&client, &start("plain", &["x"]).env("PATH", &path)).await, "plain x\n");
}

#[tokio::test]
async fn a_start_of_nothing_is_the_empty_command() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let (said, end) = run(&client, &StartRequest::default()).await;
    assert_eq!((end.exit_code, end.exited), (127, true));
    assert_eq!(said.stderr(), "envd: '': No such file or directory\n");
}

#[tokio::test]
async fn what_the_daemon_makes_has_its_own_umask_and_commands_have_the_inherited_one() {
    let dir = open_dir();
    let at = |name: &str| dir.path().join(name);
    let envd = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "umask 077; exec \"$@\"", "sh"]);
    command.arg(envd.get_program()).args(envd.get_args());
    let house = House::with(Daemon::spawn(&mut command));
    let client = client(&house.daemon);
    assert_eq!(stdout(&client, &sh("umask")).await, "0077\n");
    let uploaded = house.upload(at("made/file").to_str().unwrap(), &[], "content").await;
    assert_eq!(uploaded.status(), 200);
    house.make_dir(at("dir").to_str().unwrap()).await.unwrap();
    for (name, mode) in [("made", 0o755), ("made/file", 0o644), ("dir", 0o755)] {
        assert_eq!(fs::metadata(at(name)).unwrap().permissions().mode() & 0o7777, mode, "{name}");
    }
}

#[tokio::test]
async fn a_nul_is_an_error_and_no_more() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    for request in [
        start("tr\0ue", &[]),
        start("true", &["a\0b"]),
        start("true", &[]).env("A", "b\0c"),
        start("true", &[]).env("A\0B", "c"),
        start("true", &[]).cwd(Some("/\0")),
    ] {
        for request in [request.clone(), request.pty(80, 24)] {
            let error = refused(&client, &request).await;
            assert_eq!(error.code, "invalid_argument", "{request:?}: {error:?}");
        }
    }
    assert_eq!(list(&client).await, []);
    is_well(&daemon).await;
}

#[tokio::test]
async fn a_background_child_does_not_delay_the_end() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    // It sleeps for longer than this test would wait.
    let (said, end) = run(&client, &sh("sleep 300 & echo hi $!; exit 4")).await;
    assert_eq!(end.exit_code, 4);
    let child = said.stdout().strip_prefix("hi ").unwrap();
    assert_eq!(list(&client).await, []);
    assert!(state(child.trim().parse().unwrap()).is_some_and(|state| state != 'Z'));
    kill_stranger(child);
}

#[tokio::test]
async fn the_last_words_after_a_sigterm_arrive() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let script = "trap 'head -c 10240 /dev/zero | tr \"\\0\" x; echo last >&2; exit 3' TERM; \
                  echo ready; while :; do sleep 0.01; done";
    for _ in 0..10 {
        let mut process = begin(&client, &sh(script)).await;
        process.until_it_says("ready").await;
        signal(&client, pid(process.pid), Signal::Sigterm).await.unwrap();
        let (said, end) = process.end().await;
        assert_eq!(said.stdout.len(), "ready\n".len() + 10_240);
        assert_eq!((said.stderr(), end.exit_code), ("last\n", 3));
    }
}

#[tokio::test]
async fn kill_0_hits_nobody_else() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let other = begin(&client, &start("cat", &[])).await;
    let terminal = begin(&client, &start("cat", &[]).pty(80, 24)).await;
    let (_, end) = run(&client, &sh("kill 0; sleep 1000")).await;
    assert_eq!(end.status, "signal: terminated");
    let (_, end) = run(&client, &sh("kill -9 0; sleep 1000")).await;
    assert_eq!(end.status, "signal: killed");
    let pids: Vec<_> = list(&client).await.iter().map(|process| process.pid).collect();
    assert_eq!(pids, [other.pid, terminal.pid]);
    kill(&client, terminal.pid).await;
    close_stdin(&client, pid(other.pid)).await.unwrap();
    assert_eq!(other.end().await.1.exit_code, 0);
}

#[tokio::test]
async fn two_hundred_at_once_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    // One connection for all of them.
    let client = Client::new(&daemon, Wire::Grpc);
    for request in [start("true", &[]), start("true", &[]).pty(80, 24)] {
        run(&client, &request).await;
    }
    let before = daemon.descriptors();
    let mut runs = tokio::task::JoinSet::new();
    for i in 0..200 {
        let client = client.clone();
        runs.spawn(async move {
            let request = sh(&format!("echo {i}; exit {}", i % 7));
            let request = if i % 4 == 0 { request.pty(80, 24) } else { request };
            let (said, end) = run(&client, &request).await;
            let text = [said.stdout(), said.pty()].concat();
            assert_eq!((text.trim(), end.exit_code), (i.to_string().as_str(), i % 7));
        });
    }
    while let Some(run) = runs.join_next().await {
        run.unwrap();
    }
    // Whoever has seen the end finds no zombie.
    let own = daemon.pid().to_string();
    for entry in fs::read_dir("/proc").unwrap() {
        let stat = fs::read_to_string(entry.unwrap().path().join("stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).trim_start();
        let mut fields = fields.split(' ');
        if let (Some(state), Some(parent)) = (fields.next(), fields.next()) {
            assert!(parent != own || state != "Z", "a zombie: {stat}");
        }
    }
    assert_eq!(list(&client).await, []);
    eventually("the descriptors are closed", || (daemon.descriptors() <= before).then_some(()));
}

// Which process is meant.

#[tokio::test]
async fn a_tag_is_bounded_and_the_error_names_the_field() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    assert_eq!(stdout(&client, &start("echo", &["x"]).tag(&"t".repeat(4096))).await, "x\n");
    let failure = refused(&client, &start("echo", &["x"]).tag(&"t".repeat(4097))).await;
    assert_eq!(failure.code, "invalid_argument");
    assert_eq!(failure.message, "the field `tag` has 4097 bytes, and may have 4096");
}

#[tokio::test]
async fn each_of_three_tags_selects_its_process() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut running = Vec::new();
    for name in ["a", "b", "c"] {
        running.push((name, begin(&client, &start("cat", &[]).tag(name)).await));
    }
    let untagged = begin(&client, &start("cat", &[])).await;
    for (name, process) in &mut running {
        let mut again = connect(&client, tag(name)).await.unwrap();
        assert_eq!(again.pid, process.pid, "{name}");
        send(&client, tag(name), to_stdin(name.to_string())).await.unwrap();
        process.until_it_says(name).await;
        again.until_it_says(name).await;
    }
    for (name, process) in running {
        close_stdin(&client, tag(name)).await.unwrap();
        let (said, end) = process.end().await;
        assert_eq!((said.stdout(), end.exit_code), (name, 0));
    }
    signal(&client, pid(untagged.pid), Signal::Sigterm).await.unwrap();
    assert_eq!(untagged.end().await.1.status, "signal: terminated");
}

#[tokio::test]
async fn of_two_processes_with_one_tag_the_newest_is_meant() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let old = begin(&client, &start("cat", &[]).tag("twice")).await;
    let new = begin(&client, &start("cat", &[]).tag("twice")).await;
    assert_eq!(connect(&client, tag("twice")).await.unwrap().pid, new.pid);
    kill(&client, new.pid).await;
    new.end().await;
    assert_eq!(connect(&client, tag("twice")).await.unwrap().pid, old.pid);
    kill(&client, old.pid).await;
}

#[tokio::test]
async fn a_daemon_without_a_path_gives_its_processes_one() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"/\xff");
    for path in [None, Some(odd)] {
        let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
        command.env_remove("PATH").envs(path.map(|path| ("PATH", path)));
        let daemon = Daemon::spawn(&mut command);
        let env = stdout(&client(&daemon), &start("env", &[])).await;
        let path = env.lines().find(|line| line.starts_with("PATH=")).unwrap();
        assert_eq!(path, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
}

#[tokio::test]
async fn errors_quote_the_beginning_of_a_long_command_line() {
    let daemon = Daemon::start(&[]);
    let long = "x".repeat(100_000);
    for request in [start("echo", &[&long, "\0"]), start(&long, &["\0"])] {
        let failed = refused(&client(&daemon), &request).await;
        assert_eq!(failed.code, "invalid_argument");
        assert!(failed.message.contains("xxx…'"), "{failed:?}");
        assert!(failed.message.len() < 1200, "{}", failed.message.len());
    }
}

#[tokio::test]
async fn a_process_that_is_not_there() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    for (selector, message) in [
        (pid(999_999_999), "process with pid 999999999 not found"),
        (tag("none"), "process with tag none not found"),
    ] {
        let expected = failure("not_found", message);
        let selector = || selector.clone();
        assert_eq!(connect(&client, selector()).await.err().unwrap(), expected);
        assert_eq!(send(&client, selector(), to_stdin("x")).await.unwrap_err(), expected);
        assert_eq!(close_stdin(&client, selector()).await.unwrap_err(), expected);
        let error = signal(&client, selector(), Signal::Sigterm).await.unwrap_err();
        assert_eq!(error, expected);
    }
    let none = Some(ProcessSelector::default());
    assert_eq!(connect(&client, none).await.err().unwrap().code, "unimplemented");
    assert_eq!(connect(&client, None).await.err().unwrap().code, "unimplemented");
}

#[tokio::test]
async fn the_list_shows_what_was_asked_for_and_only_what_lives() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let list = async || {
        let list = list(&client).await.into_iter();
        list.map(|info| (info.config, info.pid, info.tag)).collect::<Vec<_>>()
    };
    assert_eq!(list().await, []);
    let first = start("sleep", &["1000"]).env("KEY", "value").tag("first");
    let second = start("cat", &["-"]).cwd(Some("/usr"));
    let (one, two) = (begin(&client, &first).await, begin(&client, &second).await);
    let info = |request: StartRequest, pid| (request.process, pid, request.tag);
    assert_eq!(list().await, [info(first, one.pid), info(second.clone(), two.pid)]);
    kill(&client, one.pid).await;
    one.end().await;
    assert_eq!(list().await, [info(second, two.pid)], "gone once its end was seen");
    close_stdin(&client, pid(two.pid)).await.unwrap();
    two.end().await;
    assert_eq!(list().await, []);
}

#[tokio::test]
async fn an_ended_process_is_still_told_of() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let process = begin(&client, &sh("echo gone; exit 9").tag("old")).await;
    let id = process.pid;
    let (_, end) = process.end().await;
    for selector in [pid(id), tag("old")] {
        let again = connect(&client, selector.clone()).await.unwrap();
        assert_eq!(again.pid, id);
        let (said, same) = again.end().await;
        assert_eq!((said.stdout(), &same), ("", &end));
        // It can be looked at, and no more.
        let error = signal(&client, selector, Signal::Sigkill).await.unwrap_err();
        assert_eq!(error.code, "not_found");
    }
    // A new process takes the tag over.
    let new = begin(&client, &start("cat", &[]).tag("old")).await;
    assert_eq!(connect(&client, tag("old")).await.unwrap().pid, new.pid);
    kill(&client, new.pid).await;
}

#[tokio::test]
async fn a_process_outlives_its_client() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("go");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let request = start("/bin/sh", &["-c", "cat \"$0\" > \"$0\".copy", fifo.to_str().unwrap()]);
    let process = begin(&client(&daemon), &request).await;
    let id = process.pid;
    drop(process);
    let go = fifo.clone();
    tokio::task::spawn_blocking(move || fs::write(go, "went on")).await.unwrap().unwrap();
    let again = connect(&client(&daemon), pid(id)).await.unwrap();
    assert_eq!(again.end().await.1.exit_code, 0);
    assert_eq!(fs::read_to_string(dir.path().join("go.copy")).unwrap(), "went on");
}

// Time.

#[tokio::test]
async fn no_keepalive_interval_is_dangerous() {
    let daemon = Daemon::start(&[]);
    let mut checks = tokio::task::JoinSet::new();
    for (interval, soon) in [
        ("0", true),
        ("-1", true),
        ("1", true),
        (" 1 ", true),
        ("-9223372036854775808", true),
        ("9223372037", false),
        ("99999999999999999999", false),
        ("abc", false),
        ("1.0", false),
        ("", false),
    ] {
        let plain = client(&daemon);
        let client = plain.clone().with("keepalive-ping-interval", interval);
        checks.spawn(async move {
            let mut silent = begin(&client, &start("sleep", &["1000"])).await;
            let mut again = connect(&client, pid(silent.pid)).await.unwrap();
            if soon {
                silent.until(|said| said.keepalives > 1).await;
                again.until(|said| said.keepalives > 1).await;
            }
            kill(&plain, silent.pid).await;
            let (said, end) = silent.end().await;
            assert_eq!(end.status, "signal: killed", "{interval}");
            assert_eq!(said.keepalives > 0, soon, "{interval}");
            assert_eq!(again.end().await.1, end, "{interval}");
        });
    }
    while let Some(check) = checks.join_next().await {
        check.unwrap();
    }
    is_well(&daemon).await;
}

#[tokio::test]
async fn the_timeout_kills_and_others_see_how_it_ended() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let limited = client.clone().with("connect-timeout-ms", "3000");
    let begun = Instant::now();
    let mut process = begin(&limited, &sh("trap '' TERM; echo on; exec sleep 1000")).await;
    process.until_it_says("on").await;
    let id = process.pid;
    let other = connect(&client, pid(id)).await.unwrap();
    let error = process.try_end().await.unwrap_err();
    assert_eq!(error.code, "deadline_exceeded");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let (_, end) = other.end().await;
    let status = "signal: killed".to_owned();
    let error = Some(status.clone());
    assert_eq!(upstreams(&end), (-1, false, status, error));
    assert_eq!(list(&client).await, []);
    assert_eq!(state(id), None);
}

#[tokio::test]
async fn the_timeout_counts_without_the_client() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let limited = client.clone().with("connect-timeout-ms", "3000");
    let process = begin(&limited, &start("sleep", &["1000"])).await;
    let id = process.pid;
    drop(process);
    let other = connect(&client, pid(id)).await.unwrap();
    assert_eq!(other.end().await.1.status, "signal: killed");
}

// Input.

/// Starts a process that reads a little, says so, and then runs `then`; and sends it more than
/// there is room for. The sending hangs when this returns.
async fn blocked(
    client: &Client,
    then: &str,
) -> (Running<StartResponse>, tokio::task::JoinHandle<Result<(), Failure>>) {
    let script = format!("head -c 1 >/dev/null; echo got; {then}");
    let mut process = begin(client, &sh(&script)).await;
    let (client, id) = (client.clone(), process.pid);
    let sending = tokio::spawn(async move {
        send(&client, pid(id), to_stdin(vec![b'x'; MORE_THAN_A_PIPE])).await
    });
    process.until_it_says("got").await;
    (process, sending)
}

#[tokio::test]
async fn input_that_nobody_reads_blocks_nothing_else() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let (process, sending) = blocked(&client, "exec sleep 1000").await;
    assert_eq!(list(&client).await.len(), 1);
    is_well(&daemon).await;
    let mut other = begin(&client, &start("cat", &[])).await;
    send(&client, pid(other.pid), to_stdin("other")).await.unwrap();
    other.until_it_says("other").await;
    kill(&client, other.pid).await;
    assert!(!sending.is_finished());
    kill(&client, process.pid).await;
    assert_eq!(process.end().await.1.status, "signal: killed");
    let error = common::soon("the sending ends", sending).await.unwrap().unwrap_err();
    assert_eq!(error.code, "internal");
    assert!(error.message.starts_with("error writing to stdin: "), "{error:?}");
}

#[tokio::test]
async fn stdin_can_be_closed_under_input_that_nobody_reads() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("go");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let then = format!("cat {} >/dev/null; cat >/dev/null; echo end of file", fifo.display());
    let (process, sending) = blocked(&client, &then).await;
    close_stdin(&client, pid(process.pid)).await.unwrap();
    let error = common::soon("the sending ends", sending).await.unwrap().unwrap_err();
    let text = "error writing to stdin: stdin not enabled or closed";
    assert_eq!(error, failure("internal", text));
    // What had been written before is read, then comes the end.
    tokio::task::spawn_blocking(move || fs::write(fifo, "")).await.unwrap().unwrap();
    let (said, end) = process.end().await;
    assert_eq!((said.stdout(), end.exit_code), ("got\nend of file\n", 0));
}

#[tokio::test]
async fn input_for_a_closed_stdin() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut process = begin(&client, &sh("exec <&-; echo closed; exec sleep 1000")).await;
    process.until_it_says("closed").await;
    let error = send(&client, pid(process.pid), to_stdin("x")).await.unwrap_err();
    let text = format!(
        "error writing to stdin: error writing to stdin of process '{}': write |1: broken pipe",
        process.pid
    );
    assert_eq!(error, failure("internal", text));
    for _ in 0..2 {
        close_stdin(&client, pid(process.pid)).await.unwrap();
    }
    let error = send(&client, pid(process.pid), to_stdin("x")).await.unwrap_err();
    let text = "error writing to stdin: stdin not enabled or closed";
    assert_eq!(error, failure("internal", text));
    let error = send(&client, pid(process.pid), None).await.unwrap_err();
    assert_eq!(error.code, "unimplemented");
    kill(&client, process.pid).await;
}

#[tokio::test]
async fn streamed_input_before_its_start() {
    use stream_input_request::{DataEvent, Event};
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let data = Event::Data(DataEvent { input: to_stdin("x"), offset: None });
    for (message, code) in [(Some(data), "failed_precondition"), (None, "unimplemented")] {
        let messages = [StreamInputRequest { event: message }];
        let error = match client.streams::<_, StreamInputResponse>(STREAM_INPUT, &messages).await {
            Err(error) => error,
            Ok(mut answer) => answer.next().await.unwrap_err(),
        };
        assert_eq!(error.code, code);
    }
    is_well(&daemon).await;
}

/// The head of a streaming call of Connect whose body comes in chunks.
fn streaming_head(daemon: &Daemon, path: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/connect+json\r\n\
         connect-protocol-version: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        daemon.tcp()
    )
}

/// A streaming call of Connect, with its one message.
fn streaming_call(daemon: &Daemon, path: &str, message: &str) -> Vec<u8> {
    let body = envelope(0, message.as_bytes());
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/connect+json\r\n\
         connect-protocol-version: 1\r\ncontent-length: {}\r\n\r\n",
        daemon.tcp(),
        body.len()
    );
    [head.as_bytes(), &body].concat()
}

#[tokio::test]
async fn an_error_of_streamed_input_does_not_wait_for_the_rest() {
    let daemon = Daemon::start(&[]);
    let mut raw = Raw::open(&daemon).await;
    raw.send(streaming_head(&daemon, STREAM_INPUT)).await;
    raw.send_chunk(&envelope(0, br#"{"start":{"process":{"pid":999999999}}}"#)).await;
    // The body is not at its end, and the answer comes nevertheless.
    let (status, _) = raw.head().await;
    assert_eq!(status, 200);
    let piece = String::from_utf8(raw.until(b"not found").await).unwrap();
    assert!(piece.contains("process with pid 999999999"), "{piece:?}");
    is_well(&daemon).await;
}

#[tokio::test]
async fn streamed_input_arrives_as_it_is_sent() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut process = begin(&client, &start("cat", &[])).await;
    let mut raw = Raw::open(&daemon).await;
    raw.send(streaming_head(&daemon, STREAM_INPUT)).await;
    let select = format!(r#"{{"start":{{"process":{{"pid":{}}}}}}}"#, process.pid);
    raw.send_chunk(&envelope(0, select.as_bytes())).await;
    // base64 of `one` and `two`.
    for (data, text) in [("b25l", "one"), ("dHdv", "two")] {
        let message = format!(r#"{{"data":{{"input":{{"stdin":"{data}"}}}}}}"#);
        raw.send_chunk(&envelope(0, message.as_bytes())).await;
        process.until_it_says(text).await;
    }
    // The end of the stream is not the end of stdin.
    raw.send("0\r\n\r\n").await;
    assert_eq!(raw.head().await.0, 200);
    send(&client, pid(process.pid), to_stdin("three")).await.unwrap();
    process.until_it_says("onetwothree").await;
    close_stdin(&client, pid(process.pid)).await.unwrap();
    assert_eq!(process.end().await.1.exit_code, 0);
}

#[tokio::test]
async fn numbers_that_are_no_signals() {
    let daemon = Daemon::start(&[]);
    // In JSON, a number that the enumeration lacks cannot be written.
    let client = Client::new(&daemon, Wire::Connect { json: false });
    let process = begin(&client, &start("sleep", &["1000"])).await;
    for (number, name) in [(0, "SIGNAL_UNSPECIFIED"), (65, "65"), (-9, "-9")] {
        let request =
            SendSignalRequest { process: pid(process.pid), signal: number, ..Default::default() };
        let error = client.unary::<_, SendSignalResponse>(SEND_SIGNAL, &request).await.unwrap_err();
        assert_eq!(error, failure("unimplemented", format!("invalid signal: {name}")));
    }
    kill(&client, process.pid).await;
    assert_eq!(process.end().await.1.status, "signal: killed");
}

#[tokio::test]
async fn every_signal_can_be_sent_by_name_and_by_number() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let script =
        "trap 'echo hup' HUP; trap 'echo usr2' USR2; trap 'echo rt' RTMIN; trap 'exit 7' INT
        echo ready; while :; do sleep 1000 & wait; done";
    let mut process = begin(&client, &start("/bin/bash", &["-c", script])).await;
    process.until_it_says("ready\n").await;
    let by = async |process: u32, signal: Signal, number| {
        let process = pid(process);
        let request =
            SendSignalRequest { process, signal: signal.into(), number, ..Default::default() };
        client.unary::<_, SendSignalResponse>(SEND_SIGNAL, &request).await.map(|_| ())
    };
    by(process.pid, Signal::Sighup, 0).await.unwrap();
    process.until_it_says("hup\n").await;
    by(process.pid, Signal::Unspecified, 12).await.unwrap();
    process.until_it_says("usr2\n").await;
    by(process.pid, Signal::Unspecified, 34).await.unwrap();
    process.until_it_says("rt\n").await;
    let both = by(process.pid, Signal::Sigint, 2).await.unwrap_err();
    assert_eq!(both.code, "invalid_argument");
    by(process.pid, Signal::Sigint, 0).await.unwrap();
    assert_eq!(process.end().await.1.exit_code, 7);
}

// Output, and clients that do not take it.

/// How many bytes a process has written.
fn written(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
    line.parse().unwrap()
}

#[tokio::test]
async fn a_client_that_does_not_read_costs_little_and_holds_up_nobody_else() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut cat = begin(&client, &start("cat", &[])).await;
    let mut other = connect(&client, pid(cat.pid)).await.unwrap();

    let mut deaf = Raw::open(&daemon).await;
    deaf.at_once = 64;
    let call = r#"{"process":{"cmd":"yes","cwd":"/"},"tag":"yes"}"#;
    deaf.send(streaming_call(&daemon, START, call)).await;
    assert_eq!(deaf.head().await.0, 200);
    deaf.until(b"\"start\"").await;
    let yes = list(&client).await.into_iter().find(|process| process.tag.is_some()).unwrap().pid;

    // It stops when nobody takes what it writes.
    let mut last = (written(yes), Instant::now());
    in_time("yes is held up", async || {
        let now = written(yes);
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_millis(500)).then_some(())
    })
    .await;
    for i in 0..20 {
        let text = format!("<{i}>");
        send(&client, pid(cat.pid), to_stdin(text.clone())).await.unwrap();
        cat.until_it_says(&text).await;
        other.until_it_says(&text).await;
        assert_eq!(list(&client).await.len(), 2);
    }
    let peak = daemon.memory("VmHWM");
    assert!(peak < 64 << 10, "the daemon grew to {peak} KiB");

    // Without its client, the process goes on.
    drop(deaf);
    let held_up = written(yes);
    in_time("yes goes on", async || (written(yes) > held_up + (16 << 20)).then_some(())).await;
    kill(&client, yes).await;
    kill(&client, cat.pid).await;
    let peak = daemon.memory("VmHWM");
    assert!(peak < 64 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn a_slow_reader_gets_every_byte() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("noise");
    let bytes = noise(8 << 20);
    fs::write(&file, &bytes).unwrap();
    let call = format!(r#"{{"process":{{"cmd":"cat","args":["{}"],"cwd":"/"}}}}"#, file.display());
    let mut raw = Raw::open(&daemon).await;
    raw.at_once = 4 << 10;
    raw.send(streaming_call(&daemon, START, &call)).await;
    assert_eq!(raw.head().await.0, 200);

    let (mut stream, mut got, mut end) = (Vec::new(), Vec::with_capacity(bytes.len()), None);
    'reading: loop {
        tokio::time::sleep(Duration::from_micros(100)).await;
        stream.extend(raw.chunk().await.expect("the end of the stream is told"));
        while let Some(head) = stream.get(..5) {
            let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
            let flags = head[0];
            if stream.len() < 5 + length {
                break;
            }
            let message: Vec<u8> = stream.drain(..5 + length).skip(5).collect();
            if flags == 2 {
                assert_eq!(message, b"{}");
                break 'reading;
            }
            let message: StartResponse = serde_json::from_slice(&message).unwrap();
            match message.event() {
                Event::Data(data) => match data.output.unwrap() {
                    Output::Stdout(bytes) => got.extend_from_slice(&bytes),
                    other => panic!("{other:?}"),
                },
                Event::End(event) => end = Some(event),
                Event::Start(_) | Event::Keepalive(_) => {}
                Event::Gap(gap) => panic!("{gap:?}"),
            }
        }
    }
    assert_eq!(got.len(), bytes.len());
    assert!(got == bytes, "it arrived changed");
    assert_eq!(end.expect("an end").exit_code, 0);
}

#[tokio::test]
async fn stdout_and_stderr_come_whole_and_apart() {
    let daemon = Daemon::start(&[]);
    let script = "i=0; while [ $i -lt 2000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done";
    let (said, end) = run(&client(&daemon), &sh(script)).await;
    let expected = |name: &str| (0..2000).map(|i| format!("{name} {i}\n")).collect::<String>();
    assert_eq!(end.exit_code, 0);
    assert!(said.stdout() == expected("out"));
    assert!(said.stderr() == expected("err"));
}

// Terminals.

#[tokio::test]
async fn a_terminal_echoes_and_has_its_size() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let (said, _) = run(&client, &start("stty", &["size"]).pty(132, 50)).await;
    assert_eq!(said.pty(), "50 132\r\n");

    let mut process = begin(&client, &start("cat", &[]).pty(80, 24)).await;
    send(&client, pid(process.pid), to_pty("hello\n")).await.unwrap();
    // Once from the terminal, once from cat.
    process.until_it_says("hello\r\nhello\r\n").await;
    send(&client, pid(process.pid), to_pty(vec![4])).await.unwrap();
    assert_eq!(process.end().await.1.exit_code, 0, "Ctrl+D ends it");

    let mut process = begin(&client, &sh("echo ready; exec sleep 1000").pty(80, 24)).await;
    process.until_it_says("ready").await;
    send(&client, pid(process.pid), to_pty(vec![3])).await.unwrap();
    assert_eq!(process.end().await.1.status, "signal: interrupt", "Ctrl+C interrupts it");
}

#[tokio::test]
async fn a_terminal_can_be_resized_and_its_process_is_told() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.01; done";
    let mut process = begin(&client, &sh(script).pty(80, 24)).await;
    process.until_it_says("ready").await;
    // Without a size nothing is asked for.
    let request = UpdateRequest { process: pid(process.pid), pty: None };
    let _: UpdateResponse = client.unary(UPDATE, &request).await.unwrap();
    resize(&client, process.pid, 101, 33).await.unwrap();
    let (said, end) = process.end().await;
    assert_eq!((said.pty(), end.exit_code), ("ready\r\n33 101\r\n", 0));
}

#[tokio::test]
async fn pipes_and_terminals_are_not_mixed_up() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let pipes = begin(&client, &start("cat", &[])).await;
    let terminal = begin(&client, &start("cat", &[]).pty(80, 24)).await;
    assert_eq!(
        send(&client, pid(terminal.pid), to_stdin("x")).await.unwrap_err(),
        failure(
            "internal",
            "error writing to stdin: tty assigned to process — input should be written to the \
             pty, not the stdin"
        )
    );
    assert_eq!(
        send(&client, pid(pipes.pid), to_pty("x")).await.unwrap_err(),
        failure(
            "internal",
            "error writing to tty: tty not assigned to process — input should be written to the \
             stdin, not the tty"
        )
    );
    assert_eq!(
        close_stdin(&client, pid(terminal.pid)).await.unwrap_err(),
        failure(
            "unknown",
            "error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead"
        )
    );
    assert_eq!(
        resize(&client, pipes.pid, 80, 24).await.unwrap_err(),
        failure("internal", "error resizing tty: tty not assigned to process")
    );
    // Both are as they were.
    assert_eq!(list(&client).await.len(), 2);
    kill(&client, pipes.pid).await;
    kill(&client, terminal.pid).await;
}

#[tokio::test]
async fn the_first_bytes_of_a_terminal_are_not_lost() {
    let daemon = Daemon::start(&[]);
    let client = Client::new(&daemon, Wire::Grpc);
    for i in 0..100 {
        let (said, end) = run(&client, &start("echo", &["hi"]).pty(80, 24)).await;
        assert_eq!((said.pty(), end.exit_code), ("hi\r\n", 0), "{i}");
    }
}

#[tokio::test]
async fn a_terminal_belongs_to_its_user() {
    let daemon = Daemon::start(&[]);
    let mut users: HashMap<String, Client> = HashMap::new();
    users.insert(me().name, client(&daemon));
    if able_as_root() {
        let nobody = client(&daemon).with("authorization", &basic("nobody"));
        users.insert("nobody".to_owned(), nobody);
    }
    for (user, client) in users {
        let script = "stat -c %U \"$(tty)\"; echo again > \"$(tty)\"; cut -d' ' -f6 /proc/$$/stat";
        let process = begin(&client, &sh(script).pty(80, 24)).await;
        let id = process.pid;
        let (said, end) = process.end().await;
        assert_eq!(end.exit_code, 0, "{said:?}");
        assert_eq!(said.pty(), format!("{user}\r\nagain\r\n{id}\r\n"));
    }
}
