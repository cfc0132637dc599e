//! Messages of PID 1: on stderr, which is the console when the kernel started it and the
//! container's log otherwise.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

const CONSOLE: &str = "/dev/console";

/// What [`say!`] does. Nothing can be done about a console that does not take the line.
pub(super) fn write(message: std::fmt::Arguments<'_>) {
    // One write, so that the daemon's lines do not come in between.
    let _ = io::stderr().write_all(format!("envd init: {message}\n").as_bytes());
}

/// Says one line, with arguments as `format!` takes them.
macro_rules! say {
    ($($message:tt)*) => { $crate::guest::init::console::write(format_args!($($message)*)) };
}
pub(super) use say;

/// Takes the console for stdin, stdout and stderr when PID 1 was started without: the kernel had
/// no /dev/console yet, and the language's runtime put /dev/null there.
pub(super) fn take_if_mute() {
    let is_null = |meta: std::fs::Metadata| {
        meta.file_type().is_char_device()
            && (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev())) == (1, 3)
    };
    if !std::fs::metadata("/proc/self/fd/2").is_ok_and(is_null) {
        return;
    }
    if let Ok(console) = OpenOptions::new().read(true).write(true).open(CONSOLE) {
        let _ = dup2_stdin(&console);
        let _ = dup2_stdout(&console);
        let _ = dup2_stderr(&console);
    }
}
