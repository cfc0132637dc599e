//! Notes of the processes that the daemon has stopped for a moment, to signal a whole tree
//! ([`super::descent`]): a daemon that dies in between would leave them stopped for ever, so the next
//! one continues them.
//!
//! One file for each pass, which names the boot, the daemon, and each process by pid and start time,
//! since a pid alone may be another's by then. A line is written before the signal is sent, and the
//! file is removed when all go on. Directory and files are closed to other users, and what others
//! could have written is not read. Without a place for notes trees are signalled all the same.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use nix::unistd::geteuid;

use super::descent::Member;
use crate::sys::procfs::{self, Group, Stat};

/// The directory, below that for the state of daemons.
const DIRECTORY: &str = "envd/stopped";
/// Identifies the boot: after another one, pids and start times are others'.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The most notes that are read at the start, and the most bytes of one: there is a note for each
/// pass that was cut, and a line for each process.
const MAX_NOTES: usize = 1024;
const MAX_NOTE: u64 = 4 << 20;

/// The notes of one daemon.
#[derive(Debug)]
pub struct StopNotes {
    dir: Option<PathBuf>,
    next: AtomicU64,
    warned: AtomicBool,
}

impl StopNotes {
    /// Notes in this directory, which is made when there is something to note.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, next: AtomicU64::new(0), warned: AtomicBool::new(false) }
    }

    /// Where they are: below `/run` of the guest, and without root, where that is not ours, below the
    /// user's own directory for such things.
    pub fn directory(guest_root: &Path) -> PathBuf {
        Self::state(guest_root).join(DIRECTORY)
    }

    /// Where the state of daemons is.
    pub fn state(guest_root: &Path) -> PathBuf {
        let own = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let own = own.filter(|dir| !geteuid().is_root() && dir.is_absolute());
        own.unwrap_or_else(|| guest_root.join("run"))
    }

    /// For a pass that may stop processes.
    pub(super) fn begin(&self) -> Note<'_> {
        Note { notes: self, state: Noting::Nothing }
    }

    fn create(&self) -> io::Result<(File, PathBuf)> {
        let dir = self.dir.as_ref().ok_or(io::ErrorKind::NotFound)?;
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        check(dir)?;
        let own = Stat::read(i32::try_from(std::process::id()).map_err(io::Error::other)?)?
            .ok_or(io::ErrorKind::NotFound)?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{}-{number}", own.pid, own.started));
        let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
        let boot = String::from_utf8_lossy(&fs::read(BOOT_ID)?).trim().to_owned();
        file.write_all(format!("{boot} {} {}\n", own.pid, own.started).as_bytes())?;
        Ok((file, path))
    }

    fn warn(&self, error: &io::Error) {
        let Some(dir) = &self.dir else { return };
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                dir = %dir.display(), %error,
                "stopped processes cannot be noted: should the daemon be killed while it signals a \
                 tree, they stay stopped"
            );
        }
    }

    /// Blocks for a moment: continues what daemons that are gone have left stopped. For the start.
    pub(super) fn continue_left(&self) {
        let Some(dir) = &self.dir else { return };
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                return tracing::warn!(dir = %dir.display(), %error, "notes of stopped processes cannot be read");
            }
        };
        if let Err(error) = check(dir) {
            return tracing::warn!(dir = %dir.display(), %error, "notes of stopped processes are not trusted");
        }
        let boot = fs::read(BOOT_ID).unwrap_or_default();
        for path in entries.take(MAX_NOTES).filter_map(|entry| Some(entry.ok()?.path())) {
            match read(&path) {
                Ok(text) if continue_noted(&text, boot.trim_ascii()) => {
                    let _ = fs::remove_file(&path);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a note of stopped processes cannot be read");
                }
            }
        }
    }
}

/// Continues the processes of a note, if its daemon is gone; whether the note is of no more use.
fn continue_noted(text: &[u8], boot: &[u8]) -> bool {
    let mut lines = procfs::lines(text);
    let mut head = procfs::words(lines.next().unwrap_or_default());
    let is_of_this_boot = head.next() == Some(boot) && !boot.is_empty();
    let Some(daemon) = member(&mut head).filter(|_| is_of_this_boot) else { return true };
    if daemon.group() != Group::Dead {
        return false;
    }
    for noted in lines.filter_map(|line| member(&mut procfs::words(line))) {
        if noted.group() == Group::Stopped {
            match noted.signal(libc::SIGCONT) {
                Ok(()) => {
                    tracing::info!(
                        pid = noted.pid,
                        "continued a process that a daemon had stopped"
                    );
                }
                Err(error) => tracing::warn!(pid = noted.pid, %error, "a process stays stopped"),
            }
        }
    }
    true
}

/// `PID STARTED`
fn member<'a>(words: &mut impl Iterator<Item = &'a [u8]>) -> Option<Member> {
    let pid = i32::try_from(procfs::number(words.next()?)?).ok().filter(|pid| *pid > 1)?;
    Some(Member { pid, started: procfs::number(words.next()?)? })
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !is_ours_alone(&file.metadata()?) {
        return Err(io::Error::other("it could have been written by others"));
    }
    let mut text = Vec::new();
    file.take(MAX_NOTE).read_to_end(&mut text)?;
    Ok(text)
}

/// Refuses a directory that others could write to.
fn check(dir: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(dir)?;
    match meta.is_dir() && is_ours_alone(&meta) {
        true => Ok(()),
        false => {
            Err(io::Error::other("it is not a directory that only the daemon's user can change"))
        }
    }
}

fn is_ours_alone(meta: &fs::Metadata) -> bool {
    meta.uid() == geteuid().as_raw() && meta.mode() & 0o022 == 0
}

/// The note of one pass. Dropped, it is removed: everybody goes on.
#[derive(Debug)]
pub(super) struct Note<'a> {
    notes: &'a StopNotes,
    state: Noting,
}

#[derive(Debug)]
enum Noting {
    Nothing,
    Impossible,
    In(File, PathBuf),
}

impl Note<'_> {
    /// Notes a process that is about to be stopped.
    pub(super) fn add(&mut self, Member { pid, started }: Member) {
        if matches!(self.state, Noting::Nothing) {
            self.state = match self.notes.create() {
                Ok((file, path)) => Noting::In(file, path),
                Err(error) => {
                    self.notes.warn(&error);
                    Noting::Impossible
                }
            };
        }
        if let Noting::In(file, _) = &mut self.state
            && let Err(error) = file.write_all(format!("{pid} {started}\n").as_bytes())
        {
            self.notes.warn(&error);
        }
    }
}

impl Drop for Note<'_> {
    fn drop(&mut self) {
        if let Noting::In(_, path) = &self.state
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "could not remove a note of stopped processes");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn stopped_child() -> (std::process::Child, Member) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let noted = Member::of(i32::try_from(child.id()).unwrap()).unwrap();
        noted.signal(libc::SIGSTOP).unwrap();
        while noted.group() != Group::Stopped {
            std::thread::yield_now();
        }
        (child, noted)
    }

    #[test]
    fn what_a_dead_daemon_has_stopped_goes_on() {
        let (mut child, noted) = stopped_child();
        let (mut other, not_noted) = stopped_child();
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        let boot = boot.trim();
        let lines = format!(
            "{} {}\n{} {}\nnonsense\n",
            noted.pid,
            noted.started,
            not_noted.pid,
            // Another process had that pid.
            not_noted.started - 1
        );
        let own = Member::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let notes = StopNotes::new(Some(dir.path().to_owned()));
        for (head, expected, stays) in [
            (format!("another-boot {} 1", i32::MAX), Group::Stopped, false),
            (format!("{boot} {} {}", own.pid, own.started), Group::Stopped, true),
            (format!("{boot} {} {}", own.pid, own.started - 1), Group::Runs, false),
        ] {
            let path = dir.path().join("note");
            fs::write(&path, format!("{head}\n{lines}")).unwrap();
            notes.continue_left();
            assert_eq!((noted.group(), path.exists()), (expected, stays), "{head}");
            assert_eq!(not_noted.group(), Group::Stopped);
        }
        for child in [&mut child, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn what_others_can_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let (mut child, noted) = stopped_child();
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        let text = format!("{} {} 1\n{} {}\n", boot.trim(), i32::MAX, noted.pid, noted.started);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note");
        fs::write(&path, text).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        let notes = StopNotes::new(Some(dir.path().to_owned()));
        for (dir_mode, file_mode, expected) in [
            (0o777, 0o600, Group::Stopped),
            (0o700, 0o666, Group::Stopped),
            (0o700, 0o600, Group::Runs),
        ] {
            mode(dir.path(), dir_mode).unwrap();
            mode(&path, file_mode).unwrap();
            notes.continue_left();
            assert_eq!(noted.group(), expected, "{dir_mode:o} {file_mode:o}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_note_lives_as_long_as_its_pass() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("run/stopped");
        let notes = StopNotes::new(Some(below.clone()));
        let mut note = notes.begin();
        assert!(!below.exists(), "there is nothing to note yet");
        let own = Member::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        note.add(own);
        let files: Vec<PathBuf> =
            fs::read_dir(&below).unwrap().map(|entry| entry.unwrap().path()).collect();
        let text = fs::read_to_string(&files[0]).unwrap();
        assert!(text.ends_with(&format!("\n{} {}\n", own.pid, own.started)), "{text}");
        drop(note);
        assert!(!files[0].exists());
        // Without a place for it.
        StopNotes::new(None).begin().add(own);
    }
}
