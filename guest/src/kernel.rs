//! The machine's life: boot, wait for a generation, serve.

use core::{fmt::Write, panic::PanicInfo, time::Duration};

use kage_abi::{DOOR_INTERVAL_NS, HEARTBEAT_INTERVAL_NS, Heartbeat, status, sync_status};

use crate::{
    arch::{self, Mail},
    executor, fs,
    local::Local,
    log, memory, net, process, programs, random, resources, service, vid,
    virtio::{block, entropy::Entropy, net::Net},
};

/// Tasks polled between two doors. Each poll is short (a task with long work yields), and guest time
/// stands still between doors, so the number is what bounds the time.
const ROUND: usize = 16;

/// Processes that run between two doors, if each soon waits for something.
const SLICE: usize = 8;

/// Processes get a slice when nothing else wants to run, so that packets and what they wake come first; and at least
/// this often.
const PATIENCE: Duration = Duration::from_millis(3);

/// Boots and serves for ever.
pub fn run() -> ! {
    memory::start();
    arch::upcall::start();
    executor::start();
    process::start();
    arch::upcall::set_code_ranges(&[programs::code_range()]);
    PULSE.set(None);
    let device = Net::start();
    block::start();
    let mut entropy = Entropy::start();
    log!("ready: {} MiB, {} disk blocks", arch::memory_bytes() >> 20, block::blocks());

    arch::set_status(status::AWAITING_GENERATION);
    let mut mail = arch::mail();
    while mail.generation == 0 {
        mail = arch::door(u64::MAX);
    }
    random::reseed(arch::take_seed(), entropy.draw());
    vid::start();
    resources::start();
    let config = arch::config();
    net::open(device, config, Duration::from_nanos(mail.now_ns));
    service::start(config, Duration::from_nanos(mail.now_ns));
    // They listen before a packet is looked at that came in with the generation.
    executor::run_round(ROUND);
    arch::set_status(status::RUNNING);
    log!("generation {}", mail.generation);
    let kernel = Kernel {
        generation: mail.generation,
        moves: mail.moves,
        synced: mail.sync_wanted,
        heartbeat: Heartbeat::default(),
        entropy,
        slice: Duration::ZERO,
    };
    kernel.serve(mail)
}

/// How long the machine's own heartbeat goes on after it was last asked for.
const PULSE_SPAN: Duration = Duration::from_secs(600);

/// The machine's own heartbeat, which its user asks for.
struct Pulse {
    until: Duration,
    since: Duration,
    last: Duration,
    longest: Duration,
}

static PULSE: Local<Option<Pulse>> = Local::new();

/// The longest gap since last asked and how long ago that was; nothing the first time. The heartbeat goes on.
pub fn ask_pulse() -> Option<(Duration, Duration)> {
    let now = crate::time::now();
    let next = Pulse { until: now + PULSE_SPAN, since: now, last: now, longest: Duration::ZERO };
    let before = PULSE.get().replace(next);
    before.filter(|before| before.until > now).map(|before| (before.longest, now - before.since))
}

/// Whether the machine's own heartbeat is on.
pub fn pulse_is_on() -> bool {
    PULSE.get().as_ref().is_some_and(|pulse| pulse.until > crate::time::now())
}

/// Stops the machine's own heartbeat.
pub fn stop_pulse() {
    *PULSE.get() = None;
}

/// Notes a beat of the machine's own heartbeat when one is due; returns when the next one is.
fn pulse(now: Duration) -> Option<u64> {
    let mut pulse = PULSE.get();
    let beating = pulse.as_mut().filter(|pulse| pulse.until > now)?;
    let interval = Duration::from_nanos(HEARTBEAT_INTERVAL_NS);
    let gap = now.saturating_sub(beating.last);
    if gap >= interval {
        beating.longest = beating.longest.max(gap);
        beating.last = now;
    }
    Some((beating.last + interval).as_nanos() as u64)
}

struct Kernel {
    generation: u64,
    moves: u32,
    /// The last request to make files safe that was seen.
    synced: u32,
    heartbeat: Heartbeat,
    entropy: Entropy,
    /// End of the last slice of processes.
    slice: Duration,
}

impl Kernel {
    fn serve(mut self, mut mail: Mail) -> ! {
        loop {
            let now = Duration::from_nanos(mail.now_ns);
            if mail.generation != self.generation {
                self.generation = mail.generation;
                random::reseed(arch::take_seed(), self.entropy.draw());
                vid::start();
                net::reopen(arch::config(), now);
                log!("generation {}", mail.generation);
            }
            block::poll();
            net::poll(now);
            if mail.moves != self.moves {
                self.moves = mail.moves;
                net::moved();
                net::poll(now);
            }
            resources::poll();
            if mail.sync_wanted != self.synced {
                self.synced = mail.sync_wanted;
                executor::spawn("sync", sync(mail.sync_wanted));
            }
            if memory::is_short() {
                // What is only kept for speed.
                process::code::forget_unused();
                fs::drop_some();
                memory::drop_spare();
            }
            executor::fire_timers(now);
            let ran = executor::run_round(ROUND);
            net::poll(now);
            let next = executor::next_run().into_iter().chain(net::next_poll(now)).min();
            let mut deadline = next.map_or(u64::MAX, |next| next.as_nanos() as u64);
            if mail.heartbeat_on {
                deadline = deadline.min(self.beat(&mail));
            }
            deadline = pulse(now).map_or(deadline, |next| deadline.min(next));
            arch::set_preempt(!process::table::is_empty());
            let quiet = ran == 0 && !executor::wants_round();
            if executor::wants_slice() && (quiet || now.saturating_sub(self.slice) >= PATIENCE) {
                executor::run_slice(SLICE);
                net::poll(now);
                mail = arch::door(0);
                self.slice = Duration::from_nanos(mail.now_ns);
                process::table::account(self.slice.saturating_sub(now));
                continue;
            }
            mail = arch::door(if deadline <= mail.now_ns { 0 } else { deadline });
        }
    }

    /// Notes a beat when one is due; returns when the next one is.
    fn beat(&mut self, mail: &Mail) -> u64 {
        let figures = &mut self.heartbeat;
        if figures.round != mail.heartbeat_round {
            *figures =
                Heartbeat { round: mail.heartbeat_round, last_ns: mail.now_ns, ..Heartbeat::default() };
        }
        let gap = mail.now_ns.saturating_sub(figures.last_ns);
        if gap >= HEARTBEAT_INTERVAL_NS {
            figures.beats += 1;
            figures.longest_ns = figures.longest_ns.max(gap);
            if gap > DOOR_INTERVAL_NS {
                figures.stall_ns += gap - HEARTBEAT_INTERVAL_NS;
            }
            figures.last_ns = mail.now_ns;
            arch::publish_heartbeat(*figures);
        }
        figures.last_ns + HEARTBEAT_INTERVAL_NS
    }
}

/// Makes all files safe because the host asks for it.
async fn sync(request: u32) {
    let status = match fs::sync_all().await {
        Ok(()) => sync_status::DONE,
        Err(error) => {
            log!("files are not safe on the disk: {error}");
            sync_status::FAILED
        }
    };
    arch::publish_sync(request, status);
}

/// Collects a panic's message without allocating.
struct Message {
    bytes: [u8; kage_abi::PANIC_MESSAGE_MAX],
    length: usize,
}

impl Write for Message {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = self.bytes.len() - self.length;
        let take = text.len().min(room);
        self.bytes[self.length..self.length + take].copy_from_slice(&text.as_bytes()[..take]);
        self.length += take;
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut message = Message { bytes: [0; kage_abi::PANIC_MESSAGE_MAX], length: 0 };
    let _ = write!(message, "{info}");
    arch::fail(&message.bytes[..message.length])
}
