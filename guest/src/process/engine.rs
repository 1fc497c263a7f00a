//! The engine, what connects it to the machine, and what it says of a program's end.
#![expect(unsafe_code, reason = "the engine calls back by name and by address")]

use alloc::{format, string::String, sync::Arc};
use core::sync::atomic::{AtomicUsize, Ordering};

use wasmtime::{Config, CustomCodeMemory, Engine, Error, Linker, Trap};

use super::{Exit, State, fiber, limits::Memories, wasi};
use crate::{
    arch::upcall::{self, Kind, Upcall},
    local::Local,
    log,
    memory::PAGE,
};

/// Vector of a page fault (SDM vol. 3 §6.15).
const PAGE_FAULT: u32 = 14;

/// Code is executable before the engine sees it, and stays so.
struct Mapped;

impl CustomCodeMemory for Mapped {
    fn required_alignment(&self) -> usize {
        PAGE
    }

    fn publish_executable(&self, _: *const u8, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn unpublish_executable(&self, _: *const u8, _: usize) -> Result<(), Error> {
        Ok(())
    }
}

/// Engine, and what programs may import.
struct Runtime {
    engine: Engine,
    linker: Linker<State>,
}

/// Made when the first program is loaded: a machine that runs none need not hold it.
static RUNTIME: Local<Option<Runtime>> = Local::new();

/// The engine's handler of faults: `wasmtime_trap_handler_t`.
type TrapHandler = extern "C" fn(usize, usize, bool, usize);

/// The handler's address, 0 before the engine has named it.
static TRAP_HANDLER: AtomicUsize = AtomicUsize::new(0);

/// The engine names its handler of faults.
#[unsafe(no_mangle)]
extern "C" fn wasmtime_init_traps(handler: TrapHandler) -> i32 {
    TRAP_HANDLER.store(handler as usize, Ordering::Relaxed);
    0
}

pub(super) fn start() {
    RUNTIME.set(None);
    upcall::set_handler(handle);
}

/// # Panics
/// When the engine refuses the settings it is built for.
fn make() -> Runtime {
    let mut config = Config::new();
    kage_engine::configure(&mut config).expect("the engine knows this target");
    // SAFETY: a host lets a machine in only if it has the features of x86-64-v3, and those are all; with them no
    // floating-point operation is a call.
    unsafe { kage_engine::run_here(&mut config) };
    config.with_host_memory(Arc::new(Memories));
    config.with_custom_code_memory(Some(Arc::new(Mapped)));
    let engine = Engine::new(&config).expect("the settings are those this engine is built for");
    let mut linker = Linker::new(&engine);
    wasi::add_to_linker(&mut linker).expect("no name is given twice");
    Runtime { engine, linker }
}

/// Runs `act` with the engine and the functions that programs may import.
pub fn with<R>(act: impl FnOnce(&Engine, &mut Linker<State>) -> R) -> R {
    let mut runtime = RUNTIME.get();
    let Runtime { engine, linker } = runtime.get_or_insert_with(make);
    act(engine, linker)
}

/// Takes an upcall, on the stack of the process that was interrupted.
fn handle(upcall: &mut Upcall<'_>) {
    match upcall.kind {
        Kind::Preempt => fiber::preempt(),
        Kind::Fault { vector, error, address } => {
            let (rip, rbp) = (upcall.frame.rip as usize, upcall.frame.rbp as usize);
            let handler = TRAP_HANDLER.load(Ordering::Relaxed);
            if handler != 0 {
                // SAFETY: `wasmtime_init_traps` stored a function of this type.
                let handler = unsafe { core::mem::transmute::<usize, TrapHandler>(handler) };
                // Comes back only if the engine knows of no trap at this instruction.
                handler(rip, rbp, vector == PAGE_FAULT, address as usize);
            }
            log!("process: exception {vector} ({error:#x}) at {rip:#x}, address {address:#x}, is no trap");
            fiber::crash();
        }
    }
}

/// What a program's error says of its end.
pub fn exit_of(error: &Error) -> Exit {
    if let Some(exit) = error.downcast_ref::<super::ExitCode>() {
        return Exit::Code(exit.0);
    }
    if let Some(trap) = error.downcast_ref::<Trap>() {
        return Exit::Trap(describe(*trap));
    }
    Exit::Failed(format!("{error:#}"))
}

fn describe(trap: Trap) -> String {
    match trap {
        Trap::StackOverflow => "call stack exhausted".into(),
        Trap::UnreachableCodeReached => "reached `unreachable`".into(),
        other => {
            let text = format!("{other}");
            text.strip_prefix("wasm trap: ").map(String::from).unwrap_or(text)
        }
    }
}
