//! `docs/compatibility.toml`: what may stand in it, and the page that it renders to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use serde::Deserialize;

/// The note at the head of the page.
const NOTE: &str = "<!-- Rendered from compatibility.toml: edit that, then run UPDATE_SNAPSHOTS=1 cargo test --test compatibility -->";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Page {
    title: String,
    intro: String,
    section: Vec<Section>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    title: String,
    /// Prose before the table.
    text: Option<String>,
    #[serde(default)]
    difference: Vec<Difference>,
}

/// A row.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Row")]
pub(crate) struct Difference {
    pub(crate) id: String,
    upstream: String,
    envd: String,
    why: String,
    /// Further arguments of the daemon that is checked.
    pub(crate) args: Vec<String>,
    pub(crate) needs: Vec<Need>,
    pub(crate) how: How,
}

/// What a check needs of the machine.
#[derive(Debug, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Need {
    Root,
}

/// How a difference is checked.
#[derive(Debug)]
pub(crate) enum How {
    /// By a test of the project.
    Test { file: String, name: String },
    /// By steps, in their order, against one daemon.
    Checks(Vec<Check>),
}

/// A row as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    id: String,
    upstream: String,
    envd: String,
    #[serde(default)]
    why: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    needs: Vec<Need>,
    test: Option<String>,
    #[serde(default)]
    check: Vec<Check>,
}

/// One step.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Check {
    Http(Http),
    Rpc(Rpc),
    Bytes(Bytes),
    Envd(Envd),
    Sh(Sh),
}

/// One request over HTTP/1.1, on a connection of its own.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Http {
    #[serde(default = "get")]
    pub(crate) method: String,
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) body: String,
    pub(crate) status: u16,
    /// Headers of the response, by names in lower case, and what their values match.
    #[serde(default)]
    pub(crate) has: BTreeMap<String, Pattern>,
    /// Headers that the response does not have.
    #[serde(default)]
    pub(crate) lacks: Vec<String>,
    /// What the body matches.
    pub(crate) contains: Option<Pattern>,
    /// What does not occur in the body.
    pub(crate) lacks_text: Option<String>,
}

fn get() -> String {
    "GET".to_owned()
}

/// One call by the Connect protocol with JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rpc {
    /// `PACKAGE.SERVICE/METHOD`
    pub(crate) method: String,
    #[serde(default = "empty")]
    pub(crate) request: serde_json::Value,
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
    /// Whether the method has a stream on either side.
    #[serde(default)]
    pub(crate) stream: bool,
    /// How many messages of the stream to wait for; without it, all to its end.
    pub(crate) messages: Option<usize>,
    /// The code of the error that is expected; without it, success is.
    pub(crate) code: Option<String>,
    /// What the answer matches: its messages as JSON, one a line, and behind the message of output that
    /// output decoded, as `stdout: TEXT`.
    pub(crate) contains: Option<Pattern>,
}

fn empty() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

/// Bytes on a connection of their own.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bytes {
    pub(crate) send: String,
    /// Whether the sending side is closed then.
    #[serde(default)]
    pub(crate) half_close: bool,
    /// What the daemon sends until it closes the connection, or as much of it as matches.
    pub(crate) receives: Pattern,
}

/// The binary, run to its end.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Envd {
    pub(crate) args: Vec<String>,
    pub(crate) code: i32,
    pub(crate) stdout: Option<Pattern>,
    pub(crate) stderr: Option<Pattern>,
}

/// A shell script that has to succeed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sh {
    pub(crate) run: String,
    pub(crate) prints: Option<Pattern>,
}

/// A regular expression over bytes, in which variables may stand.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Pattern(pub(crate) String);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Self, regex::Error> {
        // With variables in it, it is no expression yet, but nearly: `{dir}` stands for literal text.
        let plain = super::steps::NAMED.replace_all(&text, "x");
        regex::bytes::Regex::new(&plain)?;
        Ok(Self(text))
    }
}

impl TryFrom<Row> for Difference {
    type Error = String;

    fn try_from(row: Row) -> Result<Self, String> {
        let Row { id, upstream, envd, why, args, needs, test, check } = row;
        for cell in [&upstream, &envd, &why] {
            if cell.replace("\\|", "").contains(['|', '\n']) {
                return Err(format!("{id}: a cell of a table cannot hold '{cell}'"));
            }
        }
        let how = match (test, check.is_empty()) {
            (None, true) => return Err(format!("{id}: neither a test nor a check")),
            (Some(_), false) => return Err(format!("{id}: both a test and checks")),
            (Some(test), true) => {
                let (file, name) = test.split_once("::").ok_or_else(|| {
                    format!("{id}: test = '{test}' is not of the form 'tests/FILE.rs::NAME'")
                })?;
                if !file.starts_with("tests/") && !file.starts_with("src/") {
                    return Err(format!("{id}: test = '{test}' is neither in tests/ nor in src/"));
                }
                How::Test { file: file.to_owned(), name: name.to_owned() }
            }
            (None, false) => {
                for rpc in check.iter().filter_map(|check| match check {
                    Check::Rpc(rpc) => Some(rpc),
                    _ => None,
                }) {
                    if rpc.code.is_none() && rpc.contains.is_none() {
                        return Err(format!("{id}: a check of rpc expects nothing"));
                    }
                }
                How::Checks(check)
            }
        };
        Ok(Self { id, upstream, envd, why, args, needs, how })
    }
}

impl Page {
    /// # Errors
    /// What is wrong, with its line or the id of the difference.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let page: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut ids = BTreeSet::new();
        for Difference { id, .. } in page.differences() {
            if !ids.insert(id) {
                return Err(format!("{id}: two differences have this id"));
            }
        }
        Ok(page)
    }

    pub(crate) fn differences(&self) -> impl Iterator<Item = &Difference> {
        self.section.iter().flat_map(|section| &section.difference)
    }

    /// The page in Markdown.
    pub(crate) fn render(&self) -> String {
        let mut page = format!("# {}\n\n{NOTE}\n\n{}\n", self.title, self.intro.trim());
        for Section { title, text, difference } in &self.section {
            let _ = write!(page, "\n## {title}\n");
            if let Some(text) = text {
                let _ = write!(page, "\n{}\n", text.trim());
            }
            if !difference.is_empty() {
                page.push_str("\n| upstream | envd | why |\n|---|---|---|\n");
            }
            for Difference { upstream, envd, why, .. } in difference {
                let why = if why.is_empty() { String::new() } else { format!("{why} ") };
                let _ = writeln!(page, "| {upstream} | {envd} | {why}|");
            }
        }
        page
    }
}
