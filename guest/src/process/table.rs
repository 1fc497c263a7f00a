//! The processes there are.

use alloc::{collections::BTreeMap, rc::Rc, vec::Vec};
use core::time::Duration;

use super::{Process, SpawnError};
use crate::{arch, local::Local};

/// Processes that may run at a time, unless the image says otherwise.
const MOST: usize = 256;
/// What a turn of a process takes at the least: two switches.
const LEAST: Duration = Duration::from_micros(1);

struct Table {
    processes: BTreeMap<u32, Rc<Process>>,
    next: u32,
    most: usize,
    memory: usize,
    /// Those that ran since the last door, the last one last.
    ran: Vec<Ran>,
}

/// What a process did between two doors.
struct Ran {
    process: Rc<Process>,
    /// Estimate for its calls.
    cost: Duration,
    /// It was interrupted: whatever time is not accounted for is its own.
    preempted: bool,
}

static TABLE: Local<Table> = Local::new();

pub(super) fn start() {
    let memory = arch::memory_bytes() as usize / 4 * 3;
    TABLE.set(Table { processes: BTreeMap::new(), next: 1, most: MOST, memory, ran: Vec::new() });
}

/// Sets what the image says: processes at a time, and bytes of each.
pub fn set_limits(most: usize, memory: usize) {
    let mut table = TABLE.get();
    table.most = most;
    table.memory = memory;
}

/// Processes that may run at a time.
pub fn most() -> usize {
    TABLE.get().most
}

/// Bytes of memory that one may have.
pub fn memory_limit() -> usize {
    TABLE.get().memory
}

/// Gives out a number, if there may be one more process.
pub(super) fn next_pid() -> Result<u32, SpawnError> {
    let mut table = TABLE.get();
    if table.processes.len() >= table.most {
        return Err(SpawnError::TooMany);
    }
    let pid = table.next;
    // Numbers come again after four billion processes; those in use are left out.
    let mut next = pid.wrapping_add(1).max(1);
    while table.processes.contains_key(&next) {
        next = next.wrapping_add(1).max(1);
    }
    table.next = next;
    Ok(pid)
}

pub(super) fn add(process: &Rc<Process>) {
    TABLE.get().processes.insert(process.pid, Rc::clone(process));
}

pub(super) fn remove(pid: u32) {
    let process = TABLE.get().processes.remove(&pid);
    drop(process);
}

/// All processes, in the order of their numbers.
pub fn all() -> Vec<Rc<Process>> {
    TABLE.get().processes.values().cloned().collect()
}

/// The process of a number.
pub fn find(pid: u32) -> Option<Rc<Process>> {
    TABLE.get().processes.get(&pid).cloned()
}

/// Whether there is any.
pub fn is_empty() -> bool {
    TABLE.get().processes.is_empty()
}

/// Notes that a process runs between this door and the next.
pub(super) fn note_run(process: &Rc<Process>) {
    let ran = Ran { process: Rc::clone(process), cost: LEAST, preempted: false };
    TABLE.get().ran.push(ran);
}

/// Notes what the one that ran last has made of it.
pub(super) fn note_ran(cost: Duration, preempted: bool) {
    if let Some(ran) = TABLE.get().ran.last_mut() {
        ran.cost += cost;
        ran.preempted = preempted;
    }
}

/// Accounts for the time between two doors. One that was interrupted has had all but what the others' calls cost; if
/// none was, they share it.
pub fn account(span: Duration) {
    let ran = core::mem::take(&mut TABLE.get().ran);
    let Ok(count @ 1..) = u32::try_from(ran.len()) else { return };
    let preempted = ran.iter().any(|ran| ran.preempted);
    let mut left = span;
    for ran in ran.iter().filter(|ran| !ran.preempted) {
        let own = if preempted { ran.cost.min(left) } else { span / count };
        left = left.saturating_sub(own);
        ran.process.add_time(own);
    }
    if let Some(last) = ran.iter().rfind(|ran| ran.preempted) {
        last.process.add_time(left);
    }
}
