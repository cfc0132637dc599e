//! A program that was just written is executed at once, while other commands start: the children that are
//! being started must not hold a copy of the descriptor by which the daemon wrote it ("Text file busy").

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use common::{
    able, eventually,
    house::{House, set_mode},
    process::{With, run, start},
    rpc::{Client, Messages, Wire},
    soon,
};
use envd::proto::filesystem::{
    CopyRequest, CopyResponse, ExtractRequest, ExtractResponse, WriteRequest, WriteResponse,
    extract_request, write_request,
};
use futures_util::{StreamExt, stream};
use serde_json::json;
use tokio::sync::oneshot;

/// Programs that are written in each way.
const TRIES: usize = 30;
/// Commands that are started all the time.
const OTHERS: usize = 4;
/// A way to write a program: all that the daemon has.
const WAYS: [Way; 5] = [Way::Upload, Way::Write, Way::Compose, Way::Copy, Way::Extract];

#[derive(Debug, Clone, Copy)]
enum Way {
    Upload,
    Write,
    Compose,
    Copy,
    Extract,
}

struct Programs {
    house: House,
    client: Client,
    content: Vec<u8>,
    /// The program, and an archive of it under the name `extracted`.
    original: String,
    archive: Vec<u8>,
}

impl Programs {
    fn new() -> Self {
        let house = House::new();
        let content = std::fs::read("/bin/true").unwrap();
        let original = house.put("original", &content);
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        archive.append_data(&mut header, "extracted", &*content).unwrap();
        let archive = archive.into_inner().unwrap();
        let client = Client::new(&house.daemon, Wire::Grpc);
        Self { house, client, content, original, archive }
    }

    /// Writes the program and gives its path.
    async fn write(&self, way: Way, name: &str) -> String {
        let to = self.house.at(name);
        let bytes = Bytes::from(self.content.clone());
        match way {
            Way::Upload => {
                let url = self.house.files(&[("path", &to)]);
                let request = self.house.http.post(url).body(bytes);
                let request = request.header("content-type", "application/octet-stream");
                assert_eq!(request.send().await.unwrap().status(), 200);
            }
            Way::Write => {
                let event = |event| WriteRequest { event: Some(event) };
                let requests = [
                    event(write_request::Event::Start(write_request::Start {
                        path: to.clone(),
                        ..Default::default()
                    })),
                    event(write_request::Event::Chunk(write_request::Chunk {
                        data: bytes,
                        ..Default::default()
                    })),
                    event(write_request::Event::Commit(write_request::Commit::default())),
                ];
                let path = "/filesystem.Filesystem/Write";
                let mut messages: Messages<WriteResponse> =
                    self.client.streams(path, &requests).await.unwrap();
                messages.next().await.unwrap().expect("an answer");
            }
            Way::Compose => {
                let body = json!({ "source_paths": [self.part(name)], "destination": to });
                let url = self.house.daemon.url("/files/compose");
                let request = self.house.http.post(url).body(body.to_string());
                assert_eq!(request.send().await.unwrap().status(), 200);
            }
            Way::Copy => {
                let request = CopyRequest {
                    source: self.original.clone(),
                    destination: to.clone(),
                    ..Default::default()
                };
                let _: CopyResponse =
                    self.client.unary("/filesystem.Filesystem/Copy", &request).await.unwrap();
            }
            Way::Extract => {
                let event = |event| ExtractRequest { event: Some(event) };
                let requests = [
                    event(extract_request::Event::Start(extract_request::Start {
                        path: to.clone(),
                        ..Default::default()
                    })),
                    event(extract_request::Event::Data(self.archive.clone().into())),
                ];
                let path = "/filesystem.Filesystem/Extract";
                let mut messages: Messages<ExtractResponse> =
                    self.client.streams(path, &requests).await.unwrap();
                messages.next().await.unwrap().expect("an answer");
                return format!("{to}/extracted");
            }
        }
        to
    }

    /// The part that is composed, which goes with that.
    fn part(&self, name: &str) -> String {
        self.house.put(&format!("{name}.part"), &self.content)
    }
}

#[tokio::test]
async fn a_file_that_was_just_written_can_be_executed_while_others_start() {
    let programs = Programs::new();
    let done = Arc::new(AtomicBool::new(false));
    let others: Vec<_> = (0..OTHERS)
        .map(|_| {
            let (client, done) =
                (Client::new(&programs.house.daemon, Wire::Grpc), Arc::clone(&done));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    run(&client, &start("true", &[])).await;
                }
            })
        })
        .collect();
    for way in WAYS {
        for number in 0..TRIES {
            let path = programs.write(way, &format!("{way:?}{number}")).await;
            set_mode(&path, 0o755);
            let (said, end) = run(&programs.client, &start(&path, &[])).await;
            assert_eq!((end.exit_code, said.stderr()), (0, ""), "{way:?} {number}");
        }
    }
    done.store(true, Ordering::Relaxed);
    for other in others {
        other.await.unwrap();
    }
}

/// A search path on which a child tries tens of thousands of files before it executes its command.
fn long_search() -> String {
    format!("{}/usr/bin:/bin", "a:".repeat(60_000))
}

/// The children of a daemon that have not executed their command yet: what they run is still the daemon.
fn not_executed(daemon: u32) -> usize {
    let exe = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = exe(daemon).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
    let lists =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    let pids = lists.flat_map(|list| {
        list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>()
    });
    pids.filter(|pid| exe(*pid).as_ref() == Some(&own)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_was_made_during_an_upload_does_not_keep_the_file_open() {
    if !able("lists of children", Path::new("/proc/thread-self/children").exists()) {
        return;
    }
    let programs = Programs::new();
    for number in 0..5 {
        let to = programs.house.at(&format!("slow{number}"));
        let (first, rest) = programs.content.split_at(1000);
        let (go_on, wait) = oneshot::channel::<()>();
        let rest = rest.to_vec();
        let body = stream::iter([first.to_vec()]).chain(stream::once(async move {
            wait.await.unwrap();
            rest
        }));
        let request = programs.house.http.post(programs.house.files(&[("path", &to)]));
        let request = request.header("content-type", "application/octet-stream");
        let body = reqwest::Body::wrap_stream(body.map(Ok::<_, std::io::Error>));
        let upload = tokio::spawn(request.body(body).send());
        // It may have no name before it is whole.
        let is_file = |opened: &Path| {
            opened.starts_with(programs.house.dir()) && opened != programs.house.dir()
        };
        eventually("the file is being written", || {
            (programs.house.opened(is_file) > 0).then_some(())
        });
        let seen = Arc::new(AtomicBool::new(false));
        let slow = tokio::spawn({
            let (seen, client) = (Arc::clone(&seen), programs.client.clone());
            async move {
                let request = start("true", &[]).env("PATH", &long_search());
                while !seen.load(Ordering::Relaxed) {
                    assert_eq!(run(&client, &request).await.1.exit_code, 0);
                }
            }
        });
        // It has what the daemon had open when it was made.
        soon("a child that has not executed", async {
            while not_executed(programs.house.daemon.pid()) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        seen.store(true, Ordering::Relaxed);
        go_on.send(()).unwrap();
        assert_eq!(upload.await.unwrap().unwrap().status(), 200);
        set_mode(&to, 0o755);
        let (said, end) = run(&programs.client, &start(&to, &[])).await;
        assert_eq!((end.exit_code, said.stderr()), (0, ""), "{number}");
        slow.await.unwrap();
    }
}
