//! Delegation: the daemon can give each process a cgroup of its own only below a root that has
//! the controllers enabled and no processes of its own (the kernel's rule of no internal
//! processes). So PID 1 and the daemon move into leaves, `init` and `envd`.

use std::{fs, io, path::Path};

use nix::unistd::Pid;

use super::console::say;
use crate::sys::procfs;

const ROOT: &str = "/sys/fs/cgroup";
/// Where PID 1 lives.
const INIT: &str = "init";
/// Where the daemon lives.
const AGENT: &str = "envd";

/// What there is to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cgroups {
    /// A hierarchy of our own.
    Own,
    /// None, an older version, or one that others use too.
    None,
}

impl Cgroups {
    /// Looks at what is mounted. A container that shares the machine's root cgroup must not
    /// rearrange it: processes from outside our PID namespace show as 0 there.
    pub(super) fn find() -> Self {
        let at_root = fs::read("/proc/self/cgroup")
            .is_ok_and(|own| procfs::unified_cgroup(&own).as_deref() == Some(Path::new("/")));
        let ours = fs::read_to_string(Path::new(ROOT).join("cgroup.procs"))
            .is_ok_and(|pids| pids.lines().all(|pid| pid != "0"));
        if at_root && ours { Self::Own } else { Self::None }
    }

    /// Moves PID 1 into its leaf and hands every controller down.
    pub(super) fn delegate(self) {
        if self == Self::None {
            return;
        }
        self.place(Pid::this(), INIT);
        let root = Path::new(ROOT);
        let controllers = match fs::read_to_string(root.join("cgroup.controllers")) {
            Ok(controllers) => controllers,
            Err(error) => return say!("reading the controllers of {ROOT}: {error}"),
        };
        // One by one: a controller that cannot be enabled must not take the others with it.
        for controller in controllers.split_whitespace() {
            let path = root.join("cgroup.subtree_control");
            if let Err(error) = fs::write(path, format!("+{controller}")) {
                say!("enabling the controller {controller} in {ROOT}: {error}");
            }
        }
    }

    /// Moves the daemon into its leaf.
    pub(super) fn place_agent(self, pid: Pid) {
        self.place(pid, AGENT);
    }

    fn place(self, pid: Pid, leaf: &str) {
        if self == Self::None {
            return;
        }
        let leaf = Path::new(ROOT).join(leaf);
        let made = match fs::create_dir(&leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::write(leaf.join("cgroup.procs"), pid.to_string()),
        };
        if let Err(error) = made {
            say!("moving the process {pid} into {}: {error}", leaf.display());
        }
    }
}
