//! What the binary is started as: the daemon, PID 1, `envd wait`, or a request to PID 1.
//!
//! The first word decides. As PID 1 no word is an error and none ends anything: the kernel passes
//! every word of its command line that it does not know itself, `splash` for instance.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

use super::ConfigError;
use crate::{
    guest::init::{Ending, flags},
    quote,
};

/// What `envd init --help` prints.
const INIT_USAGE: &str = "\
Usage: envd init [flags]

As PID 1 of a VM or a container: mounts what is missing, reaps orphans, keeps the daemon running,
and ends the machine in order. The flags are the daemon's (see envd --help); without any they are
read from /etc/envd/init.args. A binary that is called init does the same, and envd as PID 1 of a
container does what a container needs of it, without this word.
";

/// What `envd poweroff --help` and its like print.
const ENDING_USAGE: &str = "\
Usage: envd poweroff | reboot | halt

Asks PID 1, if that is envd or systemd, to switch the machine off, to start it again, or to stop it
with the power on. In a container each of them ends the container.
";

/// The words that may come first.
const SUBCOMMANDS: [&str; 5] = ["init", "wait", "poweroff", "reboot", "halt"];
/// Words that are often tried, and what was meant by them.
const MEANT: [(&str, &str); 8] = [
    ("help", "--help"),
    ("version", "--version"),
    ("commit", "--commit"),
    ("shutdown", "poweroff"),
    ("restart", "reboot"),
    ("listen", "--listen"),
    ("port", "--port"),
    ("verbose", "--verbose"),
];
/// How many letters may be wrong in a word that is taken for a mistyped one.
const MAX_TYPOS: usize = 2;

/// What the binary is started as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subcommand {
    /// The daemon, with these arguments.
    Daemon(Vec<OsString>),
    /// PID 1, or a mistaken `envd init` elsewhere.
    Init {
        /// The arguments for the daemon, without words.
        args: Vec<OsString>,
        /// Whether all of an init's work was asked for: by the word `init`, or by that name.
        by_name: bool,
    },
    /// `envd wait`, with these arguments.
    Wait(Vec<OsString>),
    /// Ask PID 1 to end the machine.
    End(Ending),
    /// Print a text on stdout and exit 0.
    Print(&'static str),
}

impl Subcommand {
    /// What the whole command line of a process with this pid asks for.
    ///
    /// # Errors
    /// [`ConfigError`]: a subcommand has an argument that it does not take. Whether a first word is
    /// one at all, [`super::Config::parse`] says. Never for PID 1.
    pub fn of(args: &[OsString], pid: u32) -> Result<Self, ConfigError> {
        let name = args.first().and_then(|name| Path::new(name).file_name()?.to_str());
        let args = args.get(1..).unwrap_or_default();
        let first = args.first().and_then(|first| first.to_str());
        let behind = args.get(1..).unwrap_or_default();
        if pid == 1 {
            let named_init = name == Some("init");
            return Ok(match first {
                Some("wait") if !named_init => Self::Wait(behind.to_vec()),
                _ => Self::Init {
                    args: flags(args).to_vec(),
                    by_name: named_init || first == Some("init"),
                },
            });
        }
        let ending = match first {
            Some("init") if behind.iter().any(|arg| is_help(arg)) => {
                return Ok(Self::Print(INIT_USAGE));
            }
            Some("init") => {
                return Ok(Self::Init { args: flags(behind).to_vec(), by_name: true });
            }
            Some("wait") => return Ok(Self::Wait(behind.to_vec())),
            Some("poweroff") => Ending::PowerOff,
            Some("reboot") => Ending::Reboot,
            Some("halt") => Ending::Halt,
            _ => return Ok(Self::Daemon(args.to_vec())),
        };
        if behind.iter().any(|arg| is_help(arg)) {
            return Ok(Self::Print(ENDING_USAGE));
        }
        match behind.first() {
            None => Ok(Self::End(ending)),
            Some(arg) => Err(ConfigError::Unexpected {
                subcommand: first.unwrap_or_default().to_owned(),
                arg: quote::line(arg),
            }),
        }
    }
}

fn is_help(arg: &OsStr) -> bool {
    matches!(arg.to_str(), Some("-h" | "--h" | "-help" | "--help"))
}

/// What somebody may have meant by a word that is no subcommand.
pub(super) fn suggestion(word: &str) -> Option<String> {
    // Nobody mistypes a long text, and the distance takes the square of its length.
    if word.len() > 32 {
        return None;
    }
    let word = word.to_ascii_lowercase();
    let meant = MEANT.iter().map(|(tried, meant)| (*tried, *meant));
    let known = SUBCOMMANDS.iter().map(|name| (*name, *name)).chain(meant);
    let (distance, meant) =
        known.map(|(name, meant)| (distance(&word, name), meant)).min_by_key(|found| found.0)?;
    // Of a short word little may be wrong, or every word would be near.
    (distance <= MAX_TYPOS.min(word.len() / 2)).then(|| format!("envd {meant}"))
}

/// How many letters have to be inserted, removed, replaced or swapped with the next.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let width = other.len() + 1;
    let mut rows = vec![(0..width).collect::<Vec<usize>>()];
    for (i, letter) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, wanted) in other.iter().enumerate() {
            let at = |back: usize, column: usize| {
                let row = rows.len().checked_sub(back).and_then(|index| rows.get(index));
                row.and_then(|row| row.get(column)).copied().unwrap_or(usize::MAX / 2)
            };
            let replaced = at(1, j) + usize::from(letter != wanted);
            let removed = at(1, j + 1) + 1;
            let inserted = row.last().copied().unwrap_or(usize::MAX / 2) + 1;
            let mut best = replaced.min(removed).min(inserted);
            let is_swap = i > 0
                && j > 0
                && one.get(i - 1) == Some(wanted)
                && other.get(j - 1) == Some(letter);
            if is_swap {
                best = best.min(at(2, j - 1) + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows.last().and_then(|row| row.last()).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    fn of(args: &[&str], pid: u32) -> Subcommand {
        Subcommand::of(&os(args), pid).unwrap()
    }

    fn init(args: &[&str], by_name: bool) -> Subcommand {
        Subcommand::Init { args: os(args), by_name }
    }

    #[test]
    fn subcommands_are_told_from_the_daemons_flags() {
        assert_eq!(of(&["envd", "init", "--port", "1"], 7), init(&["--port", "1"], true));
        let daemon = |args: &[&str]| Subcommand::Daemon(os(args));
        assert_eq!(of(&["/sbin/init"], 7), daemon(&[]), "only PID 1 is init by its name");
        assert_eq!(of(&["envd", "--verbose", "init"], 7), daemon(&["--verbose", "init"]));
        assert_eq!(of(&["envd", "poweroff"], 7), Subcommand::End(Ending::PowerOff));
        assert_eq!(of(&["init", "reboot"], 7), Subcommand::End(Ending::Reboot));
        assert_eq!(of(&["envd", "halt"], 7), Subcommand::End(Ending::Halt));
        assert_eq!(of(&["envd", "wait", "port:1"], 7), Subcommand::Wait(os(&["port:1"])));
        assert_eq!(of(&[], 7), daemon(&[]));
    }

    #[test]
    fn pid_1_is_init_whatever_the_words_are() {
        assert_eq!(of(&["/sbin/init", "splash"], 1), init(&[], true));
        assert_eq!(of(&["/init"], 1), init(&[], true));
        assert_eq!(of(&["/usr/bin/envd", "--port", "1"], 1), init(&["--port", "1"], false));
        assert_eq!(of(&["envd", "--verbose", "init"], 1), init(&["--verbose", "init"], false));
        assert_eq!(of(&["envd", "init", "-isnotfc"], 1), init(&["-isnotfc"], true));
        for words in [&["splash", "auto"][..], &["poweroff"], &["halt", "-x"], &["-"], &["--"], &[]]
        {
            let line = [&["envd"][..], words].concat();
            let Subcommand::Init { by_name: false, .. } = of(&line, 1) else {
                panic!("{words:?}");
            };
        }
        assert_eq!(of(&["envd", "wait", "delay:1s"], 1), Subcommand::Wait(os(&["delay:1s"])));
        assert_eq!(of(&["init", "wait"], 1), init(&[], true));
    }

    #[test]
    fn a_subcommand_takes_help_and_nothing_that_it_does_not_know() {
        for word in ["poweroff", "reboot", "halt"] {
            for help in ["--help", "-h", "-help"] {
                assert_eq!(of(&["envd", word, help], 7), Subcommand::Print(ENDING_USAGE));
                assert_eq!(of(&["envd", word, "now", help], 7), Subcommand::Print(ENDING_USAGE));
            }
            for other in ["--force", "now", "", "-"] {
                let error = Subcommand::of(&os(&["envd", word, other]), 7).unwrap_err();
                assert!(error.to_string().starts_with(&format!("{word}: ")), "{error}");
            }
        }
        assert_eq!(
            of(&["envd", "init", "--port", "1", "--help"], 7),
            Subcommand::Print(INIT_USAGE)
        );
    }

    #[test]
    fn what_was_probably_meant() {
        for (word, meant) in [
            ("powerof", Some("envd poweroff")),
            ("PowerOff", Some("envd poweroff")),
            ("rebot", Some("envd reboot")),
            ("hlat", Some("envd halt")),
            ("inti", Some("envd init")),
            ("wiat", Some("envd wait")),
            ("help", Some("envd --help")),
            ("version", Some("envd --version")),
            ("verison", Some("envd --version")),
            ("serve", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(suggestion(word).as_deref(), meant, "{word}");
        }
        assert_eq!(suggestion(&"x".repeat(1 << 20)), None);
    }
}
