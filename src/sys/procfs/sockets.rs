//! /proc/PID/net/{tcp,tcp6,udp,udp6}, proc_pid_net(5).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{lines, number, words};

/// The state of a TCP socket that listens.
pub const TCP_LISTEN: u8 = 0x0A;
/// The state of a UDP socket without a peer.
pub const UDP_UNCONNECTED: u8 = 0x07;

/// A socket of the kernel's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// Its own address and port.
    pub local: SocketAddr,
    /// Its state, by the kernel's number.
    pub state: u8,
    /// Its inode, which `/proc/PID/fd` names as well.
    pub inode: u64,
}

/// The sockets of a table.
pub fn sockets(table: &[u8]) -> impl Iterator<Item = Socket> {
    // The first line says what the columns are.
    lines(table).skip(1).filter_map(socket)
}

/// `SL: LOCAL REMOTE STATE TX:RX TR:WHEN RETRANSMITS UID TIMEOUT INODE ...`
fn socket(line: &[u8]) -> Option<Socket> {
    let mut fields = words(line).skip(1);
    let local = address(fields.next()?)?;
    let state = u8::try_from(hex(fields.nth(1)?)?).ok()?;
    Some(Socket { local, state, inode: number(fields.nth(5)?)? })
}

/// An address as the kernel prints it: each 32-bit word of it as a number of this machine.
fn address(text: &[u8]) -> Option<SocketAddr> {
    let colon = text.iter().position(|byte| *byte == b':')?;
    let port = u16::try_from(hex(text.get(colon + 1..)?)?).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for word in text.get(..colon)?.chunks(8) {
        bytes.extend_from_slice(&hex(word).filter(|_| word.len() == 8)?.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn hex(digits: &[u8]) -> Option<u32> {
    let plain = digits.iter().all(u8::is_ascii_hexdigit);
    u32::from_str_radix(std::str::from_utf8(digits).ok().filter(|_| plain)?, 16).ok()
}
