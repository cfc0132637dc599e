//! What this machine cannot test: said at once on stderr, past libtest's capture of output, and recorded
//! for the summary at the end of `cargo test` (`tests/z_skipped.rs`).
//!
//! One file holds the records of one run of cargo: a line `BINARY <tab> TEST <tab> REASON` for each
//! skip. Unit tests include this file too, so it uses nothing but the standard library.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// Reports that the calling test, or a part of it, cannot run here, and why.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    // libtest names the thread of a test after it.
    let test = thread.name().filter(|name| *name != "main");
    let line = match test {
        Some(test) => format!("SKIPPED: {test}: {reason}\n"),
        None => format!("SKIPPED: {reason}\n"),
    };
    // The handle is not captured, the macros are.
    let _ = std::io::stderr().write_all(line.as_bytes());
    // Best effort: a binary that was carried elsewhere has no directory for records.
    if let Some(path) = records() {
        let reason = reason.replace(['\n', '\t'], " ");
        let record = format!("{}\t{}\t{reason}\n", binary(), test.unwrap_or("?"));
        let _ = fs::create_dir_all(path.parent().unwrap_or(&path));
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(record.as_bytes()));
    }
}

/// The file of this run: that of the process which started the test binaries. The start time tells it
/// from an earlier process with the same pid.
pub fn records() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    let deps = executable.parent().filter(|dir| dir.ends_with("deps"))?;
    let parent = std::os::unix::process::parent_id();
    let stat = fs::read_to_string(format!("/proc/{parent}/stat")).ok()?;
    // Field 22 of proc_pid_stat(5), counted from behind the name, which is field 2.
    let started = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?;
    Some(deps.parent()?.join("skipped").join(format!("{parent}-{started}")))
}

/// The name of this test binary, without cargo's hash.
fn binary() -> String {
    let executable = std::env::current_exe().unwrap_or_default();
    let name = executable.file_name().map(Path::new).and_then(Path::to_str).unwrap_or("?");
    name.rsplit_once('-').map_or(name, |(name, _)| name).to_owned()
}
