//! What machines consist of: their tables of resources, where a resource is now, and the indices of VIDs.
//!
//! A table is the guest's word. It is asked for at the owner ([`crate::machines::Inspect`]) and read entry by entry;
//! one that is damaged is refused whole. While a machine moves the question follows it: whoever is asked first asks
//! the owner that the directory names, and again when that one has lost the machine meanwhile.

use std::{
    mem::offset_of,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use kage_abi::resources::{
    Resources as Record,
    table::{self, Endpoint, Entry, Facts, Protocol},
};
use kage_directory::{ImageRecord, Records as _, Versioned, Wanted};
use kage_machine::{HostName, Memory, PAGE_SIZE, PageBytes, PageIndex, UserName, Vid, identity::Kind};

use crate::{
    api::{
        error::{Code, ErrorBody},
        types::{FileView, Place, ProcessView, Resources, SocketView, State},
    },
    http::Call,
    lifecycle::{Daemon, Image, blocking},
    machines::NoTable,
};

/// How often machines are looked at for indices running short: one word of shared memory each. Half a lease lasts
/// longer than this at 250,000 new resources a second.
const LOOK: Duration = Duration::from_secs(2);

/// How long a question for resources may take, moves included.
const PATIENCE: Duration = Duration::from_secs(10);

/// Changes at another host are not heard of; they are looked for this often.
const AGAIN: Duration = Duration::from_millis(20);

/// Machines whose tables are waited for at a time, each on a thread that blocks.
pub const ASKED: usize = 64;

/// Most bytes of an answer, as JSON: what callers read has a bound (`http.rs`), and a table of short names, or of names
/// that have to be escaped, is many times longer there.
const MOST: usize = 12 << 20;

/// Which resources are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// All of them.
    All,
    /// Those of a kind.
    Kind(Kind),
    /// One.
    One(Vid),
}

impl Only {
    fn wants(self, kind: Kind, index: u64) -> bool {
        match self {
            Self::All => true,
            Self::Kind(wanted) => wanted == kind,
            Self::One(vid) => vid.kind() == kind && vid.index() == index,
        }
    }

    fn query(self) -> String {
        match self {
            Self::All => String::new(),
            Self::Kind(kind) => format!("?kind={}", kind.name()),
            Self::One(vid) => format!("?vid={vid}"),
        }
    }
}

/// Bytes of a text in JSON, at most.
fn json_bytes(text: &str) -> usize {
    text.chars()
        .map(|at| match at {
            '"' | '\\' => 2,
            at if at.is_control() => 6,
            at => at.len_utf8(),
        })
        .sum()
}

/// An endpoint as text; an IPv4 address as such.
fn text_of(end: Endpoint) -> String {
    let address = Ipv6Addr::from(end.address);
    match address.to_ipv4_mapped() {
        Some(address) => SocketAddr::from((address, end.port)).to_string(),
        None => SocketAddr::from((address, end.port)).to_string(),
    }
}

/// Reads a guest's table into `into`, leaving out what is not wanted. `vid` makes a resource's VID.
///
/// # Errors
/// [`table::Damage`].
fn read_table(
    bytes: &[u8],
    only: Only,
    vid: impl Fn(Kind, u64) -> Ipv6Addr,
    replicas: &[HostName],
    into: &mut Resources,
) -> Result<(), table::Damage> {
    let (mut entries, mut room): (u32, _) = (0, MOST);
    let all = table::read(bytes, |Entry { index, facts, text }| {
        // How often its text stands in JSON, and the bytes of the rest at most.
        let (kind, texts, rest) = match facts {
            Facts::Process { .. } => (Kind::Process, 1, 200),
            Facts::File { .. } => (Kind::File, 2, 180),
            Facts::Socket { .. } => (Kind::Socket, 1, 360),
        };
        if only.wants(kind, index) {
            let replicas = replicas.iter().map(|host| host.as_str().len() + 4).sum::<usize>();
            let Some(left) = room.checked_sub(rest + replicas + texts * json_bytes(text)) else { return };
            room = left;
        }
        entries += 1;
        match facts {
            Facts::Process { state, pid, cpu_ns, memory_bytes } if only.wants(Kind::Process, index) => {
                into.processes.push(ProcessView {
                    vid: vid(Kind::Process, index),
                    name: text.to_owned(),
                    state: state.name().to_owned(),
                    pid,
                    cpu_ms: cpu_ns / 1_000_000,
                    memory_bytes,
                });
            }
            Facts::File { state, bytes } if only.wants(Kind::File, index) => {
                let name = text.rsplit('/').find(|part| !part.is_empty()).unwrap_or("/");
                into.files.push(FileView {
                    vid: vid(Kind::File, index),
                    name: name.to_owned(),
                    state: state.name().to_owned(),
                    path: text.to_owned(),
                    bytes,
                    replicas: replicas.to_vec(),
                });
            }
            Facts::Socket { state, protocol, local, remote, bytes_in, bytes_out }
                if only.wants(Kind::Socket, index) =>
            {
                let protocol = match protocol {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                };
                let name =
                    if text.is_empty() { format!("{protocol}/{}", local.port) } else { text.to_owned() };
                into.sockets.push(SocketView {
                    vid: vid(Kind::Socket, index),
                    name,
                    state: state.name().to_owned(),
                    protocol: protocol.to_owned(),
                    local: text_of(local),
                    remote: remote.map(text_of),
                    bytes_in,
                    bytes_out,
                });
            }
            Facts::Process { .. } | Facts::File { .. } | Facts::Socket { .. } => {}
        }
    })?;
    into.omitted = all.saturating_sub(entries);
    Ok(())
}

/// How an attempt to read a machine's resources ended without them.
enum Missed {
    /// For good.
    Final(ErrorBody),
    /// The machine is on its way; what to say should it not arrive.
    Moving(ErrorBody),
}

impl Daemon {
    /// Reads an address as a VID of this site.
    ///
    /// # Errors
    /// [`Code::NotFound`]: it names nothing.
    pub fn known_vid(&self, address: Ipv6Addr) -> Result<Vid, ErrorBody> {
        Vid::parse(self.config.network.prefix, address)
            .map_err(|error| ErrorBody::new(Code::NotFound, error.to_string()))
    }

    /// The record of an image; as last seen while the directory is away.
    async fn record_as_known(self: &Arc<Self>, user: &UserName) -> Result<ImageRecord, ErrorBody> {
        let (daemon, name) = (self.clone(), user.clone());
        match blocking(move || daemon.existing(&name)).await {
            Ok(found) => Ok(found.record),
            Err(error) if error.code == Code::Unreachable => {
                self.seen.borrow().images.get(user).cloned().ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The resources of a user's machine, wherever it is. A host that was asked by another one (`hops` above 0)
    /// answers for its own machines alone.
    ///
    /// # Errors
    /// [`ErrorBody`]; [`Code::NotFound`] when it does not run.
    pub async fn resources(
        self: &Arc<Self>,
        user: &UserName,
        only: Only,
        hops: u8,
    ) -> Result<Resources, ErrorBody> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut seen = self.seen.subscribe();
        loop {
            seen.borrow_and_update();
            let record = self.record_as_known(user).await?;
            let image = self.image(user);
            let mut changed = image.changed.subscribe();
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let attempt = if record.owner == self.me {
                self.resources_here(&image, &record, only, left).await
            } else if hops > 0 {
                let message = format!("{user}'s machine went to host {}; try again", record.owner);
                Err(Missed::Final(ErrorBody::new(Code::OwnershipLost, message)))
            } else {
                self.resources_there(user, &record.owner, only, left).await
            };
            let error = match attempt {
                Ok(resources) => return Ok(resources),
                Err(Missed::Final(error)) => return Err(error),
                Err(Missed::Moving(error)) => error,
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(error);
            }
            tokio::select! {
                _ = seen.changed() => {}
                _ = changed.changed() => {}
                () = tokio::time::sleep_until((tokio::time::Instant::now() + AGAIN).min(deadline)) => {}
            }
        }
    }

    async fn resources_there(
        self: &Arc<Self>,
        user: &UserName,
        owner: &HostName,
        only: Only,
        patience: Duration,
    ) -> Result<Resources, Missed> {
        let call = Call::new(http::Method::GET, format!("/v1/images/{user}/resources{}", only.query()));
        let call = Call { hops: 1, ..call.patience(patience) };
        let address = self.address(owner).map_err(Missed::Final)?;
        let answer = self.peers.call(owner, address, &call).await;
        answer.and_then(|answer| answer.into_value()).map_err(|error| match error.code {
            Code::OwnershipLost | Code::Busy => Missed::Moving(error),
            _ => Missed::Final(error),
        })
    }

    async fn resources_here(
        self: &Arc<Self>,
        image: &Image,
        record: &ImageRecord,
        only: Only,
        patience: Duration,
    ) -> Result<Resources, Missed> {
        let user = &image.user;
        let status = image.status();
        let inspector = match (status.inspector, status.state) {
            (_, State::Failed) | (None, _) if record.wanted == Wanted::Stopped => {
                let message = format!(
                    "{user}'s machine is not running, so it has no resources; `kage start {user}` starts it"
                );
                return Err(Missed::Final(ErrorBody::new(Code::NotFound, message)));
            }
            (_, State::Failed) => {
                let message = format!("{user}'s machine has failed; see `kage logs {user}`");
                return Err(Missed::Final(ErrorBody::failed(message)));
            }
            (Some(inspector), _) => inspector,
            (None, state) => {
                let message = format!("{user}'s machine is {} at {}; try again", state.name(), self.me);
                return Err(Missed::Moving(ErrorBody::new(Code::Busy, message)));
            }
        };
        // Who waits for a machine that says nothing holds a thread: one for a machine, so many in all.
        let asked = tokio::time::Instant::now();
        let turn = async {
            let own = image.asking.lock().await;
            (own, self.asked.acquire().await)
        };
        let Ok(_turn) = tokio::time::timeout(patience, turn).await else {
            let message =
                format!("the resources of {user}'s machine: others ask for them, too, without an answer");
            return Err(Missed::Final(ErrorBody::new(Code::TimedOut, message)));
        };
        let left = patience.saturating_sub(asked.elapsed());
        let looked = tokio::task::spawn_blocking(move || inspector.table(left)).await;
        let bytes = match looked {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(NoTable::Gone)) => {
                let message = format!("{user}'s machine has just left {}; try again", self.me);
                return Err(Missed::Moving(ErrorBody::new(Code::Busy, message)));
            }
            Ok(Err(NoTable::Silent(reason))) => {
                let message = format!("the resources of {user}'s machine: {reason}");
                return Err(Missed::Final(ErrorBody::new(Code::TimedOut, message)));
            }
            Err(error) => return Err(Missed::Final(ErrorBody::failed(error))),
        };
        let mut resources = Resources {
            user: user.clone(),
            host: self.me.clone(),
            term: record.term,
            processes: Vec::new(),
            files: Vec::new(),
            sockets: Vec::new(),
            omitted: 0,
        };
        let replicas: Vec<HostName> =
            self.view(user, record).replicas.into_iter().map(|replica| replica.host).collect();
        let prefix = self.config.network.prefix;
        let vid = |kind, index| Vid::new(prefix, record.number, kind, index).address();
        read_table(&bytes, only, vid, &replicas, &mut resources).map_err(|damage| {
            let message = format!("{user}'s machine gave a table of resources that is refused: {damage}");
            Missed::Final(ErrorBody::failed(message))
        })?;
        Ok(resources)
    }

    /// Where an image or a resource is now.
    ///
    /// # Errors
    /// [`Code::NotFound`]: nothing has this VID, or no longer.
    pub async fn place_of(self: &Arc<Self>, address: Ipv6Addr) -> Result<Place, ErrorBody> {
        let vid = self.known_vid(address)?;
        let nothing = |what: &str| ErrorBody::new(Code::NotFound, format!("{address} {what}"));
        let user = match self.user_of(vid) {
            Some(user) => user,
            // An image so new that nobody has told this host.
            None => {
                let daemon = self.clone();
                let all = blocking(move || Ok(daemon.directory.read_all::<ImageRecord>()?.0)).await?;
                let found = all.into_iter().find(|(_, found)| found.record.number == vid.image());
                found
                    .map(|(user, _)| user)
                    .ok_or_else(|| nothing("belongs to no image; `kage ls` lists them"))?
            }
        };
        if vid.kind() == Kind::Image {
            let record = self.record_as_known(&user).await?;
            let name = user.to_string();
            return Ok(Place {
                vid: address,
                kind: Kind::Image,
                name,
                user,
                host: record.owner,
                term: record.term,
            });
        }
        let found = self.resources(&user, Only::One(vid), 0).await?;
        let omitted = found.omitted;
        let process = found.processes.into_iter().next().map(|process| process.name);
        let file = || found.files.into_iter().next().map(|file| file.path);
        let socket = || found.sockets.into_iter().next().map(|socket| socket.name);
        let name = process.or_else(file).or_else(socket).ok_or_else(|| {
            let kind = vid.kind().name();
            if omitted > 0 {
                // It may be one of them: that it is gone is more than anybody knows.
                return ErrorBody::failed(format!(
                    "{user}'s machine has {omitted} resources more than it tells of; whether {address} is a {kind} \
                     among them is not known, the machine is at host {}",
                    found.host
                ));
            }
            nothing(&format!("is no {kind} of {user}'s machine, or no longer"))
        })?;
        Ok(Place { vid: address, kind: vid.kind(), name, user, host: found.host, term: found.term })
    }

    fn user_of(&self, vid: Vid) -> Option<UserName> {
        let seen = self.seen.borrow();
        seen.images.iter().find(|(_, record)| record.number == vid.image()).map(|(user, _)| user.clone())
    }
}

/// The index a machine gives out next: the guest's word.
#[must_use]
pub fn next_index(memory: &dyn Memory) -> u64 {
    let mut page: PageBytes = [0; PAGE_SIZE];
    memory.read(PageIndex((kage_abi::offset::RESOURCES / PAGE_SIZE as u64) as u32), &mut page);
    let field = offset_of!(Record, next_index);
    page.get(field..field + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Daemon {
    /// Sets more indices aside for machines that run short of them, for ever.
    pub async fn keep_indices(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            for image in self.local() {
                let status = image.status();
                let Some(memory) = status.memory.filter(|_| status.state == State::Running) else { continue };
                let next = next_index(&*memory);
                if next < status.index_limit {
                    continue;
                }
                let (daemon, holder) = (self.clone(), image.clone());
                if let Err(error) = blocking(move || daemon.extend_indices(&holder, next)).await {
                    tracing::warn!(user = %image.user, %error, "no more indices were set aside");
                }
            }
        }
    }

    /// Sets indices aside in the directory, then lets the machine have them. While somebody else is at work on the
    /// image nothing is done: the next look comes soon.
    fn extend_indices(&self, image: &Image, next: u64) -> Result<(), ErrorBody> {
        let Ok(mut slot) = image.slot.try_lock() else { return Ok(()) };
        let Some(machine) = &mut slot.machine else { return Ok(()) };
        let Versioned { revision, mut record } = self.existing(&image.user)?;
        if record.owner != self.me || record.intent.is_some() {
            return Ok(());
        }
        if record.extend_indices(next) {
            self.swap(&image.user, revision, &record)?;
        }
        machine.raise_indices(record.indices.end)?;
        let comfort = record.comfortable_below();
        image.update(|status| status.index_limit = comfort);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::Mutex};

    use kage_machine::{Geometry, PageSet};

    use super::*;

    struct Guest(Mutex<PageBytes>);

    impl Memory for Guest {
        fn geometry(&self) -> Geometry {
            Geometry { memory_pages: 1024, disk_pages: 0 }
        }
        fn read(&self, page: PageIndex, into: &mut PageBytes) {
            into.fill(0);
            if u64::from(page.0) * PAGE_SIZE as u64 == kage_abi::offset::RESOURCES {
                into.copy_from_slice(&*self.0.lock().unwrap());
            }
        }
        fn write(&self, _: PageIndex, _: &PageBytes) {}
        fn zero(&self, _: PageIndex) {}
        fn populated(&self) -> PageSet {
            PageSet::empty(1024)
        }
    }

    fn nothing() -> Resources {
        Resources {
            user: "alice".parse().unwrap(),
            host: "h1".parse().unwrap(),
            term: kage_machine::Term(1),
            processes: Vec::new(),
            files: Vec::new(),
            sockets: Vec::new(),
            omitted: 0,
        }
    }

    fn table_of(entries: &[Entry<'_>], all: u32) -> Vec<u8> {
        let mut bytes = table::header(entries.len() as u32, all).to_vec();
        entries.iter().for_each(|entry| table::write(entry, |part| bytes.extend_from_slice(part)));
        bytes
    }

    #[test]
    fn a_table_becomes_what_the_api_shows() {
        let prefix = "fd4b:6167:6500::/48".parse().unwrap();
        let vid = |kind, index| Vid::new(prefix, kage_machine::ImageNumber(7), kind, index).address();
        let mapped = Ipv4Addr::new(10, 77, 0, 5).to_ipv6_mapped().octets();
        let entries = [
            Entry {
                index: 2,
                facts: Facts::File { state: table::FileState::Directory, bytes: 0 },
                text: "/",
            },
            Entry {
                index: 3,
                facts: Facts::File { state: table::FileState::File, bytes: 9 },
                text: "/etc/motd",
            },
            Entry {
                index: 4,
                facts: Facts::Socket {
                    state: table::SocketState::Listen,
                    protocol: Protocol::Tcp,
                    local: Endpoint { address: mapped, port: 80 },
                    remote: None,
                    bytes_in: 0,
                    bytes_out: 0,
                },
                text: "",
            },
        ];
        let bytes = table_of(&entries, 5);
        let mut all = nothing();
        read_table(&bytes, Only::All, vid, &[], &mut all).unwrap();
        assert_eq!((all.files[0].name.as_str(), all.files[1].name.as_str()), ("/", "motd"));
        assert_eq!(all.files[1].vid.to_string(), "fd4b:6167:6500::720:0:3");
        assert_eq!((all.sockets[0].local.as_str(), all.sockets[0].name.as_str()), ("10.77.0.5:80", "tcp/80"));
        assert_eq!(all.omitted, 2);
        let mut one = nothing();
        let motd = Vid::new(prefix, kage_machine::ImageNumber(7), Kind::File, 3);
        read_table(&bytes, Only::One(motd), vid, &[], &mut one).unwrap();
        assert_eq!((one.files.len(), one.sockets.len()), (1, 0));
        // The index alone does not make a resource: the kind has to be right.
        let mut none = nothing();
        let process = Vid::new(prefix, kage_machine::ImageNumber(7), Kind::Process, 3);
        read_table(&bytes, Only::One(process), vid, &[], &mut none).unwrap();
        assert_eq!(none, Resources { omitted: 2, ..nothing() });
    }

    #[test]
    fn an_answer_stays_within_what_callers_read() {
        // As many as a table holds: short names, then such as have to be escaped.
        for (count, text) in [(100_000, "/a"), (3_000, "\u{1}".repeat(1000).as_str())] {
            let facts = Facts::File { state: table::FileState::File, bytes: 1 };
            let entries: Vec<_> = (1..=count).map(|index| Entry { index, facts, text }).collect();
            let mut all = nothing();
            let vid = |_, _| Ipv6Addr::UNSPECIFIED;
            read_table(&table_of(&entries, count as u32), Only::All, vid, &[], &mut all).unwrap();
            assert_eq!(all.files.len() as u64 + u64::from(all.omitted), count);
            assert!(all.omitted > 0 && !all.files.is_empty());
            let length = serde_json::to_vec(&all).unwrap().len();
            assert!(length < 16 << 20, "{length}");
        }
    }

    #[test]
    fn the_next_index_is_read_where_the_guest_keeps_it() {
        let mut page = [0; PAGE_SIZE];
        page[16..24].copy_from_slice(&0x1_2345_6789_u64.to_le_bytes());
        assert_eq!(next_index(&Guest(Mutex::new(page))), 0x1_2345_6789);
    }
}
