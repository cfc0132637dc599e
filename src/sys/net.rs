//! IPv4 by ioctl: enough to bring an interface up where no tool of the image does it.
//!
//! netdevice(7) and route(4) describe the structures. Netlink could do more, and would need a
//! library; a guest with one address and one gateway does not.

use std::{io, mem, net::Ipv4Addr, os::fd::AsRawFd, os::fd::OwnedFd};

use libc::{c_char, c_int, c_short, c_ulong};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The socket through which the kernel takes these requests.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// The kernel has no IPv4, or no descriptor is left.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        Ok(Self(socket(AddressFamily::Inet, SockType::Datagram, flags, None)?))
    }

    /// Brings an interface up, unless it is.
    ///
    /// # Errors
    /// ENODEV when there is no such interface, EPERM without CAP_NET_ADMIN.
    pub fn bring_up(&self, interface: &str) -> io::Result<()> {
        let mut request = request(interface)?;
        self.interface(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just written the flags, and any bits are a valid c_short.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
        if flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | up;
        self.interface(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Gives an interface its address and the mask of a prefix of this length.
    ///
    /// # Errors
    /// ENODEV when there is no such interface, EPERM without CAP_NET_ADMIN.
    pub fn set_address(&self, interface: &str, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut request = request(interface)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.interface(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(mask(prefix));
        self.interface(libc::SIOCSIFNETMASK, &mut request)
    }

    /// Sends what has no better route through this gateway.
    ///
    /// # Errors
    /// ENETUNREACH when no interface leads to the gateway, EEXIST when there is such a route.
    pub fn set_gateway(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: zeros are a valid rtentry: no device, no metric, and addresses of no family.
        let mut route: libc::rtentry = unsafe { mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        let request = number(libc::SIOCADDRT);
        // SAFETY: SIOCADDRT reads one rtentry, which outlives the call; its device is null, which
        // lets the kernel choose.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw const route) })
    }

    /// A request about an interface; the kernel may write the answer into it.
    fn interface(&self, what: c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: all requests used here read and write one ifreq, which outlives the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), number(what), &raw mut *request) })
    }
}

/// The network mask of a prefix.
fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
}

fn request(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: zeros are a valid ifreq: an empty name and a union of integers.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero: the kernel reads the name as a C string.
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

/// A sockaddr_in, laid out as the sockaddr that the structures hold: port, then address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = c_char::from_ne_bytes([from]);
    }
    let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    libc::sockaddr { sa_family: family, sa_data: data }
}

/// musl takes the number as an int, glibc as an unsigned long; all of these fit both.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::unnecessary_cast)]
fn number(request: c_ulong) -> libc::Ioctl {
    request as libc::Ioctl
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        for (prefix, expected) in
            [(0, "0.0.0.0"), (1, "128.0.0.0"), (24, "255.255.255.0"), (32, "255.255.255.255")]
        {
            assert_eq!(mask(prefix).to_string(), expected);
        }
    }

    #[test]
    fn what_is_no_interface_is_an_error() {
        let control = Control::open().unwrap();
        let error = control.bring_up("nosuch0").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert!(control.bring_up("a-name-far-too-long").is_err());
    }
}
