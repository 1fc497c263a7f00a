//! The timer that bounds the time between two doors: its signal makes `KVM_RUN` return.

use std::{
    io,
    sync::atomic::{AtomicPtr, Ordering},
    time::Duration,
};

/// `kvm_run.immediate_exit` of the one vCPU; null while there is none.
static IMMEDIATE_EXIT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_alarm(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.load(Ordering::Acquire);
    if !flag.is_null() {
        // SAFETY: `watch` keeps the vCPU's run page mapped until the process ends; a byte store is
        // async-signal-safe.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler for the vCPU whose `immediate_exit` byte this is. The vCPU must live until
/// the process ends.
///
/// # Errors
/// Those of `sigaction(2)`.
pub fn watch(immediate_exit: &'static mut u8) -> io::Result<()> {
    IMMEDIATE_EXIT.store(immediate_exit, Ordering::Release);
    // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_alarm as *const () as usize;
    // SAFETY: both pointers are valid or null as the call allows; the handler is async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Promotes the run page's byte to the lifetime [`watch`] wants.
///
/// The caller promises that the vCPU is never dropped.
pub fn immediate_exit_of(run: &mut kvm_bindings::kvm_run) -> &'static mut u8 {
    let at = &raw mut run.immediate_exit;
    // SAFETY: the run page stays mapped as long as the vCPU, which the caller keeps until the process ends.
    unsafe { &mut *at }
}

/// Starts the periodic alarm, or stops it with a zero period.
pub fn set_period(period: Duration) {
    let time = libc::timeval { tv_sec: 0, tv_usec: libc::suseconds_t::from(period.subsec_micros() as i32) };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: a valid timer value, and the old one is not asked for.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

/// Keeps the alarm away from the calling thread, so that only the vCPU's thread gets it.
pub fn block_in_this_thread() {
    mask(libc::SIG_BLOCK);
}

/// Holds the alarm back from this thread while it lives; one that rang meanwhile comes at its end.
pub struct Quiet(());

impl Quiet {
    /// Begins.
    #[must_use]
    pub fn begin() -> Self {
        mask(libc::SIG_BLOCK);
        Self(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        mask(libc::SIG_UNBLOCK);
    }
}

fn mask(how: libc::c_int) {
    // SAFETY: a signal set is a plain array of words.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is initialised.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGALRM) };
    // SAFETY: the set is initialised, and the old one is not asked for.
    unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) };
}
