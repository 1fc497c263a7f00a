//! Fibers: stacks of their own for code that cannot be a future.
//!
//! ```text
//! executor task ──poll──▶ resume ──switch──▶ fiber's stack: entry … wasm … hostcall
//!      ▲                                          │ block_on pends, an upcall preempts, entry returns
//!      └───────── Blocked, Preempted, Done ◀──────┘
//! ```
//!
//! A fiber that is dropped before it is done is *abandoned*: nothing of its stack is unwound. So a killed fiber is
//! resumed while it is in the kernel ([`block_on`] then says [`Killed`], and what the kernel's frames hold is dropped
//! in order), and abandoned only where its process's own code was interrupted, which holds nothing of the kernel's: but for a
//! module's start function, for which the engine holds a list of the imports, some KiB that are lost then.
//!
//! What must not be held when a fiber switches: a borrow of a [`Local`], or a lock of the engine.
#![expect(unsafe_code, reason = "switches stacks")]

use core::{
    arch::naked_asm,
    cell::Cell,
    fmt,
    future::Future,
    pin::pin,
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
    task::{Context, Poll, Waker},
};

use crate::memory::{OutOfMemory, PAGE, Window};

/// Stack beyond what a program's code may use: the kernel's part of a call, upcalls, and what starts the program.
const KERNEL_STACK: usize = 96 << 10;
/// Pages mapped of a fiber's stack, at the window's high end. All below is guard.
pub const STACK_PAGES: usize = (kage_engine::WASM_STACK + KERNEL_STACK) / PAGE;

/// The process is to end: the call that waited is to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Killed;

impl fmt::Display for Killed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("killed")
    }
}

impl core::error::Error for Killed {}

/// Why a fiber gave the thread back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It waits; whatever it waits for wakes the task.
    Blocked,
    /// It was interrupted and could go on at once.
    Preempted,
    /// Its entry has returned.
    Done,
    /// It is beyond repair, and can only be abandoned.
    Crashed,
}

/// What fiber and executor share while the fiber lives.
struct Shared {
    /// Where the fiber's stack goes on.
    stack: Cell<usize>,
    pause: Cell<Pause>,
    killed: Cell<bool>,
    /// Of the task that polls.
    waker: Cell<Option<Waker>>,
    /// The engine's thread pointer while this fiber runs.
    engine: Cell<*mut u8>,
}

/// A stack and what runs on it.
pub struct Fiber {
    window: Window,
    // A box of its own: its address does not change while the fiber refers to it.
    shared: alloc::boxed::Box<Shared>,
}

/// The fiber that runs, if any.
static CURRENT: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());
/// Where the kernel's own stack goes on when the fiber switches back.
static KERNEL: AtomicUsize = AtomicUsize::new(0);
/// The engine's thread pointer.
static ENGINE: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

/// The engine's thread pointer; one slot is all it asks for.
#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_get(_slot: usize) -> *mut u8 {
    ENGINE.load(Ordering::Relaxed)
}

/// Sets the engine's thread pointer.
#[unsafe(no_mangle)]
extern "C" fn wasmtime_tls_set(_slot: usize, to: *mut u8) {
    ENGINE.store(to, Ordering::Relaxed);
}

/// Saves the callee's registers and the stack pointer to `save`, and goes on where `to` was saved (System V ABI,
/// figure 3.4). MXCSR and the x87 control word are never changed here.
#[unsafe(naked)]
unsafe extern "C" fn switch(save: *mut usize, to: usize) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Where a new fiber begins: `switch` has put the entry into RBX, its argument into R12 and 0 into RBP, so that
/// traces end here.
#[unsafe(naked)]
unsafe extern "C" fn begin() {
    naked_asm!("mov rdi, r12", "call rbx", "call {done}", "ud2", done = sym done)
}

extern "C" fn done() -> ! {
    leave(Pause::Done);
    unreachable!("a fiber that is done was resumed")
}

/// Gives the thread back to the executor until the fiber is resumed.
fn leave(pause: Pause) {
    let current = CURRENT.load(Ordering::Relaxed);
    assert!(!current.is_null(), "no fiber runs");
    // SAFETY: `resume` set it to a fiber that it borrows until this switch has brought it back.
    let shared = unsafe { &*current };
    shared.pause.set(pause);
    // SAFETY: the kernel's stack was saved by the `resume` that runs, which waits for exactly this.
    unsafe { switch(shared.stack.as_ptr(), KERNEL.load(Ordering::Relaxed)) }
}

impl Fiber {
    /// A fiber that will run `entry(argument)` when it is first resumed.
    ///
    /// # Errors
    /// [`OutOfMemory`], also when there are no windows left.
    ///
    /// # Safety
    /// `argument` is what `entry` wants, for as long as the fiber is resumed. `entry` returns.
    pub unsafe fn new(entry: extern "C" fn(*mut ()), argument: *mut ()) -> Result<Self, OutOfMemory> {
        let window = Window::stack(STACK_PAGES)?;
        let top = window.base() + window.bytes();
        // As `switch` leaves a stack: r15, r14, r13, r12, rbx, rbp, the return address; then two words, so that
        // `begin` finds the alignment that a call needs.
        let entry = entry as *const () as usize;
        let frame: [usize; 9] = [0, 0, 0, argument as usize, entry, 0, begin as *const () as usize, 0, 0];
        let stack = top - size_of_val(&frame);
        // SAFETY: the window's highest pages are mapped read-write, and nothing refers to them.
        unsafe { (stack as *mut [usize; 9]).write(frame) };
        let shared = Shared {
            stack: Cell::new(stack),
            pause: Cell::new(Pause::Preempted),
            killed: Cell::new(false),
            waker: Cell::new(None),
            engine: Cell::new(ptr::null_mut()),
        };
        Ok(Self { window, shared: alloc::boxed::Box::new(shared) })
    }

    /// Pages its stack takes.
    pub const fn pages(&self) -> usize {
        self.window.mapped_pages()
    }

    /// Whether it was last interrupted in its process's own code, or has not begun: it can be abandoned then.
    pub fn is_abandonable(&self) -> bool {
        self.shared.pause.get() == Pause::Preempted
    }

    /// Has every wait of the fiber end with [`Killed`] from now on.
    pub fn kill(&self) {
        self.shared.killed.set(true);
    }

    /// Runs it until it pauses.
    ///
    /// # Panics
    /// On a fiber, or when it is done.
    pub fn resume(&mut self, context: &Context<'_>) -> Pause {
        let shared = &*self.shared;
        assert!(!matches!(shared.pause.get(), Pause::Done | Pause::Crashed), "resumed after its end");
        assert!(CURRENT.load(Ordering::Relaxed).is_null(), "fibers do not nest");
        shared.waker.set(Some(context.waker().clone()));
        CURRENT.store(ptr::from_ref(shared).cast_mut(), Ordering::Relaxed);
        let outside = ENGINE.swap(shared.engine.get(), Ordering::Relaxed);
        // SAFETY: the stack is mapped as long as the window is held, which is longer than the switch, and was left by
        // `new` or by `switch`.
        unsafe { switch(KERNEL.as_ptr(), shared.stack.get()) };
        shared.engine.set(ENGINE.swap(outside, Ordering::Relaxed));
        CURRENT.store(ptr::null_mut(), Ordering::Relaxed);
        shared.waker.set(None);
        shared.pause.get()
    }
}

/// Has the fiber that was interrupted wait for its next turn. Called on its stack, by an upcall.
pub fn preempt() {
    leave(Pause::Preempted);
}

/// Gives the fiber up that faulted. Called on its stack, by an upcall.
pub fn crash() -> ! {
    leave(Pause::Crashed);
    unreachable!("a fiber that crashed was resumed")
}

/// Runs a future on the fiber that calls: while it pends, others run.
///
/// # Errors
/// [`Killed`] when the process is to end; the future is dropped then, and the caller is to return.
///
/// # Panics
/// Outside a fiber.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, Killed> {
    let current = CURRENT.load(Ordering::Relaxed);
    assert!(!current.is_null(), "a future is blocked on outside a fiber");
    // SAFETY: set by `resume` to a fiber that lives, at the same address, as long as this code on its stack can run.
    let shared = unsafe { &*current };
    let mut future = pin!(future);
    loop {
        if shared.killed.get() {
            return Err(Killed);
        }
        let waker = shared.waker.take().unwrap_or(Waker::noop().clone());
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        shared.waker.set(Some(waker));
        match polled {
            Poll::Ready(output) => return Ok(output),
            Poll::Pending => leave(Pause::Blocked),
        }
    }
}
