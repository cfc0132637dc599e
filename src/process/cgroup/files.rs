//! The files of a control group. They are small, and the kernel answers from memory.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// How deep groups may be nested below a leaf, and how many there may be, for them to be looked at
/// and removed. Only root in the sandbox can make any.
const MAX_DEPTH: usize = 16;
const MAX_NESTED: usize = 4096;

/// Makes a group; one that is there already is fine.
pub(super) fn make(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Writes a value, in one call as the kernel wants it, and without making the file.
pub(super) fn write(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    File::options().write(true).open(dir.join(file))?.write_all(value.as_bytes())
}

/// Reads a file with one number; `None` where there is no such file, or it says `max`.
pub(super) fn number(dir: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

/// Reads a number from a file with a name and a number on each line.
pub(super) fn entry(dir: &Path, file: &str, name: &str) -> Option<u64> {
    keyed(&fs::read_to_string(dir.join(file)).ok()?, name)
}

/// The number behind a name at the beginning of a line.
pub(super) fn keyed(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The sum of the numbers behind `KEY=` in `io.stat`, over all devices.
pub(super) fn summed(text: &str, key: &str) -> u64 {
    text.split_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

/// Does something with a group and those nested in it, the innermost first, as far as the bounds
/// go.
pub(super) fn each(dir: &Path, act: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut left = MAX_NESTED;
    each_below(dir, MAX_DEPTH, &mut left, act)
}

fn each_below(
    dir: &Path,
    depth: usize,
    left: &mut usize,
    act: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> io::Result<()> {
    if depth > 0 {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            if *left == 0 {
                break;
            }
            *left -= 1;
            each_below(&entry.path(), depth - 1, left, act)?;
        }
    }
    act(dir)
}

/// Removes a group and those nested in it, if no process is in any of them. One that is gone
/// already is fine.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    let removed = match fs::remove_dir(dir) {
        // It has processes, or others nested in it.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            if entry(dir, "cgroup.events", "populated") == Some(1) {
                return Err(error);
            }
            each(dir, &mut |dir| fs::remove_dir(dir))
        }
        result => result,
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_names() {
        let text = "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n";
        assert_eq!(keyed(text, "oom"), Some(4));
        assert_eq!(keyed(text, "oom_kill"), Some(5));
        assert_eq!(keyed(text, "oom_"), None);
        let text = "8:0 rbytes=10 wbytes=5 rios=1\n8:16 rbytes=7 wbytes=1\n";
        assert_eq!((summed(text, "rbytes"), summed(text, "wbytes")), (17, 6));
        assert_eq!(summed("8:0 \n", "rbytes"), 0);
    }
}
