//! One mount whose server never answers (FUSE, NFS): calls that touch it fail and name it, and
//! everything else goes on.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "hung_mount/servers.rs"]
mod servers;
#[path = "hung_mount/streams.rs"]
mod streams;
#[path = "hung_mount/watches.rs"]
mod watches;

use std::{fs, time::Duration};

use common::{
    able,
    house::{House, rest_error},
    hung_mount::HungMount,
    in_time,
    process::{Running, START, With, sh, start, stdout},
    rpc::{Client, Failure, Messages, Wire},
    soon,
};
use envd::proto::{
    filesystem::{
        ArchiveRequest, ArchiveResponse, CopyRequest, CopyResponse, ExtractRequest,
        ExtractResponse, ReadRequest, ReadResponse, SearchRequest, SearchResponse, WatchDirRequest,
        WatchDirResponse, WriteRequest, WriteResponse, extract_request, watch_dir_response::Event,
        write_request,
    },
    process::{StartRequest, StartResponse},
};

/// More than the threads of a pool, and than the places for uploads.
const MANY: usize = 70;
/// How long an impatient client waits.
const GIVES_UP: Duration = Duration::from_millis(300);
/// Less than a caller's patience; more than a busy machine needs.
const AT_ONCE: Duration = Duration::from_secs(15);

struct Env {
    /// First, so that it is unmounted before the directory around it is removed: that would hang.
    hung: HungMount,
    files: House,
}

impl Env {
    /// A daemon, and in its directory `dir/hung`, which does not answer, and `plain/f`.
    fn new() -> Option<Self> {
        Self::with(House::new())
    }

    /// The same with a daemon that runs already.
    fn with(files: House) -> Option<Self> {
        for dir in ["dir/hung", "plain"] {
            fs::create_dir_all(files.at(dir)).unwrap();
        }
        files.put("plain/f", "x");
        let hung = HungMount::at(files.at("dir/hung").as_ref());
        if !able("root and /dev/fuse", hung.is_some()) {
            return None;
        }
        Some(Self { hung: hung?, files })
    }

    /// What every error has to begin with.
    fn named(&self) -> String {
        format!("the file system at {} does not answer: ", self.hung.path())
    }

    #[track_caller]
    fn check(&self, failure: &Failure, code: &str) {
        assert_eq!(failure.code, code, "{failure:?}");
        assert!(failure.message.contains(&self.named()), "{failure:?}");
    }

    /// Everything elsewhere works, and without delay.
    async fn is_well_elsewhere(&self) {
        let files = &self.files;
        let all = async {
            assert_eq!(files.stat(&files.at("plain/f")).await.unwrap().size, 1);
            assert!(!files.list(&files.at("plain"), 1).await.unwrap().is_empty());
            assert_eq!(files.download(&files.at("plain/f")).await.text().await.unwrap(), "x");
            assert_eq!(files.upload(&files.at("plain/g"), &[], "y").await.status(), 200);
            let request = start("echo", &["well"]);
            assert_eq!(stdout(&files.client, &request).await, "well\n");
            for probe in ["/health", "/livez"] {
                let answer = files.call(reqwest::Method::GET, probe, &[]).await;
                assert_eq!(answer.status(), 204, "{probe}");
            }
        };
        tokio::time::timeout(AT_ONCE, all).await.expect("others do not wait");
    }

    /// As soon as nobody waits for the mount any more, it is an empty directory to look at.
    async fn is_usable_again(&self) {
        in_time("the mount is usable again", async || self.files.stat(self.hung.path()).await.ok())
            .await;
        let above = self.files.at("dir");
        assert_eq!(self.files.list(&above, 1).await.unwrap().len(), 1);
        self.is_well_elsewhere().await;
    }
}

/// Begins many calls and leaves them.
async fn abandon<F: Future + Send + 'static>(call: impl Fn() -> F)
where
    F::Output: Send,
{
    let calls: Vec<_> =
        (0..MANY).map(|_| tokio::spawn(tokio::time::timeout(GIVES_UP, call()))).collect();
    for call in calls {
        assert!(call.await.unwrap().is_err(), "the mount does not answer");
    }
}

fn request_of(path: &str) -> SearchRequest {
    SearchRequest { path: path.to_owned(), pattern: "x".to_owned(), ..SearchRequest::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listings_that_meet_a_hung_mount_fail_by_name_and_hold_up_no_others() {
    let Some(env) = Env::new() else { return };
    let above = env.files.at("dir");
    // More than are served at a time.
    let lists = futures_util::future::join_all((0..6).map(|_| env.files.list(&above, 1)));
    let elsewhere = async {
        tokio::time::sleep(GIVES_UP).await;
        let other = env.files.at("other");
        fs::create_dir(&other).unwrap();
        tokio::time::timeout(AT_ONCE, env.files.list(&other, 1)).await.expect("at once").unwrap();
    };
    let (lists, ()) = soon("listings", async { tokio::join!(lists, elsewhere) }).await;
    for failure in lists {
        env.check(&failure.unwrap_err(), "internal");
    }
    env.is_well_elsewhere().await;
    // Now it is known.
    let again = tokio::time::timeout(AT_ONCE, env.files.list(&above, 1)).await;
    env.check(&again.expect("fails fast").unwrap_err(), "internal");
    env.hung.answer();
    env.is_usable_again().await;
}

/// The attributes of a mount's root are its server's to tell, and not those of the directory above.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_ends_at_a_hung_mount_fails_by_name() {
    let Some(env) = Env::new() else { return };
    let (files, mount) = (&env.files, env.hung.path().to_owned());
    std::os::unix::fs::symlink(&mount, files.at("plain/link")).unwrap();
    let calls = async {
        env.check(&files.stat(&mount).await.unwrap_err(), "internal");
        env.check(&files.list(&mount, 1).await.unwrap_err(), "internal");
        env.check(&files.make_dir(&mount).await.unwrap_err(), "internal");
        env.check(&files.remove(&mount).await.unwrap_err(), "internal");
        env.check(&files.rename(&mount, &files.at("moved")).await.unwrap_err(), "internal");
        for failed in [files.download(&mount).await, files.upload(&mount, &[], "x").await] {
            let message = rest_error(failed, 503).await;
            assert!(message.contains(&env.named()), "{message}");
        }
        // A link to it is told, without what is behind it.
        assert!(files.stat(&files.at("plain/link")).await.unwrap().symlink_target.is_some());
        assert_eq!(files.list(&files.at("plain"), 1).await.unwrap().len(), 2);
    };
    soon("calls for the mount's root", calls).await;
    fs::remove_file(files.at("plain/link")).unwrap();
    env.is_well_elsewhere().await;
    env.hung.answer();
    env.is_usable_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_calls_and_uploads_that_are_left_hold_up_no_others() {
    let Some(mut env) = Env::new() else { return };
    let file = format!("{}/x", env.hung.path());
    let (client, http) = (env.files.client.clone(), env.files.http.clone());
    let stat = envd::proto::filesystem::StatRequest { path: file.clone() };
    abandon(|| {
        let (client, stat) = (client.clone(), stat.clone());
        async move {
            client
                .unary::<_, envd::proto::filesystem::StatResponse>(
                    "/filesystem.Filesystem/Stat",
                    &stat,
                )
                .await
        }
    })
    .await;
    env.is_well_elsewhere().await;
    let url = env.files.files(&[("path", &file)]);
    abandon(|| {
        let request = http.post(url.clone()).header("content-type", "application/octet-stream");
        request.body("content").send()
    })
    .await;
    env.is_well_elsewhere().await;
    env.check(&env.files.stat(&file).await.unwrap_err(), "internal");
    env.check(&env.files.make_dir(&file).await.unwrap_err(), "internal");
    env.check(&env.files.remove(&file).await.unwrap_err(), "internal");
    let plain = env.files.at("plain/f");
    env.check(&env.files.rename(&plain, &file).await.unwrap_err(), "internal");
    for answer in [env.files.upload(&file, &[], "content").await, env.files.download(&file).await] {
        let message = rest_error(answer, 503).await;
        assert!(message.contains(&env.named()), "{message}");
    }
    env.hung.end();
    in_time("it is dead, and says so", async || {
        let failure = env.files.stat(&file).await.unwrap_err();
        (!failure.message.contains(&env.named())).then_some(())
    })
    .await;
    env.is_well_elsewhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_on_trees_and_streams_fails_by_name() {
    let Some(env) = Env::new() else { return };
    let client = &env.files.client;
    let (above, file) = (env.files.at("dir"), format!("{}/x", env.hung.path()));
    let copy = CopyRequest {
        source: above.clone(),
        destination: env.files.at("copy"),
        ..CopyRequest::default()
    };
    let copy = client.unary::<_, CopyResponse>("/filesystem.Filesystem/Copy", &copy);
    let archive = async {
        let request = ArchiveRequest { path: above.clone(), ..ArchiveRequest::default() };
        let path = "/filesystem.Filesystem/Archive";
        let mut chunks: Messages<ArchiveResponse> = client.stream(path, &request).await?;
        while chunks.next().await?.is_some() {}
        Ok(())
    };
    let search = async {
        let path = "/filesystem.Filesystem/Search";
        let mut found: Messages<SearchResponse> = client.stream(path, &request_of(&above)).await?;
        while found.next().await?.is_some() {}
        Ok(())
    };
    let read = async {
        let request = ReadRequest { path: file.clone(), ..ReadRequest::default() };
        let path = "/filesystem.Filesystem/Read";
        let mut pieces: Messages<ReadResponse> = client.stream(path, &request).await?;
        while pieces.next().await?.is_some() {}
        Ok(())
    };
    let write = async {
        let start = write_request::Start { path: file.clone(), ..write_request::Start::default() };
        let start = WriteRequest { event: Some(write_request::Event::Start(start)) };
        let grpc = Client::new(&env.files.daemon, Wire::Grpc);
        let path = "/filesystem.Filesystem/Write";
        let mut answer: Messages<WriteResponse> = grpc.streams(path, &[start]).await?;
        answer.next().await.map(drop)
    };
    let extract = async {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        tar.append_data(&mut header, "hung/x", &b"x"[..]).unwrap();
        let start = extract_request::Start { path: above.clone(), ..Default::default() };
        let events = [
            extract_request::Event::Start(start),
            extract_request::Event::Data(tar.into_inner().unwrap().into()),
        ];
        let requests = events.map(|event| ExtractRequest { event: Some(event) });
        let grpc = Client::new(&env.files.daemon, Wire::Grpc);
        let path = "/filesystem.Filesystem/Extract";
        let mut answer: Messages<ExtractResponse> = grpc.streams(path, &requests).await?;
        answer.next().await.map(drop)
    };
    let all = async { tokio::join!(copy, archive, search, read, write, extract) };
    let (copy, archive, search, read, write, extract) = soon("all of them fail", all).await;
    for failed in [copy.map(drop), archive, search, read, write, extract] {
        env.check(&failed.unwrap_err(), "unavailable");
    }
    env.is_well_elsewhere().await;
    env.hung.answer();
    env.is_usable_again().await;
}

async fn failing_start(client: Client, request: StartRequest) -> Option<Failure> {
    match client.stream::<_, StartResponse>(START, &request).await {
        Err(failure) => Some(failure),
        Ok(messages) => Running::of(messages).await.err(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starts_that_need_a_hung_mount_hold_up_no_others() {
    let Some(env) = Env::new() else { return };
    let script = env.files.put("script", format!("#!{}/interpreter\n", env.hung.path()));
    common::house::set_mode(&script, 0o755);
    let path = format!("{}:/usr/bin:/bin", env.hung.path());
    let command = format!("{}/command", env.hung.path());
    let requests = [
        start("true", &[]).cwd(Some(env.hung.path())),
        start(&command, &[]),
        start("true", &[]).env("PATH", &path),
        start(&script, &[]),
    ];
    let client = env.files.client.clone();
    for request in &requests {
        abandon(|| failing_start(client.clone(), request.clone())).await;
        env.is_well_elsewhere().await;
    }
    for request in &requests {
        let failure = soon("it fails", failing_start(client.clone(), request.clone())).await;
        env.check(&failure.expect("an error"), "internal");
    }
    env.hung.answer();
    env.is_usable_again().await;
    in_time("what was given up does not run", async || {
        let all = common::process::list(&client).await;
        all.is_empty().then_some(())
    })
    .await;
    // It is refused while calls from before still wait.
    let said = in_time("commands start there", async || {
        let request = sh("pwd").cwd(Some(env.hung.path()));
        let stream = client.stream(START, &request).await.ok()?;
        let running: Running<StartResponse> = Running::of(stream).await.ok()?;
        Some(running.try_end().await.ok()?.0)
    })
    .await;
    assert_eq!(said.stdout, format!("{}\n", env.hung.path()).into_bytes());
}

/// The next file event of a watch.
async fn next_name(messages: &mut Messages<WatchDirResponse>) -> String {
    loop {
        let message = messages.next().await.unwrap().expect("it goes on");
        if let Some(Event::Filesystem(event)) = message.event {
            return event.name;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_mount_that_moves_into_a_watched_tree_ends_no_watch() {
    let files = House::new();
    for dir in ["tree", "outside/inner/hung", "plain"] {
        fs::create_dir_all(files.at(dir)).unwrap();
    }
    let hung = HungMount::at(files.at("outside/inner/hung").as_ref());
    if !able("root and /dev/fuse", hung.is_some()) {
        return;
    }
    let mut hung = hung.unwrap();
    let watch = async |dir: &str, recursive| {
        let request =
            WatchDirRequest { path: files.at(dir), recursive, ..WatchDirRequest::default() };
        let mut messages: Messages<WatchDirResponse> =
            files.client.stream("/filesystem.Filesystem/WatchDir", &request).await.unwrap();
        let first = messages.next().await.unwrap().unwrap();
        assert!(matches!(first.event, Some(Event::Start(_))));
        messages
    };
    let (mut tree, mut plain) = (watch("tree", true).await, watch("plain", false).await);
    fs::rename(files.at("outside/inner"), files.at("tree/inner")).unwrap();
    hung.moved_to(files.at("tree/inner/hung").as_ref());
    assert_eq!(soon("an event", next_name(&mut tree)).await, "inner");
    assert_eq!(soon("an event", next_name(&mut tree)).await, "inner/hung");
    // Those of others, and of the rest of the tree.
    files.put("plain/new", "");
    assert_eq!(soon("an event", next_name(&mut plain)).await, "new");
    files.put("tree/inner/new", "");
    assert_eq!(soon("an event", next_name(&mut tree)).await, "inner/new");
    // A watch that begins above it works too, and by now it is known.
    let mut again = soon("a watch", watch("tree", true)).await;
    files.put("tree/more", "");
    assert_eq!(soon("an event", next_name(&mut again)).await, "more");
    assert_eq!(soon("an event", next_name(&mut tree)).await, "more");
    drop(hung);
    files.is_well().await;
}
