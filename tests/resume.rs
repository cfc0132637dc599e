//! Output that survives its clients: journals, resume by offset, starts and inputs that may be
//! repeated, reading and waiting without a stream.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use common::{
    Daemon, able_as_root, basic, in_time, noise,
    process::*,
    rpc::{Client, Wire},
};
use envd::proto::process::{
    AtBound, HeadTail, ListRequest, ListResponse, OutputOptions, ProcessState, ReadRequest,
    ReadResponse, SendInputRequest, SendInputResponse, SendSignalRequest, SendSignalResponse,
    Signal, SignalScope, StartRequest, StartResponse, WaitRequest, WaitResponse, output_chunk,
    process_event::{Event, data_event::Output},
    wait_request::{self, Condition},
    wait_response::Result as Answer,
};
use pbjson_types::Duration as Span;

const READ: &str = "/process.Process/Read";
const WAIT: &str = "/process.Process/Wait";

/// The protocols in which a stream can be followed and left.
const STREAMS: [Wire; 3] =
    [Wire::Grpc, Wire::Connect { json: true }, Wire::Connect { json: false }];

fn client(daemon: &Daemon) -> Client {
    Client::new(daemon, Wire::Connect { json: true })
}

fn span(time: Duration) -> Option<Span> {
    Some(Span {
        seconds: time.as_secs().try_into().unwrap(),
        nanos: time.subsec_nanos().try_into().unwrap(),
    })
}

fn seconds(seconds: u64) -> Option<Span> {
    span(Duration::from_secs(seconds))
}

fn named(mut request: StartRequest, name: &str) -> StartRequest {
    request.process_id = name.to_owned();
    request
}

fn kept(mut request: StartRequest, memory: u64, spill: u64, at_bound: AtBound) -> StartRequest {
    request.output =
        Some(OutputOptions { memory_bytes: memory, spill_bytes: spill, at_bound: at_bound.into() });
    request
}

async fn read(client: &Client, request: &ReadRequest) -> ReadResponse {
    client.unary(READ, request).await.unwrap()
}

/// The bytes of a read, whatever channel they are of.
fn bytes(response: &ReadResponse) -> Vec<u8> {
    let mut all = Vec::new();
    for chunk in &response.chunks {
        use output_chunk::Output::{Pty, Stderr, Stdout};
        let (Stdout(bytes) | Stderr(bytes) | Pty(bytes)) = chunk.output.as_ref().unwrap();
        all.extend_from_slice(bytes);
    }
    all
}

async fn wait(client: &Client, process: &str, condition: Option<Condition>) -> Answer {
    let request = WaitRequest { process: id(process), condition, timeout: seconds(60) };
    client.unary::<_, WaitResponse>(WAIT, &request).await.unwrap().result.unwrap()
}

/// A shell script that writes noise to both of its channels (or its terminal) and to files beside
/// them.
fn noisy(length: usize, dir: &str, pty: bool) -> StartRequest {
    if pty {
        let script = format!("stty raw; head -c {length} /dev/urandom | tee {dir}/out");
        return sh(&script).pty(80, 24);
    }
    sh(&format!(
        "head -c {length} /dev/urandom | tee {dir}/err >&2 & head -c {length} /dev/urandom | tee {dir}/out; wait"
    ))
}

/// Follows a process by offset through any number of connections that are cut at random; what it
/// said.
async fn in_pieces(client: &Client, process: &str, cuts: usize, length: usize) -> (Said, u64) {
    let (mut said, mut at, mut connections) = (Said::default(), 0_u64, 0);
    let mut random = noise(cuts.max(1) * 4).into_iter().cycle();
    loop {
        let mut follower = connect_from(client, id(process), Some(at)).await.unwrap();
        assert_eq!(follower.start.next_offset, at);
        connections += 1;
        // Twice as far as would make that many cuts of the whole, at most.
        let part = (0..4).fold(0_usize, |part, _| part << 8 | usize::from(random.next().unwrap()));
        let enough = 1 + part % (2 * length / cuts.max(1) + 1);
        let mut end = None;
        while end.is_none() && follower.said.len() < enough {
            end = follower.step().await.unwrap();
        }
        assert_eq!(follower.gaps, [], "nothing may be gone");
        at = follower.at;
        said.add(&follower.said);
        if let Some(end) = end {
            assert_eq!((end.exit_code, end.end_offset), (0, at));
            return (said, connections);
        }
    }
}

#[tokio::test]
async fn a_client_that_is_cut_off_again_and_again_gets_every_byte() {
    // The soak run asks for more.
    let figure = |name: &str, usual: usize| {
        std::env::var(name).map_or(usual, |value| value.parse().expect(name))
    };
    let length = figure("ENVD_RESUME_BYTES", 4 << 20);
    let cuts = figure("ENVD_RESUME_CUTS", 60);
    let spill = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&["--spill-dir", spill.path().to_str().unwrap()]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        for pty in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().to_str().unwrap();
            // What is on its way when the connection is cut counts as read, and must still be there.
            // As much through the one channel of a terminal as through two pipes.
            let each = if pty { 2 * length } else { length };
            let request = kept(noisy(each, dir, pty), 0, 32 << 20, AtBound::Block);
            let name = format!("{wire:?}-{pty}").replace([' ', '{', '}'], "");
            drop(begin(&client, &named(request, &name)).await);
            let (said, connections) = in_pieces(&client, &name, cuts, 2 * length).await;
            let written = fs::read(format!("{dir}/out")).unwrap();
            assert_eq!(written.len(), each);
            if pty {
                assert!(said.pty == written, "{wire:?}");
            } else {
                assert!(said.stdout == written, "{wire:?}");
                assert!(said.stderr == fs::read(format!("{dir}/err")).unwrap(), "{wire:?}");
            }
            assert!(connections > cuts as u64 / 4, "{connections}");
            println!("{wire:?}, terminal {pty}: {connections} connections, {} bytes", said.len());
        }
    }
    // Kept output has files with names, and they are the daemon's alone.
    for entry in fs::read_dir(spill.path()).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}");
    }
}

#[tokio::test]
async fn output_that_nobody_listened_to_is_there_and_what_is_gone_is_told() {
    let daemon = Daemon::start(&["--output-window", "65536"]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        let process = begin(&client, &sh("read x; seq 1 100000; sleep 1000")).await;
        let name = process.start.process_id.clone();
        assert!(!name.is_empty());
        let number = process.pid;
        drop(process);
        send(&client, pid(number), to_stdin("go\n")).await.unwrap();
        let all: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
        // Nobody is attached: the process is not held up.
        in_time("all is written", async || {
            let listed = list(&client).await;
            let info = listed.iter().find(|info| info.process_id == name).unwrap();
            (info.next_offset == all.len() as u64).then_some(())
        })
        .await;
        let mut late = connect_from(&client, id(&name), Some(0)).await.unwrap();
        late.until(|said| said.stdout().ends_with("\n100000\n")).await;
        let [(0, from)] = late.gaps[..] else { panic!("{:?}", late.gaps) };
        assert_eq!(late.start.earliest_offset, from);
        let rest = &all[usize::try_from(from).unwrap()..];
        assert!(late.said.stdout() == rest && rest.len() > 32 * 1024, "{}", rest.len());
        // Upstream's way: from now on.
        let now = connect(&client, pid(number)).await.unwrap();
        assert_eq!(now.start.next_offset, all.len() as u64);
        let beyond = connect_from(&client, id(&name), Some(u64::MAX)).await.err().unwrap();
        assert_eq!(beyond.code, "out_of_range");
        kill(&client, number).await;
        let (_, end) = now.end().await;
        assert_eq!(end.end_offset, all.len() as u64);
    }
}

#[tokio::test]
async fn ended_processes_can_be_read_and_followed_again() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let (said, end) =
        run(&client, &named(sh("echo out; sleep 0.1; echo err >&2; exit 3"), "a")).await;
    assert_eq!((said.stdout(), said.stderr(), end.exit_code), ("out\n", "err\n", 3));
    for _ in 0..2 {
        let (again, same) = connect_from(&client, id("a"), Some(0)).await.unwrap().end().await;
        assert_eq!((again.stdout(), again.stderr()), ("out\n", "err\n"));
        assert_eq!(same, end);
    }
    let (part, _) = connect_from(&client, id("a"), Some(6)).await.unwrap().end().await;
    assert_eq!((part.stdout(), part.stderr()), ("", "r\n"));
    let (none, same) = connect(&client, id("a")).await.unwrap().end().await;
    assert_eq!((none.stdout(), none.stderr(), same), ("", "", end.clone()));

    assert!(list(&client).await.is_empty());
    let request = ListRequest { include_ended: true };
    let listed: ListResponse = client.unary(LIST, &request).await.unwrap();
    let [info] = &listed.processes[..] else { panic!("{listed:?}") };
    assert_eq!(info.process_id, "a");
    assert_eq!(info.state(), ProcessState::Ended);
    assert_eq!((&info.outcome, &info.ended_at), (&end.outcome, &end.exited_at));
    assert_eq!((info.earliest_offset, info.next_offset), (0, 8));
}

#[tokio::test]
async fn what_a_background_child_writes_after_the_end_can_be_read() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let script = "(read x < /proc/self/fd/9; echo late) 9<&0 & echo early";
    let fifo = tempfile::tempdir().unwrap();
    let path = fifo.path().join("gate");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = script.replace("/proc/self/fd/9", path.to_str().unwrap()).replace(" 9<&0", "");
    let (said, end) = run(&client, &named(sh(&script), "a")).await;
    assert_eq!((said.stdout(), end.end_offset), ("early\n", 6));
    fs::write(&path, "\n").unwrap();
    let request =
        ReadRequest { process: id("a"), from_offset: 6, wait: seconds(60), ..Default::default() };
    let late = in_time("it is written", async || {
        Some(read(&client, &request).await).filter(|read| read.next_offset > 6)
    })
    .await;
    assert_eq!(bytes(&late), b"late\n");
}

#[tokio::test]
async fn a_start_can_be_repeated() {
    let daemon = Daemon::start(&[]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        let name = format!("{wire:?}").replace([' ', '{', '}'], "");
        let request = named(sh("echo $$; read line; echo $line"), &name).env("SECRET", "x");
        // Many at once start one process.
        let starts = (0..10).map(|_| begin(&client, &request));
        let all = futures_util::future::join_all(starts).await;
        let number = all[0].pid;
        assert!(all.iter().all(|one| one.pid == number));
        send(&client, id(&name), to_stdin("word\n")).await.unwrap();
        for one in all {
            let (said, end) = one.end().await;
            assert_eq!(said.stdout(), format!("{number}\nword\n"));
            assert_eq!(end.exit_code, 0);
        }
        // It has ended, and the retry hears all of it.
        let (said, _) = run(&client, &request).await;
        assert_eq!(said.stdout(), format!("{number}\nword\n"));
        for other in [
            named(sh("echo other"), &name),
            request.clone().env("SECRET", "y"),
            request.clone().tag("t"),
            request.clone().cwd(Some("/usr")),
            request.clone().no_stdin(),
            StartRequest { timeout: seconds(1), ..request.clone() },
            kept(request.clone(), 1 << 20, 0, AtBound::Block),
        ] {
            let error = refused(&client, &other).await;
            assert_eq!(error.code, "already_exists");
            assert!(error.message.contains(&name), "{}", error.message);
        }
        for bad in [String::from("a b"), "x".repeat(129), String::from("ä")] {
            let error = refused(&client, &named(sh("true"), &bad)).await;
            assert_eq!(error.code, "invalid_argument");
            assert!(error.message.contains("process_id"), "{}", error.message);
        }
    }
}

#[tokio::test]
async fn an_input_can_be_repeated() {
    let daemon = Daemon::start(&[]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        for terminal in [false, true] {
            let mut request = sh("stty raw -echo 2> /dev/null; echo ready; exec cat");
            if terminal {
                request = request.pty(80, 24);
            }
            let mut process = begin(&client, &request).await;
            process.until_it_says("ready\n").await;
            let input = |text: &'static str, offset| SendInputRequest {
                process: pid(process.pid),
                input: if terminal { to_pty(text) } else { to_stdin(text) },
                offset,
            };
            let write = async |text, offset| {
                let sent = client.unary(SEND_INPUT, &input(text, offset)).await;
                sent.map(|sent: SendInputResponse| sent.accepted_offset)
            };
            assert_eq!(write("abc", Some(0)).await, Ok(3));
            assert_eq!(write("abc", Some(0)).await, Ok(3), "a retry is applied once");
            assert_eq!(write("bcde", Some(1)).await, Ok(5), "and the part that is new");
            assert_eq!(write("f", None).await, Ok(6));
            let ahead = write("x", Some(7)).await.unwrap_err();
            assert_eq!(ahead.code, "out_of_range");
            assert!(ahead.message.contains("is at 6"), "{}", ahead.message);
            process.until_it_says("abcdef").await;
            kill(&client, process.pid).await;
            let (said, _) = process.end().await;
            let all = String::from_utf8([said.stdout, said.pty].concat()).unwrap();
            assert_eq!(all.split_whitespace().last(), Some("abcdef"));
        }
    }
}

#[tokio::test]
async fn reading_without_a_stream() {
    let daemon = Daemon::start(&[]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        let process = begin(&client, &sh("echo begin; read x; printf 0123456789; read y")).await;
        let from = |from_offset| ReadRequest {
            process: pid(process.pid),
            from_offset,
            ..Default::default()
        };
        // There is nothing yet, or there is; a wait finds it.
        let first = read(&client, &ReadRequest { wait: seconds(60), ..from(0) }).await;
        assert_eq!((bytes(&first), first.next_offset), (b"begin\n".to_vec(), 6));
        assert_eq!((first.earliest_offset, &first.end, &first.gap), (0, &None, &None));
        let none = read(&client, &from(6)).await;
        assert_eq!((none.chunks.len(), none.next_offset), (0, 6));
        let short = Duration::from_millis(50);
        let none = read(&client, &ReadRequest { wait: span(short), ..from(6) }).await;
        assert_eq!((none.chunks.len(), none.next_offset), (0, 6));

        let waiting = ReadRequest { wait: seconds(60), ..from(6) };
        let (read_on, sent) = tokio::join!(
            read(&client, &waiting),
            send(&client, pid(process.pid), to_stdin("go\n"))
        );
        sent.unwrap();
        assert!(bytes(&read_on).starts_with(b"0"), "{read_on:?}");
        let all = in_time("all is written", async || {
            Some(read(&client, &from(0)).await).filter(|all| all.next_offset == 16)
        })
        .await;
        assert_eq!(bytes(&all), b"begin\n0123456789");
        let two = read(&client, &ReadRequest { max_bytes: 2, ..from(7) }).await;
        assert_eq!((bytes(&two), two.next_offset), (b"12".to_vec(), 9));
        let ends = HeadTail { head_bytes: 3, tail_bytes: 2 };
        let ends = read(&client, &ReadRequest { head_tail: Some(ends), ..from(1) }).await;
        assert_eq!((bytes(&ends), ends.omitted_bytes), (b"egi89".to_vec(), 10));
        assert_eq!(ends.end, None);
        let ends = HeadTail { head_bytes: 10, tail_bytes: 10 };
        let ends = read(&client, &ReadRequest { head_tail: Some(ends), ..from(0) }).await;
        assert_eq!((bytes(&ends).len(), ends.omitted_bytes), (16, 0));

        let beyond = client.unary::<_, ReadResponse>(READ, &from(17)).await.unwrap_err();
        assert_eq!(beyond.code, "out_of_range");
        let much = ReadRequest { max_bytes: u32::MAX, ..from(0) };
        let much = client.unary::<_, ReadResponse>(READ, &much).await.unwrap_err();
        assert_eq!(much.code, "invalid_argument");
        assert!(much.message.contains("max_bytes"), "{}", much.message);

        let waiting = ReadRequest { wait: seconds(60), ..from(16) };
        let (at_end, closed) =
            tokio::join!(read(&client, &waiting), close_stdin(&client, pid(process.pid)));
        closed.unwrap();
        let end = at_end.end.expect("the end");
        assert_eq!((end.exited, end.end_offset), (true, 16));
        let ends = HeadTail { head_bytes: 3, tail_bytes: 2 };
        let ends = read(&client, &ReadRequest { head_tail: Some(ends), ..from(0) }).await;
        assert_eq!((bytes(&ends), ends.end), (b"beg89".to_vec(), Some(end)));
        process.end().await;
    }
}

#[tokio::test]
async fn waiting_for_what_comes() {
    let daemon = Daemon::start(&[]);
    for wire in STREAMS {
        let client = Client::new(&daemon, wire);
        let name = format!("{wire:?}").replace([' ', '{', '}'], "");
        let script = "echo starting; echo 'ready on port 80' >&2; read x; exit 4";
        let process = begin(&client, &named(sh(script), &name)).await;
        let output = |regex: &str, stderr| {
            let regex = regex.to_owned();
            Some(Condition::Output(wait_request::Output { regex, stderr, from_offset: 0 }))
        };
        match wait(&client, &name, output(r"port (\d+)", None)).await {
            Answer::Match(found) => {
                assert_eq!((&found.bytes[..], found.stderr), (&b"port 80"[..], true));
            }
            other => panic!("{other:?}"),
        }
        let silence = wait_request::Silence { duration: span(Duration::from_millis(30)) };
        let silent = wait(&client, &name, Some(Condition::Silence(silence))).await;
        assert!(matches!(silent, Answer::Silent(_)), "{silent:?}");
        let request = WaitRequest {
            process: id(&name),
            condition: output("port", Some(false)),
            timeout: span(Duration::from_millis(50)),
        };
        let none: WaitResponse = client.unary(WAIT, &request).await.unwrap();
        assert!(matches!(none.result, Some(Answer::TimedOut(_))), "{none:?}");
        assert_eq!(none.next_offset, 26);
        let bad = WaitRequest { process: id(&name), condition: output("(", None), timeout: None };
        let bad = client.unary::<_, WaitResponse>(WAIT, &bad).await.unwrap_err();
        assert_eq!(bad.code, "invalid_argument");
        assert!(bad.message.contains("output.regex"), "{}", bad.message);
        let (ended, closed) =
            tokio::join!(wait(&client, &name, None), close_stdin(&client, id(&name)));
        closed.unwrap();
        assert!(matches!(&ended, Answer::End(end) if end.exit_code == 4), "{ended:?}");
        // Whoever waits for what will not come hears of the end.
        let ended = wait(&client, &name, output("never", None)).await;
        assert!(matches!(&ended, Answer::End(end) if end.exit_code == 4), "{ended:?}");
        process.end().await;
    }
}

#[tokio::test]
async fn waiting_until_a_descendant_listens() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    // The program that surely is there and listens is envd itself.
    let script = format!(
        "read x; {} --listen tcp://127.0.0.1:0 -no-cgroups 2> /dev/null & wait",
        env!("CARGO_BIN_EXE_envd")
    );
    let process = begin(&client, &named(sh(&script), "a")).await;
    let any = Some(Condition::Port(wait_request::Port { number: 0 }));
    let (found, sent) =
        tokio::join!(wait(&client, "a", any), send(&client, id("a"), to_stdin("go\n")));
    sent.unwrap();
    let Answer::Listening(found) = found else { panic!("{found:?}") };
    assert_eq!(found.address, format!("127.0.0.1:{}", found.port));
    let health = reqwest::get(format!("http://{}/health", found.address)).await.unwrap();
    assert!(health.status().is_success());
    let same = Some(Condition::Port(wait_request::Port { number: found.port }));
    assert_eq!(wait(&client, "a", same).await, Answer::Listening(found));
    let bad = WaitRequest {
        process: id("a"),
        condition: Some(Condition::Port(wait_request::Port { number: 65536 })),
        timeout: None,
    };
    let bad = client.unary::<_, WaitResponse>(WAIT, &bad).await.unwrap_err();
    assert_eq!(bad.code, "invalid_argument");
    let request = SendSignalRequest {
        process: id("a"),
        signal: Signal::Sigkill.into(),
        scope: SignalScope::Tree.into(),
        ..Default::default()
    };
    client.unary::<_, SendSignalResponse>(SEND_SIGNAL, &request).await.unwrap();
    process.end().await;
}

#[tokio::test]
async fn the_environment_of_others_is_not_listed() {
    if !able_as_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let as_user = |user: &str| client(&daemon).with("authorization", &basic(user));
    let root = as_user("root");
    let process = begin(&root, &start("sleep", &["1000"]).env("TOKEN", "secret")).await;
    let shown = async |client: &Client| {
        let listed = list(client).await.remove(0);
        assert_eq!((listed.pid, listed.user.as_str()), (process.pid, "root"));
        listed.config.unwrap().envs
    };
    assert_eq!(shown(&root).await.get("TOKEN").map(String::as_str), Some("secret"));
    assert!(shown(&as_user("nobody")).await.is_empty());
    kill(&root, process.pid).await;
    process.end().await;
}

#[tokio::test]
async fn a_process_can_be_made_to_end_with_its_client() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut request = sh("sleep 1000 & echo $!; wait");
    request.stop_on_disconnect = true;
    let mut process = begin(&client, &request).await;
    process.until_it_says("\n").await;
    let (leader, child) = (process.pid, process.said.stdout().trim().parse().unwrap());
    drop(process);
    in_time("both end", async || {
        let gone = |pid| state(pid).is_none_or(|state| state == 'Z');
        (gone(leader) && gone(child)).then_some(())
    })
    .await;
    // One that ends by itself is left alone.
    let mut request = sh("exit 5");
    request.stop_on_disconnect = true;
    assert_eq!(run(&client, &request).await.1.exit_code, 5);
}

#[tokio::test]
async fn a_stuck_reader_is_let_go_and_comes_back_while_a_live_one_gets_everything() {
    let daemon = Daemon::start(&["--output-window", "1048576", "--output-stall-timeout", "1"]);
    let client = Client::new(&daemon, Wire::Grpc);
    let length = 64_usize << 20;
    let script = format!("read x; head -c {length} /dev/zero");
    let mut stuck = begin(&client, &named(sh(&script), "a")).await;
    // A connection of its own: the windows of HTTP/2 are shared.
    let live = Client::new(&daemon, Wire::Connect { json: false });
    let live = connect_from(&live, id("a"), Some(0)).await.unwrap();
    let before = daemon.memory("VmRSS");
    send(&Client::new(&daemon, Wire::Grpc), id("a"), to_stdin("go\n")).await.unwrap();
    let (said, end) = live.end().await;
    assert_eq!((said.stdout.len(), end.exit_code), (length, 0));
    let grown = daemon.memory("VmHWM").saturating_sub(before);
    assert!(grown < 24 * 1024, "{grown} KiB more, of a window of 1 MiB");
    let error = loop {
        match stuck.step().await {
            Ok(None) => {}
            Ok(Some(end)) => panic!("it read nothing, and sees {end:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, "resource_exhausted");
    let at = stuck.at;
    let mut again = connect_from(&client, id("a"), Some(at)).await.unwrap();
    let same = loop {
        if let Some(end) = again.step().await.unwrap() {
            break end;
        }
    };
    assert_eq!(same, end);
    let gone: u64 = again.gaps.iter().map(|(from, to)| to - from).sum();
    assert!(gone > 0, "it was more than the window behind");
    assert_eq!(at + gone + again.said.stdout.len() as u64, length as u64);
}

#[tokio::test]
async fn a_terminal_that_was_closed_and_opened_again_is_read_on() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let script = "t=$(tty); echo one; exec < /dev/null > /dev/null 2>&1; sleep 0.2; echo two > $t";
    let (said, end) = run(&client, &sh(script).pty(80, 24)).await;
    assert_eq!((said.pty(), end.exit_code), ("one\r\ntwo\r\n", 0));
}

#[tokio::test]
async fn upstreams_clients_see_what_they_always_saw() {
    let daemon = Daemon::start(&[]);
    let client = client(&daemon);
    let mut events =
        client.stream::<_, StartResponse>(START, &sh("echo out; exit 2")).await.unwrap();
    let mut kinds = Vec::new();
    while let Some(response) = events.next().await.unwrap() {
        kinds.push(match response.event.unwrap().event.unwrap() {
            Event::Start(start) => format!("start {}", start.pid > 0),
            Event::Data(data) => match data.output.unwrap() {
                Output::Stdout(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
                other => panic!("{other:?}"),
            },
            Event::End(end) => format!("{:?}", upstreams(&end)),
            other => panic!("{other:?}"),
        });
    }
    let status = "exit status 2";
    let end = format!("{:?}", (2, true, status.to_owned(), Some(status.to_owned())));
    assert_eq!(kinds, ["start true", "out\n", &end]);
}
