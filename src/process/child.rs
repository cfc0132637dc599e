//! The child: its control group, its limits, its user, and in words why there is none.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::unistd::{geteuid, getgroups, getresgid, getresuid};

use super::{
    Groups, Manager, StartError, StartSpec, Stdio, Unavailable, cgroup::Leaf, limits,
    reach::stand_on_command, spec::SYSTEM_TAG, start::Attempt,
};
use crate::{
    blocking::Busy,
    guest::users::User,
    quote,
    sys::{
        errno,
        spawn::{self, Child, Credentials, Rlimit, SpawnError, Stage},
    },
};

/// Blocks: makes the child's control group, starts the child and waits until it has executed.
pub(super) fn spawn(
    manager: &Manager,
    spec: &StartSpec,
    pwd: String,
    stdio: &[OwnedFd; 3],
) -> Result<(Child, Option<Leaf>), StartError> {
    let env = spec.environment(pwd);
    stand_on_command(spec, &env).map_err(Busy::from)?;
    let credentials = credentials(&spec.user);
    let [stdin, stdout, stderr] = stdio;
    let rlimits = rlimits(spec, manager.options.nofile);
    let leaf = match spec.tag.as_deref() {
        Some(SYSTEM_TAG) => {
            let why = format!("the tag {SYSTEM_TAG} keeps a process in the daemon's control group");
            Groups::none(why).leaf(spec.stdio, &spec.limits)
        }
        _ => manager.groups.leaf(spec.stdio, &spec.limits),
    };
    let mut leaf =
        leaf.map_err(|unavailable| StartError::Limit { attempt: Attempt::of(spec), unavailable })?;
    let mut child = spawn::Spec {
        cmd: &spec.cmd,
        args: &spec.args,
        env: &env,
        cwd: &spec.cwd,
        stdio: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        terminal: matches!(spec.stdio, Stdio::Pty { .. }),
        credentials: credentials.as_ref(),
        rlimits: &rlimits,
        cgroup: leaf.as_ref().and_then(Leaf::fd),
    };
    let failed = match spawn::spawn(&child) {
        Ok(child) => {
            leaf.iter_mut().for_each(Leaf::close);
            return Ok((child, leaf));
        }
        Err(error) => error,
    };
    // As where a group cannot be made: without limits it is missed, no more.
    let without = match (&leaf, group_refused(&failed)) {
        (Some(_), Some(why)) if spec.limits.settings().is_empty() => {
            tracing::warn!(why, "a process starts without a control group");
            child.cgroup = None;
            spawn::spawn(&child).map_err(|error| spawn_error(spec, &error))
        }
        (Some(_), Some(why)) => Err(StartError::limits(spec, &why)),
        _ => Err(spawn_error(spec, &failed)),
    };
    if let Some(mut leaf) = leaf
        && let Err(error) = leaf.remove()
    {
        leaf.close();
        tracing::warn!(%error, "the control group of a process that did not start stays for now");
        manager.groups.miss(Arc::new(leaf));
    }
    without.map(|child| (child, None))
}

/// Why a child could not be put into its control group, if it was that.
fn group_refused(error: &SpawnError) -> Option<String> {
    let errno = match error {
        SpawnError::Child { stage: Stage::Cgroup, errno, .. } => *errno,
        SpawnError::System { what: "cgroup.procs", source } => source.raw_os_error()?,
        // What clone3 says about a group.
        SpawnError::System { source, .. } => source.raw_os_error().filter(|errno| {
            let of_groups =
                [libc::EACCES, libc::EBUSY, libc::EOPNOTSUPP, libc::ENOENT, libc::ENODEV];
            of_groups.contains(errno)
        })?,
        _ => return None,
    };
    Some(format!("a process cannot be put into its control group: {}", errno::text(errno)))
}

/// The limits that a child gets: those of before the daemon raised its own, unless it asks for
/// others.
fn rlimits(spec: &StartSpec, nofile: Option<(u64, u64)>) -> Vec<Rlimit> {
    let asked_for = spec.limits.rlimits();
    let own = nofile.map(|(soft, hard)| Rlimit { resource: limits::NOFILE, soft, hard });
    let mut all = asked_for.to_vec();
    all.extend(own.filter(|_| asked_for.iter().all(|limit| limit.resource != limits::NOFILE)));
    all
}

/// What the child has to become, or `None` when the daemon is that already: then it needs no right
/// to change, which a daemon without root (or in a container without CAP_SETGID) has not.
fn credentials(user: &User) -> Option<Credentials> {
    let (Ok(uids), Ok(gids)) = (getresuid(), getresgid()) else {
        return Some(wanted(user));
    };
    let is_user = [uids.real, uids.effective, uids.saved].iter().all(|id| id.as_raw() == user.uid)
        && [gids.real, gids.effective, gids.saved].iter().all(|id| id.as_raw() == user.gid);
    let sorted = |mut groups: Vec<u32>| {
        groups.push(user.gid);
        groups.sort_unstable();
        groups.dedup();
        groups
    };
    let has_groups = || {
        let own = getgroups().unwrap_or_default().iter().map(|gid| gid.as_raw()).collect();
        sorted(own) == sorted(user.groups.clone())
    };
    // Without root the groups are what they are.
    let as_is = is_user && (!geteuid().is_root() || has_groups());
    (!as_is).then(|| wanted(user))
}

fn wanted(user: &User) -> Credentials {
    Credentials { uid: user.uid, gid: user.gid, groups: user.groups.clone() }
}

fn spawn_error(spec: &StartSpec, error: &SpawnError) -> StartError {
    let attempt = Attempt::of(spec);
    let errno = match error {
        SpawnError::Nul(_) => None,
        SpawnError::System { source, .. } => source.raw_os_error(),
        SpawnError::Child { errno, .. } => Some(*errno),
    };
    let reason = match error {
        SpawnError::Nul(_) => {
            return StartError::Nul { attempt, field: "a string contains NUL".to_owned() };
        }
        SpawnError::System { what, source } => {
            format!("fork/exec {}: {what}: {}", quote::text(&spec.cmd), errno::text_of(source))
        }
        SpawnError::Child { stage, errno: number, detail } => {
            let text = errno::text(*number);
            let user = &spec.user;
            match stage {
                Stage::Cgroup => format!("join control group: {text}"),
                Stage::Rlimit => return StartError::rlimit(spec, *detail, &text),
                Stage::Descriptors => format!("leave the daemon's descriptors: {text}"),
                Stage::Session => format!("setsid: {text}"),
                Stage::Terminal => format!("set controlling terminal: {text}"),
                Stage::Stdio => format!("dup stdio: {text}"),
                Stage::Groups => format!("set groups of user '{}': {text}", user.name),
                Stage::Gid => format!("set group {}: {text}", user.gid),
                Stage::Uid => format!("set user '{}' ({}): {text}", user.name, user.uid),
                Stage::Chdir => format!("chdir '{}': {text}", quote::path(&spec.cwd)),
                Stage::Exec => format!("fork/exec {}: {text}", quote::text(&spec.cmd)),
            }
        }
    };
    StartError::Spawn { attempt, reason, errno }
}

impl StartError {
    fn limits(spec: &StartSpec, why: &str) -> Self {
        let field = spec.limits.settings().first().map_or("limits", |setting| setting.field);
        let unavailable = Unavailable { field: field.to_owned(), why: why.to_owned(), errno: None };
        Self::Limit { attempt: Attempt::of(spec), unavailable }
    }

    /// The limit of setrlimit(2) at a place could not be set.
    fn rlimit(spec: &StartSpec, place: i32, text: &str) -> Self {
        let limit = usize::try_from(place).ok().and_then(|place| spec.limits.rlimits().get(place));
        let field = format!("limits.rlimits[{place}]");
        let why = match limit {
            Some(limit) => {
                format!("{} {}:{}: {text}", limits::rlimit_name(limit), limit.soft, limit.hard)
            }
            // Its old limit of open files, which is lower than the daemon's.
            None => format!("nofile: {text}"),
        };
        Self::Limit {
            attempt: Attempt::of(spec),
            unavailable: Unavailable { field, why, errno: None },
        }
    }
}
