//! The summary of what this run of `cargo test` has skipped. No test, but the last of the test binaries:
//! cargo runs them in the order of their names.

#![allow(missing_docs, clippy::print_stdout, clippy::panic)]

#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "common/skipped.rs"]
mod skipped;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

/// Records that no summary has read, of runs that failed or were filtered, are removed after this time.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

fn main() {
    // Programs that list tests find none here.
    if std::env::args().any(|arg| arg == "--list") {
        return;
    }
    let Some(path) = skipped::records() else {
        println!("\nskipped: unknown, the binary does not lie where cargo puts it");
        return;
    };
    let records = match fs::read_to_string(&path) {
        Ok(records) => records,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => panic!("{}: {error}", path.display()),
    };
    print!("{}", summary(&records));
    let _ = fs::remove_file(&path);
    if let Some(dir) = path.parent() {
        remove_old(dir);
    }
}

/// Each reason with its tests.
fn summary(records: &str) -> String {
    let mut reasons: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
    for record in records.lines() {
        let mut fields = record.splitn(3, '\t');
        if let (Some(binary), Some(test), Some(reason)) =
            (fields.next(), fields.next(), fields.next())
        {
            let test = format!("{binary}::{test}");
            *reasons.entry(reason).or_default().entry(test).or_default() += 1;
        }
    }
    if reasons.is_empty() {
        return "\nskipped: nothing\n\n".to_owned();
    }
    let count: usize = reasons.values().map(BTreeMap::len).sum();
    let mut text = format!("\nskipped: {count}, in whole or in part, for lack of\n");
    for (reason, tests) in reasons {
        text.push_str(&format!("  {reason}: {}\n", tests.len()));
        for (test, times) in tests {
            match times {
                1 => text.push_str(&format!("    {test}\n")),
                _ => text.push_str(&format!("    {test} ({times} parts)\n")),
            }
        }
    }
    text.push('\n');
    text
}

fn remove_old(dir: &Path) {
    let now = SystemTime::now();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > KEPT) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
