//! Mounts that answer some calls, kernels without mount ids, and so many mounts that nothing is left.

use std::time::Instant;

use envd::blocking::{JOB_STALL, MAX_FILE_THREADS, MAX_STUCK_THREADS};
use reqwest::Method;

use super::{AT_ONCE, Env, House, With, able, failing_start, fs, in_time, soon, start};
use crate::common::{
    Daemon,
    hung_mount::{HungMount, with_own_mounts},
    seccomp::{self, Refused},
};

/// `STATX_MNT_ID`: Linux 5.8.
const STATX_MNT_ID: u32 = 0x1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_that_looks_no_name_up_fails_by_name() {
    let Some(env) = Env::new() else { return };
    env.hung.answer_for_attributes();
    let file = format!("{}/x", env.hung.path());
    let begun = Instant::now();
    let failure = soon("a call", env.files.stat(&file)).await.unwrap_err();
    env.check(&failure, "internal");
    assert!(begun.elapsed() < JOB_STALL, "not given up as a call that takes its time");
    let again = tokio::time::timeout(AT_ONCE, env.files.stat(&file)).await;
    env.check(&again.expect("now it is known").unwrap_err(), "internal");
    env.is_well_elsewhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernel_without_mount_ids_knows_the_mounts_of_descriptors_all_the_same() {
    let mut command = Daemon::command(&["--listen", "tcp://127.0.0.1:0"]);
    let refused = Refused::with_bits(libc::SYS_statx, 3, STATX_MNT_ID, libc::ENOSYS);
    seccomp::behind(&mut command, &[refused]);
    let Some(env) = Env::with(House::with(Daemon::spawn(&mut command))) else { return };
    let above = env.files.at("dir");
    env.check(&soon("a listing", env.files.list(&above, 1)).await.unwrap_err(), "internal");
    let request = start("true", &[]).cwd(Some(env.hung.path()));
    let failure = soon("a start", failing_start(env.files.client.clone(), request)).await;
    env.check(&failure.expect("an error"), "internal");
    env.is_well_elsewhere().await;
    env.hung.answer();
    env.is_usable_again().await;
}

/// Each mount keeps one thread, and none is left.
#[tokio::test]
async fn livez_is_red_while_no_thread_for_files_returns() {
    let possible = crate::common::is_root() && with_own_mounts();
    if !able("root and mount namespaces", possible) {
        return;
    }
    let files = House::new();
    let mut mounts = Vec::new();
    for i in 0..MAX_FILE_THREADS + MAX_STUCK_THREADS + 8 {
        let path = files.at(&format!("m{i}"));
        fs::create_dir(&path).unwrap();
        let hung = HungMount::at(path.as_ref());
        if !able("root and /dev/fuse", hung.is_some()) {
            return;
        }
        mounts.extend(hung);
    }
    let livez = async || files.call(Method::GET, "/livez", &[]).await;
    assert_eq!(livez().await.status(), 204);
    let paths: Vec<_> = mounts.iter().map(|hung| format!("{}/x", hung.path())).collect();
    let calls = futures_util::future::join_all(paths.iter().map(|path| files.stat(path)));
    let red = in_time("it is red", async || {
        let answer = livez().await;
        (answer.status() == 503).then_some(answer)
    });
    let look = async {
        let text = red.await.text().await.unwrap();
        assert_eq!(text, "no thread of the pool 'files' returns from its call\n");
        mounts.iter().for_each(HungMount::answer);
        in_time("it is green again", async || (livez().await.status() == 204).then_some(())).await;
    };
    let (ended, ()) = tokio::join!(calls, look);
    assert!(ended.iter().all(Result::is_err), "there is no such file, or no answer");
    files.is_well().await;
}
