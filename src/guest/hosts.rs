//! The name of the host's event service in `/etc/hosts` (hosts(5)).

use std::{fs, io, net::IpAddr, path::Path};

use super::replace::replace;

/// Upstream's name for the service.
pub const EVENTS_HOST: &str = "events.e2b.local";

const MODE: u32 = 0o644;
/// A larger file is not one of addresses.
const MAX_BYTES: u64 = 1 << 20;

/// Makes [`EVENTS_HOST`] mean this address, in the file below `root`; whether that was news. Blocks.
///
/// # Errors
/// The file cannot be read or replaced, or is absurdly large.
pub fn point(root: &Path, address: IpAddr) -> io::Result<bool> {
    let path = root.join("etc/hosts");
    let text = match fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_BYTES => {
            return Err(io::Error::other(format!("'{}' is too large", path.display())));
        }
        Ok(_) => fs::read(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let Some(next) = with(&text, address) else { return Ok(false) };
    replace(&path, &next, MODE)?;
    Ok(true)
}

/// The text with the name at this address, and at no other of its family; `None` if it is so
/// already. Bytes, since comments are in any encoding.
fn with(text: &[u8], address: IpAddr) -> Option<Vec<u8>> {
    let mut next = Vec::with_capacity(text.len() + 64);
    let mut is_there = false;
    let mut changed = false;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let (content, comment) = match line.iter().position(|byte| *byte == b'#') {
            Some(at) => line.split_at(at),
            None => (line, &[][..]),
        };
        let mut words = content.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let known =
            words.next().and_then(|word| std::str::from_utf8(word).ok()?.parse::<IpAddr>().ok());
        let names: Vec<&[u8]> = words.collect();
        let same_family = known.is_some_and(|known| known.is_ipv4() == address.is_ipv4());
        let is_first = known == Some(address) && !is_there;
        let names_it = same_family && names.contains(&EVENTS_HOST.as_bytes());
        if !names_it || is_first {
            is_there |= names_it;
            next.extend_from_slice(line);
            next.push(b'\n');
            continue;
        }
        changed = true;
        // Its other names stay where they are.
        let others: Vec<&[u8]> =
            names.into_iter().filter(|name| *name != EVENTS_HOST.as_bytes()).collect();
        if let (Some(known), false) = (known, others.is_empty()) {
            next.extend_from_slice(format!("{:<16} ", known.to_string()).as_bytes());
            next.extend_from_slice(&others.join(&b' '));
            next.extend_from_slice(comment);
            next.push(b'\n');
        }
    }
    if !is_there {
        let line = format!("{:<16} {EVENTS_HOST}\n", address.to_string());
        next.extend_from_slice(line.as_bytes());
    }
    (changed || !is_there).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_a_family_and_the_rest_as_it_was() {
        let v4: IpAddr = "10.1.2.3".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        let with = |text: &str, address| {
            super::with(text.as_bytes(), address).map(|next| String::from_utf8(next).unwrap())
        };
        let text = "# mine\n\n127.0.0.1 localhost\n10.0.0.9         events.e2b.local\n";
        let next = with(text, v4).unwrap();
        assert_eq!(next, "# mine\n\n127.0.0.1 localhost\n10.1.2.3         events.e2b.local\n");
        assert_eq!(with(&next, v4), None);
        let both = with(&next, v6).unwrap();
        assert_eq!(both, next + "fd00::1          events.e2b.local\n");
        assert_eq!(with(&both, v4), None);
        assert_eq!(with("", v4).unwrap(), "10.1.2.3         events.e2b.local\n");
        // No newline at the end, and a name among others.
        let shared = with("10.0.0.9 a events.e2b.local b # c", v4).unwrap();
        assert_eq!(shared, "10.0.0.9         a b# c\n10.1.2.3         events.e2b.local\n");
        // A comment that names it is no mapping.
        assert!(with("# 10.1.2.3 events.e2b.local\n", v4).is_some());
        // What is not UTF-8 stays as it is.
        let odd = super::with(b"1.2.3.4 x # \xe4\n", v4).unwrap();
        assert!(odd.starts_with(b"1.2.3.4 x # \xe4\n"), "{odd:x?}");
    }

    #[test]
    fn the_file_is_touched_only_when_it_changes() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let address = "10.1.2.3".parse().unwrap();
        assert!(point(root.path(), address).unwrap());
        assert!(!point(root.path(), address).unwrap());
        point(&root.path().join("none"), address).unwrap_err();
    }
}
