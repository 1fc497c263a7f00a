//! Answers the host's requests for the machine's table of resources ([`kage_abi::resources`]).
//!
//! Nothing happens until it is asked for. The table is built by a task in pieces, so that thousands of files hold
//! nothing up; files made or removed meanwhile may be in it or not.

use alloc::vec::Vec;
use core::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};

use kage_abi::resources::table::{
    Endpoint, Entry, Facts, FileState, HEADER, MAX, ProcessState, Protocol, SocketState, header, write,
};
use smoltcp::{socket::tcp::State, wire::IpAddress};

use crate::{
    arch, executor, fs,
    local::Local,
    memory, net,
    process::{self, Process},
    time,
};

/// Entries written between two looks at the cost; a path may be two thousand names long.
const PIECE: usize = 4;
/// Cost of a piece in nanoseconds, estimated.
const PIECE_COST: u64 = 1_500;
/// Cost of each byte of a path.
const NAME_COST: u64 = 30;

/// Longest wait for files that are not mounted yet: what tells of them may have to come from another host.
const MOUNT: Duration = Duration::from_secs(1);

/// Doors over which a table stays where it is.
const DOORS: usize = 64;

/// The request that is being answered.
static ROUND: Local<u32> = Local::new();

/// Nothing is asked for yet.
pub fn start() {
    ROUND.set(arch::resources().published);
}

/// Starts answering when the host has asked since the last call.
pub fn poll() {
    let wanted = arch::resources().wanted;
    let mut round = ROUND.get();
    if *round != wanted {
        *round = wanted;
        drop(round);
        executor::spawn("resources", publish(wanted));
    }
}

/// A table under construction.
struct Table {
    bytes: Vec<u8>,
    entries: u32,
    all: u32,
}

impl Table {
    /// Adds an entry; one for which there is no room is counted alone.
    fn add(&mut self, entry: &Entry<'_>) {
        self.all += 1;
        let (before, mut fits) = (self.bytes.len(), true);
        let bytes = &mut self.bytes;
        write(entry, |part| {
            fits &= bytes.len() + part.len() <= MAX
                && (bytes.capacity() - bytes.len() >= part.len()
                    || memory::kernel_room(2 * bytes.capacity() + part.len())
                        && bytes.try_reserve(part.len()).is_ok());
            if fits {
                bytes.extend_from_slice(part);
            }
        });
        if fits {
            self.entries += 1;
        } else {
            self.bytes.truncate(before);
        }
    }
}

/// Waits for the files, or as long as that may take.
async fn mounted() {
    let (mut ready, mut late) = (pin!(fs::ready()), pin!(time::sleep(MOUNT)));
    poll_fn(|context| match ready.as_mut().poll(context) {
        Poll::Ready(()) => Poll::Ready(()),
        Poll::Pending => late.as_mut().poll(context),
    })
    .await;
}

async fn publish(round: u32) {
    mounted().await;
    let mut table = Table { bytes: Vec::from([0; HEADER]), entries: 0, all: 0 };
    for processes in process::table::all().chunks(PIECE) {
        processes.iter().for_each(|process| table.add(&process_entry(process)));
        executor::work(PIECE_COST).await;
    }
    for sockets in net::entries().chunks(PIECE) {
        for socket in sockets {
            let holder = socket.pid.and_then(process::table::find);
            let name = holder.as_ref().map_or_else(|| service(socket), |process| process.name());
            table.add(&socket_entry(socket, name));
        }
        executor::work(PIECE_COST).await;
    }
    let mut from = 0;
    loop {
        let files = fs::rows(from, PIECE);
        files.iter().for_each(|file| table.add(&file_entry(file)));
        let Some(last) = files.last() else { break };
        from = last.facts.vid.index() + 1;
        // A path is followed up to the root, name by name.
        let names: usize = files.iter().filter_map(|file| file.path.as_deref()).map(str::len).sum();
        executor::work(PIECE_COST + names as u64 * NAME_COST).await;
    }
    table.bytes[..HEADER].copy_from_slice(&header(table.entries, table.all));
    arch::publish_resources(round, &table.bytes);
    // The host copies a piece at each door, and there is one before this task goes on. A host that takes longer
    // than the largest table needs does not want it: the machine has moved.
    for _ in 0..DOORS {
        executor::yield_now().await;
        if arch::resources().taken == round {
            return;
        }
    }
}

fn process_entry(process: &Process) -> Entry<'_> {
    let facts = Facts::Process {
        state: if process.is_waiting() { ProcessState::Waiting } else { ProcessState::Running },
        pid: process.pid(),
        cpu_ns: process.time().as_nanos() as u64,
        memory_bytes: process.memory_bytes() as u64,
    };
    Entry { index: process.vid().index(), facts, text: process.name() }
}

/// What of the kernel's own services a socket belongs to.
fn service(socket: &net::Entry) -> &'static str {
    match socket.local.port {
        7 => "echo",
        9 => "discard",
        19 => "chargen",
        22 => "ssh",
        80 => "http",
        _ => "",
    }
}

fn file_entry(file: &fs::Row) -> Entry<'_> {
    let state = match file.facts.kind {
        fs::Kind::Directory => FileState::Directory,
        fs::Kind::File => FileState::File,
        fs::Kind::Link => FileState::Link,
    };
    let bytes = if state == FileState::Directory { 0 } else { file.facts.size };
    let facts = Facts::File { state, bytes };
    // A file that only programs still hold has no name.
    Entry { index: file.facts.vid.index(), facts, text: file.path.as_deref().unwrap_or_default() }
}

fn endpoint(address: Option<IpAddress>, port: u16) -> Endpoint {
    let address = match address {
        Some(IpAddress::Ipv6(address)) => address.octets(),
        Some(IpAddress::Ipv4(address)) => address.to_ipv6_mapped().octets(),
        None => [0; 16],
    };
    Endpoint { address, port }
}

fn socket_entry<'a>(socket: &net::Entry, text: &'a str) -> Entry<'a> {
    let (protocol, state) = match socket.protocol {
        net::Protocol::Tcp(state) => (Protocol::Tcp, tcp_state(state)),
        net::Protocol::Udp => (Protocol::Udp, SocketState::Open),
    };
    let facts = Facts::Socket {
        state,
        protocol,
        local: endpoint(socket.local.addr, socket.local.port),
        remote: socket.remote.map(|remote| endpoint(Some(remote.addr), remote.port)),
        bytes_in: socket.traffic.received,
        bytes_out: socket.traffic.sent,
    };
    Entry { index: socket.vid.index(), facts, text }
}

fn tcp_state(state: State) -> SocketState {
    match state {
        State::Closed => SocketState::Closed,
        State::Listen => SocketState::Listen,
        State::SynSent => SocketState::SynSent,
        State::SynReceived => SocketState::SynReceived,
        State::Established => SocketState::Established,
        State::FinWait1 => SocketState::FinWait1,
        State::FinWait2 => SocketState::FinWait2,
        State::CloseWait => SocketState::CloseWait,
        State::Closing => SocketState::Closing,
        State::LastAck => SocketState::LastAck,
        State::TimeWait => SocketState::TimeWait,
    }
}
