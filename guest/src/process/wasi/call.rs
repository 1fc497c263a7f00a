//! One call of a program into the kernel: its memory, its outcome, what it costs.
//!
//! Nothing a program passes is trusted: every address is checked against its memory's size of now, and what a call
//! would copy or collect is bounded before it is.

use alloc::{string::String, vec::Vec};
use core::{
    ops::Range,
    task::{Context, Poll, Waker},
};

use wasmtime::{Caller, Error, Extern, Memory};

use super::{
    super::{
        State,
        fiber::{self, Killed},
    },
    errno::Errno,
};
use crate::{executor, fs::FileError, memory, shell::Failure};

/// Parts of memory in one call.
const MAX_VECTORS: u32 = 1024;
/// Bytes of one call to read or write; a longer one does part of it.
pub const MAX_BYTES: usize = 1 << 20;
/// Bytes copied in one go.
pub const PIECE: usize = 64 << 10;
/// A call, in estimated nanoseconds.
const CALL_COST: u64 = 250;
/// Copying 16 bytes.
const COPY_COST: u64 = 2;
/// A part of memory in a call.
const VECTOR_COST: u64 = 20;

/// A call into the kernel.
pub type Call<'a> = Caller<'a, State>;

/// Why a call does not do what was asked.
#[derive(Debug)]
pub enum Stop {
    /// The program is told so.
    Errno(Errno),
    /// The program ends.
    End(Error),
}

/// What a call comes to.
pub type Outcome<T = ()> = Result<T, Stop>;

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<FileError> for Stop {
    fn from(error: FileError) -> Self {
        Self::Errno(error.into())
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Errno(failure.into())
    }
}

impl From<Killed> for Stop {
    fn from(killed: Killed) -> Self {
        Self::End(Error::new(killed))
    }
}

/// Turns an outcome into what the program gets: 0, an error number, or its end. Others run when this call and those
/// before it have had enough, by estimate or by the host's alarm; so a program that does nothing but call holds up the
/// network for no longer than one call takes, which is less than a millisecond.
///
/// # Errors
/// The program's end.
pub fn finish(outcome: Outcome) -> Result<u32, Error> {
    if executor::charge(CALL_COST)
        && let Err(killed) = fiber::block_on(executor::yield_now())
    {
        return Err(Error::new(killed));
    }
    match outcome {
        Ok(()) => Ok(0),
        Err(Stop::Errno(errno)) => Ok(u32::from(errno as u16)),
        Err(Stop::End(error)) => Err(error),
    }
}

/// Accounts for `bytes` copied.
pub fn copied(bytes: usize) -> Outcome {
    worked(bytes as u64 / 16 * COPY_COST)
}

/// Accounts for work of estimated `nanoseconds`, and lets others run when it was enough.
pub fn worked(nanoseconds: u64) -> Outcome {
    if executor::charge(nanoseconds) {
        fiber::block_on(executor::yield_now())?;
    }
    Ok(())
}

/// Asks for `bytes` of the kernel's heap that a call is to keep for longer than it takes.
pub fn room(bytes: usize) -> Outcome {
    if memory::kernel_room(bytes) { Ok(()) } else { Err(Errno::NoMem.into()) }
}

/// Waits until `poll` is ready; or asks it once, when the descriptor is not to wait.
pub fn wait<T>(blocking: bool, mut poll: impl FnMut(&mut Context<'_>) -> Poll<Outcome<T>>) -> Outcome<T> {
    if blocking {
        return fiber::block_on(core::future::poll_fn(poll))?;
    }
    match poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => Err(Errno::Again.into()),
    }
}

/// A program's memory for the time of one call.
pub struct Guest<'a>(&'a mut [u8]);

/// The program's memory, and its state.
pub fn parts<'a>(call: &'a mut Call<'_>) -> Outcome<(Guest<'a>, &'a mut State)> {
    let memory = memory(call)?;
    let (bytes, state) = memory.data_and_store_mut(call);
    Ok((Guest(bytes), state))
}

fn memory(call: &mut Call<'_>) -> Outcome<Memory> {
    if let Some(memory) = call.data().wasi.memory {
        return Ok(memory);
    }
    let Some(memory) = call.get_export("memory").and_then(Extern::into_memory) else {
        return Err(Stop::End(Error::msg("the program exports no memory")));
    };
    call.data_mut().wasi.memory = Some(memory);
    Ok(memory)
}

impl Guest<'_> {
    fn range(&self, at: u32, length: usize) -> Outcome<Range<usize>> {
        let start = at as usize;
        let end = start.checked_add(length).filter(|&end| end <= self.0.len()).ok_or(Errno::Fault)?;
        Ok(start..end)
    }

    /// Bytes to read.
    pub fn bytes(&self, at: u32, length: u32) -> Outcome<&[u8]> {
        let range = self.range(at, length as usize)?;
        Ok(self.0.get(range).ok_or(Errno::Fault)?)
    }

    /// Bytes to write.
    pub fn bytes_mut(&mut self, at: u32, length: u32) -> Outcome<&mut [u8]> {
        let range = self.range(at, length as usize)?;
        Ok(self.0.get_mut(range).ok_or(Errno::Fault)?)
    }

    /// Bytes of a part that [`Guest::vectors`] found.
    pub fn part(&self, part: &Range<usize>) -> &[u8] {
        self.0.get(part.clone()).unwrap_or_default()
    }

    /// Bytes of a part that [`Guest::vectors`] found.
    pub fn part_mut(&mut self, part: &Range<usize>) -> &mut [u8] {
        self.0.get_mut(part.clone()).unwrap_or_default()
    }

    fn array<const N: usize>(&self, at: u32) -> Outcome<[u8; N]> {
        let range = self.range(at, N)?;
        Ok(self.0.get(range).and_then(|bytes| bytes.try_into().ok()).ok_or(Errno::Fault)?)
    }

    fn put<const N: usize>(&mut self, at: u32, bytes: [u8; N]) -> Outcome {
        let range = self.range(at, N)?;
        self.0.get_mut(range).ok_or(Errno::Fault)?.copy_from_slice(&bytes);
        Ok(())
    }

    /// Reads a byte.
    pub fn u8(&self, at: u32) -> Outcome<u8> {
        self.array(at).map(u8::from_le_bytes)
    }

    /// Reads 16 bits.
    pub fn u16(&self, at: u32) -> Outcome<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    /// Reads 32 bits.
    pub fn u32(&self, at: u32) -> Outcome<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    /// Reads 64 bits.
    pub fn u64(&self, at: u32) -> Outcome<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// Writes a byte.
    pub fn put_u8(&mut self, at: u32, value: u8) -> Outcome {
        self.put(at, value.to_le_bytes())
    }

    /// Writes 16 bits.
    pub fn put_u16(&mut self, at: u32, value: u16) -> Outcome {
        self.put(at, value.to_le_bytes())
    }

    /// Writes 32 bits.
    pub fn put_u32(&mut self, at: u32, value: u32) -> Outcome {
        self.put(at, value.to_le_bytes())
    }

    /// Writes 64 bits.
    pub fn put_u64(&mut self, at: u32, value: u64) -> Outcome {
        self.put(at, value.to_le_bytes())
    }

    /// Writes bytes.
    pub fn put_bytes(&mut self, at: u32, bytes: &[u8]) -> Outcome {
        let range = self.range(at, bytes.len())?;
        self.0.get_mut(range).ok_or(Errno::Fault)?.copy_from_slice(bytes);
        Ok(())
    }

    /// A text of at most `most` bytes.
    pub fn text(&self, at: u32, length: u32, most: usize) -> Outcome<String> {
        if length as usize > most {
            return Err(Errno::NameTooLong.into());
        }
        let bytes = self.bytes(at, length)?;
        Ok(core::str::from_utf8(bytes).map(String::from).map_err(|_| Errno::IlSeq)?)
    }

    /// The parts of memory that `count` vectors at `at` name, [`MAX_BYTES`] at the most, none of them empty.
    pub fn vectors(&self, at: u32, count: u32) -> Outcome<Vec<Range<usize>>> {
        if count > MAX_VECTORS {
            return Err(Errno::Inval.into());
        }
        // The array is there as a whole before anything is collected.
        self.range(at, count as usize * 8)?;
        room(count as usize * size_of::<Range<usize>>())?;
        executor::charge(u64::from(count) * VECTOR_COST);
        let mut parts = Vec::with_capacity(count as usize);
        let mut left = MAX_BYTES;
        for index in 0..count {
            let at = at + index * 8;
            let part = self.range(self.u32(at)?, self.u32(at + 4)? as usize)?;
            let part = part.start..part.start + part.len().min(left);
            left -= part.len();
            if !part.is_empty() {
                parts.push(part);
            }
        }
        Ok(parts)
    }
}
