//! What a VMM process gives up before hostile code runs in it.
//!
//! Everything it will ever use has arrived as a descriptor, so it needs no path, no socket, no process
//! of its own: it leaves the mount, IPC and host-name namespaces, becomes an unprivileged user, and
//! installs a filter that allows the few system calls of its loop. `ioctl` is allowed on KVM's requests
//! alone.

use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Leaves namespaces and becomes `uid`; with `None` (tests) only gains no new privileges.
///
/// Must run before the process has a second thread.
///
/// # Errors
/// Those of the system calls.
pub fn drop_privileges(uid: Option<u32>) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let Some(uid) = uid else { return Ok(()) };
    leave_namespaces()?;
    become_user(uid)
}

/// Allows what the loop and the disk's worker do, and ends the process on anything else.
///
/// # Errors
/// When the filter cannot be built or installed.
pub fn filter() -> io::Result<()> {
    let allowed = [
        libc::SYS_ppoll,
        libc::SYS_poll,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_accept4,
        libc::SYS_close,
        libc::SYS_fcntl,
        libc::SYS_lseek,
        libc::SYS_futex,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_getrandom,
        libc::SYS_setitimer,
        libc::SYS_clock_gettime,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_sched_yield,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_tgkill,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let kvm = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(0xff00), 0xae00)
        .map_err(io::Error::other)?;
    let kvm = SeccompRule::new(vec![kvm]).map_err(io::Error::other)?;
    let rules =
        allowed.into_iter().map(|call| (call, Vec::new())).chain([(libc::SYS_ioctl, vec![kvm])]).collect();
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
            .map_err(io::Error::other)?;
    let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
    seccompiler::apply_filter_all_threads(&program).map_err(io::Error::other)
}

/// Has all threads allocate from one heap: a thread's own asks the kernel, by a file, whether it may shrink.
///
/// Must run before the process has a second thread.
#[expect(unsafe_code, reason = "sets an option of the allocator in this single-threaded process")]
pub fn share_heap() {
    // SAFETY: plain numbers; no other thread allocates meanwhile. Where it fails nothing has changed.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

#[expect(unsafe_code, reason = "unshares namespaces and changes the user of this single-threaded process")]
fn leave_namespaces() -> io::Result<()> {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: the process has one thread and keeps no state that these namespaces name.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) }?;
    Ok(())
}

#[expect(unsafe_code, reason = "changes the user of this single-threaded process")]
fn become_user(uid: u32) -> io::Result<()> {
    let check = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: an empty list of groups.
    check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresgid(uid, uid, uid) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresuid(uid, uid, uid) })
}
