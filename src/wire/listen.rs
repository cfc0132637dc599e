//! Where envd can be reached: TCP (with or without TLS), unix and vsock sockets, any number of each.
//!
//! An address is a URL: `tcp://0.0.0.0:49983`, `tcp://[::]:49983`, `unix:///run/envd.sock?mode=0660`,
//! `vsock://49983` (any context id), `vsock://3:49983`. `?optional` behind any of them makes it a
//! warning and not an error that the listener cannot be had, for images that boot with and without
//! a vsock device.

use std::{
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::{
    errno::Errno,
    sys::stat::{Mode, umask},
};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use super::tls;

/// Connections that the kernel keeps before they are accepted.
const BACKLOG: u32 = 1024;

/// Why an address is none, or a listener cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text is no address.
    #[error(
        "'{text}' is no address: {why}; write tcp://HOST:PORT, tls://HOST:PORT?cert=PATH&key=PATH, unix:///PATH[?mode=0660] or vsock://[CID:]PORT"
    )]
    Address {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The system refused.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
}

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// What kind, and where.
    pub place: Place,
    /// Whether envd may run without it.
    pub optional: bool,
}

/// The kinds of address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A host (address or name) and port.
    Tcp {
        /// An IP address or a name.
        host: String,
        /// The port; 0 lets the system choose.
        port: u16,
    },
    /// The same, with TLS.
    Tls {
        /// An IP address or a name.
        host: String,
        /// The port; 0 lets the system choose.
        port: u16,
        /// Its certificate and key.
        files: Box<tls::Files>,
    },
    /// A socket in the file system.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A port of a VM's vsock device.
    Vsock {
        /// The context id; `VMADDR_CID_ANY` for every one that the guest has.
        cid: u32,
        /// The port.
        port: u32,
    },
}

impl FromStr for Address {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let wrong = |why| ListenError::Address { text: text.to_owned(), why };
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let (mut optional, mut mode) = (false, None);
        let (mut cert, mut key, mut client_ca) = (None, None, None);
        for option in query.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("optional", "" | "true") => optional = true,
                ("mode", octal) => {
                    let bits = u32::from_str_radix(octal, 8).ok().filter(|bits| *bits <= 0o777);
                    mode = Some(bits.ok_or_else(|| wrong("the mode is not an octal number"))?);
                }
                ("cert", path) => cert = Some(PathBuf::from(path)),
                ("key", path) => key = Some(PathBuf::from(path)),
                ("client_ca", path) => client_ca = Some(PathBuf::from(path)),
                _ => return Err(wrong("the options are ?mode=OCTAL and ?optional")),
            }
        }
        let (scheme, rest) = base.split_once("://").ok_or_else(|| wrong("it has no scheme"))?;
        if mode.is_some() && scheme != "unix" {
            return Err(wrong("only unix sockets have a mode"));
        }
        if scheme != "tls" && (cert.is_some() || key.is_some() || client_ca.is_some()) {
            return Err(wrong("only tls:// has certificates"));
        }
        let place = match scheme {
            "tcp" | "tls" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong("it has no port"))?;
                let port = port.parse().map_err(|_| wrong("the port is not 0 to 65535"))?;
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                if host.is_empty() {
                    return Err(wrong("it has no host"));
                }
                match (scheme, cert, key) {
                    ("tcp", ..) => Place::Tcp { host, port },
                    (_, Some(cert), Some(key)) => {
                        let files = Box::new(tls::Files { cert, key, client_ca });
                        Place::Tls { host, port, files }
                    }
                    _ => return Err(wrong("TLS needs ?cert=PATH&key=PATH")),
                }
            }
            "unix" if rest.starts_with('/') => {
                Place::Unix { path: PathBuf::from(rest), mode: mode.unwrap_or(0o600) }
            }
            "unix" => return Err(wrong("the path is not absolute")),
            "vsock" => {
                let (cid, port) = match rest.split_once(':') {
                    Some((cid, port)) => {
                        (cid.parse().map_err(|_| wrong("the context id is no number"))?, port)
                    }
                    None => (VMADDR_CID_ANY, rest),
                };
                Place::Vsock {
                    cid,
                    port: port.parse().map_err(|_| wrong("the port is no number"))?,
                }
            }
            _ => return Err(wrong("the scheme is not tcp, tls, unix or vsock")),
        };
        Ok(Self { place, optional })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Place::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Place::Tls { host, port, .. } if host.contains(':') => {
                write!(f, "tls://[{host}]:{port}")
            }
            Place::Tls { host, port, .. } => write!(f, "tls://{host}:{port}"),
            Place::Unix { path, .. } => write!(f, "unix://{}", path.display()),
            Place::Vsock { cid: VMADDR_CID_ANY, port } => write!(f, "vsock://{port}"),
            Place::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// TCP with TLS.
    Tls(TcpListener, tls::Acceptor),
    /// Unix; the socket's file is removed when the listener is dropped.
    Unix(UnixListener, SocketFile),
    /// Vsock.
    Vsock(VsockListener),
}

/// The file of a unix socket, removed on drop unless it is another's by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: Self::identity(path) }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == Self::identity(&self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Whether it is bound to a loopback address, so that only programs of this machine reach it.
    pub fn is_loopback(&self) -> bool {
        let (Self::Tcp(tcp) | Self::Tls(tcp, _)) = self else { return false };
        tcp.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback())
    }

    /// Whether others than programs of this machine may reach it by the network.
    pub fn is_open_to_the_network(&self) -> bool {
        matches!(self, Self::Tcp(_) | Self::Tls(..)) && !self.is_loopback()
    }

    /// Where it can be reached, with the port that the system chose.
    pub fn local(&self) -> String {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("tcp://{address}"),
                Err(error) => format!("tcp://? ({error})"),
            },
            Self::Tls(listener, _) => match listener.local_addr() {
                Ok(address) => format!("tls://{address}"),
                Err(error) => format!("tls://? ({error})"),
            },
            Self::Unix(_, file) => format!("unix://{}", file.path.display()),
            Self::Vsock(listener) => match listener.local_addr() {
                Ok(address) if address.cid() == VMADDR_CID_ANY => {
                    format!("vsock://{}", address.port())
                }
                Ok(address) => format!("vsock://{}:{}", address.cid(), address.port()),
                Err(error) => format!("vsock://? ({error})"),
            },
        }
    }
}

/// Binds one address. A name may stand for several, hence several listeners.
///
/// `v6_only` keeps an IPv6 wildcard from taking the IPv4 port too, where another listener wants it.
///
/// # Errors
/// [`ListenError::Bind`], naming the address.
pub async fn bind(address: &Address, v6_only: bool) -> Result<Vec<Listener>, ListenError> {
    let bound = match &address.place {
        Place::Tcp { host, port } => tcp(host, *port, v6_only).await,
        Place::Tls { host, port, files } => match tls::Acceptor::new(files) {
            Ok(acceptor) => tcp(host, *port, v6_only).await.map(|listeners| {
                let secret = |listener| match listener {
                    Listener::Tcp(tcp) => Listener::Tls(tcp, acceptor.clone()),
                    other => other,
                };
                listeners.into_iter().map(secret).collect()
            }),
            Err(error) => Err(io::Error::other(error)),
        },
        Place::Unix { path, mode } => unix(path, *mode).map(|listener| vec![listener]),
        Place::Vsock { cid, port } => {
            VsockListener::bind(VsockAddr::new(*cid, *port)).map(|v| vec![Listener::Vsock(v)])
        }
    };
    bound.map_err(|source| ListenError::Bind { address: address.clone(), source })
}

/// Whether an address is the wildcard of IPv4 at this port.
pub fn is_v4_wildcard(address: &Address, at: u16) -> bool {
    matches!(
        &address.place,
        Place::Tcp { host, port } | Place::Tls { host, port, .. } if *port == at && host == "0.0.0.0"
    )
}

async fn tcp(host: &str, port: u16, v6_only: bool) -> io::Result<Vec<Listener>> {
    let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => tokio::net::lookup_host((host, port)).await?.collect(),
    };
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    addresses.into_iter().map(|address| tcp_at(address, v6_only)).collect()
}

fn tcp_at(address: SocketAddr, v6_only: bool) -> io::Result<Listener> {
    use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &v6_only)?;
    }
    // A restarted daemon must get its port back while old connections linger in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG).map(Listener::Tcp)
}

fn unix(path: &Path, mode: u32) -> io::Result<Listener> {
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "the path exists and is not a socket",
            ));
        }
        // A socket that nobody listens on is left over from a daemon that was killed.
        Ok(_) if is_abandoned(path) => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
        Err(_) => {}
    }
    // With its mode from the first moment on: nobody may slip in before a chmod.
    let mask = umask(Mode::from_bits_truncate(0o777 & !mode));
    let listener = UnixListener::bind(path);
    umask(mask);
    let listener = listener?;
    let file = SocketFile::new(path);
    Ok(Listener::Unix(listener, file))
}

/// Whether nobody listens on a socket, found out without waiting for whoever does.
fn is_abandoned(path: &Path) -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None);
    let (Ok(probe), Ok(address)) = (probe, UnixAddr::new(path)) else { return false };
    connect(probe.as_raw_fd(), &address) == Err(Errno::ECONNREFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_a_round_trip() {
        for text in [
            "tcp://0.0.0.0:49983",
            "tcp://[::1]:1",
            "tcp://localhost:0",
            "unix:///run/envd.sock",
            "vsock://49983",
            "vsock://3:5",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let unix: Address = "unix:///a?mode=0666&optional".parse().unwrap();
        assert!(unix.optional);
        assert_eq!(unix.place, Place::Unix { path: "/a".into(), mode: 0o666 });
        let tls: Address = "tls://[::1]:1?cert=/c&key=/k&client_ca=/a".parse().unwrap();
        assert_eq!(tls.to_string(), "tls://[::1]:1");
        let Place::Tls { files, .. } = tls.place else { panic!("{tls}") };
        assert_eq!(files.client_ca, Some("/a".into()));
    }

    #[test]
    fn what_is_no_address_is_named() {
        for text in [
            "",
            "49983",
            "udp://1:1",
            "tcp://host",
            "tcp://host:99999",
            "tcp://:1",
            "unix://relative",
            "unix:///a?mode=9",
            "tcp://a:1?mode=600",
            "vsock://x:1",
            "vsock://",
            "tcp://a:1?what",
            "tcp://a:1?cert=/c",
            "tls://a:1",
            "tls://a:1?cert=/c",
            "tls://:1?cert=/c&key=/k",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is no address")), "{error}");
        }
    }
}
