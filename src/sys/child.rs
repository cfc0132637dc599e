//! What a child does between clone and exec.
//!
//! The child usually shares the daemon's memory (CLONE_VM) while one thread of the daemon waits for
//! it (CLONE_VFORK). So [`run`] allocates nothing, takes no lock, panics nowhere and calls nothing
//! but `syscall(2)`: not even libc's `setuid`, which would change every thread of the daemon. All
//! that it needs is in a [`Plan`], made before.
//!
//! While a child that has dropped its privileges still shares memory with a root daemon, its user
//! must not be able to look into it. The kernel sees to that: a change of uid makes the memory
//! undumpable, hence closed to ptrace, for as long as it lives. The daemon must therefore
//! **never** set PR_SET_DUMPABLE again: it would open the next child's window. A daemon of
//! root's is undumpable from its start (`guest/inherited.rs`); the price is that it writes no core
//! dump.

// The numbers here are descriptors, flags and addresses on their way into registers.
#![allow(clippy::cast_sign_loss, clippy::cast_possible_wrap, clippy::cast_possible_truncation)]

use std::{
    convert::Infallible,
    ffi::{CString, NulError},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    ptr,
    sync::atomic::Ordering,
};

use libc::{c_char, c_int, c_long, c_void};

use super::{
    low_fds::LowFds,
    spawn::{self, Rlimit, Spec, Stage},
};

/// The search path of a command whose environment has no PATH, and the PATH that processes get where
/// the daemon itself has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Longer names cannot be opened; a candidate beyond it is not even tried. Together with
/// [`PATH_TOO_LONG`] this bounds the memory of a search.
const PATH_MAX: usize = libc::PATH_MAX as usize;

/// A longer name is in no directory.
const NAME_MAX: usize = 255;

/// A search path of this length or longer is not taken apart: with its name it is more than the
/// kernel accepts of one environment string (MAX_ARG_STRLEN, of 32 pages of 4 KiB), and execve(2)
/// would say E2BIG to every candidate.
const PATH_TOO_LONG: usize = 128 * 1024;

/// The last signal number on Linux.
const LAST_SIGNAL: c_int = 64;

/// The size of the kernel's signal set, which the raw calls ask for.
const SIGSET_SIZE: usize = 8;

/// ioprio_set(2): a process, class best-effort, level 4; libc has no names for them.
const IOPRIO_WHO_PROCESS: usize = 1;
const IOPRIO_BEST_EFFORT_4: usize = (2 << 13) | 4;

/// How willingly the kernel kills a command for want of memory: sooner than the daemon.
const OOM_SCORE_ADJ: &[u8] = b"100";

/// The stage, the error number, and which one of several.
type Failure = (Stage, c_int, c_int);

/// Everything that the child needs, allocated before it exists.
#[derive(Debug)]
pub(super) struct Plan {
    /// Owns what the pointers below point to.
    strings: Vec<CString>,
    /// The files to try, in order.
    candidates: Vec<*const c_char>,
    /// What to say when none of them is there.
    not_found: c_int,
    /// Null-terminated, as the next two.
    argv: Vec<*const c_char>,
    /// `sh FILE args...`, for a script without `#!`; the child sets FILE.
    script_argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    cwd: CString,
    stdio: [c_int; 3],
    /// The low numbers that `stdio` has, of a child that shares the daemon's descriptors at first.
    low: Option<LowFds>,
    /// Where a child with memory of its own reports why it failed.
    report: Option<OwnedFd>,
    /// The same in memory, for the daemon that shares it.
    failure: Option<[c_int; 3]>,
    terminal: bool,
    credentials: Option<(u32, u32)>,
    groups: Vec<u32>,
    rlimits: Vec<(u32, libc::rlimit64)>,
    /// The umask, where the daemon has changed its own.
    umask: Option<u32>,
    /// `cgroup.procs` of the group to move to.
    moved_to: Option<OwnedFd>,
}

impl Plan {
    /// Makes the plan. The numbers of `stdio` and `report` are above 2 (the caller sees to it).
    pub(super) fn new(
        spec: &Spec<'_>,
        (stdio, low): ([c_int; 3], Option<LowFds>),
        report: Option<OwnedFd>,
        moved_to: Option<OwnedFd>,
    ) -> Result<Self, NulError> {
        let mut plan = Self {
            strings: Vec::new(),
            candidates: Vec::new(),
            not_found: libc::ENOENT,
            argv: Vec::new(),
            script_argv: vec![c"sh".as_ptr(), ptr::null()],
            envp: Vec::new(),
            cwd: CString::new(spec.cwd.as_os_str().as_bytes())?,
            stdio,
            low,
            report,
            failure: None,
            terminal: spec.terminal,
            credentials: spec.credentials.map(|to| (to.uid, to.gid)),
            groups: spec.credentials.map(|to| to.groups.clone()).unwrap_or_default(),
            rlimits: spec.rlimits.iter().map(for_kernel).collect(),
            umask: spawn::umask_of_children(),
            moved_to,
        };
        let cmd = plan.own(spec.cmd.as_bytes().to_vec())?;
        plan.argv.push(cmd);
        for arg in spec.args {
            let arg = plan.own(arg.as_bytes().to_vec())?;
            plan.argv.push(arg);
            plan.script_argv.push(arg);
        }
        plan.argv.push(ptr::null());
        plan.script_argv.push(ptr::null());
        for (name, value) in spec.env {
            let variable = plan.own([name.as_bytes(), b"=", value.as_bytes()].concat())?;
            plan.envp.push(variable);
        }
        plan.envp.push(ptr::null());
        // Of two variables of one name getenv finds the first, and so does this search.
        let path = spec.env.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.as_str());
        plan.search(spec.cmd, path.unwrap_or(DEFAULT_PATH), cmd)?;
        Ok(plan)
    }

    /// Whether the child has the daemon's table of descriptors until its first step.
    pub(super) fn shares_descriptors(&self) -> bool {
        self.low.is_some()
    }

    /// Why a child that shared the daemon's memory has failed: stage, error number, and which one.
    pub(super) fn failure(&self) -> Option<[c_int; 3]> {
        self.failure
    }

    /// Fills in the files to try, as execvp(3) finds them.
    fn search(&mut self, cmd: &str, path: &str, whole: *const c_char) -> Result<(), NulError> {
        // An empty name, or one too long for a directory entry, gets its errno from the kernel.
        if cmd.is_empty() || cmd.contains('/') || cmd.len() > NAME_MAX {
            self.candidates.push(whole);
            return Ok(());
        }
        if path.len() >= PATH_TOO_LONG {
            self.not_found = libc::E2BIG;
            return Ok(());
        }
        for dir in path.split(':') {
            if dir.len() + 1 + cmd.len() >= PATH_MAX {
                continue;
            }
            // An empty element is the working directory.
            let file = match dir {
                "" => whole,
                dir => self.own([dir.as_bytes(), b"/", cmd.as_bytes()].concat())?,
            };
            self.candidates.push(file);
        }
        Ok(())
    }

    fn own(&mut self, bytes: Vec<u8>) -> Result<*const c_char, NulError> {
        let string = CString::new(bytes)?;
        // The bytes are on the heap and stay where they are when the CString moves.
        let pointer = string.as_ptr();
        self.strings.push(string);
        Ok(pointer)
    }
}

fn for_kernel(limit: &Rlimit) -> (u32, libc::rlimit64) {
    (limit.resource, libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard })
}

/// The child: becomes the command, or reports why it cannot and exits as a shell would.
///
/// `plan` must point to a [`Plan`] that nobody else touches while the child runs.
pub(super) extern "C" fn run(plan: *mut c_void) -> c_int {
    // SAFETY: as the contract above says; the parent's thread is suspended or has its own copy.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    // SAFETY: we are the child, and the plan's pointers are valid.
    let Err((stage, errno, detail)) = unsafe { become_command(plan) };
    let report = [stage as i32, errno, detail];
    plan.failure = Some(report);
    let code = if errno == libc::ENOENT { 127 } else { 126 };
    // SAFETY: writes twelve bytes that live on this stack, and ends the child without running the
    // daemon's exit handlers.
    unsafe {
        if let Some(pipe) = &plan.report {
            let bytes = size_of_val(&report);
            let to = pipe.as_raw_fd() as usize;
            let _ = raw(libc::SYS_write, [to, addr(report.as_ptr()), bytes, 0, 0]);
        }
        let _ = raw(libc::SYS_exit_group, [code, 0, 0, 0, 0]);
    }
    // Not reached; without exit_group there is no system to speak of.
    0
}

/// # Safety
/// Only in a child whose memory nobody else writes to, with valid pointers in `plan`.
unsafe fn become_command(plan: &mut Plan) -> Result<Infallible, Failure> {
    // SAFETY: every call gets valid pointers or none: to the plan, to constants, or to this stack.
    unsafe {
        // First, so that all that follows is counted there.
        if let Some(processes) = &plan.moved_to {
            let args = [processes.as_raw_fd() as usize, addr(c"0".as_ptr()), 1, 0, 0];
            at(Stage::Cgroup, raw(libc::SYS_write, args))?;
        }
        // From here on none of the daemon's files is kept open by this child. What needs a higher number
        // than the stdio has been done.
        if let Some(low) = &plan.low {
            let unshare = libc::CLOSE_RANGE_UNSHARE as usize;
            let range = [low.above() as usize, u32::MAX as usize, unshare, 0, 0];
            at(Stage::Descriptors, raw(libc::SYS_close_range, range))?;
            low.is_apart.store(true, Ordering::Release);
        }
        // Always a session and a group of its own: `kill 0` then hits this command alone.
        at(Stage::Session, raw(libc::SYS_setsid, [0; 5]))?;
        let [stdin, stdout, stderr] = plan.stdio;
        if plan.terminal {
            let request = libc::TIOCSCTTY as usize;
            at(Stage::Terminal, raw(libc::SYS_ioctl, [stdin as usize, request, 0, 0, 0]))?;
        }
        for (from, to) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
            at(Stage::Stdio, raw(libc::SYS_dup3, [from as usize, to, 0, 0, 0]))?;
        }
        if plan.low.is_some() {
            // The stdio of other children, whose output would not end while this one is held up.
            let _ = raw(libc::SYS_close_range, [3, u32::MAX as usize, 0, 0, 0]);
        }
        set_priorities();
        if let Some(umask) = plan.umask {
            let _ = raw(libc::SYS_umask, [umask as usize, 0, 0, 0, 0]);
        }
        // Before the user changes: the right to raise a limit goes with it.
        for (place, (resource, limit)) in (0..).zip(&plan.rlimits) {
            let args = [0, *resource as usize, addr(limit), 0, 0];
            if let Err(errno) = raw(libc::SYS_prlimit64, args) {
                return Err((Stage::Rlimit, errno, place));
            }
        }
        if let Some((uid, gid)) = plan.credentials {
            let groups = [plan.groups.len(), addr(plan.groups.as_ptr()), 0, 0, 0];
            at(Stage::Groups, raw(libc::SYS_setgroups, groups))?;
            at(Stage::Gid, raw(libc::SYS_setgid, [gid as usize, 0, 0, 0, 0]))?;
            at(Stage::Uid, raw(libc::SYS_setuid, [uid as usize, 0, 0, 0, 0]))?;
            if uid != 0 {
                // The kernel has set fs.suid_dumpable, which systems with a core dump service set
                // to 2; and before Linux 5.16 a core dump kills all who share the memory.
                let _ = raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 0, 0, 0, 0]);
            }
        }
        // With the user's rights: a directory that they cannot enter is an error, not a way in.
        at(Stage::Chdir, raw(libc::SYS_chdir, [addr(plan.cwd.as_ptr()), 0, 0, 0, 0]))?;
        reset_signals();
        // Ours are close-on-exec anyway; whoever started the daemon may have left others open.
        let range = [3, u32::MAX as usize, libc::CLOSE_RANGE_CLOEXEC as usize, 0, 0];
        let _ = raw(libc::SYS_close_range, range);
        exec(plan)
    }
}

/// The command is an ordinary citizen, whatever the daemon is. What fails here is not needed.
///
/// # Safety
/// Only in the child.
unsafe fn set_priorities() {
    // SAFETY: the pointers are to constants.
    unsafe {
        let path = addr(c"/proc/self/oom_score_adj".as_ptr());
        let here = libc::AT_FDCWD as isize as usize;
        let flags = (libc::O_WRONLY | libc::O_CLOEXEC) as usize;
        // The kernel leaves the daemon's own score alone though the memory is shared: it
        // recognises a vfork.
        if let Ok(file) = raw(libc::SYS_openat, [here, path, flags, 0, 0]) {
            let text = [file as usize, addr(OOM_SCORE_ADJ.as_ptr()), OOM_SCORE_ADJ.len(), 0, 0];
            let _ = raw(libc::SYS_write, text);
            let _ = raw(libc::SYS_close, [file as usize, 0, 0, 0, 0]);
        }
        let _ = raw(libc::SYS_setpriority, [libc::PRIO_PROCESS as usize, 0, 0, 0, 0]);
        let _ = raw(libc::SYS_ioprio_set, [IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_4, 0, 0]);
    }
}

/// Default dispositions first, then an empty mask: the daemon's handlers must never run here.
///
/// # Safety
/// Only in the child.
unsafe fn reset_signals() {
    // The kernel's sigaction is at most four words, and zeros in it mean SIG_DFL.
    let default = [0_u64; 8];
    let empty = 0_u64;
    // SAFETY: the pointers are to this stack, and larger than what the kernel reads.
    unsafe {
        for signal in 1..=LAST_SIGNAL {
            let action = [signal as usize, addr(default.as_ptr()), 0, SIGSET_SIZE, 0];
            let _ = raw(libc::SYS_rt_sigaction, action);
        }
        let mask = [libc::SIG_SETMASK as usize, addr(&raw const empty), 0, SIGSET_SIZE, 0];
        let _ = raw(libc::SYS_rt_sigprocmask, mask);
    }
}

/// execvp(3): the first candidate that can be executed; a file that exists but must not be
/// executed is remembered, and reported when no other is found.
///
/// # Safety
/// Only in the child, with valid pointers in `plan`.
unsafe fn exec(plan: &mut Plan) -> Result<Infallible, Failure> {
    let mut found = plan.not_found;
    let envp = addr(plan.envp.as_ptr());
    for &file in &plan.candidates {
        // SAFETY: the strings are valid and the arrays null-terminated.
        let mut result =
            unsafe { raw(libc::SYS_execve, [addr(file), addr(plan.argv.as_ptr()), envp, 0, 0]) };
        if result == Err(libc::ENOEXEC) {
            if let Some(slot) = plan.script_argv.get_mut(1) {
                *slot = file;
            }
            let shell = [addr(c"/bin/sh".as_ptr()), addr(plan.script_argv.as_ptr()), envp, 0, 0];
            // SAFETY: as above. Where there is no shell the format error stands.
            let _ = unsafe { raw(libc::SYS_execve, shell) };
            result = Err(libc::ENOEXEC);
        }
        match result {
            Err(libc::EACCES) => found = libc::EACCES,
            Err(libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT) => {}
            Err(errno) => return Err((Stage::Exec, errno, 0)),
            Ok(_) => {}
        }
    }
    Err((Stage::Exec, found, 0))
}

/// # Safety
/// As the system call demands of its arguments.
unsafe fn raw(number: c_long, [a, b, c, d, e]: [usize; 5]) -> Result<c_long, c_int> {
    // SAFETY: `syscall` is the bare instruction; it sets errno in the memory of the thread that
    // waits for us, which does not read it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 {
        // SAFETY: errno of the thread whose registers we have inherited.
        Err(unsafe { *libc::__errno_location() })
    } else {
        Ok(result)
    }
}

fn at(stage: Stage, result: Result<c_long, c_int>) -> Result<(), Failure> {
    match result {
        Ok(_) => Ok(()),
        Err(errno) => Err((stage, errno, 0)),
    }
}

fn addr<T>(pointer: *const T) -> usize {
    pointer.expose_provenance()
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd, path::Path};

    use super::*;

    #[test]
    fn a_search_path_that_the_kernel_refuses_is_not_taken_apart() {
        let null = File::open("/dev/null").unwrap();
        let cmd = "c".repeat(NAME_MAX);
        let candidates = |cmd: &str, length: usize| {
            let env = [("PATH".to_owned(), "a:".repeat(length / 2))];
            let spec = Spec {
                cmd,
                args: &[],
                env: &env,
                cwd: Path::new("/"),
                stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
                terminal: false,
                credentials: None,
                rlimits: &[],
                cgroup: None,
            };
            let plan = Plan::new(&spec, ([3, 4, 5], None), None, None).unwrap();
            (plan.candidates.len(), plan.not_found)
        };
        assert_eq!(candidates(&cmd, 4 << 20), (0, libc::E2BIG));
        assert_eq!(candidates(&cmd, 1000), (501, libc::ENOENT));
        // What is not looked for does not care.
        assert_eq!(candidates("/bin/true", 4 << 20), (1, libc::ENOENT));
    }
}
