//! Searching, with a real file system.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::*;
use crate::{
    blocking::Pool,
    fs::{
        Kind,
        actor::{Actor, FileAccess},
    },
    guest::users::{User, Users},
    slots::Slots,
};

/// Whoever runs the tests.
fn me() -> Actor {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
    Actor::new(&user, FileAccess::Compatible)
}

struct Fixture {
    tmp: tempfile::TempDir,
    files: Arc<Pool>,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Self {
        let fixture = Self { tmp: tempfile::tempdir_in(".").unwrap(), files: Pool::for_files() };
        for (name, content) in files {
            let path = fixture.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        fixture
    }

    fn root(&self) -> PathBuf {
        self.path("")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().canonicalize().unwrap().join(name)
    }

    async fn try_search(
        &self,
        path: &Path,
        options: SearchOptions,
    ) -> Result<(Vec<Match>, Summary), SearchError> {
        let slot = Slots::new(1).wait().await;
        let users = Arc::new(Users::system());
        let query = Query::new(options)?;
        let mut found = start(query, path.to_owned(), me(), users, &self.files, slot).await?;
        let mut matches = Vec::new();
        loop {
            match found.recv().await.expect("a summary comes") {
                Found::Match(found) => matches.push(found),
                Found::Failed(busy) => panic!("{busy}"),
                Found::Summary(summary) => {
                    assert!(found.recv().await.is_none(), "the summary is the last");
                    return Ok((matches, summary));
                }
            }
        }
    }

    /// The names below the root that are found, sorted.
    async fn names(&self, options: SearchOptions) -> Vec<String> {
        let (matches, _) = self.try_search(&self.root(), options).await.unwrap();
        let root = self.root();
        let below = |found: Match| {
            let path = PathBuf::from(found.path);
            path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned()
        };
        let mut names: Vec<_> = matches.into_iter().map(below).collect();
        names.sort();
        names
    }
}

fn globs(include: &[&str], exclude: &[&str]) -> SearchOptions {
    let list = |globs: &[&str]| globs.iter().map(|glob| (*glob).to_owned()).collect();
    SearchOptions { include: list(include), exclude: list(exclude), ..SearchOptions::default() }
}

fn pattern(pattern: &str) -> SearchOptions {
    SearchOptions { pattern: pattern.to_owned(), ..SearchOptions::default() }
}

#[tokio::test]
async fn names_are_found_by_glob() {
    let f = Fixture::new(&[
        ("a.rs", ""),
        ("b.txt", ""),
        ("src/c.rs", ""),
        ("src/deep/d.RS", ""),
        ("node_modules/x/e.rs", ""),
        (".hidden/f.rs", ""),
    ]);
    symlink("a.rs", f.path("link.rs")).unwrap();
    for (include, exclude, wanted) in [
        (&["*.rs"][..], &[][..], &["a.rs", "link.rs", "node_modules/x/e.rs", "src/c.rs"][..]),
        (&["*.rs"], &["node_modules"], &["a.rs", "link.rs", "src/c.rs"]),
        (&["*.rs"], &["node_modules/", "a.rs/"], &["a.rs", "link.rs", "src/c.rs"]),
        (&["src/*.rs"], &[], &["src/c.rs"]),
        (&["/*.rs"], &[], &["a.rs", "link.rs"]),
        (&["src/**"], &[], &["src/c.rs", "src/deep", "src/deep/d.RS"]),
        (&["{a,b}.*"], &["*.txt"], &["a.rs"]),
        (&["deep"], &[], &["src/deep"]),
        (&[], &["**/*.*", "x"], &["node_modules", "src", "src/deep"]),
    ] {
        assert_eq!(f.names(globs(include, exclude)).await, wanted, "{include:?} {exclude:?}");
    }
    let options = SearchOptions { ignore_case: true, ..globs(&["d.rs"], &[]) };
    assert_eq!(f.names(options).await, ["src/deep/d.RS"]);
    let options = SearchOptions { hidden: true, ..globs(&["f.rs"], &[]) };
    assert_eq!(f.names(options).await, [".hidden/f.rs"]);
    let options = SearchOptions { max_depth: 1, ..globs(&["*.rs"], &[]) };
    assert_eq!(f.names(options).await, ["a.rs", "link.rs"]);
}

#[tokio::test]
async fn lines_are_found_with_their_place() {
    let f = Fixture::new(&[("f", "one\nzwei two Two\n\nthree\nlast two")]);
    let (found, summary) = f.try_search(&f.root(), pattern("two")).await.unwrap();
    let lines: Vec<_> = found.iter().map(|found| found.line.clone().unwrap()).collect();
    let line = |number, offset, bytes: &str, ranges: &[(usize, usize)]| Line {
        number,
        offset,
        bytes: bytes.as_bytes().to_owned(),
        truncated: false,
        context: false,
        ranges: ranges.to_vec(),
    };
    let wanted = [line(2, 4, "zwei two Two", &[(5, 8)]), line(5, 24, "last two", &[(5, 8)])];
    assert_eq!(lines, wanted);
    assert_eq!(found[0].path, f.path("f").display().to_string());
    assert_eq!((summary.matches, summary.searched, summary.bytes_read), (2, 1, 32));
    assert_eq!((summary.skipped, summary.truncated), (vec![], None));

    let ranges = async |options| {
        let (found, _) = f.try_search(&f.root(), options).await.unwrap();
        found.into_iter().map(|found| found.line.unwrap().ranges).collect::<Vec<_>>()
    };
    let ignore = SearchOptions { ignore_case: true, ..pattern("two") };
    assert_eq!(ranges(ignore).await, [vec![(5, 8), (9, 12)], vec![(5, 8)]]);
    let word = SearchOptions { word: true, ..pattern("w.") };
    assert!(ranges(word).await.is_empty());
    let plain = SearchOptions { fixed_string: true, ..pattern("t.o") };
    assert!(ranges(plain).await.is_empty());
    assert_eq!(ranges(pattern("^$")).await, [vec![(0, 0)]]);

    let context = SearchOptions { before_context: 1, after_context: 1, ..pattern("^three") };
    let (found, summary) = f.try_search(&f.root(), context).await.unwrap();
    let around: Vec<_> = found
        .into_iter()
        .map(|found| found.line.unwrap())
        .map(|line| (line.number, line.context))
        .collect();
    assert_eq!(around, [(3, true), (4, false), (5, true)]);
    assert_eq!(summary.matches, 1);

    let cut = SearchOptions { max_line_bytes: 6, ..pattern("two|Two") };
    let (found, _) = f.try_search(&f.root(), cut).await.unwrap();
    let line = found[0].line.as_ref().unwrap();
    assert_eq!((line.bytes.as_slice(), line.truncated), (&b"zwei t"[..], true));
    assert_eq!(line.ranges, [(5, 6)]);
}

#[tokio::test]
async fn the_root_can_be_a_file() {
    let f = Fixture::new(&[("d/f.txt", "x\n")]);
    symlink("d/f.txt", f.path("link")).unwrap();
    for name in ["d/f.txt", "link"] {
        let shown = f.path(name).display().to_string();
        let options = SearchOptions { include_entry: true, ..pattern("x") };
        let (found, _) = f.try_search(&f.path(name), options).await.unwrap();
        assert_eq!((found.len(), &found[0].path), (1, &shown));
        assert_eq!(found[0].entry.as_ref().unwrap().path, shown);
        let (found, _) = f.try_search(&f.path(name), globs(&["*.txt"], &[])).await.unwrap();
        assert_eq!(found.len(), 1);
        let (found, _) = f.try_search(&f.path(name), globs(&["*.rs"], &[])).await.unwrap();
        assert_eq!(found.len(), 0);
    }
}

#[tokio::test]
async fn nothing_outside_the_root_is_reached_through_links() {
    let f = Fixture::new(&[("outside/secret", "secret\n"), ("root/f", "secret\n")]);
    symlink(f.path("outside"), f.path("root/dir")).unwrap();
    symlink(f.path("outside/secret"), f.path("root/file")).unwrap();
    symlink("..", f.path("root/up")).unwrap();
    let (found, _) = f.try_search(&f.path("root"), pattern("secret")).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, f.path("root/f").display().to_string());
    let (found, _) = f.try_search(&f.path("root"), globs(&[], &[])).await.unwrap();
    let mut found: Vec<_> = found.into_iter().map(|found| (found.path, found.kind)).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let wanted = [
        ("root/dir", EntryKind::Other),
        ("root/f", EntryKind::File),
        ("root/file", EntryKind::Other),
        ("root/up", EntryKind::Other),
    ];
    let wanted = wanted.map(|(name, kind)| (f.path(name).display().to_string(), kind));
    assert_eq!(found, wanted);
}

#[tokio::test]
async fn a_directory_that_becomes_a_link_meanwhile_leads_nowhere() {
    let f = Fixture::new(&[("outside/deep/secret", "secret\n"), ("root/f", "")]);
    for i in 0..50 {
        fs::create_dir_all(f.path(&format!("root/d{i}/deep"))).unwrap();
    }
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (root, outside) = (f.path("root"), f.path("outside"));
    let attacker = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for i in 0..50 {
                    let (dir, away) = (root.join(format!("d{i}")), root.join("away"));
                    let _ = fs::rename(&dir, &away);
                    let _ = symlink(&outside, &dir);
                    let _ = fs::remove_file(&dir);
                    let _ = fs::rename(&away, &dir);
                }
            }
        }
    });
    for _ in 0..200 {
        let (found, _) = f.try_search(&f.path("root"), pattern("secret")).await.unwrap();
        assert_eq!(found, []);
        let (found, _) = f.try_search(&f.path("root"), globs(&["secret"], &[])).await.unwrap();
        assert_eq!(found, []);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    attacker.join().unwrap();
}

#[tokio::test]
async fn rules_of_git_are_obeyed_when_asked_for() {
    let f = Fixture::new(&[
        (".gitignore", "*.log\n/build\nlib/\n!keep.log\n# comment\n"),
        (".git/config", "x"),
        ("a.log", "x"),
        ("keep.log", "x"),
        ("build/x", "x"),
        ("sub/build/x", "x"),
        ("sub/.gitignore", "!a.log\n*.tmp\n"),
        ("sub/a.log", "x"),
        ("sub/b.tmp", "x"),
        ("sub/lib/x", "x"),
        ("lib", "a file\n"),
        ("sub/.ignore", "!b.tmp\nsecret\n"),
        ("sub/secret", "x"),
        ("other/.git/config", "x"),
        ("other/a.log", "x"),
    ]);
    let options = SearchOptions { gitignore: true, ..pattern("x") };
    let wanted = ["keep.log", "other/a.log", "sub/a.log", "sub/b.tmp", "sub/build/x"];
    assert_eq!(f.names(options.clone()).await, wanted);
    // What is hidden is searched when asked for; the repository itself is not.
    let names = f.names(SearchOptions { hidden: true, ..options }).await;
    assert!(names.iter().all(|name| !name.contains(".git/")), "{names:?}");
    assert_eq!(f.names(pattern("x")).await.len(), 9);
}

#[tokio::test]
async fn what_is_skipped_is_counted() {
    let f = Fixture::new(&[("text", "match\n"), ("large", "match match\n")]);
    fs::write(f.path("binary"), b"match\n\0match\n").unwrap();
    let long = [vec![b'a'; MAX_LINE_IN_MEMORY + 1], b" match\n".to_vec()].concat();
    fs::write(f.path("long"), long).unwrap();
    nix::unistd::mkfifo(&f.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (found, summary) = f.try_search(&f.root(), pattern("match")).await.unwrap();
    assert_eq!(usize::try_from(summary.matches), Ok(found.len()));
    let wanted = [(Skip::Binary, 1), (Skip::LineTooLong, 1), (Skip::Special, 1)];
    assert_eq!(summary.skipped, wanted);
    let options = SearchOptions { max_file_bytes: 6, ..pattern("match") };
    assert_eq!(f.names(options).await, ["text"]);
    let options = SearchOptions { binary: true, ..globs(&["binary"], &[]) };
    let options = SearchOptions { pattern: "match".to_owned(), ..options };
    assert_eq!(f.names(options).await, ["binary", "binary"]);
}

#[tokio::test]
async fn each_bound_ends_a_search_and_is_named() {
    let files: Vec<(String, String)> =
        (0..200).map(|i| (format!("d{}/f{i}", i % 7), "match\n".repeat(20))).collect();
    let files: Vec<_> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let f = Fixture::new(&files);
    let ends = async |options| f.try_search(&f.root(), options).await.unwrap();
    let (found, summary) = ends(pattern("match")).await;
    assert_eq!((found.len(), summary.matches, summary.truncated), (4000, 4000, None));
    assert_eq!((summary.searched, summary.bytes_read), (200, 24_000));
    let (found, summary) = ends(SearchOptions { max_matches: 33, ..pattern("match") }).await;
    let (matches, truncated) = (summary.matches, summary.truncated);
    assert_eq!((found.len(), matches, truncated), (33, 33, Some(Truncation::Matches)));
    let (_, summary) = ends(SearchOptions { max_matches: 4000, ..pattern("match") }).await;
    assert_eq!(summary.truncated, None, "exactly so many are not too many");
    let (_, summary) = ends(SearchOptions { max_bytes_read: 1000, ..pattern("none") }).await;
    assert_eq!(summary.truncated, Some(Truncation::BytesRead));
    assert!(summary.bytes_read < 2000, "{summary:?}");
    let (found, summary) =
        ends(SearchOptions { max_bytes_returned: 1000, ..pattern("match") }).await;
    assert_eq!(summary.truncated, Some(Truncation::BytesReturned));
    let bytes = |found: &Match| found.path.len() + found.line.as_ref().unwrap().bytes.len();
    assert!(found.iter().map(bytes).sum::<usize>() <= 1000);
    assert_eq!(usize::try_from(summary.matches), Ok(found.len()));
    let timeout = Some(Duration::from_nanos(1));
    let (found, summary) = ends(SearchOptions { timeout, ..pattern("match") }).await;
    assert_eq!((found.len(), summary.truncated), (0, Some(Truncation::Timeout)));
}

#[tokio::test]
async fn trees_deeper_than_the_bound_are_searched_down_to_it() {
    let f = Fixture::new(&[]);
    let mut dir = f.root();
    for _ in 0..MAX_DEPTH + 3 {
        dir.push("d");
    }
    fs::create_dir_all(&dir).unwrap();
    let (found, summary) = f.try_search(&f.root(), globs(&["d"], &[])).await.unwrap();
    assert_eq!(found.len(), MAX_DEPTH);
    assert_eq!(summary.skipped, [(Skip::TooDeep, 1)]);
}

#[tokio::test]
async fn file_systems_of_the_kernel_are_searched_only_by_their_own_path() {
    let f = Fixture::new(&[]);
    let options = SearchOptions { max_depth: 1, ..globs(&["proc", "sys"], &[]) };
    let (found, summary) = f.try_search(Path::new("/"), options.clone()).await.unwrap();
    assert_eq!((found.len(), summary.skipped), (2, vec![]), "they are found by name");
    let options = SearchOptions { max_depth: 2, exclude: vec!["/[!ps]*".into()], ..options };
    let (_, summary) = f.try_search(Path::new("/"), options).await.unwrap();
    assert!(summary.skipped.contains(&(Skip::Virtual, 2)), "{summary:?}");
    let (found, _) = f.try_search(Path::new("/proc/self"), globs(&["fdinfo"], &[])).await.unwrap();
    assert!(!found.is_empty());
}

#[tokio::test]
async fn a_search_that_nobody_listens_to_ends() {
    let f = Fixture::new(&[("f", &"match\n".repeat(100_000))]);
    let slots = Slots::new(1);
    let slot = slots.wait().await;
    let query = Query::new(pattern("match")).unwrap();
    let users = Arc::new(Users::system());
    let mut found = start(query, f.root(), me(), users, &f.files, slot).await.unwrap();
    found.recv().await.unwrap();
    drop(found);
    let again = tokio::time::timeout(Duration::from_secs(60), slots.wait()).await;
    assert!(again.is_ok(), "its slot comes back");
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let f = Fixture::new(&[("f", "")]);
    let many = vec!["x".to_owned(); MAX_GLOBS + 1];
    let too_large = pattern(r"[\pL]{500}{500}");
    for (options, wanted) in [
        (globs(&["a[b"], &[]), "include: 'a[b' is no glob: unclosed character class"),
        (globs(&[], &["/"]), "exclude: '/' is no glob: it matches nothing"),
        (
            SearchOptions { include: many, ..globs(&[], &[]) },
            "include, exclude: more than 256 globs",
        ),
        (pattern("a("), "pattern: regex parse error"),
        (pattern("a\\nb"), "pattern: the literal"),
        (too_large, "pattern: "),
        (pattern(&"x".repeat(MAX_PATTERN_BYTES + 1)), "pattern: longer than 16384 bytes"),
        (
            SearchOptions { max_matches: 1_000_001, ..pattern("x") },
            "max_matches: 1000001 is more than 1000000",
        ),
        (
            SearchOptions { after_context: 101, ..pattern("x") },
            "after_context: 101 is more than 100",
        ),
        (
            SearchOptions { timeout: Some(Duration::from_secs(3601)), ..pattern("x") },
            "timeout: not between 0 and 3600 seconds",
        ),
    ] {
        let error = f.try_search(&f.root(), options).await.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().starts_with(wanted), "{error}");
    }
    let error = f.try_search(&f.path("no"), pattern("x")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    let shown = f.path("no").display().to_string();
    assert_eq!(
        error.to_string(),
        format!("path not found: open {shown}: no such file or directory")
    );
    let error = f.try_search(Path::new("/dev/null"), pattern("x")).await.unwrap_err();
    assert_eq!(error.to_string(), "path '/dev/null' is neither a directory nor a regular file");
}
