//! Kernel modules, in an order that whoever built the image has resolved.
//!
//! `/etc/envd/modules` names one file a line: a path, or one relative to `/lib/modules`; `#` begins
//! a comment. The files are not compressed: whoever builds an image unpacks them once, and the
//! guest needs no decompressor.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
};

use super::console::say;

const LIST: &str = "/etc/envd/modules";
const DIRECTORY: &str = "/lib/modules";

/// Loads what the list names; one that cannot be loaded is said.
pub(super) fn load() {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return say!("reading {LIST}: {error}"),
    };
    for path in paths(&list) {
        if let Err(error) = insert(&path) {
            say!("loading the module {}: {error}", path.display());
        }
    }
}

fn insert(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match finit_module(file, c"", ModuleInitFlags::empty()) {
        // Loaded already, or built in.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn paths(list: &str) -> impl Iterator<Item = PathBuf> {
    let lines = list.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    // An absolute path replaces the directory.
    lines.filter(|line| !line.is_empty()).map(|line| Path::new(DIRECTORY).join(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_path_a_line() {
        let list = "# for vsock\nvsock.ko\n\n  /boot/x.ko # last\n6.1/net/virtio_net.ko\n";
        let expected =
            ["/lib/modules/vsock.ko", "/boot/x.ko", "/lib/modules/6.1/net/virtio_net.ko"];
        assert!(paths(list).eq(expected.iter().map(PathBuf::from)));
    }
}
