use std::{os::unix::fs::PermissionsExt, sync::LazyLock, thread};

use nix::sys::stat::Mode as FileMode;

use super::*;
use crate::sys::pidfd::Exit;

static NULL: LazyLock<File> =
    LazyLock::new(|| File::options().read(true).write(true).open("/dev/null").unwrap());

static ENV: LazyLock<Vec<(String, String)>> = LazyLock::new(|| env("/usr/bin:/bin"));

fn env(path: &str) -> Vec<(String, String)> {
    vec![("PATH".to_owned(), path.to_owned())]
}

fn base() -> Spec<'static> {
    low_fds::reserve().unwrap();
    Spec {
        cmd: "true",
        args: &[],
        env: &ENV,
        cwd: Path::new("/"),
        stdio: [NULL.as_fd(), NULL.as_fd(), NULL.as_fd()],
        terminal: false,
        credentials: None,
        rlimits: &[],
        cgroup: None,
    }
}

struct Ran {
    child: Result<Child, SpawnError>,
    output: String,
    exit: Option<Exit>,
}

/// Runs to the end, and gives what was written to stdout and stderr.
fn run(mode: Mode, spec: &Spec<'_>) -> Ran {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let stdio = [NULL.as_fd(), write.as_fd(), write.as_fd()];
    let child = spawn_as(&Spec { stdio, ..spec.clone() }, mode, Joining::Moved);
    drop(write);
    let mut output = String::new();
    File::from(read).read_to_string(&mut output).unwrap();
    let exit = child.as_ref().ok().and_then(|child| pidfd::wait_blocking(child.as_ref()).unwrap());
    Ran { child, output, exit }
}

fn shell(script: &str) -> [String; 2] {
    ["-c".to_owned(), script.to_owned()]
}

const OPEN_FILES: Rlimit = Rlimit { resource: 7, soft: 123, hard: 456 };

const MODES: [Mode; 4] = [Mode::Vfork, Mode::Fork, Mode::VforkByPid, Mode::ForkByPid];

#[test]
fn a_search_path_beyond_the_kernels_bound_is_too_long_an_argument_list() {
    for mode in MODES {
        let env = env(&"a:".repeat(2 << 20));
        let ran = run(mode, &Spec { env: &env, ..base() });
        let error = ran.child.unwrap_err();
        assert!(
            matches!(error, SpawnError::Child { stage: Stage::Exec, errno: libc::E2BIG, .. }),
            "{error}"
        );
    }
}

#[test]
fn the_child_is_an_ordinary_citizen_of_its_own_session() {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    for mode in MODES {
        let script = "cut -d' ' -f1,5,6,19 /proc/self/stat; cat /proc/self/oom_score_adj; \
                      echo $$; grep -E 'Sig(Blk|Ign)' /proc/self/status; ulimit -n";
        let ran =
            run(mode, &Spec { cmd: "sh", args: &shell(script), rlimits: &[OPEN_FILES], ..base() });
        let lines: Vec<&str> = ran.output.lines().collect();
        let pid = ran.child.unwrap().pid.to_string();
        let [stat, oom, shell, blocked, ignored, nofile] = lines[..] else { panic!("{lines:?}") };
        let stat: Vec<&str> = stat.split(' ').collect();
        assert_eq!(stat[1..], [pid.as_str(), pid.as_str(), "0"], "group, session, nice");
        assert_eq!((oom, shell, nofile), ("100", pid.as_str(), "123"));
        assert_eq!(blocked, "SigBlk:\t0000000000000000");
        assert_eq!(ignored, "SigIgn:\t0000000000000000");
        assert_eq!(ran.exit, Some(Exit::Exited(0)));
    }
    assert_eq!(std::fs::read_to_string("/proc/self/oom_score_adj").unwrap(), own);
}

#[test]
fn only_the_three_descriptors_reach_the_child() {
    // One that is not close-on-exec, as a careless starter of the daemon leaves them.
    let leaky = nix::fcntl::open("/dev/null", OFlag::O_RDONLY, FileMode::empty()).unwrap();
    for mode in MODES {
        let ran = run(mode, &Spec { cmd: "ls", args: &["/proc/self/fd".to_owned()], ..base() });
        // The fourth is the directory that ls reads.
        assert_eq!(ran.output, "0\n1\n2\n3\n");
    }
    drop(leaky);
}

#[test]
fn a_user_switch_sets_exactly_the_given_groups() {
    let nobody = Credentials { uid: 65534, gid: 65534, groups: vec![65534, 7777] };
    for mode in MODES {
        let ran = run(
            mode,
            &Spec {
                cmd: "sh",
                args: &shell("id -u; id -g; id -G"),
                credentials: Some(&nobody),
                ..base()
            },
        );
        assert_eq!(ran.output, "65534\n65534\n65534 7777\n");
    }
    assert!(nix::unistd::geteuid().is_root());
}

#[test]
fn the_directory_is_entered_with_the_users_rights() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let nobody = Credentials { uid: 65534, gid: 65534, groups: vec![65534] };
    for mode in MODES {
        let ran = run(mode, &Spec { cwd: dir.path(), credentials: Some(&nobody), ..base() });
        match ran.child {
            Err(SpawnError::Child { stage: Stage::Chdir, errno: libc::EACCES, .. }) => {}
            other => panic!("{other:?}"),
        }
        let ran = run(mode, &Spec { cwd: Path::new("/etc/passwd"), ..base() });
        match ran.child {
            Err(SpawnError::Child { stage: Stage::Chdir, errno: libc::ENOTDIR, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn commands_are_found_as_execvp_finds_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode| {
        std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(dir.path().join(name), mode).unwrap();
    };
    file("a/tool", "", 0o644);
    file("b/tool", "echo script $0 $1\n", 0o755);
    file("c/-dash", "#!/bin/sh\necho dash\n", 0o755);
    file("a/closed", "", 0o644);
    let root = dir.path().to_str().unwrap();
    let path = format!("{root}/none:{root}/a:{root}/b:/etc/passwd:{root}/c");
    let arg = ["x".to_owned()];
    for mode in MODES {
        let search = |cmd: &str| {
            let env = env(&path);
            run(mode, &Spec { cmd, args: &arg, env: &env, ..base() })
        };
        let tool = search("tool");
        assert_eq!(tool.output, format!("script {root}/b/tool x\n"));
        assert_eq!(search("-dash").output, "dash\n");
        for (cmd, errno, code) in [
            ("closed", libc::EACCES, 126),
            ("missing", libc::ENOENT, 127),
            ("", libc::ENOENT, 127),
            ("/etc", libc::EACCES, 126),
            ("/etc/passwd/x", libc::ENOENT, 127),
        ] {
            let ran = search(cmd);
            assert_eq!(ran.child.unwrap().exec_error, Some(errno), "{cmd}");
            assert_eq!(ran.exit, Some(Exit::Exited(code)), "{cmd}");
        }
        // An empty element is the working directory.
        let env = env("");
        let ran = run(
            mode,
            &Spec {
                cmd: "sh",
                args: &shell("echo here"),
                env: &env,
                cwd: Path::new("/bin"),
                ..base()
            },
        );
        assert_eq!(ran.output, "here\n");
    }
}

#[test]
fn arguments_beyond_the_kernels_bound_are_an_error_and_leave_no_zombie() {
    for mode in MODES {
        let ran = run(mode, &Spec { args: &["x".repeat(200_000)], ..base() });
        match ran.child {
            Err(SpawnError::Child { stage: Stage::Exec, errno: libc::E2BIG, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn many_threads_can_spawn_at_once() {
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            thread::spawn(move || {
                for mode in MODES.into_iter().cycle().take(40) {
                    let ran =
                        run(mode, &Spec { cmd: "echo", args: &[worker.to_string()], ..base() });
                    assert_eq!(ran.output, format!("{worker}\n"));
                    assert_eq!(ran.exit, Some(Exit::Exited(0)));
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
}

/// A control group for one test, where there are any to be had.
struct Group(std::path::PathBuf);

impl Group {
    fn new(name: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let place = words.nth(1)?;
            (words.next()? == "cgroup2").then(|| place.to_owned())
        });
        let dir = Path::new(&root?).join(format!("envd-{name}-{}", std::process::id()));
        std::fs::create_dir(&dir).ok()?;
        Some(Self(dir))
    }

    fn has(&self, path: &str) -> bool {
        let own = self.0.file_name().unwrap().to_str().unwrap();
        path.lines().any(|line| line.starts_with("0::/") && line.ends_with(own))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).unwrap();
    }
}

#[test]
fn a_child_is_in_its_control_group_from_the_beginning() {
    let Some(group) = Group::new("spawn") else {
        crate::skipped::skip("root and a cgroup v2 that can be written to");
        return;
    };
    let dir = File::open(&group.0).unwrap();
    let nobody = Credentials { uid: 65534, gid: 65534, groups: vec![65534] };
    for mode in MODES {
        for joining in [Joining::Born, Joining::Moved] {
            let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
            let args = ["/proc/self/cgroup".to_owned()];
            let spec = Spec {
                cmd: "cat",
                args: &args,
                stdio: [NULL.as_fd(), write.as_fd(), write.as_fd()],
                credentials: Some(&nobody),
                cgroup: Some(dir.as_fd()),
                ..base()
            };
            let child = spawn_as(&spec, mode, joining).unwrap();
            drop(write);
            let mut output = String::new();
            File::from(read).read_to_string(&mut output).unwrap();
            let exit = pidfd::wait_blocking(child.as_ref()).unwrap();
            assert_eq!(exit, Some(Exit::Exited(0)), "{mode:?} {joining:?}");
            assert!(group.has(&output), "{mode:?} {joining:?}: {output}");
        }
    }
    // One that is no control group is told, not ignored.
    let tmp = File::open("/tmp").unwrap();
    spawn(&Spec { cgroup: Some(tmp.as_fd()), ..base() }).unwrap_err();
    let ran = run(Mode::Vfork, &base());
    assert_eq!(ran.exit, Some(Exit::Exited(0)));
}

#[test]
fn limits_are_set_or_nothing_is_started() {
    let limit = |resource, soft, hard| Rlimit { resource, soft, hard };
    for mode in MODES {
        let ran = run(
            mode,
            &Spec {
                cmd: "sh",
                args: &shell("ulimit -n; ulimit -c; ulimit -Hc"),
                rlimits: &[OPEN_FILES, limit(4, 0, 1024)],
                ..base()
            },
        );
        let blocks = ran.output.lines().nth(2).unwrap().parse::<u64>().unwrap();
        assert!(ran.output.starts_with("123\n0\n") && [1, 2].contains(&blocks), "{}", ran.output);
        let ran = run(mode, &Spec { rlimits: &[OPEN_FILES, limit(7, 2, 1)], ..base() });
        match ran.child {
            Err(SpawnError::Child { stage: Stage::Rlimit, errno: libc::EINVAL, detail: 1 }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A child that asked for memory, for a variable or for any lock of the daemon's would wait for a
/// thread that does not exist in it, for ever.
#[test]
fn between_clone_and_exec_no_lock_of_another_thread_is_needed() {
    let done = std::sync::atomic::AtomicBool::new(false);
    let done = &done;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let held: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
                    drop(std::hint::black_box(held));
                }
            });
        }
        for mode in MODES.into_iter().cycle().take(200) {
            let ran = run(mode, &Spec { cmd: "echo", args: &["x".to_owned()], ..base() });
            assert_eq!(ran.output, "x\n");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
