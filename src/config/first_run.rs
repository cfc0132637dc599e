//! The defaults of a person's first run.
//!
//! Images, units and orchestrators say where envd listens or that it is not in Firecracker. Somebody
//! who types `envd` on a workstation does not, and must not offer a shell to the network, set the
//! workstation's clock or tell its programs that they are in a sandbox.

use std::io::{self, IsTerminal};

use super::{Config, DEFAULT_PORT};
use crate::wire::listen::{Address, Place};

/// The variable of a socket manager; sd_listen_fds(3).
const LISTEN_FDS: &str = "LISTEN_FDS";

/// How this process was started, as far as it says whether a person has done so.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// Whether stdin and stderr are terminals.
    pub terminals: bool,
    /// The process id.
    pub pid: u32,
    /// Whether a socket manager has started it.
    pub has_listen_fds: bool,
}

impl Origin {
    /// That of this process.
    pub fn of_this_process() -> Self {
        Self {
            terminals: io::stdin().is_terminal() && io::stderr().is_terminal(),
            pid: std::process::id(),
            has_listen_fds: std::env::var_os(LISTEN_FDS).is_some(),
        }
    }
}

impl Config {
    /// Restricts the daemon of a person's first run to loopback: at terminals, not as PID 1, and
    /// with nothing given that says where it is to be reached from. Returns the line that says so.
    pub fn restrict_first_run(&mut self, origin: Origin) -> Option<String> {
        let Origin { terminals, pid, has_listen_fds } = origin;
        if !terminals || pid == 1 || has_listen_fds || self.says_where {
            return None;
        }
        let place = Place::Tcp { host: "127.0.0.1".into(), port: DEFAULT_PORT };
        self.listen = vec![Address { place, optional: false }];
        self.is_not_fc = true;
        self.mmds = None;
        self.no_clock = true;
        self.no_markers = true;
        Some(format!(
            "started at a terminal without --listen: serves on 127.0.0.1:{DEFAULT_PORT} only and \
             leaves the clock and /run/e2b alone; to serve the network as in a sandbox, give \
             --listen tcp://0.0.0.0:{DEFAULT_PORT}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::{super::Command, *};

    fn config(args: &[&str]) -> Config {
        match Config::parse(args.iter().map(OsString::from)) {
            Ok(Command::Run(config)) => *config,
            other => panic!("{args:?}: {other:?}"),
        }
    }

    #[test]
    fn a_person_at_a_terminal_gets_loopback_and_nobody_else_does() {
        let person = Origin { terminals: true, pid: 7, has_listen_fds: false };
        for args in [&[][..], &["--verbose"], &["--default-user", "root"], &["--no-clock"]] {
            let mut restricted = config(args);
            let line = restricted.restrict_first_run(person).unwrap();
            assert!(line.contains("127.0.0.1:49983") && line.contains("--listen tcp://0.0.0.0"));
            assert_eq!(restricted.listen, ["tcp://127.0.0.1:49983".parse().unwrap()]);
            assert!(restricted.no_clock && restricted.no_markers && restricted.mmds.is_none());
        }
        for args in [
            &["--listen", "tcp://0.0.0.0:1"][..],
            &["-port", "49983"],
            &["-isnotfc"],
            &["-isnotfc=false"],
            &["--ready", "vsock://2:1"],
        ] {
            let (given, mut left) = (config(args), config(args));
            assert_eq!(left.restrict_first_run(person), None, "{args:?}");
            assert_eq!(left, given);
        }
        for other in [
            Origin { terminals: false, ..person },
            Origin { pid: 1, ..person },
            Origin { has_listen_fds: true, ..person },
        ] {
            let (given, mut left) = (config(&[]), config(&[]));
            assert_eq!(left.restrict_first_run(other), None, "{other:?}");
            assert_eq!(left, given);
            assert_eq!(left.listen, ["tcp://0.0.0.0:49983".parse().unwrap()]);
        }
    }
}
