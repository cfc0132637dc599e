//! The TCP ports on which processes listen, from /proc (proc_pid_net(5)).

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::SocketAddr,
    path::Path,
};

use crate::sys::procfs;

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
        .filter_map(|table| fs::read(format!("/proc/{first}/net/{table}")).ok())
        .flat_map(|table| listeners(&table))
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
        .filter_map(|table| fs::read(format!("/proc/self/net/{table}")).ok())
        .flat_map(|table| listeners(&table))
        .collect();
    sockets.sort_by_key(|(address, _)| (address.port(), address.ip()));
    let truncated = sockets.len() > MAX_OPEN;
    sockets.truncate(MAX_OPEN);
    let mut missing: HashSet<u64> = sockets.iter().map(|(_, inode)| *inode).collect();
    let mut owners = HashMap::new();
    let pids = procfs::pids().into_iter().flatten();
    for pid in pids.map(i32::unsigned_abs) {
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

/// Addresses and inodes of the sockets of a table that listen.
fn listeners(table: &[u8]) -> Vec<(SocketAddr, u64)> {
    procfs::sockets(table)
        .filter(|socket| socket.state == procfs::TCP_LISTEN)
        .map(|socket| (socket.local, socket.inode))
        .collect()
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
}
