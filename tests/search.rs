//! Searching, as a client sees it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, path::Path};

use common::{
    Daemon, in_time,
    rpc::{Client, Failure, Messages, WIRES, Wire},
};
use envd::proto::filesystem::{
    FileType, SearchMatch, SearchRequest, SearchResponse, SearchSummary,
    search_response::Event,
    search_summary::{SkipReason, Truncation},
};

const SEARCH: &str = "/filesystem.Filesystem/Search";

async fn begin(
    client: &Client,
    request: &SearchRequest,
) -> Result<Messages<SearchResponse>, Failure> {
    let mut messages: Messages<SearchResponse> = client.stream(SEARCH, request).await?;
    let first = messages.next().await?.expect("a start").event.unwrap();
    assert!(matches!(first, Event::Start(_)), "first came {first:?}");
    Ok(messages)
}

async fn search(
    client: &Client,
    request: &SearchRequest,
) -> Result<(Vec<SearchMatch>, SearchSummary), Failure> {
    let mut messages = begin(client, request).await?;
    let mut found = Vec::new();
    loop {
        match messages.next().await?.expect("a summary comes").event.unwrap() {
            Event::Match(one) => found.push(one),
            Event::Summary(summary) => {
                assert!(messages.next().await?.is_none(), "the summary is the last");
                return Ok((found, summary));
            }
            Event::Keepalive(_) => {}
            Event::Start(_) => panic!("a second start"),
        }
    }
}

fn text(path: &Path, pattern: &str) -> SearchRequest {
    let (path, pattern) = (path.to_str().unwrap().to_owned(), pattern.to_owned());
    SearchRequest { path, pattern, ..SearchRequest::default() }
}

#[tokio::test]
async fn every_protocol_streams_what_is_found() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("src/deep")).unwrap();
    fs::write(dir.path().join("src/deep/main.rs"), "fn main() {\n    needle();\n}\n").unwrap();
    fs::write(dir.path().join("src/other.txt"), "needle").unwrap();
    fs::write(dir.path().join("binary"), b"needle\n\0").unwrap();
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let request = SearchRequest {
            include: vec!["*.rs".to_owned()],
            before_context: 1,
            include_entry: true,
            ..text(dir.path(), "needle")
        };
        let (found, summary) = search(&client, &request).await.unwrap();
        let path = dir.path().join("src/deep/main.rs").to_str().unwrap().to_owned();
        assert_eq!(found.len(), 2, "{wire:?}");
        let (before, line) = (&found[0], &found[1]);
        assert_eq!((before.line.as_ref(), before.context), (&b"fn main() {"[..], true));
        assert_eq!((line.line.as_ref(), line.context), (&b"    needle();"[..], false));
        assert_eq!((&line.path, line.r#type()), (&path, FileType::File));
        assert_eq!((line.line_number, line.byte_offset, line.line_truncated), (2, 12, false));
        let ranges: Vec<_> = line.ranges.iter().map(|range| (range.start, range.end)).collect();
        assert_eq!(ranges, [(4, 10)]);
        assert_eq!(line.entry.as_ref().unwrap().path, path);
        assert_eq!((summary.matches, summary.searched), (1, 1));
        assert_eq!(summary.truncated(), Truncation::Unspecified);

        let (found, summary) = search(&client, &text(dir.path(), "needle")).await.unwrap();
        assert_eq!((found.len(), summary.matches), (2, 2));
        let skipped: Vec<_> = summary.skipped.iter().map(|s| (s.reason(), s.count)).collect();
        assert_eq!(skipped, [(SkipReason::Binary, 1)]);

        let by_name = SearchRequest { include: vec!["deep".to_owned()], ..text(dir.path(), "") };
        let (found, _) = search(&client, &by_name).await.unwrap();
        assert_eq!((found.len(), found[0].r#type()), (1, FileType::Directory));
        assert_eq!((found[0].line_number, &found[0].entry), (0, &None));
    }
}

#[tokio::test]
async fn what_cannot_be_searched_says_why() {
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let shown = missing.display();
    for wire in WIRES {
        let client = Client::new(&daemon, wire);
        let error = search(&client, &text(&missing, "x")).await.unwrap_err();
        assert_eq!(error.code, "not_found");
        let wanted = format!("path not found: open {shown}: no such file or directory");
        assert_eq!(error.message, wanted);
        let error = search(&client, &text(dir.path(), "(")).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument");
        assert!(error.message.starts_with("pattern: "), "{error:?}");
        let negative = pbjson_types::Duration { seconds: -1, nanos: 0 };
        let request = SearchRequest { timeout: Some(negative), ..text(dir.path(), "x") };
        let error = search(&client, &request).await.unwrap_err();
        assert_eq!(error.message, "timeout: not between 0 and 3600 seconds");
    }
}

#[tokio::test]
async fn without_a_path_the_working_directory_is_searched() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "x").unwrap();
    let daemon = Daemon::start(&["--default-workdir", dir.path().to_str().unwrap()]);
    let client = Client::new(&daemon, Wire::Connect { json: true });
    let (found, _) = search(&client, &text(Path::new(""), "x")).await.unwrap();
    assert_eq!(found[0].path, dir.path().join("file").to_str().unwrap());
}

#[tokio::test]
async fn searches_that_clients_leave_make_room_for_others() {
    let daemon = Daemon::start(&[]);
    let client = Client::new(&daemon, Wire::Connect { json: false });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "a line that matches\n".repeat(500_000)).unwrap();
    let request = SearchRequest {
        max_matches: 1_000_000,
        max_bytes_returned: 256 << 20,
        ..text(dir.path(), "line")
    };
    // More than run at a time, and none of them reads to the end.
    for _ in 0..12 {
        let mut messages = begin(&client, &request).await.unwrap();
        messages.next().await.unwrap().expect("a match");
    }
    let (found, _) = search(&client, &text(dir.path(), "none")).await.unwrap();
    assert!(found.is_empty());
    in_time("nothing of it is open", async || {
        let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
        let open = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        (!open.into_iter().any(|path| path.starts_with(dir.path()))).then_some(())
    })
    .await;
    let peak = daemon.memory("VmHWM");
    assert!(peak < 96 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn a_hostile_tree_is_searched_to_its_end_and_costs_little() {
    use std::os::unix::fs::symlink;
    let daemon = Daemon::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b")).unwrap();
    fs::write(at("a/b/real"), "needle\n").unwrap();
    fs::write(at("new\nline"), "needle\n").unwrap();
    // Links in circles, out, and to nowhere.
    symlink("..", at("a/b/up")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink("/", at("root")).unwrap();
    symlink("/nowhere", at("dangling")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // One line of a hole of a gibibyte, which is NUL bytes, and one of what is no hole.
    fs::File::create(at("hole")).unwrap().set_len(1 << 30).unwrap();
    fs::write(at("line"), vec![b'x'; 9 << 20]).unwrap();
    fs::write(at("binary"), b"needle\0needle\n").unwrap();
    let client = Client::new(&daemon, Wire::Grpc);
    let (found, summary) = search(&client, &text(dir.path(), "needle")).await.unwrap();
    let mut names: Vec<_> = found
        .iter()
        .map(|one| one.path.strip_prefix(dir.path().to_str().unwrap()).unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["/a/b/real", "/new\nline"]);
    let skipped = |reason: SkipReason| {
        let all = summary.skipped.iter().filter(|skipped| skipped.reason() == reason);
        all.map(|skipped| skipped.count).sum::<u64>()
    };
    assert_eq!(skipped(SkipReason::Binary), 2, "{summary:?}");
    assert_eq!(skipped(SkipReason::LineTooLong), 1, "{summary:?}");
    assert_eq!(skipped(SkipReason::Special), 1, "{summary:?}");
    assert_eq!(summary.truncated(), Truncation::Unspecified, "{summary:?}");
    let peak = daemon.memory("VmHWM");
    assert!(peak < 64 << 10, "the daemon grew to {peak} KiB");

    // With bytes of every kind, and an expression that others would take for ever over.
    let everything = SearchRequest { binary: true, ..text(dir.path(), "(x+x+)+y|needle") };
    let (found, summary) = search(&client, &everything).await.unwrap();
    assert!(found.len() >= 3, "{} lines", found.len());
    assert!(skipped_at_least(&summary, SkipReason::LineTooLong, 2), "{summary:?}");
    let peak = daemon.memory("VmHWM");
    assert!(peak < 96 << 10, "the daemon grew to {peak} KiB");
}

fn skipped_at_least(summary: &SearchSummary, reason: SkipReason, count: u64) -> bool {
    summary.skipped.iter().any(|skipped| skipped.reason() == reason && skipped.count >= count)
}
