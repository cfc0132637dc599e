//! Watches beside a mount that does not answer, and watches with one inside.

use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EventType, GetWatcherEventsRequest,
    GetWatcherEventsResponse,
};

use super::{Env, fs, in_time};

/// The threads that make calls of the watching thread that may hang.
const OTHERS: &str = "envd-watch-io";
/// The renames of a storm, and how many lie between two questions.
const RENAMES: usize = 400;
const ASK_EVERY: usize = 50;

impl Env {
    async fn create_watcher(&self, dir: &str) -> String {
        let request = CreateWatcherRequest {
            path: self.files.at(dir),
            recursive: true,
            include_entry: true,
            ..CreateWatcherRequest::default()
        };
        let path = "/filesystem.Filesystem/CreateWatcher";
        let answer: CreateWatcherResponse = self.files.client.unary(path, &request).await.unwrap();
        answer.watcher_id
    }

    fn has_thread(&self, name: &str) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.files.daemon.pid())).unwrap();
        tasks.filter_map(Result::ok).any(|task| {
            let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            comm.trim_end() == name
        })
    }
}

/// A call that another thread makes takes many times as long, and a storm of renames takes several for
/// each event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_pay_for_a_mount_only_where_they_touch_it() {
    let Some(env) = Env::new() else { return };
    let id = env.create_watcher("plain").await;
    let mut created = 0;
    for i in 0..RENAMES {
        let (old, new) =
            (env.files.at(&format!("plain/d{i}")), env.files.at(&format!("plain/e{i}")));
        fs::create_dir(&old).unwrap();
        fs::write(format!("{old}/file"), "x").unwrap();
        fs::rename(&old, &new).unwrap();
        if (i + 1) % ASK_EVERY == 0 {
            let path = "/filesystem.Filesystem/GetWatcherEvents";
            let request = GetWatcherEventsRequest { watcher_id: id.clone(), ..Default::default() };
            let answer: GetWatcherEventsResponse =
                env.files.client.unary(path, &request).await.unwrap();
            let new = answer
                .events
                .iter()
                .filter(|event| event.r#type() == EventType::Create && event.name.starts_with('e'));
            created += new.filter(|event| !event.name.contains('/')).count();
            assert!(!env.has_thread(OTHERS), "it makes its calls itself");
        }
    }
    assert_eq!(created, RENAMES);
    // The other way round, a tree that the mount is in.
    env.create_watcher("dir").await;
    in_time("others make the calls", async || env.has_thread(OTHERS).then_some(())).await;
}
