//! What a caller says about a process to start.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Limits, TimeLimit, journal::Bounds};
use crate::{guest::users::User, quote};

/// A process to start. Paths and defaults are resolved by the caller.
#[derive(Debug, Clone)]
pub struct StartSpec {
    /// The command: a path if it has a slash, else a name to find on the PATH of `env`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The variables as asked for, for listing.
    pub requested_env: BTreeMap<String, String>,
    /// The working directory as asked for, for listing.
    pub requested_cwd: Option<String>,
    /// The whole environment; of two of one name the later wins. PWD is added from `cwd`.
    pub env: Vec<(String, String)>,
    /// The working directory, absolute.
    pub cwd: PathBuf,
    /// Who runs it.
    pub user: User,
    /// Pipes or a terminal.
    pub stdio: Stdio,
    /// A name to select it by; need not be unique.
    pub tag: Option<String>,
    /// The identity that the client has chosen.
    pub id: Option<String>,
    /// How large its journal may get.
    pub output: Bounds,
    /// When it gets SIGKILL, it alone, however many clients look on.
    pub timeout: Option<Duration>,
    /// When its whole tree is made to end.
    pub time_limit: Option<TimeLimit>,
    /// What its whole tree may use.
    pub limits: Limits,
    /// Held while this is in memory, if it is large. The manager sets it.
    pub charge: Option<Arc<RequestCharge>>,
}

/// A part of what the requests of processes may take together, given back on drop.
#[derive(Debug)]
pub struct RequestCharge {
    pub(super) used: Arc<AtomicUsize>,
    pub(super) bytes: usize,
}

impl Drop for RequestCharge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// The tag of what belongs to the sandbox itself. It stays in the daemon's control group, as with
/// upstream.
pub const SYSTEM_TAG: &str = "_system";

/// What a process reads from and writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdio {
    /// Two pipes for its output, and one for its input or /dev/null.
    Pipes {
        /// Whether it has an input.
        stdin: bool,
    },
    /// A terminal of this size.
    Pty {
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
}

impl StartSpec {
    /// Whether this asks for the same process. What follows from the daemon's defaults, and the
    /// deadline of the call itself, do not count.
    pub(super) fn is_same_request(&self, other: &Self) -> bool {
        self.cmd == other.cmd
            && self.args == other.args
            && self.requested_env == other.requested_env
            && self.requested_cwd == other.requested_cwd
            && self.user == other.user
            && self.stdio == other.stdio
            && self.tag == other.tag
            && self.id == other.id
            && self.output == other.output
            && self.time_limit == other.time_limit
            && self.limits == other.limits
    }

    /// Whether it starts in the home directory because nobody has named another one. When that does not
    /// exist it starts in `/`.
    pub(super) fn starts_at_home(&self) -> bool {
        self.requested_cwd.as_deref().is_none_or(str::is_empty) && self.cwd == self.user.home
    }

    /// Roughly, what it takes in memory, without the environment as it was given to the process.
    pub fn size(&self) -> usize {
        const STRING: usize = size_of::<String>();
        let env =
            self.requested_env.iter().map(|(name, value)| 2 * STRING + name.len() + value.len());
        let args = self.args.iter().map(|arg| STRING + arg.len());
        let names = [&self.tag, &self.id, &self.requested_cwd].into_iter().flatten();
        size_of::<Self>()
            + self.cmd.len()
            + self.cwd.as_os_str().len()
            + args.sum::<usize>()
            + env.sum::<usize>()
            + names.map(String::len).sum::<usize>()
    }

    /// The command and its arguments in one line, as messages quote it.
    pub(super) fn command_line(&self) -> String {
        let mut line = quote::text(&self.cmd).into_owned();
        for arg in &self.args {
            if line.len() > quote::MAX_QUOTED {
                break;
            }
            line.push(' ');
            line.push_str(&quote::text(arg));
        }
        quote::text(&line).into_owned()
    }

    /// The name of the first field with a NUL inside, which no program can be given.
    pub(super) fn field_with_nul(&self) -> Option<String> {
        if self.cmd.contains('\0') {
            return Some("command contains NUL".to_owned());
        }
        if let Some(index) = self.args.iter().position(|arg| arg.contains('\0')) {
            return Some(format!("argument {index} contains NUL"));
        }
        if self.cwd.as_os_str().as_encoded_bytes().contains(&0) {
            return Some("working directory contains NUL".to_owned());
        }
        let variable =
            self.env.iter().find(|(name, value)| name.contains('\0') || value.contains('\0'));
        // The name alone: the value may be a secret.
        variable.map(|(name, _)| format!("environment variable contains NUL: {name:?}"))
    }

    /// The environment as the kernel gets it: one entry a name, and `pwd` for PWD, as a shell sets
    /// it. A name that is empty or has a `=` is no name that a program could look up.
    pub(super) fn environment(&self, pwd: String) -> Vec<(String, String)> {
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut env: Vec<(String, String)> = Vec::with_capacity(self.env.len() + 1);
        for (name, value) in &self.env {
            if name.is_empty() || name.contains('=') || name == "PWD" {
                continue;
            }
            let place = *places.entry(name).or_insert(env.len());
            match env.get_mut(place) {
                Some(known) => known.1.clone_from(value),
                None => env.push((name.clone(), value.clone())),
            }
        }
        env.push(("PWD".to_owned(), pwd));
        env
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;

    #[test]
    fn the_later_variable_wins_and_pwd_is_the_directory() {
        let mut spec = spec("true", &[]);
        spec.env = [("A", "1"), ("PWD", "/x"), ("", "y"), ("B=", "z"), ("A", "2")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec();
        let env = spec.environment("/here".to_owned());
        assert_eq!(env, [("A", "2"), ("PWD", "/here")].map(|(n, v)| (n.to_owned(), v.to_owned())));
    }

    #[test]
    fn the_size_counts_all_that_a_client_can_make_large() {
        let empty = spec("", &[]);
        let grown = |change: &dyn Fn(&mut super::StartSpec)| {
            let mut spec = empty.clone();
            change(&mut spec);
            spec.size() - empty.size()
        };
        let long = || "x".repeat(1000);
        assert!(grown(&|spec| spec.cmd = long()) >= 1000);
        assert!(grown(&|spec| spec.tag = Some(long())) >= 1000);
        assert!(grown(&|spec| spec.id = Some(long())) >= 1000);
        assert!(grown(&|spec| spec.requested_cwd = Some(long())) >= 1000);
        assert!(grown(&|spec| spec.cwd = long().into()) >= 999);
        // Empty strings are not free either.
        assert!(grown(&|spec| spec.args = vec![String::new(); 1000]) >= 24_000);
        let number = |number: u32| (number.to_string(), String::new());
        assert!(grown(&|spec| spec.requested_env = (0..1000).map(number).collect()) >= 48_000);
    }

    #[test]
    fn a_long_command_line_is_quoted_by_its_beginning() {
        let line = |cmd: &str, args: &[&str]| spec(cmd, args).command_line();
        assert_eq!(line("echo", &["a", "b"]), "echo a b");
        let long = "x".repeat(5000);
        assert_eq!(line(&long, &["y"]), format!("{}…", &long[..1024]));
        assert_eq!(line("e", &[&long, &long]), format!("e {}…", &long[..1022]));
        assert_eq!(line("e", &[&long[..1022]]), format!("e {}", &long[..1022]));
    }

    #[test]
    fn a_nul_is_found_and_the_value_is_not_told() {
        let mut spec = spec("true", &["a"]);
        assert_eq!(spec.field_with_nul(), None);
        spec.env.push(("KEY".to_owned(), "secret\0".to_owned()));
        let field = spec.field_with_nul().unwrap();
        assert!(field.contains("KEY") && !field.contains("secret"), "{field}");
        spec.args = vec!["ok".to_owned(), "\0".to_owned()];
        assert_eq!(spec.field_with_nul().unwrap(), "argument 1 contains NUL");
    }
}
