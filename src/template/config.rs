//! `/etc/envd/template.toml` and its drop-ins.
//!
//! The file is part of the image. Drop-ins, `template.d/*.toml` beside it in the order of their
//! names, replace single keys of it, and add to its environment. docs/templates.md has every key.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use toml::Value;

use super::condition::{Condition, ConditionError};
use crate::process::KillScope;

/// Where the file is in an image.
pub const DEFAULT_PATH: &str = "/etc/envd/template.toml";
/// The pause between two attempts of a ready command (upstream's).
pub const INTERVAL: Duration = Duration::from_secs(2);
/// The pause between two looks at a native condition, which costs next to nothing.
pub const CONDITION_INTERVAL: Duration = Duration::from_millis(100);
/// How long a template may take to be ready (upstream's).
pub const TIMEOUT: Duration = Duration::from_secs(600);
/// What a template with a start command and nothing else waits (upstream's `sleep 20`).
pub const DEFAULT_DELAY: Duration = Duration::from_secs(20);
/// The most bytes of one file.
const MAX_FILE: u64 = 1 << 20;
/// The most drop-ins.
const MAX_DROP_INS: usize = 64;
/// Between which an interval may be.
const INTERVALS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(3600));
/// The longest timeout.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("'{}': {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not what it should be; the text names the place in it.
    #[error("'{}': {why}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// All files together make no sense.
    #[error("the template: {key}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// A command of the template's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A text for `bash -l -c`, as E2B runs it.
    Shell(String),
    /// A program and its arguments, run as they are.
    Program(Vec<String>),
}

/// What tells that the template is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// A command that ends with 0.
    Command(Command),
    /// Something that envd sees by itself.
    Condition(Condition),
}

/// What happens when the start command ends badly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// The template has failed.
    No,
    /// It is started again, after a pause that grows.
    OnFailure,
}

/// What `/health` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Whether the template is ready.
    Ready,
    /// Whether the daemon lives, as upstream's does.
    Live,
}

/// When the start command is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartAfter {
    /// As soon as the daemon listens.
    Boot,
    /// After the first `/init`, with its variables.
    Init,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its service, if it has one.
    pub start: Option<Command>,
    /// When it is ready.
    pub ready: Ready,
    /// Who runs both; without one, the sandbox's default user.
    pub user: Option<String>,
    /// Where both run; without one, the default directory.
    pub workdir: Option<String>,
    /// Variables of both, over those of the sandbox.
    pub env: BTreeMap<String, String>,
    /// The pause between two attempts.
    pub interval: Duration,
    /// How long one attempt may take; without one, as long as is left of the timeout.
    pub attempt_timeout: Option<Duration>,
    /// How long it may take to be ready.
    pub timeout: Duration,
    /// What happens when the start command ends badly.
    pub restart: Restart,
    /// What `/health` tells.
    pub health: Health,
    /// When the start command is started.
    pub start_after: StartAfter,
    /// What dies of a SIGKILL that names no scope, if the command line does not say.
    pub kill_scope: Option<KillScope>,
}

/// One file: every key may be missing.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    start: Option<CommandValue>,
    ready: Option<ReadyValue>,
    user: Option<String>,
    workdir: Option<String>,
    env: BTreeMap<String, Variable>,
    interval: Option<Span>,
    attempt_timeout: Option<Span>,
    timeout: Option<Span>,
    restart: Option<Restart>,
    health: Option<Health>,
    start_after: Option<StartAfter>,
    kill_scope: Option<KillScope>,
}

/// The value of a variable. What is wrong with one is told without it.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct Variable(String);

impl TryFrom<Value> for Variable {
    type Error = &'static str;

    fn try_from(value: Value) -> Result<Self, &'static str> {
        match value {
            Value::String(text) => Ok(Self(text)),
            _ => Err("a variable is a string"),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct CommandValue(Command);

#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct ReadyValue(Ready);

/// A time: `"2s"`, `"500ms"`, `"1m 30s"`, or whole seconds.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "Value")]
struct Span(Duration);

impl TryFrom<Value> for Span {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match value {
            Value::String(text) => {
                let parsed = humantime::parse_duration(&text);
                parsed.map(Span).map_err(|error| format!("'{text}' is no time: {error}"))
            }
            Value::Integer(seconds) => {
                let seconds = u64::try_from(seconds).map_err(|_| "a time is not negative")?;
                Ok(Self(Duration::from_secs(seconds)))
            }
            _ => Err("a time is a string like \"2s\" or a number of seconds".to_owned()),
        }
    }
}

impl TryFrom<Value> for CommandValue {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        command(value).map(Self)
    }
}

fn command(value: Value) -> Result<Command, String> {
    match value {
        Value::String(text) if !text.trim().is_empty() => Ok(Command::Shell(text)),
        Value::Array(words) => {
            let words: Option<Vec<String>> =
                words.into_iter().map(|word| word.as_str().map(str::to_owned)).collect();
            match words {
                Some(words) if words.first().is_some_and(|word| !word.is_empty()) => {
                    Ok(Command::Program(words))
                }
                _ => Err("a program is an array of strings, its name first".to_owned()),
            }
        }
        Value::String(_) => Err("the command is empty".to_owned()),
        _ => {
            Err("a command is a string for bash, or an array of a program and its arguments".into())
        }
    }
}

impl TryFrom<Value> for ReadyValue {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            port: Option<i64>,
            url: Option<String>,
            status: Option<i64>,
            process: Option<String>,
            file: Option<String>,
            delay: Option<Span>,
        }
        let Value::Table(table) = value else {
            return command(value).map(|command| Self(Ready::Command(command)));
        };
        let table: Table = Value::Table(table).try_into().map_err(|error| error.to_string())?;
        let wrong = |error: ConditionError| error.to_string();
        let conditions = [
            table.port.map(Condition::port),
            table.url.map(|url| Condition::url(&url, table.status.unwrap_or(200))),
            table.process.map(|name| Condition::process(&name)),
            table.file.map(|path| Condition::file(&path)),
            table.delay.map(|Span(delay)| Ok(Condition::Delay(delay))),
        ];
        let mut conditions = conditions.into_iter().flatten();
        match (conditions.next(), conditions.next()) {
            (Some(condition), None) => Ok(Self(Ready::Condition(condition.map_err(wrong)?))),
            _ => Err("write one of port, url (with status), process, file or delay".to_owned()),
        }
    }
}

/// Reads the template. Without `path` it is at its usual place, or there is none. Blocks.
///
/// # Errors
/// [`ConfigError`], naming file and place, or key.
pub fn load(path: Option<&Path>) -> Result<Option<Config>, ConfigError> {
    let usual = Path::new(DEFAULT_PATH);
    let main = path.unwrap_or(usual);
    let drop_ins = drop_ins(&main.with_extension("d"))?;
    let mut merged = match read(main)? {
        Some(text) => parse(main, &text)?,
        None if path.is_some() => {
            let source = io::ErrorKind::NotFound.into();
            return Err(ConfigError::Read { path: main.to_owned(), source });
        }
        None if drop_ins.is_empty() => return Ok(None),
        None => File::default(),
    };
    for path in &drop_ins {
        if let Some(text) = read(path)? {
            merged.merge(parse(path, &text)?);
        }
    }
    merged.check()
}

/// One text, as if it were the only file.
///
/// # Errors
/// [`ConfigError`].
pub fn from_text(text: &str) -> Result<Option<Config>, ConfigError> {
    parse(Path::new("template.toml"), text)?.check()
}

fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // A FIFO would hold up the start, and a device has no end.
    if !meta.is_file() {
        return Err(failed(io::Error::other("it is no regular file")));
    }
    let mut text = String::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other("it is larger than 1 MiB")));
    }
    Ok(Some(text))
}

fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            if paths.len() == MAX_DROP_INS {
                return Err(failed(io::Error::other("it has more than 64 drop-ins")));
            }
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error| {
        // The place and not the line: it may hold a secret, and everybody may ask why the template has
        // failed.
        let before = error.span().and_then(|span| text.get(..span.start));
        let why = error.message().trim_end();
        let why = before.map_or_else(
            || why.to_owned(),
            |before| {
                let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count());
                let line = before.matches('\n').count();
                format!("line {}, column {}: {why}", line + 1, column + 1)
            },
        );
        ConfigError::Parse { path: path.to_owned(), why }
    })
}

impl File {
    fn merge(&mut self, over: Self) {
        fn take<T>(under: &mut Option<T>, over: Option<T>) {
            if over.is_some() {
                *under = over;
            }
        }
        take(&mut self.start, over.start);
        take(&mut self.ready, over.ready);
        take(&mut self.user, over.user);
        take(&mut self.workdir, over.workdir);
        self.env.extend(over.env);
        take(&mut self.interval, over.interval);
        take(&mut self.attempt_timeout, over.attempt_timeout);
        take(&mut self.timeout, over.timeout);
        take(&mut self.restart, over.restart);
        take(&mut self.health, over.health);
        take(&mut self.start_after, over.start_after);
        take(&mut self.kill_scope, over.kill_scope);
    }

    fn check(self) -> Result<Option<Config>, ConfigError> {
        let wrong = |key, why: &str| Err(ConfigError::Value { key, why: why.to_owned() });
        let start = self.start.map(|CommandValue(command)| command);
        let ready = match (self.ready, &start) {
            (Some(ReadyValue(ready)), _) => ready,
            (None, Some(_)) => Ready::Condition(Condition::Delay(DEFAULT_DELAY)),
            (None, None) => Ready::Condition(Condition::Delay(Duration::ZERO)),
        };
        let usual = match ready {
            Ready::Command(_) => INTERVAL,
            Ready::Condition(_) => CONDITION_INTERVAL,
        };
        let interval = self.interval.map_or(usual, |Span(interval)| interval);
        if !(INTERVALS.0..=INTERVALS.1).contains(&interval) {
            return wrong("interval", "it is not between 10ms and 1h");
        }
        let timeout = self.timeout.map_or(TIMEOUT, |Span(timeout)| timeout);
        let attempt_timeout = self.attempt_timeout.map(|Span(timeout)| timeout);
        for (key, time) in [("timeout", Some(timeout)), ("attempt_timeout", attempt_timeout)] {
            if time.is_some_and(|time| time.is_zero() || time > MAX_TIMEOUT) {
                return wrong(key, "it is not between 1ns and 7days");
            }
        }
        if self.workdir.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return wrong("workdir", "the path is not absolute");
        }
        if self.user.as_ref().is_some_and(String::is_empty) {
            return wrong("user", "it is empty");
        }
        if let Some(name) = self.env.iter().find_map(|(name, value)| {
            let bad = name.is_empty() || name.contains(['=', '\0']) || value.0.contains('\0');
            bad.then_some(name)
        }) {
            let why = format!("the variable {name:?} cannot be given to a program");
            return Err(ConfigError::Value { key: "env", why });
        }
        Ok(Some(Config {
            start,
            ready,
            user: self.user,
            workdir: self.workdir,
            env: self.env.into_iter().map(|(name, value)| (name, value.0)).collect(),
            interval,
            attempt_timeout,
            timeout,
            restart: self.restart.unwrap_or(Restart::No),
            health: self.health.unwrap_or(Health::Ready),
            start_after: self.start_after.unwrap_or(StartAfter::Boot),
            kill_scope: self.kill_scope,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        from_text(text).unwrap().unwrap()
    }

    #[test]
    fn what_is_missing_is_as_e2b_has_it() {
        let start = config("start = \"npm start\"");
        assert_eq!(start.start, Some(Command::Shell("npm start".into())));
        assert_eq!(start.ready, Ready::Condition(Condition::Delay(DEFAULT_DELAY)));
        assert_eq!((start.timeout, start.restart), (TIMEOUT, Restart::No));
        let ready = config("ready = '[ -n \"$(ss -Htuln sport = :80)\" ]'");
        assert_eq!((ready.start, ready.interval), (None, INTERVAL));
        assert_eq!(config("").ready, Ready::Condition(Condition::Delay(Duration::ZERO)));
    }

    #[test]
    fn every_key() {
        let all = config(
            "start = [\"/bin/srv\", \"-x\"]\nready = { port = 8080 }\nuser = \"u\"\n\
             workdir = \"/srv\"\ninterval = \"500ms\"\nattempt_timeout = 5\ntimeout = \"1m 30s\"\n\
             restart = \"on-failure\"\nhealth = \"live\"\nstart_after = \"init\"\nkill_scope = \"tree\"\n[env]\nA = \"1\"",
        );
        assert_eq!(all.start, Some(Command::Program(vec!["/bin/srv".into(), "-x".into()])));
        assert_eq!(all.ready, Ready::Condition(Condition::Port(8080)));
        assert_eq!(all.interval, Duration::from_millis(500));
        assert_eq!(all.attempt_timeout, Some(Duration::from_secs(5)));
        assert_eq!(all.timeout, Duration::from_secs(90));
        assert_eq!((all.restart, all.health), (Restart::OnFailure, Health::Live));
        assert_eq!((all.start_after, all.env["A"].as_str()), (StartAfter::Init, "1"));
        assert_eq!(all.kill_scope, Some(KillScope::Tree));
        for (text, condition) in [
            ("{ url = \"http://localhost:80/x\" }", Condition::url("http://localhost:80/x", 200)),
            ("{ url = \"http://h/\", status = 404 }", Condition::url("http://h/", 404)),
            ("{ process = \"nginx\" }", Condition::process("nginx")),
            ("{ file = \"/x\" }", Condition::file("/x")),
            ("{ delay = \"2s\" }", Ok(Condition::Delay(Duration::from_secs(2)))),
        ] {
            let ready = config(&format!("ready = {text}")).ready;
            assert_eq!(ready, Ready::Condition(condition.unwrap()), "{text}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (text, named) in [
            ("strat = \"x\"", "strat"),
            ("\n\nstart = 1", "line 3"),
            ("start = \"\"", "empty"),
            ("start = []", "array of strings"),
            ("start = [\"a\", 1]", "array of strings"),
            ("ready = { port = 0 }", "port"),
            ("ready = { port = 70000 }", "port"),
            ("ready = { prot = 1 }", "prot"),
            ("ready = { port = 1, file = \"/x\" }", "one of"),
            ("ready = {}", "one of"),
            ("ready = { url = \"https://x\" }", "http://"),
            ("ready = { file = \"x\" }", "absolute"),
            ("interval = \"0s\"", "interval"),
            ("interval = \"soon\"", "soon"),
            ("timeout = -1", "negative"),
            ("timeout = \"0s\"", "timeout"),
            ("restart = \"always\"", "always"),
            ("health = \"dead\"", "dead"),
            ("workdir = \"x\"", "workdir"),
            ("[env]\nA = 5150", "line 2, column 5: a variable is a string"),
            ("[env]\nA = [\"secret\"]", "a variable is a string"),
            ("[env]\nA = \"secret", "line 2, column"),
            ("[env]\nA = secret", "line 2, column"),
            ("[env]\n\"A=B\" = \"secret\"", "A=B"),
        ] {
            let error = from_text(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
            assert!(!error.contains("secret") && !error.contains("5150"), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_no_file_does_not_hold_up_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("template.toml");
        nix::unistd::mkfifo(&main, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = load(Some(&main)).unwrap_err().to_string();
        assert!(error.contains("template.toml") && error.contains("no regular file"), "{error}");
        fs::remove_file(&main).unwrap();
        fs::write(&main, "#".repeat((1 << 20) + 1)).unwrap();
        assert!(load(Some(&main)).unwrap_err().to_string().contains("larger than 1 MiB"));
    }

    #[test]
    fn drop_ins_replace_keys_in_order_and_add_variables() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("template.toml");
        assert!(matches!(load(Some(&main)), Err(ConfigError::Read { .. })));
        fs::write(&main, "start = \"a\"\nuser = \"u\"\n[env]\nA = \"1\"\nB = \"1\"").unwrap();
        let drops = dir.path().join("template.d");
        fs::create_dir(&drops).unwrap();
        fs::write(drops.join("20.toml"), "start = \"c\"\n[env]\nB = \"3\"").unwrap();
        fs::write(drops.join("10.toml"), "start = \"b\"\ntimeout = 5").unwrap();
        fs::write(drops.join("README"), "not toml at all").unwrap();
        let config = load(Some(&main)).unwrap().unwrap();
        assert_eq!(config.start, Some(Command::Shell("c".into())));
        assert_eq!((config.user.as_deref(), config.timeout.as_secs()), (Some("u"), 5));
        assert_eq!((config.env["A"].as_str(), config.env["B"].as_str()), ("1", "3"));
        fs::write(drops.join("30.toml"), "start = ").unwrap();
        let error = load(Some(&main)).unwrap_err().to_string();
        assert!(error.contains("30.toml"), "{error}");
    }
}
