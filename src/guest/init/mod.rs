//! PID 1: `envd init`, and envd as `/sbin/init` of a VM or as the entry point of a container.
//!
//! PID 1 prepares the machine and then does three things only: it reaps orphans, keeps the daemon
//! running and ends the machine in order. The daemon is its child, a process of its own. So PID 1
//! never has a second thread or a request to serve, a crash of the daemon is no kernel panic, and
//! PID 1, which waits for every process that has lost its parent, cannot take an exit status away
//! from the daemon, whose processes are the daemon's own children.
//!
//! In a container nothing of the machine is touched: kernel modules, the kernel's command line
//! (the machine's!) and its file systems belong to others there, and the end is an exit.
//!
//! Plain `envd` as the entry point of a container, which is how upstream's images start theirs, is
//! split in the same way, because nobody else there reaps orphans, and one process must not both reap
//! strangers and own children: it would take their exit statuses away from itself. It leaves alone
//! what the container's engine has set up: mounts, network, limits, environment and directory.

mod agent;
mod cgroup;
mod cmdline;
mod console;
mod control;
mod handover;
mod modules;
mod mounts;
mod network;
mod power;
mod root;
mod supervise;
mod teardown;

use std::{
    ffi::{CStr, OsString},
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{self, ExitCode},
};

use nix::sys::{
    prctl,
    reboot::set_cad_enabled,
    signal::{SigSet, SigmaskHow},
};

use self::{
    agent::Agent,
    cgroup::Cgroups,
    cmdline::Params,
    console::say,
    handover::{HandoverError, hand_over},
};
pub use self::{
    control::{ControlError, ask},
    power::Ending,
};
use super::boot;
use crate::sys::procfs;

/// PID 1's name in lists of processes, by which `envd poweroff` knows it.
const NAME: &CStr = c"envd-init";
/// The inode of the first PID namespace, which the kernel fixes (`PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// `CAP_SYS_BOOT`, as a bit.
const CAP_SYS_BOOT: u64 = 1 << 22;
/// Any one of these permissions lets root execute a file.
const EXECUTABLE: u32 = 0o111;

/// How PID 1 was started.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// The arguments for the daemon, without words.
    pub args: &'a [OsString],
    /// Whether all of an init's work was asked for, by the word `init` or by that name. PID 1 of a
    /// machine does it in any case.
    pub by_name: bool,
    /// Says what to exit with where these arguments start no daemon (`--help`, a mistake), having
    /// printed why. Not asked on a machine, whose PID 1 must not exit.
    pub check: fn(&[OsString]) -> Option<ExitCode>,
}

/// The arguments without the words that come first, which are errors to the daemon.
pub fn flags(args: &[OsString]) -> &[OsString] {
    let is_word = |arg: &OsString| {
        let bytes = arg.as_encoded_bytes();
        !bytes.starts_with(b"-") || matches!(bytes, b"-" | b"--")
    };
    let words = args.iter().take_while(|arg| is_word(arg)).count();
    args.get(words..).unwrap_or_default()
}

/// Is PID 1. Returns only in a container, or when this is not PID 1.
pub fn run(start: Start<'_>) -> ExitCode {
    if process::id() != 1 {
        say!("this is for PID 1; to run the daemon, leave the word init away");
        return ExitCode::from(2);
    }
    let since_kernel = boot::passed_on(boot::KERNEL_US).unwrap_or_else(boot::microseconds);
    // Signals wait from here on: the kernel drops those to PID 1 that it neither handles nor
    // blocks. Blocking cannot fail.
    let inherited = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).ok();
    let unblock = || {
        let _ = inherited.unwrap_or_else(SigSet::empty).thread_set_mask();
    };
    let _ = prctl::set_name(NAME);

    // Whether this is a machine is known by /proc, which no engine leaves out, and no kernel mounts.
    let maybe_machine = !Path::new("/proc/self").exists();
    if start.by_name || maybe_machine {
        mounts::first();
    }
    let machine = is_machine();
    if !machine && let Some(code) = (start.check)(start.args) {
        return code;
    }
    let whole = start.by_name || machine;
    if whole {
        console::take_if_mute();
    }
    let params = if machine { of_the_machine() } else { Params::default() };
    if let Some(device) = &params.root
        && mounts::root_is_in_memory()
    {
        let error = root::switch(device, &params, since_kernel, unblock);
        say!("{error}; serving from where this is");
        let _ = SigSet::all().thread_set_mask();
    }
    if whole {
        mounts::second();
        network::set_up(&params);
    }
    let cgroups = Cgroups::find();
    let agent = Agent::new(start.args, since_kernel, cgroups, whole);

    let mut running = None;
    if let Some(init) = &params.handover {
        let error = hand_over(init, &agent, unblock);
        say!("handing over to {}: {error}; going on as PID 1", init.display());
        let _ = SigSet::all().thread_set_mask();
        if let HandoverError::Exec { agent, .. } = error {
            running = Some(agent);
        }
    }
    cgroups.delegate();
    let (ending, agent) = supervise::supervise(&agent, running, machine);
    say!("{ending:?}");
    power::end_processes(agent, machine);
    if machine {
        power::end_machine(ending);
    }
    ExitCode::SUCCESS
}

/// What only the PID 1 of a whole machine does: modules, and what the host asks for.
fn of_the_machine() -> Params {
    // Ctrl-alt-del becomes a SIGINT. A kernel without the key has nothing to disable.
    let _ = set_cad_enabled(false);
    modules::load();
    let line = fs::read("/proc/cmdline").unwrap_or_else(|error| {
        say!("reading the kernel's command line: {error}");
        Vec::new()
    });
    // Words of others may be in any encoding.
    let (params, bad) = Params::parse(&String::from_utf8_lossy(&line));
    bad.iter().for_each(|bad| say!("{bad}"));
    params
}

/// Whether the machine is ours to set up and to switch off: this is the first PID namespace, and
/// nobody has taken the right to reboot away. Elsewhere, to make a file system read-only, say,
/// would hit those outside.
fn is_machine() -> bool {
    in_first_pid_namespace()
        && fs::read("/proc/self/status").is_ok_and(|status| may_reboot(&status))
}

/// Whether this process is in the PID namespace of the machine, and not in a container's.
fn in_first_pid_namespace() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|ns| ns.ino() == FIRST_PID_NAMESPACE)
}

fn may_reboot(status: &[u8]) -> bool {
    let effective = procfs::entry(status, b"CapEff:").and_then(|hex| std::str::from_utf8(hex).ok());
    let bits = effective.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    bits.is_some_and(|bits| bits & CAP_SYS_BOOT != 0)
}

/// Whether this is a file that can be executed.
fn executable(meta: &fs::Metadata) -> io::Result<()> {
    match meta.is_file() && meta.permissions().mode() & EXECUTABLE != 0 {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "not an executable file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_kernels_command_line_are_not_arguments() {
        let os = |args: &[&str]| args.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(flags(&os(&["splash", "auto"])).is_empty());
        assert_eq!(flags(&os(&["splash", "--", "--verbose", "x"])), os(&["--verbose", "x"]));
    }

    #[test]
    fn the_right_to_reboot() {
        assert!(may_reboot(b"Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_reboot(b"CapEff:\t00000000a80425fb\n"), "a container's usual set");
        assert!(!may_reboot(b""));
    }
}
