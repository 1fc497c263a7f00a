//! The machine's sockets by their identity, with what went through each.

use alloc::{collections::BTreeMap, vec::Vec};

use smoltcp::{
    iface::SocketHandle,
    socket::Socket,
    wire::{IpEndpoint, IpListenEndpoint},
};

use super::STACK;
use crate::vid::{self, Kind, Vid};

/// Bytes of content that went through a socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Taken by who reads from it.
    pub received: u64,
    /// Handed to it.
    pub sent: u64,
}

/// Sockets that somebody holds. Those that still wait in a listener for a connection have no identity yet.
#[derive(Default)]
pub struct Named {
    sockets: BTreeMap<SocketHandle, (Vid, Traffic)>,
    listeners: BTreeMap<Vid, u16>,
    /// Takes what is counted of a socket that is not here.
    stray: Traffic,
}

impl Named {
    /// Names a socket, which keeps its name until it is removed.
    pub fn add(&mut self, handle: SocketHandle) -> Vid {
        let vid = vid::next(Kind::Socket);
        self.sockets.insert(handle, (vid, Traffic::default()));
        vid
    }

    /// Forgets a socket.
    pub fn remove(&mut self, handle: SocketHandle) {
        self.sockets.remove(&handle);
    }

    /// Names a listener at a port.
    pub fn add_listener(&mut self, port: u16) -> Vid {
        let vid = vid::next(Kind::Socket);
        self.listeners.insert(vid, port);
        vid
    }

    /// Forgets a listener.
    pub fn remove_listener(&mut self, vid: Vid) {
        self.listeners.remove(&vid);
    }

    /// What went through a socket.
    pub fn traffic(&mut self, handle: SocketHandle) -> &mut Traffic {
        self.sockets.get_mut(&handle).map_or(&mut self.stray, |(_, traffic)| traffic)
    }

    /// The name of a socket that was added.
    pub fn vid(&mut self, handle: SocketHandle) -> Vid {
        match self.sockets.get(&handle) {
            Some((vid, _)) => *vid,
            None => self.add(handle),
        }
    }
}

/// Which protocol a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, with its state.
    Tcp(smoltcp::socket::tcp::State),
    /// UDP.
    Udp,
}

/// One socket as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its identity.
    pub vid: Vid,
    /// Its protocol.
    pub protocol: Protocol,
    /// This end; no address: every one of the image.
    pub local: IpListenEndpoint,
    /// The other end, if there is one.
    pub remote: Option<IpEndpoint>,
    /// What went through it.
    pub traffic: Traffic,
}

/// All sockets, in the order of their identities.
pub fn entries() -> Vec<Entry> {
    let stack = STACK.get();
    let listening = stack.named.listeners.iter().map(|(&vid, &port)| Entry {
        vid,
        protocol: Protocol::Tcp(smoltcp::socket::tcp::State::Listen),
        local: port.into(),
        remote: None,
        traffic: Traffic::default(),
    });
    let named = |handle| stack.named.sockets.get(&handle).copied();
    let open = stack.sockets.iter().filter_map(|(handle, socket)| {
        let (vid, traffic) = named(handle)?;
        Some(match socket {
            Socket::Tcp(socket) => Entry {
                vid,
                protocol: Protocol::Tcp(socket.state()),
                local: socket.local_endpoint().map_or(socket.listen_endpoint(), Into::into),
                remote: socket.remote_endpoint(),
                traffic,
            },
            Socket::Udp(socket) => {
                Entry { vid, protocol: Protocol::Udp, local: socket.endpoint(), remote: None, traffic }
            }
            #[allow(unreachable_patterns, reason = "depends on the kinds of socket compiled in")]
            _ => return None,
        })
    });
    let mut all: Vec<Entry> = listening.chain(open).collect();
    all.sort_by_key(|entry| entry.vid);
    all
}
