//! What was checked, where, and how it went.

use std::{collections::BTreeMap, panic::AssertUnwindSafe, time::Instant};

use futures_util::FutureExt;

/// Filled while the scenarios run, printed at the end.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Of each scenario, in the order in which they ran.
    scenarios: Vec<Scenario>,
    /// Figures that are said again at the end.
    notes: Vec<String>,
    /// Scenarios that could not be run here, each with what it lacked.
    skipped: Vec<String>,
    /// The project's own tests that ran inside a guest, by binary.
    inside: BTreeMap<String, Inside>,
}

#[derive(Debug, Default)]
struct Scenario {
    name: String,
    passed: usize,
    failed: usize,
}

/// What one binary of tests has said inside a guest.
#[derive(Debug, Default, Clone)]
pub(crate) struct Inside {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Each with what it lacked.
    pub(crate) skipped: Vec<String>,
}

impl Report {
    /// Runs one check, whose name begins with that of its scenario; a panic in it is its failure,
    /// and only its.
    pub(crate) async fn check<T>(
        &mut self,
        name: &str,
        check: impl Future<Output = T>,
    ) -> Option<T> {
        let start = Instant::now();
        let outcome = AssertUnwindSafe(check).catch_unwind().await;
        let took = start.elapsed().as_secs_f32();
        let said = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {said} ({took:.1} s)");
        let scenario = self.scenario(name.split(':').next().unwrap_or(name));
        match outcome {
            Ok(value) => {
                scenario.passed += 1;
                Some(value)
            }
            Err(_) => {
                scenario.failed += 1;
                None
            }
        }
    }

    fn scenario(&mut self, name: &str) -> &mut Scenario {
        let place = self.scenarios.iter().position(|one| one.name == name);
        let place = place.unwrap_or_else(|| {
            self.scenarios.push(Scenario { name: name.to_owned(), ..Scenario::default() });
            self.scenarios.len() - 1
        });
        &mut self.scenarios[place]
    }

    pub(crate) fn failed(&self) -> usize {
        self.scenarios.iter().map(|one| one.failed).sum()
    }

    fn passed(&self) -> usize {
        self.scenarios.iter().map(|one| one.passed).sum()
    }

    /// Whether something was checked, and nothing failed.
    pub(crate) fn is_good(&self) -> bool {
        self.failed() == 0 && self.passed() > 0
    }

    /// Prints a figure, now and at the end.
    pub(crate) fn note(&mut self, note: String) {
        println!("{note}");
        self.notes.push(note);
    }

    /// A scenario cannot be run on this machine; said now and at the end.
    pub(crate) fn skip(&mut self, scenario: &str, why: &str) {
        let skip = format!("SKIPPED: {scenario}: {why}");
        println!("{skip}");
        self.skipped.push(skip);
    }

    pub(crate) fn ran_inside(&mut self, binary: &str, result: Inside) {
        self.inside.insert(binary.to_owned(), result);
    }

    pub(crate) fn print(&self) {
        println!();
        for note in &self.notes {
            println!("{note}");
        }
        for Scenario { name, passed, failed } in &self.scenarios {
            println!("checks from outside, {name}: {passed} passed, {failed} failed");
        }
        for skip in &self.skipped {
            println!("{skip}");
        }
        for (name, Inside { passed, failed, skipped }) in &self.inside {
            let skips = skipped.len();
            println!("tests inside, {name}: {passed} passed, {failed} failed; {skips} skips");
            for skip in skipped {
                println!("    {skip}");
            }
        }
        let inside = |count: fn(&Inside) -> usize| self.inside.values().map(count).sum::<usize>();
        println!(
            "\n{} checks from outside passed, {} failed; {} tests inside passed, {} failed",
            self.passed(),
            self.failed(),
            inside(|one| one.passed),
            inside(|one| one.failed)
        );
    }
}
