//! Arguments, environment, clocks, randomness, and the process's end.

use alloc::{string::String, vec::Vec};
use core::time::Duration;

use wasmtime::Error;

use super::{
    call::{Call, Outcome, PIECE, Stop, parts},
    errno::Errno,
};
use crate::{
    executor,
    process::{ExitCode, State, fiber},
    random, time,
};

/// Guest time moves on at doors, which are at most this far apart while something runs.
const RESOLUTION_NS: u64 = kage_abi::DOOR_INTERVAL_NS;
/// A random byte, in estimated nanoseconds.
const RANDOM_COST: u64 = 4;
/// Status of a process that a signal ended, before the signal's number.
const SIGNALLED: u32 = 128;

fn sizes(call: &mut Call<'_>, texts: fn(&super::Context) -> &[String], count: u32, bytes: u32) -> Outcome {
    let (mut guest, state) = parts(call)?;
    let texts = texts(&state.wasi);
    guest.put_u32(count, texts.len() as u32)?;
    guest.put_u32(bytes, texts.iter().map(|text| text.len() as u32 + 1).sum())
}

fn texts(call: &mut Call<'_>, texts: fn(&super::Context) -> &[String], list: u32, buffer: u32) -> Outcome {
    let (mut guest, state) = parts(call)?;
    let mut at = buffer;
    for (index, text) in texts(&state.wasi).iter().enumerate() {
        let entry = u32::try_from(index * 4).ok().and_then(|offset| list.checked_add(offset));
        guest.put_u32(entry.ok_or(Errno::Fault)?, at)?;
        guest.put_bytes(at, text.as_bytes())?;
        let end = at.checked_add(text.len() as u32).ok_or(Errno::Fault)?;
        guest.put_u8(end, 0)?;
        at = end.checked_add(1).ok_or(Errno::Fault)?;
    }
    Ok(())
}

pub fn args_sizes_get(call: &mut Call<'_>, count: u32, bytes: u32) -> Outcome {
    sizes(call, |context| &context.arguments, count, bytes)
}

pub fn args_get(call: &mut Call<'_>, list: u32, buffer: u32) -> Outcome {
    texts(call, |context| &context.arguments, list, buffer)
}

pub fn environ_sizes_get(call: &mut Call<'_>, count: u32, bytes: u32) -> Outcome {
    sizes(call, |context| &context.environment, count, bytes)
}

pub fn environ_get(call: &mut Call<'_>, list: u32, buffer: u32) -> Outcome {
    texts(call, |context| &context.environment, list, buffer)
}

/// The clocks there are (`typenames.witx`, `clockid`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Wall clock.
    Real,
    /// Guest time.
    Monotonic,
    /// Time the process has run.
    Process,
}

impl Clock {
    /// The clock of a number.
    pub fn of(number: u32) -> Outcome<Self> {
        match number {
            0 => Ok(Self::Real),
            1 => Ok(Self::Monotonic),
            // A process is one thread.
            2 | 3 => Ok(Self::Process),
            _ => Err(Errno::Inval.into()),
        }
    }

    /// What it shows.
    pub fn now(self, state: &State) -> Duration {
        match self {
            Self::Real => time::wall(),
            Self::Monotonic => time::now(),
            Self::Process => state.process.time(),
        }
    }
}

pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub fn clock_res_get(call: &mut Call<'_>, clock: u32, resolution: u32) -> Outcome {
    Clock::of(clock)?;
    parts(call)?.0.put_u64(resolution, RESOLUTION_NS)
}

pub fn clock_time_get(call: &mut Call<'_>, clock: u32, _precision: u64, into: u32) -> Outcome {
    let clock = Clock::of(clock)?;
    let (mut guest, state) = parts(call)?;
    guest.put_u64(into, nanoseconds(clock.now(state)))
}

pub fn random_get(call: &mut Call<'_>, buffer: u32, length: u32) -> Outcome {
    let (mut guest, _) = parts(call)?;
    for piece in guest.bytes_mut(buffer, length)?.chunks_mut(PIECE / 16) {
        random::fill(piece);
        if executor::charge(piece.len() as u64 * RANDOM_COST) {
            fiber::block_on(executor::yield_now())?;
        }
    }
    Ok(())
}

pub fn sched_yield(_: &mut Call<'_>) -> Outcome {
    Ok(fiber::block_on(executor::yield_now())?)
}

pub fn proc_exit(status: u32) -> Error {
    Error::new(ExitCode(status))
}

/// A program that sends itself a signal ends by it: none is handled otherwise here.
pub fn proc_raise(_: &mut Call<'_>, signal: u32) -> Outcome {
    match signal {
        0 => Ok(()),
        1..=30 => Err(Stop::End(Error::new(ExitCode(SIGNALLED + signal)))),
        _ => Err(Errno::Inval.into()),
    }
}

/// Makes texts a program gets of what it is started with: none holds a zero byte, which would end it.
pub fn clean(texts: &[String]) -> Vec<String> {
    texts.iter().map(|text| text.replace('\0', "")).collect()
}
