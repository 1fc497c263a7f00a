//! The table of a machine's resources.
//!
//! Layout, all little-endian: a header of [`HEADER`] bytes, then one entry after the other.
//!
//! ```text
//!  header  magic u32 · version u16 · 0 u16 · entries u32 · all u32 (entries there would be in a larger table)
//!  entry   bytes u16 (of the whole entry) · kind u8 · state u8 · index u64 · what its kind has · texts
//!   1 process  pid u32 · 0 u32 · cpu_ns u64 · memory u64                      · name
//!   2 file     bytes u64                                                      · path
//!   3 socket   protocol u8 · flags u8 · local port u16 · remote port u16 · 0 u16 · local 16 · remote 16 ·
//!              received u64 · sent u64                                        · name
//! ```
//! The text is what is left of the entry, UTF-8. An IPv4 address stands as `::ffff:a.b.c.d`; all zeros is
//! "every address of the image".
//!
//! Readers pass over entries of unknown kinds. A table from a guest is not trusted: [`read`] looks at every length
//! before it uses it and stops at what is wrong.

/// First word of a table.
pub const MAGIC: u32 = u32::from_le_bytes(*b"kres");
/// Version of this layout.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER: usize = 16;
/// Largest table. Room for 30,000 files of 100 bytes of path.
pub const MAX: usize = 4 << 20;
/// Longest text of an entry; a longer one is cut at a character.
pub const TEXT_MAX: usize = 4096;

const PROCESS: u8 = 1;
const FILE: u8 = 2;
const SOCKET: u8 = 3;
const COMMON: usize = 12;
/// Fixed bytes of each kind beside the common ones.
const PROCESS_BYTES: usize = 24;
const FILE_BYTES: usize = 8;
const SOCKET_BYTES: usize = 56;
/// A socket has another end.
const HAS_REMOTE: u8 = 1;

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// On the vCPU or ready for it.
    Running,
    /// Waits for something.
    Waiting,
    /// Stopped by its user.
    Stopped,
    /// Has ended, and nobody has asked how.
    Ended,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A file of the image, not changed.
    Base,
    /// A directory of the image.
    BaseDirectory,
    /// A symbolic link.
    Link,
}

/// What a socket is doing; for TCP the states of RFC 9293 §3.3.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketState {
    /// Closed.
    Closed,
    /// Listens.
    Listen,
    /// Has sent a SYN.
    SynSent,
    /// Has received a SYN.
    SynReceived,
    /// Connected.
    Established,
    /// Closing, this end first.
    FinWait1,
    /// Its closing was acknowledged.
    FinWait2,
    /// The peer sends no more.
    CloseWait,
    /// Both close.
    Closing,
    /// The last acknowledgement is awaited.
    LastAck,
    /// Kept for late segments.
    TimeWait,
    /// UDP, open.
    Open,
}

macro_rules! states {
    ($type:ident: $($state:ident = $name:literal),* $(,)?) => {
        impl $type {
            const ALL: &'static [Self] = &[$(Self::$state),*];

            /// Its name in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$state => $name),* }
            }

            fn of(number: u8) -> Option<Self> {
                Self::ALL.get(usize::from(number)).copied()
            }
        }
    };
}

states!(ProcessState: Running = "running", Waiting = "waiting", Stopped = "stopped", Ended = "ended");
states!(FileState: File = "file", Directory = "directory", Base = "base", BaseDirectory = "base_directory", Link = "link");
states!(SocketState: Closed = "closed", Listen = "listen", SynSent = "syn_sent", SynReceived = "syn_received",
    Established = "established", FinWait1 = "fin_wait_1", FinWait2 = "fin_wait_2", CloseWait = "close_wait",
    Closing = "closing", LastAck = "last_ack", TimeWait = "time_wait", Open = "open");

/// Protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An address and a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// IPv6, or `::ffff:a.b.c.d`; all zeros: every address.
    pub address: [u8; 16],
    /// Port.
    pub port: u16,
}

/// What an entry says beside identity and text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Facts {
    /// A process; the text is its name.
    Process {
        /// What it is doing.
        state: ProcessState,
        /// Its number in this machine.
        pid: u32,
        /// Time it had the vCPU.
        cpu_ns: u64,
        /// Bytes of memory it holds.
        memory_bytes: u64,
    },
    /// A file; the text is its path.
    File {
        /// What it is.
        state: FileState,
        /// Bytes of content.
        bytes: u64,
    },
    /// A socket; the text is a name for it, or nothing.
    Socket {
        /// What it is doing.
        state: SocketState,
        /// Its protocol.
        protocol: Protocol,
        /// This end.
        local: Endpoint,
        /// The other end.
        remote: Option<Endpoint>,
        /// Bytes received.
        bytes_in: u64,
        /// Bytes sent.
        bytes_out: u64,
    },
}

/// One resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Index of its VID.
    pub index: u64,
    /// What it is.
    pub facts: Facts,
    /// Name or path.
    pub text: &'a str,
}

/// The header of a table of so many entries.
#[must_use]
pub fn header(entries: u32, all: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..12].copy_from_slice(&entries.to_le_bytes());
    bytes[12..].copy_from_slice(&all.to_le_bytes());
    bytes
}

/// A text as it goes into an entry.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// Most bytes an entry takes before its text.
const FIXED_MAX: usize = COMMON + SOCKET_BYTES;

/// Gives an entry's bytes to `put`, in order.
pub fn write(entry: &Entry<'_>, mut put: impl FnMut(&[u8])) {
    let mut fixed = [0; FIXED_MAX];
    let text = cut(entry.text);
    let (kind, state, length) = match entry.facts {
        Facts::Process { state, pid, cpu_ns, memory_bytes } => {
            fixed[12..16].copy_from_slice(&pid.to_le_bytes());
            fixed[20..28].copy_from_slice(&cpu_ns.to_le_bytes());
            fixed[28..36].copy_from_slice(&memory_bytes.to_le_bytes());
            (PROCESS, state as u8, COMMON + PROCESS_BYTES)
        }
        Facts::File { state, bytes } => {
            fixed[12..20].copy_from_slice(&bytes.to_le_bytes());
            (FILE, state as u8, COMMON + FILE_BYTES)
        }
        Facts::Socket { state, protocol, local, remote, bytes_in, bytes_out } => {
            fixed[12] = protocol as u8;
            fixed[13] = if remote.is_some() { HAS_REMOTE } else { 0 };
            let remote = remote.unwrap_or_default();
            fixed[14..16].copy_from_slice(&local.port.to_le_bytes());
            fixed[16..18].copy_from_slice(&remote.port.to_le_bytes());
            fixed[20..36].copy_from_slice(&local.address);
            fixed[36..52].copy_from_slice(&remote.address);
            fixed[52..60].copy_from_slice(&bytes_in.to_le_bytes());
            fixed[60..68].copy_from_slice(&bytes_out.to_le_bytes());
            (SOCKET, state as u8, COMMON + SOCKET_BYTES)
        }
    };
    fixed[..2].copy_from_slice(&((length + text.len()) as u16).to_le_bytes());
    fixed[2] = kind;
    fixed[3] = state;
    fixed[4..12].copy_from_slice(&entry.index.to_le_bytes());
    put(&fixed[..length]);
    put(text.as_bytes());
}

/// Why a table cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Not a table, or of another version.
    Header,
    /// An entry ends beyond the table or before its own beginning.
    Length,
    /// A state, protocol or index there is none of.
    Value,
    /// A text that is no text.
    Text,
    /// Fewer or more entries than the header says.
    Count,
}

impl core::fmt::Display for Damage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Header => "it does not begin as a table of this version",
            Self::Length => "an entry's length is impossible",
            Self::Value => "an entry holds an impossible value",
            Self::Text => "an entry's text is not UTF-8",
            Self::Count => "it has not as many entries as it says",
        })
    }
}

impl core::error::Error for Damage {}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Damage> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or(Damage::Length)
}

/// Reads a table, giving each entry to `take`. Returns how many entries there would be in a larger table.
/// Entries of unknown kinds are passed over.
///
/// # Errors
/// [`Damage`]; entries before it have been given.
pub fn read<'a>(table: &'a [u8], mut take: impl FnMut(Entry<'a>)) -> Result<u32, Damage> {
    let magic = u32::from_le_bytes(part(table, 0).map_err(|_| Damage::Header)?);
    let version = u16::from_le_bytes(part(table, 4).map_err(|_| Damage::Header)?);
    if (magic, version) != (MAGIC, VERSION) {
        return Err(Damage::Header);
    }
    let entries = u32::from_le_bytes(part(table, 8).map_err(|_| Damage::Header)?);
    let all = u32::from_le_bytes(part(table, 12).map_err(|_| Damage::Header)?);
    let mut rest = table.get(HEADER..).ok_or(Damage::Header)?;
    for _ in 0..entries {
        if rest.is_empty() {
            return Err(Damage::Count);
        }
        let length = usize::from(u16::from_le_bytes(part(rest, 0)?));
        let bytes = rest.get(..length).filter(|bytes| bytes.len() >= COMMON).ok_or(Damage::Length)?;
        if let Some(entry) = entry(bytes)? {
            take(entry);
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    if rest.is_empty() && all >= entries { Ok(all) } else { Err(Damage::Count) }
}

fn entry(bytes: &[u8]) -> Result<Option<Entry<'_>>, Damage> {
    let [kind, state] = part(bytes, 2)?;
    let index = u64::from_le_bytes(part(bytes, 4)?);
    if index == 0 || index > super::INDEX_MAX {
        return Err(Damage::Value);
    }
    let word = |at| part(bytes, at).map(u64::from_le_bytes);
    let port = |at| part(bytes, at).map(u16::from_le_bytes);
    let (facts, fixed) = match kind {
        PROCESS => {
            let state = ProcessState::of(state).ok_or(Damage::Value)?;
            let pid = u32::from_le_bytes(part(bytes, 12)?);
            let facts = Facts::Process { state, pid, cpu_ns: word(20)?, memory_bytes: word(28)? };
            (facts, PROCESS_BYTES)
        }
        FILE => {
            let state = FileState::of(state).ok_or(Damage::Value)?;
            (Facts::File { state, bytes: word(12)? }, FILE_BYTES)
        }
        SOCKET => {
            let state = SocketState::of(state).ok_or(Damage::Value)?;
            let [protocol, flags] = part(bytes, 12)?;
            let protocol = match protocol {
                0 => Protocol::Tcp,
                1 => Protocol::Udp,
                _ => return Err(Damage::Value),
            };
            let remote = Endpoint { address: part(bytes, 36)?, port: port(16)? };
            let facts = Facts::Socket {
                state,
                protocol,
                local: Endpoint { address: part(bytes, 20)?, port: port(14)? },
                remote: (flags & HAS_REMOTE != 0).then_some(remote),
                bytes_in: word(52)?,
                bytes_out: word(60)?,
            };
            (facts, SOCKET_BYTES)
        }
        _ => return Ok(None),
    };
    let text = bytes.get(COMMON + fixed..).ok_or(Damage::Length)?;
    let text = core::str::from_utf8(text).map_err(|_| Damage::Text)?;
    Ok(Some(Entry { index, facts, text }))
}
