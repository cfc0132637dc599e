//! The differences from upstream's envd: `docs/compatibility.toml` has them as data, each with a check
//! that fails when the difference is gone, and `docs/compatibility.md` is that data as a page.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

#[path = "compatibility/client.rs"]
mod client;
#[path = "compatibility/data.rs"]
mod data;
#[path = "compatibility/steps.rs"]
mod steps;

use std::{fs, path::PathBuf};

use data::{Difference, How, Page};

fn source(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn page() -> Page {
    let text = fs::read_to_string(source("docs/compatibility.toml")).unwrap();
    Page::parse(&text).unwrap_or_else(|error| panic!("docs/compatibility.toml: {error}"))
}

#[test]
fn the_page_is_what_the_data_renders_to() {
    let path = source("docs/compatibility.md");
    let rendered = page().render();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, rendered).unwrap();
        return;
    }
    let page = fs::read_to_string(&path).unwrap();
    let differs = page.lines().zip(rendered.lines()).position(|(is, should)| is != should);
    let line = differs.unwrap_or_else(|| page.lines().count().min(rendered.lines().count())) + 1;
    assert!(
        page == rendered,
        "docs/compatibility.md is not what docs/compatibility.toml renders to, from line {line} on: edit \
         the .toml, then run UPDATE_SNAPSHOTS=1 cargo test --test compatibility"
    );
}

/// Runs the checks, all of them also when some fail.
#[test]
fn every_difference_that_can_be_checked_by_itself_is_there() {
    let mut gone = Vec::new();
    let mut checked = 0;
    for Difference { id, how, args, needs, .. } in page().differences() {
        let How::Checks(checks) = how else { continue };
        let can = needs.iter().all(|need| match need {
            data::Need::Root => common::able_as_root(),
        });
        if !can {
            continue;
        }
        checked += 1;
        if let Err(error) = steps::run(checks, args) {
            gone.push(format!("{id}: {error}"));
        }
    }
    assert!(checked > 0, "no difference has a check");
    assert!(
        gone.is_empty(),
        "{} of {checked} differences in docs/compatibility.toml are not as they are described. Where envd \
         does as upstream does now, remove the row.\n\n{}",
        gone.len(),
        gone.join("\n\n")
    );
}

#[test]
fn every_test_that_a_difference_names_exists() {
    let mut missing = Vec::new();
    for Difference { id, how, .. } in page().differences() {
        let How::Test { file, name } = how else { continue };
        let Ok(text) = fs::read_to_string(source(file)) else {
            missing.push(format!("{id}: there is no file {file}"));
            continue;
        };
        if !is_test(file, &text, name) {
            missing.push(format!("{id}: {file} has no test {name}"));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// Whether a source has a function of this name with an attribute that makes it a test. The checks of
/// `make vm` have no harness and so no attribute.
fn is_test(file: &str, source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim_start).collect();
    if file.starts_with("tests/vm/") {
        let head = format!("pub(crate) async fn {name}(");
        return lines.iter().any(|line| line.starts_with(&head));
    }
    let heads = [format!("fn {name}("), format!("async fn {name}(")];
    lines.iter().enumerate().any(|(at, line)| {
        heads.iter().any(|head| line.starts_with(head))
            && lines[..at]
                .iter()
                .rev()
                .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
                .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn only_functions_with_the_attribute_are_tests() {
    let source =
        "#[tokio::test]\n#[ignore]\nasync fn one() {}\nfn two() {}\n#[test]\nfn three() {}\n";
    let is = |name| is_test("tests/x.rs", source, name);
    assert!(is("one") && is("three"));
    assert!(!is("two") && !is("four") && !is("thre"));
}

#[test]
fn mistakes_in_the_data_are_errors_that_name_them() {
    let with = |lines: &str| {
        let text = format!(
            "title = 't'\nintro = 'i'\n[[section]]\ntitle = 's'\n[[section.difference]]\nid = 'x'\n{lines}"
        );
        Page::parse(&text).map(|_| ()).unwrap_err().to_string()
    };
    let cells = "upstream = 'u'\nenvd = 'e'\n";
    let check = "[[section.difference.check]]\n";
    for (lines, named) in [
        ("upstream = 'u'\ntest = 'tests/x.rs::y'\n".to_owned(), "envd"),
        (cells.to_owned(), "x: neither"),
        (
            format!("{cells}test = 'tests/x.rs::y'\n{check}http.path = '/'\nhttp.status = 200"),
            "x: both",
        ),
        (format!("{cells}test = 'tests/x.rs'\n"), "tests/x.rs"),
        (format!("{cells}test = '/etc/passwd::y'\n"), "/etc/passwd"),
        (format!("{cells}tets = 'tests/x.rs::y'\n"), "tets"),
        (format!("{cells}{check}htpp.path = '/'"), "htpp"),
        (format!("{cells}{check}http.path = '/'\nhttp.status = 200\nhttp.stauts = 200"), "stauts"),
        (format!("{cells}{check}http.path = '/'"), "status"),
        (
            format!("{cells}{check}http.path = '/'\nhttp.status = 200\nhttp.contains = '('"),
            "unclosed",
        ),
        (format!("{cells}{check}rpc.method = 'a.B/C'\n"), "x: a check of rpc expects nothing"),
        ("upstream = 'a | b'\nenvd = 'e'\ntest = 'tests/x.rs::y'".to_owned(), "a | b"),
    ] {
        let error = with(&lines);
        assert!(error.contains(named), "{named}: {error}");
    }
}
