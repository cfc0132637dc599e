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
        Ok(_) => String::from_utf8_lossy(&fs::read(&path)?).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let Some(next) = with(&text, address) else { return Ok(false) };
    replace(&path, next.as_bytes(), MODE)?;
    Ok(true)
}

/// The text with the name at this address, and at no other of its family; `None` if it is so
/// already.
fn with(text: &str, address: IpAddr) -> Option<String> {
    let mut next = String::with_capacity(text.len() + 64);
    let mut is_there = false;
    let mut changed = false;
    for line in text.lines() {
        let (content, comment) = match line.find('#') {
            Some(at) => line.split_at(at),
            None => (line, ""),
        };
        let mut words = content.split_whitespace();
        let known = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        let names: Vec<&str> = words.collect();
        let same_family = known.is_some_and(|known| known.is_ipv4() == address.is_ipv4());
        if !same_family || !names.contains(&EVENTS_HOST) {
            next.push_str(line);
            next.push('\n');
            continue;
        }
        if known == Some(address) && !is_there {
            is_there = true;
            next.push_str(line);
            next.push('\n');
            continue;
        }
        changed = true;
        // Its other names stay where they are.
        let others: Vec<&str> = names.into_iter().filter(|name| *name != EVENTS_HOST).collect();
        if let (Some(known), false) = (known, others.is_empty()) {
            next.push_str(&format!("{:<16} {}", known.to_string(), others.join(" ")));
            next.push_str(comment);
            next.push('\n');
        }
    }
    if !is_there {
        next.push_str(&format!("{:<16} {EVENTS_HOST}\n", address.to_string()));
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
