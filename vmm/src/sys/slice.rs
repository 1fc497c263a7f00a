//! The scheduler's slice.

/// Shortest slice that can be asked for.
const SHORTEST_NS: u64 = 100_000;

/// Asks that this thread wake up at once, even beside others that compute: from Linux 6.12 on, who asks for short slices
/// takes the processor from who does not, instead of at the next tick (4 ms). Its share stays the same; a kernel that
/// does not know of this changes nothing.
pub fn ask_for_short_slices() {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let mut attributes = Attributes { size: 48, ..Attributes::default() };
    let own = 0_i32;
    // SAFETY: the attributes live across the call, which writes at most their size.
    let known =
        unsafe { libc::syscall(libc::SYS_sched_getattr, own, &raw mut attributes, attributes.size, 0_u32) };
    if known != 0 {
        return;
    }
    (attributes.size, attributes.runtime) = (48, SHORTEST_NS);
    // SAFETY: as above; it only reads them.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, own, &raw const attributes, 0_u32) };
}
