//! Who is at the other end of a connection, as far as the kernel knows.

/// The other end. It stands in the extensions of every request from a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Anybody who reaches the TCP port.
    Tcp,
    /// A process of this machine, over a unix socket.
    Unix {
        /// Its user when it connected (`SO_PEERCRED`, unix(7)); `None` if the kernel does not say.
        uid: Option<u32>,
    },
    /// A machine, over vsock.
    Vsock {
        /// Its context id; 2 is the host (vsock(7)).
        cid: u32,
    },
    /// Whoever reaches a TCP port with TLS.
    Tls {
        /// Whether it has shown a certificate of the listener's authority.
        verified: bool,
    },
}

/// Which peers need no access token. None of them, unless they are configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Users of this machine, over unix sockets.
    pub uids: Vec<u32>,
    /// Machines, over vsock.
    pub cids: Vec<u32>,
    /// Whether client certificates count.
    pub certificates: bool,
}

impl Trust {
    /// Whether this peer is one of them.
    pub fn includes(&self, peer: Peer) -> bool {
        match peer {
            Peer::Tcp => false,
            Peer::Unix { uid } => uid.is_some_and(|uid| self.uids.contains(&uid)),
            Peer::Vsock { cid } => self.cids.contains(&cid),
            Peer::Tls { verified } => verified && self.certificates,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_trusted_by_default() {
        let peers = [
            Peer::Tcp,
            Peer::Unix { uid: Some(0) },
            Peer::Vsock { cid: 2 },
            Peer::Tls { verified: true },
        ];
        assert!(!peers.iter().any(|peer| Trust::default().includes(*peer)));
        let trust = Trust { uids: vec![0], cids: vec![2], certificates: true };
        let trusted: Vec<_> = peers.iter().map(|peer| trust.includes(*peer)).collect();
        assert_eq!(trusted, [false, true, true, true]);
        assert!(!trust.includes(Peer::Unix { uid: None }));
        assert!(!trust.includes(Peer::Unix { uid: Some(1000) }));
        assert!(!trust.includes(Peer::Vsock { cid: 3 }));
        assert!(!trust.includes(Peer::Tls { verified: false }));
    }
}
