//! WASI preview 1: what a program calls.

use alloc::vec;

use wasmtime::{Caller, Error, Extern, Linker};

use super::{ExitCode, Spec, State, fiber};
use crate::shell::stdio::Stdio;

/// Module that the functions are imported from.
const MODULE: &str = "wasi_snapshot_preview1";
/// Errno of a pointer that is none.
const FAULT: i32 = 21;
/// Errno of a descriptor that is none.
const BAD: i32 = 8;
/// Errno of a pipe that nobody reads.
const PIPE: i32 = 64;
/// Bytes written at once.
const MOST: usize = 64 << 10;

/// What a process has open.
pub struct Context {
    stdio: Stdio,
}

impl Context {
    /// What a new process starts with.
    pub fn new(spec: &Spec) -> Self {
        Self { stdio: spec.stdio.clone() }
    }
}

fn word(data: &[u8], at: u32) -> Option<u32> {
    let bytes = data.get(at as usize..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn fd_write(
    mut caller: Caller<'_, State>,
    fd: i32,
    vectors: i32,
    count: i32,
    written: i32,
) -> Result<i32, Error> {
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else { return Ok(FAULT) };
    let data = memory.data(&caller);
    let mut bytes = vec![];
    for index in 0..count as u32 {
        let at = (vectors as u32).wrapping_add(index.wrapping_mul(8));
        let (Some(start), Some(length)) = (word(data, at), word(data, at.wrapping_add(4))) else {
            return Ok(FAULT);
        };
        let Some(part) = data.get(start as usize..).and_then(|rest| rest.get(..length as usize)) else {
            return Ok(FAULT);
        };
        if bytes.len() + part.len() > MOST {
            break;
        }
        bytes.extend_from_slice(part);
    }
    let stdio = &caller.data().wasi.stdio;
    let output = match fd {
        1 => stdio.output.clone(),
        2 => stdio.error.clone(),
        _ => return Ok(BAD),
    };
    if fiber::block_on(output.write(&bytes))?.is_err() {
        return Ok(PIPE);
    }
    let Some(to) = memory.data_mut(&mut caller).get_mut(written as u32 as usize..) else { return Ok(FAULT) };
    let Some(to) = to.first_chunk_mut() else { return Ok(FAULT) };
    *to = (bytes.len() as u32).to_le_bytes();
    Ok(0)
}

/// Names the functions that a program may import.
///
/// # Errors
/// A name given twice.
pub fn add_to_linker(linker: &mut Linker<State>) -> Result<(), Error> {
    linker.func_wrap(MODULE, "fd_write", fd_write)?;
    linker.func_wrap(MODULE, "proc_exit", |code: i32| -> Result<(), Error> {
        Err(ExitCode(code as u32).into())
    })?;
    Ok(())
}
