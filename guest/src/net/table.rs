//! The machine's sockets by their identity, with what went through each: listeners, connections, datagram sockets.
//! Those that still wait in a listener for a connection have no identity yet.

use alloc::{
    collections::BTreeMap,
    rc::{Rc, Weak},
    vec::Vec,
};
use core::cell::Cell;

use smoltcp::{
    iface::SocketHandle,
    socket::{Socket, tcp, udp},
    wire::{IpEndpoint, IpListenEndpoint},
};

use super::STACK;
use crate::{
    local::Local,
    vid::{self, Vid},
};

/// What is known of a socket beside what the stack knows.
pub struct Record {
    vid: Vid,
    /// The process that has it; none for the kernel's own services.
    pid: Option<u32>,
    /// Its handle in the stack; none while it is not open, and for a listener, which has several.
    handle: Cell<Option<SocketHandle>>,
    /// What a listener listens at, and what a socket is bound to before it is open.
    bound: Cell<IpListenEndpoint>,
    stream: bool,
    traffic: Cell<Traffic>,
}

static RECORDS: Local<BTreeMap<u64, Weak<Record>>> = Local::new();

/// Prepares the list.
pub fn start() {
    RECORDS.set(BTreeMap::new());
}

impl Record {
    /// Gives a socket its VID, and lists it as long as the record lives.
    pub fn new(stream: bool, pid: Option<u32>) -> Rc<Self> {
        let record = Rc::new(Self {
            vid: vid::next(vid::Kind::Socket),
            pid,
            handle: Cell::new(None),
            bound: Cell::new(IpListenEndpoint::default()),
            stream,
            traffic: Cell::default(),
        });
        RECORDS.get().insert(record.vid.index(), Rc::downgrade(&record));
        record
    }

    /// The process that has it.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// It is open now.
    pub fn open(&self, handle: SocketHandle) {
        self.handle.set(Some(handle));
    }

    /// It is bound now.
    pub fn bind(&self, to: IpListenEndpoint) {
        self.bound.set(to);
    }

    /// What it is bound to.
    pub fn bound(&self) -> IpListenEndpoint {
        self.bound.get()
    }

    /// Counts bytes received.
    pub fn count_received(&self, bytes: usize) {
        let traffic = self.traffic.get();
        self.traffic.set(Traffic { received: traffic.received + bytes as u64, ..traffic });
    }

    /// Counts bytes sent.
    pub fn count_sent(&self, bytes: usize) {
        let traffic = self.traffic.get();
        self.traffic.set(Traffic { sent: traffic.sent + bytes as u64, ..traffic });
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        RECORDS.get().remove(&self.vid.index());
    }
}

/// How many sockets a process has, and how many all processes have.
pub fn counts(pid: Option<u32>) -> (usize, usize) {
    let records = RECORDS.get();
    let of_processes = records.values().filter_map(Weak::upgrade).filter(|record| record.pid.is_some());
    let (mut own, mut all) = (0, 0);
    let mut kept = Vec::new();
    for record in of_processes {
        own += usize::from(record.pid == pid);
        all += 1;
        // Were one of these the last, dropping it here would want the list again.
        kept.push(record);
    }
    drop(records);
    (own, all)
}

/// Bytes of content that went through a socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Taken by who reads from it.
    pub received: u64,
    /// Handed to it.
    pub sent: u64,
}

/// Which protocol a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, with its state.
    Tcp(tcp::State),
    /// UDP.
    Udp,
}

/// One socket as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its identity.
    pub vid: Vid,
    /// The process that has it; none for the kernel's own services.
    pub pid: Option<u32>,
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
    let records: Vec<Rc<Record>> = RECORDS.get().values().filter_map(Weak::upgrade).collect();
    let stack = STACK.get();
    let sockets: BTreeMap<SocketHandle, &Socket<'_>> = stack.sockets.iter().collect();
    let entry = |record: &Rc<Record>| {
        let bound = record.bound.get();
        let idle = if bound.port == 0 { tcp::State::Closed } else { tcp::State::Listen };
        let mut entry = Entry {
            vid: record.vid,
            pid: record.pid,
            protocol: if record.stream { Protocol::Tcp(idle) } else { Protocol::Udp },
            local: bound,
            remote: None,
            traffic: record.traffic.get(),
        };
        match record.handle.get().and_then(|handle| sockets.get(&handle)) {
            Some(Socket::Tcp(socket)) => {
                entry.protocol = Protocol::Tcp(socket.state());
                entry.local = socket.local_endpoint().map_or(bound, Into::into);
                entry.remote = socket.remote_endpoint();
            }
            Some(Socket::Udp(socket)) => entry.local = socket.endpoint(),
            #[allow(unreachable_patterns, reason = "depends on the kinds of socket compiled in")]
            _ => {}
        }
        entry
    };
    let entries = records.iter().map(entry).collect();
    drop(stack);
    entries
}

/// Whether a port is used by a socket of that kind, for all addresses or for this one. Connections that were accepted
/// at a port do not use it: a service that was killed starts again while its clients still close theirs.
pub fn is_used(stream: bool, wanted: IpListenEndpoint) -> bool {
    let clash = |other: IpListenEndpoint| {
        other.port == wanted.port
            && (other.addr.is_none() || wanted.addr.is_none() || other.addr == wanted.addr)
    };
    let bound: Vec<Rc<Record>> = RECORDS.get().values().filter_map(Weak::upgrade).collect();
    let by_record = bound
        .iter()
        .any(|record| record.stream == stream && record.handle.get().is_none() && clash(record.bound.get()));
    by_record
        || STACK.get().sockets.iter().any(|(_, socket)| match socket {
            Socket::Tcp(socket) if stream => {
                matches!(socket.state(), tcp::State::Listen | tcp::State::SynReceived)
                    && clash(socket.listen_endpoint())
            }
            Socket::Udp(socket) if !stream => clash(udp::Socket::endpoint(socket)),
            _ => false,
        })
}
