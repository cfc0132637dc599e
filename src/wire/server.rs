//! Accepts connections from every listener and serves them, up to a limit over all of them.
//!
//! Beyond that limit some are kept for peers from elsewhere ([`KEPT_SHARE`]): a program of the sandbox
//! that opens all the connections it gets does not keep out who runs the sandbox. Peers over unix
//! sockets count as from elsewhere: whom those serve, their mode says. At the limit a newcomer gets the
//! place of the connection that has been idle for longest ([`super::eviction`]).

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::ready;
use http::{Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_vsock::VMADDR_CID_HOST;
use tower::Service;

use super::{
    Body, KEPT_SHARE, Limits, MAX_REFUSALS, REFUSAL_TIME,
    activity::{Activity, Waiting, Why},
    connection::{self, Place},
    eviction::Connections,
    listen::Listener,
    memory::Memory,
    peer::Peer,
    translate::Refused,
};
use crate::telemetry::rate_limit;

/// The idle connections that are closed at a time when there are no descriptors left.
const EVICTED_FOR_DESCRIPTORS: usize = 16;
/// The pause after an accept that failed for want of descriptors or memory; connections wait in
/// the backlog meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a TCP connection is silent before the kernel asks whether the client is there, and how
/// often it asks (`TCP_KEEPIDLE`, `TCP_KEEPINTVL`; tcp(7)).
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Serves one service on any number of listeners.
#[derive(Debug)]
pub struct Server<S> {
    service: S,
    limits: Limits,
    memory: Memory,
    slots: Arc<Semaphore>,
    /// Of those, the ones that peers of this machine may have.
    inner_slots: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    connections: Arc<Connections>,
    shutdown: watch::Receiver<bool>,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
struct Source {
    /// From a program of this machine, as far as that can be told.
    inner: bool,
    /// Over a listener that is bound to a loopback address.
    via_loopback: bool,
}

impl<S> Server<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    /// A server that stops accepting, and lets its connections end, once `shutdown` says true.
    pub fn new(
        service: S,
        limits: Limits,
        memory: Memory,
        shutdown: watch::Receiver<bool>,
    ) -> Arc<Self> {
        Arc::new(Self {
            service,
            slots: Arc::new(Semaphore::new(all(&limits))),
            inner_slots: Arc::new(Semaphore::new(limits.connections)),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            connections: Arc::default(),
            limits,
            memory,
            shutdown,
        })
    }

    /// Accepts until shutdown.
    pub async fn accept(self: Arc<Self>, listener: Listener) {
        let mut shutdown = self.shutdown.clone();
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => {}
            () = self.accept_forever(&listener) => {}
        }
    }

    /// Waits until no connection is left.
    pub async fn drained(&self) {
        let all = u32::try_from(all(&self.limits)).unwrap_or(u32::MAX);
        let _ = self.slots.acquire_many(all).await;
    }

    async fn accept_forever(self: &Arc<Self>, listener: &Listener) {
        let via_loopback = listener.is_loopback();
        loop {
            let accepted = match listener {
                Listener::Tcp(tcp) => tcp.accept().await.map(|(stream, address)| {
                    prepare(&stream);
                    let inner = is_own(address);
                    let from = Source { inner, via_loopback };
                    self.spawn(ready(Ok((stream, Peer::Tcp))), of_tcp(address, inner), from);
                }),
                Listener::Tls(tcp, tls) => tcp.accept().await.map(|(stream, address)| {
                    prepare(&stream);
                    let inner = is_own(address);
                    let greeting = tls.clone().accept(stream);
                    let greeting = async {
                        let (stream, verified) = greeting.await?;
                        Ok((stream, Peer::Tls { verified }))
                    };
                    let from = Source { inner, via_loopback };
                    self.spawn(greeting, of_tcp(address, inner), from);
                }),
                Listener::Unix(unix, _) => unix.accept().await.map(|(stream, _)| {
                    let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                    let log_peer = rate_limit::Peer::User(uid);
                    let from = Source { inner: false, via_loopback };
                    self.spawn(ready(Ok((stream, Peer::Unix { uid }))), log_peer, from);
                }),
                Listener::Vsock(vsock) => vsock.accept().await.map(|(stream, address)| {
                    let cid = address.cid();
                    // Else it is the machine itself, or a sibling.
                    let inner = cid != VMADDR_CID_HOST;
                    let log_peer = rate_limit::Peer::Machine(cid);
                    let from = Source { inner, via_loopback };
                    self.spawn(ready(Ok((stream, Peer::Vsock { cid }))), log_peer, from);
                }),
            };
            if let Err(error) = accepted
                && !is_of_one_connection(&error)
            {
                tracing::warn!(listener = listener.local(), %error, "cannot accept");
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                    self.evict_idle();
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }

    /// Closes the connections that have been idle for longest, for their descriptors; whether there
    /// were any. It does not wait until they are closed.
    pub fn evict_idle(&self) -> bool {
        // Each call picks another one.
        let evicted = (0..EVICTED_FOR_DESCRIPTORS)
            .take_while(|_| self.connections.evict_for(false, Why::Resources));
        evicted.count() > 0
    }

    /// Closes the connection whose client has taken nothing for longest, for the memory that it holds;
    /// whether there was one that had stalled for long enough.
    pub fn evict_stalled(&self) -> bool {
        self.connections.evict_stalled()
    }

    /// A place for a connection.
    fn slot(&self, inner: bool) -> Option<connection::Slot> {
        let inner = match inner {
            true => Some(Arc::clone(&self.inner_slots).try_acquire_owned().ok()?),
            false => None,
        };
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        Some(connection::Slot { all: slot, inner })
    }

    /// The place of the connection that has been idle for longest, which is closed for it.
    async fn make_room(&self, inner: bool) -> Option<connection::Slot> {
        if !self.connections.evict_for(inner, Why::Place) {
            return None;
        }
        let freed = async {
            let inner = match inner {
                true => Some(Arc::clone(&self.inner_slots).acquire_owned().await.ok()?),
                false => None,
            };
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
            Some(connection::Slot { all: slot, inner })
        };
        timeout(REFUSAL_TIME, freed).await.ok()?
    }

    /// What a connection is told for which there is no place.
    fn refuse(&self, log_peer: rate_limit::Peer) -> Refused {
        let limit = self.limits.connections;
        rate_limit::of_peer_now(log_peer, || {
            tracing::warn!(peer = %log_peer, limit, "too many connections");
        });
        Refused(format!("too many connections: the limit is {limit}").into())
    }

    /// Serves a connection once its client has been greeted, if there is a place for it.
    fn spawn<I>(
        self: &Arc<Self>,
        greeting: impl Future<Output = io::Result<(I, Peer)>> + Send + 'static,
        log_peer: rate_limit::Peer,
        from: Source,
    ) where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let place = match self.slot(from.inner) {
            Some(slot) => Ok(slot),
            // There are few places to wait or to be refused on.
            None => match Arc::clone(&self.refusals).try_acquire_owned() {
                Ok(permit) => Err(permit),
                Err(_) => return,
            },
        };
        let server = Arc::clone(self);
        tokio::spawn(rate_limit::of_peer(Some(log_peer), async move {
            tracing::debug!(peer = %log_peer, "connection accepted");
            let (slot, refused) = match place {
                Ok(slot) => (slot, None),
                Err(permit) => match server.make_room(from.inner).await {
                    Some(slot) => (slot, None),
                    None => (
                        connection::Slot { all: permit, inner: None },
                        Some(server.refuse(log_peer)),
                    ),
                },
            };
            let activity = Arc::new(Activity::new(Waiting::ForHead));
            // One that is refused has no place to give away.
            let registered =
                refused.is_none().then(|| server.connections.register(&activity, from.inner));
            let greeting = async {
                tokio::select! {
                    greeted = timeout(server.limits.header_timeout, greeting) => greeted,
                    () = activity.evicted() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                }
            };
            let (io, peer) = match greeting.await {
                Ok(Ok(greeted)) => greeted,
                Ok(Err(error)) => return tracing::debug!(%error, "connection not greeted"),
                Err(_) => return tracing::debug!("connection not greeted within the time for it"),
            };
            // There are few places to be refused on: they are not for waiting.
            let limits = match refused {
                None => server.limits.clone(),
                Some(_) => Limits {
                    header_timeout: server.limits.header_timeout.min(REFUSAL_TIME),
                    idle_timeout: server.limits.idle_timeout.min(REFUSAL_TIME),
                    ..server.limits.clone()
                },
            };
            let via_loopback = from.via_loopback;
            let memory = server.memory.clone();
            let place = Place { slot, peer, log_peer, via_loopback, refused, memory, activity };
            let (service, shutdown) = (server.service.clone(), server.shutdown.clone());
            connection::serve(io, service, place, &limits, shutdown).await;
            drop(registered);
        }));
    }
}

/// The connections that there may be, those for peers from elsewhere included.
fn all(limits: &Limits) -> usize {
    limits.connections + limits.connections / KEPT_SHARE
}

/// Whose log lines those of a TCP peer are.
fn of_tcp(peer: SocketAddr, inner: bool) -> rate_limit::Peer {
    if inner { rate_limit::Peer::Inside } else { rate_limit::Peer::at(peer.ip()) }
}

/// Sets up a TCP connection. Each of these is a help, and none a condition.
fn prepare(stream: &TcpStream) {
    use nix::sys::socket::{setsockopt, sockopt};
    // Streams of small events must not wait for Nagle's algorithm.
    let _ = stream.set_nodelay(true);
    // A client that vanished is found out, as upstream finds it out, and not waited for.
    let seconds = u32::try_from(KEEPALIVE.as_secs()).unwrap_or(u32::MAX);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &seconds);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &seconds);
}

/// Whether an address is one of this machine's, and so a peer a program of it: its programs may send from
/// any of them, wherever they connect to. Only those can be bound (EADDRNOTAVAIL of bind(2)); where
/// `ip_nonlocal_bind` lets all be, nobody counts as from elsewhere.
fn is_own(mut peer: SocketAddr) -> bool {
    peer.set_port(0);
    peer.ip().to_canonical().is_loopback() || std::net::UdpSocket::bind(peer).is_ok()
}

/// Errors of accept(2) that concern the connection, not the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_this_machine_are_told_from_others_whichever_address_they_have() {
        let mut own: Vec<SocketAddr> =
            ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"]
                .map(|text| text.parse().unwrap())
                .into();
        // Those of its interfaces.
        let interfaces = nix::ifaddrs::getifaddrs().unwrap();
        own.extend(interfaces.filter_map(|interface| {
            let address = interface.address?;
            Some(SocketAddr::from((address.as_sockaddr_in()?.ip(), 1)))
        }));
        for address in own {
            assert!(is_own(address), "{address}");
        }
        // For documentation, and nobody's (RFC 5737, RFC 3849).
        for address in ["203.0.113.77:1", "[2001:db8::77]:1", "[::ffff:203.0.113.77]:1"] {
            assert!(!is_own(address.parse().unwrap()), "{address}");
        }
    }
}
