//! Runs the programs in `tests/sdk/` with the published E2B SDKs, each against its own daemon.
//!
//! The SDKs are installed once under `target/sdk/` and again whenever their lock files change.
//! Where that is not possible the tests say so on stderr and pass, unless `CI=true` is set.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{Daemon, is_root, me, readme};

/// The longest that one program may take.
const PROGRAM: Duration = Duration::from_secs(300);
/// The longest that one step of an installation may take.
const INSTALLATION: Duration = Duration::from_secs(300);

#[test]
fn python_sync() {
    run(python(), "python_sync.py");
}

#[test]
fn python_async() {
    run(python(), "python_async.py");
}

#[test]
fn javascript() {
    run(node(), "javascript.mjs");
}

#[test]
fn python_files() {
    run(python(), "files.py");
}

#[test]
fn javascript_files() {
    run(node(), "files.mjs");
}

/// Up to 1.5.2 the releases refuse answers with fields that they do not know.
#[test]
fn python_1_0_6() {
    smoke(&python_release("1.0.6"), "1.0.6");
}

#[test]
fn python_1_2_1() {
    smoke(&python_release("1.2.1"), "1.2.1");
}

#[test]
fn python_1_5_6() {
    smoke(&python_release("1.5.6"), "1.5.6");
}

#[test]
fn python_2_0_2() {
    smoke(&python_release("2.0.2"), "2.0.2");
}

#[test]
fn python_2_21_0() {
    smoke(&python_release("2.21.0"), "2.21.0");
}

#[test]
fn python_newest() {
    smoke(python(), "the newest release");
}

#[test]
fn python_secure() {
    run_secure(python(), "secure.py");
}

#[test]
fn javascript_secure() {
    run_secure(node(), "secure.mjs");
}

/// What the first program of the README prints.
const FIRST_PROGRAM: &str = "hello\n\nwritten through envd\n";

#[test]
fn readme_python() {
    run_readme(python(), "from e2b import", "readme.py", FIRST_PROGRAM);
}

#[test]
fn readme_javascript() {
    run_readme(node(), "from \"e2b\"", "readme.mjs", FIRST_PROGRAM);
}

#[test]
fn readme_command_line_client() {
    run_readme(cli(), "npx e2b", "readme.sh", "hello\n");
}

/// What runs the programs of one language.
struct Runtime {
    interpreter: PathBuf,
    /// Where the programs lie: beside `node_modules` or in the source tree.
    programs: PathBuf,
}

/// A runtime, or why there is none.
type Installed = Result<Runtime, String>;

/// Runs a program against a fresh daemon; its output is shown when it fails.
fn run(runtime: &Installed, program: &str) {
    run_as(runtime, program, program);
}

/// Runs the program that works with every release of the Python SDK.
fn smoke(runtime: &Installed, release: &str) {
    run_as(runtime, "smoke.py", &format!("smoke.py with {release}"));
}

/// As [`run`]; the name stands in reports.
fn run_as(runtime: &Installed, program: &str, name: &str) {
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(reason) => return skip(name, reason),
    };
    let daemon = Daemon::start(&[]);
    let mut command = Command::new(&runtime.interpreter);
    command
        .arg(runtime.programs.join(program))
        .env_remove("E2B_API_KEY")
        .env_remove("E2B_DOMAIN")
        .env("E2B_DEBUG", "true")
        .env("E2B_SANDBOX_URL", daemon.url(""))
        .env("ENVD_TEST_SELF", me().name)
        .env("NO_PROXY", "127.0.0.1,localhost");
    match another_user() {
        Some(user) => command.env("ENVD_TEST_USER", user),
        None => command.env_remove("ENVD_TEST_USER"),
    };
    if let Err(failure) = finish(&mut command, name, PROGRAM) {
        panic!("{failure}");
    }
}

/// Runs the block of README.md in which `part` stands, as a program of this name.
fn run_readme(runtime: &Installed, part: &str, program: &str, prints: &str) {
    if let Ok(Runtime { programs, .. }) = runtime {
        let path = if *programs == sources() { scratch() } else { programs.clone() }.join(program);
        // npx looks for programs in the working directory.
        let text = readme::block(part).text;
        let text = if program.ends_with(".sh") {
            format!("cd '{}'\n{text}", programs.display())
        } else {
            text
        };
        fs::write(&path, text).unwrap();
        run(runtime, path.to_str().unwrap());
        let printed = read(&log_of(path.to_str().unwrap()));
        assert_eq!(printed, prints, "{program}");
    } else {
        run(runtime, program);
    }
}

/// Runs a program outside debug mode against a fresh daemon that has a token, beside a control plane
/// that gives this token out.
fn run_secure(runtime: &Installed, program: &str) {
    const TOKEN: &str = "an-access-token";
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(reason) => return skip(program, reason),
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{TOKEN}").unwrap();
    let daemon = Daemon::start(&[&format!("--access-token-file={}", file.path().display())]);
    let mut command = Command::new(&runtime.interpreter);
    command
        .arg(runtime.programs.join(program))
        .env_remove("E2B_DEBUG")
        .env_remove("E2B_DOMAIN")
        .env("E2B_API_KEY", "e2b_00")
        .env("E2B_VALIDATE_API_KEY", "false")
        .env("E2B_API_URL", control_plane(TOKEN))
        .env("E2B_SANDBOX_URL", daemon.url(""))
        .env("NO_PROXY", "127.0.0.1,localhost");
    if let Err(failure) = finish(&mut command, program, PROGRAM) {
        panic!("{failure}");
    }
}

/// As much of E2B's API as it takes to create and to kill a sandbox; it ends with the tests.
fn control_plane(token: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || answer(stream, token));
        }
    });
    url
}

fn answer(mut stream: TcpStream, token: &str) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let (mut length, mut chunked) = (0, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let header = header.trim_end().to_ascii_lowercase();
        match header.split_once(": ") {
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(("transfer-encoding", "chunked")) => chunked = true,
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    while chunked {
        let mut size = String::new();
        reader.read_line(&mut size).unwrap();
        let size = usize::from_str_radix(size.trim_end(), 16).unwrap();
        reader.read_exact(&mut vec![0; size + 2]).unwrap();
        chunked = size > 0;
    }
    let (status, body) = if line.starts_with("POST ") && line.contains("/sandboxes ") {
        let sandbox = serde_json::json!({
            "templateID": "base", "sandboxID": "secured", "clientID": "c", "envdVersion": "0.6.13",
            "envdAccessToken": token,
        });
        ("201 Created", sandbox.to_string())
    } else if line.starts_with("DELETE ") {
        ("204 No Content", String::new())
    } else {
        ("404 Not Found", String::new())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
}

fn skip(program: &str, reason: &str) {
    let strict = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!strict, "{program} cannot run, and CI=true demands it: {reason}");
    common::skipped::skip(&format!("{program}: {reason}"));
}

/// Root's daemon can switch users; another's cannot.
fn another_user() -> Option<&'static str> {
    let exists = |name| matches!(nix::unistd::User::from_name(name), Ok(Some(_)));
    (is_root() && exists("nobody")).then_some("nobody")
}

fn python() -> &'static Installed {
    static PYTHON: OnceLock<Installed> = OnceLock::new();
    PYTHON.get_or_init(|| python_with("python", read(&sources().join("requirements.txt")).trim()))
}

/// The Python SDK in an older release.
fn python_release(release: &str) -> Installed {
    python_with(&format!("python-{release}"), &format!("e2b=={release}"))
}

/// A virtual environment below `target/sdk/` with one package in it.
fn python_with(name: &str, requirement: &str) -> Installed {
    let version = "import sys; print(sys.version); sys.exit(sys.version_info < (3, 11))";
    let version = ask("python3", &["-c", version])
        .map_err(|error| format!("the SDK needs Python 3.11 or newer: {error}"))?;
    let home = installed(name, &[&version, requirement], |home| {
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv"]).arg(home);
        finish(&mut venv, &format!("{name}: python3 -m venv"), INSTALLATION)?;
        let mut pip = Command::new(home.join("bin/python"));
        pip.args(["-m", "pip", "install", "--disable-pip-version-check", requirement]);
        finish(&mut pip, &format!("{name}: pip install"), INSTALLATION)
    })?;
    Ok(Runtime { interpreter: home.join("bin/python"), programs: sources() })
}

fn node() -> &'static Installed {
    static NODE: OnceLock<Installed> = OnceLock::new();
    NODE.get_or_init(|| {
        let lock = sources().join("package-lock.json");
        let version = ask("node", &["--version"])?;
        ask("npm", &["--version"])?;
        let home = installed("node", &[&version, &read(&lock)], |home| {
            for file in ["package.json", "package-lock.json"] {
                copy(&sources().join(file), &home.join(file))?;
            }
            let mut npm = Command::new("npm");
            npm.args(["ci", "--no-audit", "--no-fund"]).current_dir(home);
            finish(&mut npm, "npm ci", INSTALLATION)
        })?;
        // A module finds its packages beside itself.
        for program in ["javascript.mjs", "files.mjs", "secure.mjs"] {
            copy(&sources().join(program), &home.join(program))?;
        }
        Ok(Runtime { interpreter: "node".into(), programs: home })
    })
}

/// E2B's command-line client, for scripts.
fn cli() -> &'static Installed {
    static CLI: OnceLock<Installed> = OnceLock::new();
    CLI.get_or_init(|| {
        let lock = sources().join("cli/package-lock.json");
        let version = ask("node", &["--version"])?;
        ask("npm", &["--version"])?;
        let home = installed("cli", &[&version, &read(&lock)], |home| {
            for file in ["package.json", "package-lock.json"] {
                copy(&sources().join("cli").join(file), &home.join(file))?;
            }
            let mut npm = Command::new("npm");
            npm.args(["ci", "--no-audit", "--no-fund"]).current_dir(home);
            finish(&mut npm, "npm ci (cli)", INSTALLATION)
        })?;
        Ok(Runtime { interpreter: "sh".into(), programs: home })
    })
}

/// A directory below `target/sdk/`, filled by `install` unless that was done for the same inputs.
fn installed(
    name: &str,
    inputs: &[&str],
    install: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<PathBuf, String> {
    let because = |error: std::io::Error| format!("{}: {error}", scratch().display());
    fs::create_dir_all(scratch()).map_err(because)?;
    // Two runs of the tests at the same time install one after the other.
    let guard = File::create(scratch().join(format!("{name}.lock"))).map_err(because)?;
    guard.lock().map_err(because)?;

    let (home, stamp) = (scratch().join(name), scratch().join(format!("{name}.stamp")));
    let inputs = inputs.join("\n");
    if fs::read_to_string(&stamp).is_ok_and(|stamped| stamped == inputs) && home.is_dir() {
        return Ok(home);
    }
    if home.exists() {
        fs::remove_dir_all(&home).map_err(because)?;
    }
    fs::create_dir(&home).map_err(because)?;
    install(&home)?;
    fs::write(&stamp, inputs).map_err(because)?;
    Ok(home)
}

/// Runs a command to its end and gives its output as the error when it fails or takes too long.
fn finish(command: &mut Command, name: &str, patience: Duration) -> Result<(), String> {
    let log = log_of(name);
    let output = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let errors = output.try_clone().map_err(|error| format!("{}: {error}", log.display()))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
    match Running(child).wait(patience) {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("{name}: {status}\n{}", read(&log))),
        None => Err(format!("{name}: not done within {patience:?}\n{}", read(&log))),
    }
}

/// Where the output of a command of this name is.
fn log_of(name: &str) -> PathBuf {
    scratch().join(format!("{}.log", name.replace(['/', ' '], "-")))
}

/// A child that does not outlive its handle.
struct Running(Child);

impl Running {
    fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().expect("the child is ours") {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The output of a command that ends at once.
fn ask(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{program}: {text}")) }
}

fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map(drop).map_err(|error| format!("{}: {error}", to.display()))
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk")
}

/// `target/sdk`, wherever the target directory is.
fn scratch() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("sdk")
}
