//! Runs the steps of one difference against a daemon of its own.

use std::{collections::BTreeMap, process::Command, sync::LazyLock};

use regex::{Regex, bytes};
use serde_json::Value;

use crate::{
    client,
    common::Daemon,
    data::{Bytes, Check, Envd, Http, Pattern, Rpc, Sh},
};

/// A variable in a text.
pub(crate) static NAMED: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{[a-z]+\}").expect("an expression"));

const ENVD: &str = env!("CARGO_BIN_EXE_envd");

/// # Errors
/// The first step whose outcome is not as described.
pub(crate) fn run(checks: &[Check], args: &[String]) -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let daemon = Daemon::start(&args);
    let known = BTreeMap::from([
        ("dir".to_owned(), dir.path().display().to_string()),
        ("pid".to_owned(), daemon.pid().to_string()),
        ("envd".to_owned(), ENVD.to_owned()),
    ]);
    let mut steps = Steps { address: daemon.tcp(), known };
    for (number, check) in checks.iter().enumerate() {
        steps.step(check).map_err(|error| format!("check {}: {error}", number + 1))?;
    }
    Ok(())
}

struct Steps {
    address: String,
    /// The variables.
    known: BTreeMap<String, String>,
}

impl Steps {
    fn step(&mut self, check: &Check) -> Result<(), String> {
        match check {
            Check::Http(http) => self.http(http),
            Check::Rpc(rpc) => self.rpc(rpc),
            Check::Bytes(bytes) => self.bytes(bytes),
            Check::Envd(envd) => self.envd(envd),
            Check::Sh(sh) => self.sh(sh),
        }
    }

    fn http(&mut self, http: &Http) -> Result<(), String> {
        let Http { method, path, status, has, lacks, contains, lacks_text, .. } = http;
        let request = Http {
            method: method.clone(),
            path: self.fill(path),
            headers: self.fill_all(&http.headers),
            body: self.fill(&http.body),
            status: *status,
            has: BTreeMap::new(),
            lacks: Vec::new(),
            contains: None,
            lacks_text: None,
        };
        let what = format!("{method} {}", request.path);
        let response =
            client::http(&self.address, &request).map_err(|error| format!("{what}: {error}"))?;
        let body = String::from_utf8_lossy(&response.body).into_owned();
        if response.status != *status {
            return Err(format!("{what}: {} and not {status}: {body}", response.status));
        }
        for (name, pattern) in has {
            let value = response.headers.get(name);
            let value = value.ok_or_else(|| format!("{what}: no header {name}"))?;
            self.matches(&format!("{what}: {name}"), pattern, value.as_bytes())?;
        }
        if let Some(name) = lacks.iter().find(|name| response.headers.contains_key(*name)) {
            return Err(format!("{what}: {name}: {}", response.headers[name]));
        }
        if let Some(pattern) = contains {
            self.matches(&what, pattern, &response.body)?;
        }
        match lacks_text {
            Some(text) if body.contains(text.as_str()) => {
                Err(format!("{what}: {text:?} is in {body:?}"))
            }
            _ => Ok(()),
        }
    }

    fn rpc(&mut self, rpc: &Rpc) -> Result<(), String> {
        let Rpc { method, stream, messages, code, contains, .. } = rpc;
        let call = Rpc {
            method: method.clone(),
            request: self.fill_json(&rpc.request),
            headers: self.fill_all(&rpc.headers),
            stream: *stream,
            messages: *messages,
            code: None,
            contains: None,
        };
        let answer =
            client::rpc(&self.address, &call).map_err(|error| format!("{method}: {error}"))?;
        if answer.code != *code {
            let (is, should) = (answer.code, code);
            return Err(format!("{method}: code {is:?} and not {should:?}: {}", answer.text));
        }
        match contains {
            Some(pattern) => self.matches(method, pattern, answer.text.as_bytes()),
            None => Ok(()),
        }
    }

    fn bytes(&mut self, bytes: &Bytes) -> Result<(), String> {
        let pattern = self.compiled(&bytes.receives)?;
        // An expression that matches nothing as well is about all that comes.
        let all = pattern.is_match(b"");
        let send = self.fill(&bytes.send);
        let received =
            client::exchange(&self.address, send.as_bytes(), bytes.half_close, |received| {
                !all && pattern.is_match(received)
            })
            .map_err(|error| format!("{:?}: {error}", bytes.send))?;
        self.matches(&format!("{:?}", bytes.send), &bytes.receives, &received)
    }

    fn envd(&mut self, envd: &Envd) -> Result<(), String> {
        let args: Vec<String> = envd.args.iter().map(|arg| self.fill(arg)).collect();
        let output = Command::new(ENVD).args(&args).output().map_err(|error| error.to_string())?;
        let what = format!("envd {}", args.join(" "));
        if output.status.code() != Some(envd.code) {
            return Err(format!("{what}: {} and not {}", output.status, envd.code));
        }
        for (name, pattern, is) in
            [("stdout", &envd.stdout, &output.stdout), ("stderr", &envd.stderr, &output.stderr)]
        {
            if let Some(pattern) = pattern {
                self.matches(&format!("{what}: {name}"), pattern, is)?;
            }
        }
        Ok(())
    }

    fn sh(&mut self, sh: &Sh) -> Result<(), String> {
        let script = self.fill(&sh.run);
        let output = Command::new("sh").args(["-euc", &script]).output();
        let output = output.map_err(|error| error.to_string())?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("{script}: {}: {error}", output.status));
        }
        match &sh.prints {
            Some(pattern) => self.matches(&script, pattern, &output.stdout),
            None => Ok(()),
        }
    }

    /// Keeps what the named groups have matched.
    fn matches(&mut self, what: &str, pattern: &Pattern, is: &[u8]) -> Result<(), String> {
        let compiled = self.compiled(pattern)?;
        let found = compiled.captures(is).ok_or_else(|| {
            format!("{what}: no match of '{}' in: {}", compiled, String::from_utf8_lossy(is))
        })?;
        for name in compiled.capture_names().flatten() {
            if let Some(value) = found.name(name) {
                let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                self.known.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }

    fn compiled(&self, pattern: &Pattern) -> Result<bytes::Regex, String> {
        let mut text = pattern.0.clone();
        for (name, value) in &self.known {
            text = text.replace(&format!("{{{name}}}"), &regex::escape(value));
        }
        bytes::Regex::new(&text).map_err(|error| error.to_string())
    }

    fn fill(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, value) in &self.known {
            text = text.replace(&format!("{{{name}}}"), value);
        }
        text
    }

    fn fill_all(&self, texts: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        texts.iter().map(|(name, value)| (name.clone(), self.fill(value))).collect()
    }

    fn fill_json(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.fill(text)),
            Value::Array(all) => all.iter().map(|one| self.fill_json(one)).collect(),
            Value::Object(fields) => {
                let filled = fields.iter().map(|(name, v)| (name.clone(), self.fill_json(v)));
                Value::Object(filled.collect())
            }
            other => other.clone(),
        }
    }
}
