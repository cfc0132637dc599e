//! The project's own tests inside a guest, which has what they need of a kernel: root, a cgroup v2
//! with all controllers, mounts, devices.
//!
//! `scripts/vm.sh` builds them with optimisation and carries them in on a disk; they run there as they
//! are, with the same patience as this program.

use std::time::{Duration, Instant};

use envd::proto::process::{
    StartRequest, StartResponse,
    process_event::{Event, data_event::Output},
};

use crate::{
    checks::{events, next, root, sh, start},
    common::{
        PATIENCE,
        rpc::{Messages, Wire},
    },
    guest::{Disk, Guest, Kind},
    report::{Inside, Report},
};

/// The longest that one test may take under emulation, on a busy machine. It is there for one that
/// hangs: each wait in a test has a deadline of its own.
const CARRIED_PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Beyond it, a test's time is printed.
const SLOW: Duration = Duration::from_secs(10);
/// What `skipped::skip` begins its line with.
const SKIPPED: &str = "SKIPPED: ";

/// Boots one guest for all of them.
pub(crate) async fn run(report: &mut Report) {
    let boot = Guest::boot(Kind::Systemd, Disk::Snapshot);
    let Some(guest) = report.check("inside: boots and answers", boot).await else { return };
    let address = guest.tcp();
    let Some(tests) = report.check("inside: the tests are there", carried(&address)).await else {
        return guest.print_console();
    };
    let failed_before = report.failed();
    for test in tests {
        let name = test.split(' ').next().unwrap_or(&test).to_owned();
        let mut result = Inside::default();
        let run = run_carried(&address, &test, &mut result);
        report.check(&format!("inside: {name}"), run).await;
        report.ran_inside(&name, result);
    }
    if report.failed() > failed_before {
        guest.print_console();
    }
}

/// Mounts the disk with the test binaries; gives their names, with their filters.
async fn carried(address: &str) -> Vec<String> {
    let list = "mkdir -p /mnt/tests && mount -o ro /dev/vdb /mnt/tests && sh /mnt/tests/place.sh && cat /mnt/tests/list";
    let names = sh(address, list).await;
    assert!(!names.is_empty());
    names.lines().map(str::to_owned).collect()
}

/// Runs one of them, with its filters, as root, and prints its progress; counts in `result`.
async fn run_carried(address: &str, test: &str, result: &mut Inside) {
    // One after another, so that the last line of a run that hangs names the test; what a test says
    // is kept until the end.
    let patience = PATIENCE.as_secs();
    let line = format!(
        "cd /tmp && CI=true TMPDIR=/var/tmp ENVD_TEST_PATIENCE={patience} /mnt/tests/bin/{test} --test-threads=1 --show-output 2>&1"
    );
    // Signs of life, because a test may be silent for longer than an answer may take.
    let client = root(address, Wire::Grpc).with("keepalive-ping-interval", "10");
    let run = StartRequest { stop_on_disconnect: true, ..start("sh", &["-c", &line]) };
    let (_, mut events) = events(&client, &run).await;
    let mut log = Log::new(result);
    let code = log.follow(&mut events).await;
    assert!(code == 0 && log.good, "it ended with {code}:\n{}", log.rest.join("\n"));
    assert!(result.passed > 0, "no test ran");
}

/// The output of a test binary, line by line.
struct Log<'a> {
    result: &'a mut Inside,
    /// What has come of the current line.
    line: String,
    /// When the current line began.
    begun: Instant,
    /// The running test, once it has skipped something.
    skipping: String,
    /// Whether it has summed up a good run.
    good: bool,
    /// All lines that are about no test that has passed.
    rest: Vec<String>,
    /// Whether what follows is about tests that have passed.
    successes: bool,
}

impl<'a> Log<'a> {
    fn new(result: &'a mut Inside) -> Self {
        let (line, skipping) = (String::new(), String::new());
        Self {
            result,
            line,
            begun: Instant::now(),
            skipping,
            good: false,
            rest: Vec::new(),
            successes: false,
        }
    }

    /// Gives the exit code.
    async fn follow(&mut self, events: &mut Messages<StartResponse>) -> i32 {
        loop {
            let deadline = (self.begun + CARRIED_PATIENCE).into();
            let Ok(event) = tokio::time::timeout_at(deadline, next(events)).await else {
                panic!("it hangs in {:?}:\n{}", self.line, self.rest.join("\n"));
            };
            match event {
                Event::Data(data) => match data.output.unwrap() {
                    Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => {
                        self.take(&String::from_utf8_lossy(&bytes));
                    }
                },
                Event::End(end) => return end.exit_code,
                _ => {}
            }
        }
    }

    fn take(&mut self, text: &str) {
        for piece in text.split_inclusive('\n') {
            self.line.push_str(piece);
            if self.line.ends_with('\n') {
                let line = std::mem::take(&mut self.line);
                self.line_is_whole(line.trim_end());
                self.begun = Instant::now();
            }
        }
    }

    fn skipped(&mut self, what: &str) {
        // The line has the name of the test too, if the test said it on its own thread.
        let what = what.strip_prefix(&format!("{}: ", self.skipping)).unwrap_or(what);
        self.result.skipped.push(format!("{}: {what}", self.skipping));
    }

    fn line_is_whole(&mut self, line: &str) {
        let took = self.begun.elapsed();
        // libtest prints a test's name, then what the test writes past the capture, then the outcome.
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... "))
            && let Some(what) = rest.strip_prefix(SKIPPED)
        {
            name.clone_into(&mut self.skipping);
            self.skipped(what);
            return;
        }
        if !self.skipping.is_empty() {
            match line.strip_prefix(SKIPPED) {
                Some(what) => return self.skipped(what),
                None => {
                    let test = std::mem::take(&mut self.skipping);
                    if matches!(line, "ok" | "FAILED") {
                        return self.line_is_whole(&format!("test {test} ... {line}"));
                    }
                }
            }
        }
        if let Some(test) = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... ok"))
        {
            self.result.passed += 1;
            if took > SLOW {
                println!("    {test}: {:.0} s", took.as_secs_f32());
            }
            return;
        }
        if line.starts_with("test ") && line.ends_with(" ... FAILED") {
            self.result.failed += 1;
            println!("    {line}");
        }
        if line.starts_with("test result: ok.") {
            println!("    {line}");
            self.good = true;
        }
        match line {
            "successes:" => self.successes = true,
            "failures:" => self.successes = false,
            _ => {}
        }
        if !self.successes || line.starts_with("test result:") {
            self.rest.push(line.to_owned());
        }
    }
}
