//! The TCP ports on which processes listen, from /proc (proc_pid_net(5)).

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

/// The state of a socket that listens, in /proc/PID/net/tcp.
const TCP_LISTEN: &str = "0A";

/// The most sockets that are told of at a time.
const MAX_OPEN: usize = 4096;

/// A socket that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// Its port.
    pub port: u16,
    /// Its address.
    pub address: SocketAddr,
}

/// Blocks: the first socket of one of these processes that listens on a port, or on any if it is 0.
/// The processes are taken to be in the network namespace of the first.
pub(super) fn listening(pids: &[u32], port: u16) -> Option<Listening> {
    let first = pids.first()?;
    let sockets: Vec<_> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/{first}/net/{table}")).ok())
        .flat_map(|table| table.lines().skip(1).filter_map(listener).collect::<Vec<_>>())
        .filter(|(address, _)| port == 0 || address.port() == port)
        .collect();
    if sockets.is_empty() {
        return None;
    }
    for pid in pids {
        let open = open_sockets(*pid);
        if let Some((address, _)) = sockets.iter().find(|(_, inode)| open.contains(inode)) {
            return Some(Listening { port: address.port(), address: *address });
        }
    }
    None
}

/// A socket that listens, and a process that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Its address and port.
    pub address: SocketAddr,
    /// The process, if it is known.
    pub pid: Option<u32>,
    /// What the kernel calls the process.
    pub command: String,
}

/// Blocks: the sockets of this machine that listen, by their ports, and whether there are more than
/// [`MAX_OPEN`].
pub fn open() -> (Vec<Open>, bool) {
    let mut sockets: Vec<_> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/self/net/{table}")).ok())
        .flat_map(|table| table.lines().skip(1).filter_map(listener).collect::<Vec<_>>())
        .collect();
    sockets.sort_by_key(|(address, _)| (address.port(), address.ip()));
    let truncated = sockets.len() > MAX_OPEN;
    sockets.truncate(MAX_OPEN);
    let mut missing: HashSet<u64> = sockets.iter().map(|(_, inode)| *inode).collect();
    let mut owners = HashMap::new();
    let processes = fs::read_dir("/proc").into_iter().flatten();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        if missing.is_empty() {
            break;
        }
        let found: Vec<u64> = open_sockets(pid).intersection(&missing).copied().collect();
        for inode in found {
            missing.remove(&inode);
            owners.insert(inode, pid);
        }
    }
    let open = sockets.into_iter().map(|(address, inode)| {
        let pid = owners.get(&inode).copied();
        let name = pid.and_then(|pid| fs::read(format!("/proc/{pid}/comm")).ok());
        let command = name.map_or(String::new(), |name| {
            String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
        });
        Open { address, pid, command }
    });
    (open.collect(), truncated)
}

/// The inodes of a process's sockets.
fn open_sockets(pid: u32) -> HashSet<u64> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return HashSet::new() };
    dir.filter_map(|entry| inode(&fs::read_link(entry.ok()?.path()).ok()?)).collect()
}

/// The inode in `socket:[123]`.
fn inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Address and inode of a line about a socket that listens.
fn listener(line: &str) -> Option<(SocketAddr, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    if fields.nth(1)? != TCP_LISTEN {
        return None;
    }
    Some((address(local)?, fields.nth(5)?.parse().ok()?))
}

/// An address as the kernel prints it: each 32-bit word of it as a number of this machine.
fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for at in (0..host.len()).step_by(8) {
        let word = u32::from_str_radix(host.get(at..at + 8)?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_socket_that_this_process_listens_on() {
        let own = [std::process::id()];
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let socket = std::net::TcpListener::bind(host).unwrap();
            let address = socket.local_addr().unwrap();
            let found = listening(&own, address.port()).unwrap();
            assert_eq!(found, Listening { port: address.port(), address });
            assert_eq!(listening(&[1], address.port()), None, "of another process");
            drop(socket);
            assert_eq!(listening(&own, address.port()), None);
        }
    }

    #[test]
    fn nonsense_is_no_address() {
        for text in ["", ":", "0100007F", "0100007F:", "0100007F:123456", "01:50", "XX00007F:50"] {
            assert_eq!(address(text), None, "{text}");
        }
    }
}
