//! The compile service: the host a machine is on turns WebAssembly into the machine's own code.
//!
//! A machine asks its gateway, which is always the host it is on, over TCP. All numbers are little endian:
//! ```text
//! request  "kagecomp" │ protocol u32 │ length u8, engine │ length u32, module
//! reply    status u32, 0 = compiled │ length u32, code or a reason
//! ```
//! The service remembers what it compiled and a request changes nothing, so that a machine that moved in the middle,
//! and whose connection broke by that, asks again where it is now.
//!
//! What comes back is run as it is. That is no trust beyond what a machine needs anyway: its host runs it.

use alloc::{string::String, vec, vec::Vec};
use core::{fmt, net::Ipv6Addr, time::Duration};

use kage_abi::GATEWAY;

use crate::{
    executor,
    memory::{Access, Kind, OutOfMemory, PAGE, Window},
    net::{Buffers, Closed, Stream},
    time,
};

/// Port of the service.
const PORT: u16 = 7702;
const MAGIC: &[u8; 8] = b"kagecomp";
const PROTOCOL: u32 = 1;
/// Largest module.
pub const MOST: u64 = 32 << 20;
/// Largest reason kept.
const REASON: usize = 1 << 10;
/// Bytes moved in one go.
const CHUNK: usize = 16 << 10;
/// Copying a byte, in estimated nanoseconds per 16.
const COPY_COST: u64 = 16;
/// Pages mapped in one go, and the cost of one in estimated nanoseconds.
const PIECE: usize = 128;
const PAGE_COST: u64 = 400;
const BUFFERS: Buffers = Buffers { receive: 64 << 10, send: 64 << 10, backlog: 0 };
/// How often the service is asked, and the wait before it is asked again: a move is over in less.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(200);

/// Why there is no code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompileError {
    /// Larger than the service takes.
    TooLarge,
    /// The service says why.
    Refused(String),
    /// Nobody answers.
    NoService,
    /// The file changed or went away.
    Unreadable,
    /// No memory for the code.
    NoMemory,
}

impl fmt::Display for CompileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => write!(formatter, "a module may have {} MiB", MOST >> 20),
            Self::Refused(reason) => formatter.write_str(reason),
            Self::NoService => formatter.write_str("this host compiles no modules"),
            Self::Unreadable => formatter.write_str("the file cannot be read"),
            Self::NoMemory => formatter.write_str("not enough memory for the code"),
        }
    }
}

/// Code in a window of its own.
pub struct Compiled {
    /// Holds the code from its first address on, read-execute.
    pub window: Window,
    /// Bytes of it.
    pub length: usize,
}

/// Has a module of `length` bytes compiled; `read` fills a buffer from an offset on.
///
/// # Errors
/// [`CompileError`].
pub async fn compile(
    length: u64,
    read: impl AsyncFn(u64, &mut [u8]) -> Option<usize>,
) -> Result<Compiled, CompileError> {
    let Some(short) = u32::try_from(length).ok().filter(|_| length <= MOST) else {
        return Err(CompileError::TooLarge);
    };
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            time::sleep(PAUSE * attempt).await;
        }
        match ask(short, &read).await {
            Err(Failed::Connection) => {}
            Err(Failed::For(error)) => return Err(error),
            Ok(compiled) => return Ok(compiled),
        }
    }
    Err(CompileError::NoService)
}

enum Failed {
    /// Worth another attempt.
    Connection,
    For(CompileError),
}

impl From<Closed> for Failed {
    fn from(_: Closed) -> Self {
        Self::Connection
    }
}

impl From<CompileError> for Failed {
    fn from(error: CompileError) -> Self {
        Self::For(error)
    }
}

async fn ask(length: u32, read: &impl AsyncFn(u64, &mut [u8]) -> Option<usize>) -> Result<Compiled, Failed> {
    let mut stream = Stream::connect(Ipv6Addr::from(GATEWAY), PORT, BUFFERS).await?;
    // Who gives up before the reply is there wants nothing compiled any more.
    stream.set_abrupt(true);
    let engine = kage_engine::ENGINE.as_bytes();
    let mut head = Vec::from(*MAGIC);
    head.extend_from_slice(&PROTOCOL.to_le_bytes());
    head.push(engine.len() as u8);
    head.extend_from_slice(engine);
    head.extend_from_slice(&length.to_le_bytes());
    stream.write_all(&head).await?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < u64::from(length) {
        let room = buffer.len().min((u64::from(length) - at) as usize);
        let count = read(at, &mut buffer[..room]).await.filter(|count| *count > 0);
        let count = count.ok_or(CompileError::Unreadable)?;
        stream.write_all(&buffer[..count]).await?;
        at += count as u64;
        executor::work(count as u64 * COPY_COST / 16).await;
    }
    let mut reply = [0; 8];
    read_exact(&mut stream, &mut reply).await?;
    let [a, b, c, d, e, f, g, h] = reply;
    let (status, length) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]) as usize);
    if status != 0 {
        let mut reason = vec![0; length.min(REASON)];
        read_exact(&mut stream, &mut reason).await?;
        let reason = String::from_utf8_lossy(&reason).trim_end().into();
        return Err(CompileError::Refused(reason).into());
    }
    let compiled = receive(&mut stream, length, &mut buffer).await?;
    stream.set_abrupt(false);
    Ok(compiled)
}

async fn receive(stream: &mut Stream, length: usize, buffer: &mut [u8]) -> Result<Compiled, Failed> {
    let mut window = Window::reserve(Kind::Code).ok_or(CompileError::NoMemory)?;
    let pages = length.div_ceil(PAGE);
    if length > window.bytes() || crate::memory::free_frames() < pages {
        return Err(CompileError::NoMemory.into());
    }
    let mut at = 0;
    while at < length {
        let mapped = window.mapped_pages();
        if at == mapped * PAGE {
            let piece = PIECE.min(pages - mapped);
            let map = window.map(mapped, piece, Access::ReadExecute);
            map.map_err(|OutOfMemory| CompileError::NoMemory)?;
            executor::work(piece as u64 * PAGE_COST).await;
        }
        let room = buffer.len().min(length - at).min(window.mapped_pages() * PAGE - at);
        let count = stream.read(&mut buffer[..room]).await?;
        if count == 0 {
            return Err(Failed::Connection);
        }
        window.write(at, &buffer[..count]);
        at += count;
        executor::work(count as u64 * COPY_COST / 16).await;
    }
    Ok(Compiled { window, length })
}

async fn read_exact(stream: &mut Stream, mut into: &mut [u8]) -> Result<(), Closed> {
    while !into.is_empty() {
        let count = stream.read(into).await?;
        if count == 0 {
            return Err(Closed);
        }
        into = &mut into[count..];
    }
    Ok(())
}
