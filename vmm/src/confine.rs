//! Runs the compiler for user programs where it can do no harm.
//!
//! What it reads may come from anyone, and a code generator is large. So before it runs, its process becomes a user of
//! its own, leaves the network, mount, IPC and host-name namespaces, may use so much memory and time and no more, and
//! keeps three pipes: module in, code and reasons out. Of the system calls it has those of a program that allocates,
//! reads and writes; all others fail.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::jail::drop_privileges;

/// Address space: a module of 26 MB takes about 1 GiB.
pub const MEMORY: u64 = 3 << 30;
/// Processor time: a module of 26 MB takes about 40 s.
pub const SECONDS: u64 = 120;
/// Machines go first.
const NICE: i32 = 15;

/// Turns this process into the compiler at `executable`, confined; with a user only if it is privileged.
///
/// # Errors
/// Why it is still this process.
pub fn run(executable: &Path, user: Option<u32>) -> Result<Infallible, String> {
    let file = File::open(executable).map_err(|error| format!("{}: {error}", executable.display()))?;
    let failed =
        |what: &'static str| move |error: io::Error| format!("cannot confine the compiler: {what}: {error}");
    // Where memory is short, a machine must not end for a module that somebody else brought.
    std::fs::write("/proc/self/oom_score_adj", "1000").map_err(failed("memory"))?;
    rustix::process::nice(NICE).map_err(|error| failed("nice")(error.into()))?;
    if user.is_some() {
        leave_network().map_err(failed("network"))?;
    }
    drop_privileges(user).map_err(failed("user"))?;
    // Only now: a change of user would undo it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| failed("end")(error.into()))?;
    for (resource, most) in [
        (Resource::As, MEMORY),
        (Resource::Cpu, SECONDS),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nofile, 16),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(|error| failed("limits")(error.into()))?;
    }
    let file = OwnedFd::from(file);
    filter().map_err(failed("system calls"))?;
    Err(failed("start")(execute(&file)))
}

fn filter() -> io::Result<()> {
    let allowed = [
        libc::SYS_execveat,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_lseek,
        libc::SYS_fcntl,
        libc::SYS_poll,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_getrandom,
        libc::SYS_clock_gettime,
        libc::SYS_arch_prctl,
        libc::SYS_set_tid_address,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let mut rules: BTreeMap<_, _> = allowed.into_iter().map(|call| (call, Vec::new())).collect();
    // Its own limits, which the C library reads; no other process's.
    let own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 0);
    let own = own.and_then(|own| SeccompRule::new(vec![own])).map_err(io::Error::other)?;
    rules.insert(libc::SYS_prlimit64, vec![own]);
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, denied, SeccompAction::Allow, TargetArch::x86_64)
        .map_err(io::Error::other)?;
    let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
    seccompiler::apply_filter_all_threads(&program).map_err(io::Error::other)
}

#[expect(unsafe_code, reason = "unshares the network of this single-threaded process")]
fn leave_network() -> io::Result<()> {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: the process has one thread and keeps no state that the namespace names.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Becomes the executable in `file`, without arguments and environment; returns if that fails.
#[expect(unsafe_code, reason = "executes a descriptor, which has no path once the user has changed")]
fn execute(file: &OwnedFd) -> io::Error {
    const NAME: &CStr = c"kage-compile";
    const NO_PATH: &CStr = c"";
    let arguments = [NAME.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: a descriptor that is open, texts with end marks, and lists that end in null, all alive.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            NO_PATH.as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}
