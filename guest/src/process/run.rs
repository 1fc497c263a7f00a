//! A process's life on its fiber.
#![expect(unsafe_code, reason = "a fiber refers to what its task owns")]

use alloc::{boxed::Box, format, rc::Rc, sync::Arc};
use core::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::pin,
    ptr::NonNull,
    task::{Context, Poll, Waker},
};

use wasmtime::Store;

use super::{
    Exit, Limits, Process, Signal, SpawnError, Spec, State, Usage,
    code::{self, Program},
    engine,
    fiber::{self, Pause},
    table, wasi,
};
use crate::{executor, memory, shell::stdio::Output, vid};

/// Memory that a new process leaves to others: connections, files, the shell that ends it.
const LEFT_PAGES: usize = (1 << 20) / memory::PAGE;

/// Kernel's heap that one takes before its program has opened anything.
const KERNEL_BYTES: usize = 32 << 10;

/// What task and fiber share. The task owns it, and the fiber's code only ever runs while the task resumes it.
struct Job {
    /// Lies here and not on the fiber's stack, so that abandoning that leaks nothing. Refers to the program's code.
    store: Option<Store<State>>,
    /// Taken when the fiber begins.
    state: Option<State>,
    program: Rc<Program>,
    process: Rc<Process>,
    exit: Option<Exit>,
}

/// A job and its fiber, which is not resumed once this is dropped.
struct Running {
    fiber: fiber::Fiber,
    job: NonNull<Job>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`, freed once; the fiber is not resumed again.
        drop(unsafe { Box::from_raw(self.job.as_ptr()) });
    }
}

impl Running {
    fn new(job: Job) -> Result<Self, SpawnError> {
        let job = NonNull::from(Box::leak(Box::new(job)));
        // SAFETY: `begin` takes a job, which lives until this is dropped, and returns.
        match unsafe { fiber::Fiber::new(begin, job.as_ptr().cast()) } {
            Ok(fiber) => Ok(Self { fiber, job }),
            Err(memory::OutOfMemory) => {
                // SAFETY: as in `drop`; there is no fiber.
                drop(unsafe { Box::from_raw(job.as_ptr()) });
                Err(SpawnError::NoMemory)
            }
        }
    }

    /// How the job ended, once its fiber is done.
    fn take_exit(&mut self) -> Option<Exit> {
        // SAFETY: the fiber is done, so nothing else refers to the job.
        unsafe { (*self.job.as_ptr()).exit.take() }
    }
}

extern "C" fn begin(job: *mut ()) {
    // SAFETY: `Running` gave the address of its job, which nobody else touches before the fiber is done.
    let job = unsafe { &mut *job.cast::<Job>() };
    job.run();
}

impl Job {
    fn run(&mut self) {
        let Some(state) = self.state.take() else { return };
        let mut store = engine::with(|engine, _| Store::new(engine, state));
        store.limiter(|state| &mut state.limits);
        let store = self.store.insert(store);
        let exit = match self.program.call(store) {
            Ok(()) => Exit::Code(0),
            Err(error) => engine::exit_of(&error),
        };
        // Whatever the error says, it comes of that.
        let killed = self.process.signal.get().map(Exit::Signal);
        self.exit = Some(killed.unwrap_or(exit));
    }
}

/// Starts a process.
///
/// # Errors
/// [`SpawnError`].
pub fn spawn(program: Rc<Program>, spec: Spec) -> Result<Rc<Process>, SpawnError> {
    let wanted = LEFT_PAGES + fiber::STACK_PAGES + program.least_pages();
    if memory::free_frames() < wanted {
        code::forget_unused();
    }
    if memory::free_frames() < wanted || !memory::kernel_room(KERNEL_BYTES) {
        return Err(SpawnError::NoMemory);
    }
    if !vid::has_room() {
        return Err(SpawnError::NoIdentity);
    }
    let pid = table::next_pid()?;
    let usage = Arc::new(Usage::default());
    let error = spec.stdio.error.clone();
    let wasi = wasi::Context::new(&spec);
    let process = Rc::new(Process {
        pid,
        vid: vid::next(vid::Kind::Process),
        arguments: spec.arguments,
        usage: Arc::clone(&usage),
        time: Cell::default(),
        allowed: spec.allowed,
        waiting: Cell::new(false),
        signal: Cell::new(None),
        exit: RefCell::new(None),
        waker: RefCell::new(None),
        waiters: RefCell::default(),
    });
    let limits = Limits::new(usage, process.memory_limit());
    let state = State { wasi, limits, process: Rc::clone(&process) };
    let job = Job { store: None, state: Some(state), program, process: Rc::clone(&process), exit: None };
    let running = Running::new(job)?;
    process.usage.add(running.fiber.pages() * memory::PAGE);
    table::add(&process);
    executor::spawn_process(live(Rc::clone(&process), running, error));
    Ok(process)
}

/// The task of a process.
async fn live(process: Rc<Process>, mut running: Running, error: Output) {
    let exit = poll_fn(|context| turn(&process, &mut running, context)).await;
    // What the process had open is closed before anybody learns that it has ended.
    drop(running);
    table::remove(process.pid);
    say(&process, &exit, &error);
    drop(error);
    process.end(exit);
}

/// Lets the process run until it pauses.
fn turn(process: &Rc<Process>, running: &mut Running, context: &mut Context<'_>) -> Poll<Exit> {
    if let Some(signal) = process.signal.get() {
        if running.fiber.is_abandonable() {
            return Poll::Ready(Exit::Signal(signal));
        }
        running.fiber.kill();
    }
    *process.waker.borrow_mut() = Some(context.waker().clone());
    table::note_run(process);
    process.waiting.set(false);
    let before = executor::cost();
    let pause = running.fiber.resume(context);
    table::note_ran(executor::cost().saturating_sub(before), pause == Pause::Preempted);
    match pause {
        Pause::Blocked => {
            process.waiting.set(true);
            Poll::Pending
        }
        Pause::Preempted => {
            executor::end_slice();
            context.waker().wake_by_ref();
            Poll::Pending
        }
        Pause::Crashed => Poll::Ready(Exit::Trap("a fault that is no trap; the log has it".into())),
        Pause::Done => {
            Poll::Ready(running.take_exit().unwrap_or_else(|| Exit::Failed("it never began".into())))
        }
    }
}

/// Says on standard error why a process ended, unless it ended by itself or by Ctrl-C.
fn say(process: &Process, exit: &Exit, error: &Output) {
    let mut text = match exit {
        Exit::Code(_) | Exit::Signal(Signal::Interrupt | Signal::Pipe) => return,
        exit => format!("{}: {exit}", process.name()),
    };
    if process.usage.was_refused() && !matches!(exit, Exit::Signal(_)) {
        let limit = process.memory_limit() >> 20;
        text.push_str(&format!(
            " (it was refused memory; it had {} KiB of at most {limit} MiB)",
            process.memory_bytes() >> 10
        ));
    }
    text.push('\n');
    // Once: nobody may be reading any more, and an end does not wait for that.
    let _ = pin!(error.write(text.as_bytes())).poll(&mut Context::from_waker(Waker::noop()));
}
