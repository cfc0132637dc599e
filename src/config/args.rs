//! Splits a command line into flags and words as Go's `flag` package does: `-name`, `--name`,
//! `-name=value` and `-name value` mean the same, and `--` ends the flags.
//!
//! Unlike Go's package it goes on behind a word, so that flags behind a stray word still count.

use std::{
    ffi::{OsStr, OsString},
    fmt::Display,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use super::ConfigError;
use crate::{guest::users, quote};

/// The longest time that a flag may ask for: a day.
const MAX_SECONDS: u64 = 86_400;

/// One item of a command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A flag.
    Flag(Flag),
    /// Anything else, and everything behind `--`.
    Word(OsString),
}

/// A flag as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flag {
    /// Its name, without dashes.
    pub(crate) name: String,
    /// Whether it was written with one dash.
    pub(crate) one_dash: bool,
    /// What stood behind `=`.
    value: Option<OsString>,
}

impl Flag {
    /// The flag that this argument is, if it is one.
    fn of(arg: &OsStr) -> Option<Self> {
        let bytes = arg.as_bytes().strip_prefix(b"-").filter(|rest| !rest.is_empty())?;
        let (rest, one_dash) = match bytes.strip_prefix(b"-") {
            Some(rest) => (rest, false),
            None => (bytes, true),
        };
        let equals = rest.iter().position(|byte| *byte == b'=');
        let (name, value) = match equals.and_then(|at| rest.split_at_checked(at)) {
            Some((name, value)) => (name, value.get(1..)),
            None => (rest, None),
        };
        Some(Self {
            name: String::from_utf8_lossy(name).into_owned(),
            one_dash,
            value: value.map(|value| OsString::from_vec(value.to_vec())),
        })
    }

    /// An error about this flag.
    pub(crate) fn wrong(&self, why: impl Display) -> ConfigError {
        ConfigError::Value { flag: quote::line(&self.name), why: quote::message(&why.to_string()) }
    }
}

/// The arguments that are left, and the flag that is being read.
#[derive(Debug)]
pub(crate) struct Args {
    rest: std::vec::IntoIter<OsString>,
    only_words: bool,
    /// The flag that [`Args::next`] returned last.
    flag: Option<Flag>,
}

impl Args {
    pub(crate) fn new(args: impl IntoIterator<Item = OsString>) -> Self {
        let rest = args.into_iter().collect::<Vec<_>>().into_iter();
        Self { rest, only_words: false, flag: None }
    }

    /// The next flag or word. The value of a flag is not consumed: a method below reads it.
    pub(crate) fn next(&mut self) -> Option<Item> {
        let mut arg = self.rest.next()?;
        if !self.only_words && arg == "--" {
            self.only_words = true;
            arg = self.rest.next()?;
        }
        let flag = if self.only_words { None } else { Flag::of(&arg) };
        self.flag.clone_from(&flag);
        Some(flag.map_or(Item::Word(arg), Item::Flag))
    }

    /// An error about the flag that was read last.
    pub(crate) fn wrong(&self, why: impl Display) -> ConfigError {
        let name = self.flag.as_ref().map_or("", |flag| flag.name.as_str());
        ConfigError::Value { flag: quote::line(name), why: quote::message(&why.to_string()) }
    }

    /// The flag's value: what stands behind `=`, else the next argument, whatever that is.
    ///
    /// # Errors
    /// There is no value. This and every error below names the flag.
    pub(crate) fn value(&mut self) -> Result<OsString, ConfigError> {
        let given = self.flag.as_mut().and_then(|flag| flag.value.take());
        given.or_else(|| self.rest.next()).ok_or_else(|| self.wrong("the value is missing"))
    }

    /// A path. It need not be UTF-8.
    pub(crate) fn path(&mut self) -> Result<PathBuf, ConfigError> {
        match self.value()? {
            empty if empty.is_empty() => Err(self.wrong("is empty")),
            path => Ok(path.into()),
        }
    }

    /// A text that is not empty.
    pub(crate) fn text(&mut self) -> Result<String, ConfigError> {
        let value = self.value()?;
        match value.into_string() {
            Ok(text) if text.is_empty() => Err(self.wrong("is empty")),
            Ok(text) => Ok(text),
            Err(value) => Err(self.wrong(format_args!("'{}' is not UTF-8", quote::line(&value)))),
        }
    }

    /// A value that is `what`.
    pub(crate) fn parsed<T: FromStr>(&mut self, what: &str) -> Result<T, ConfigError> {
        let text = self.text()?;
        let wrong = |_| self.wrong(format_args!("'{}' is not {what}", quote::line(&text)));
        text.parse().map_err(wrong)
    }

    /// A number from `min` to `max`.
    pub(crate) fn number(&mut self, min: u64, max: u64) -> Result<u64, ConfigError> {
        let text = self.text()?;
        let number = text.parse::<u64>().ok().filter(|number| (min..=max).contains(number));
        number.ok_or_else(|| {
            let given = quote::line(&text);
            self.wrong(format_args!("'{given}' is not a number between {min} and {max}"))
        })
    }

    /// A user id. The highest number is not one: the kernel says it of a peer without credentials.
    pub(crate) fn user_id(&mut self) -> Result<u32, ConfigError> {
        let text = self.text()?;
        users::id(&text).ok_or_else(|| {
            self.wrong(format_args!("'{}' is not the number of a user", quote::line(&text)))
        })
    }

    /// A number from `min` to `max` of something that fits into memory.
    pub(crate) fn size(&mut self, min: u64, max: u64) -> Result<usize, ConfigError> {
        usize::try_from(self.number(min, max)?).map_err(|error| self.wrong(error))
    }

    /// Seconds: at least `min`, at most a day.
    pub(crate) fn seconds(&mut self, min: u64) -> Result<Duration, ConfigError> {
        self.number(min, MAX_SECONDS).map(Duration::from_secs)
    }

    /// A flag that is on when it has no value; Go's `-flag=false` turns it off. The next argument
    /// is never its value.
    pub(crate) fn switch(&mut self) -> Result<bool, ConfigError> {
        match self.flag.as_mut().and_then(|flag| flag.value.take()) {
            None => Ok(true),
            Some(value) => match value.to_str() {
                Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
                Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
                _ => {
                    let given = quote::line(&value);
                    Err(self.wrong(format_args!("'{given}' is neither true nor false")))
                }
            },
        }
    }
}
