//! Machines that run without some of their pages, which a thread brings from where they come from; and machines that are
//! copied while they wait behind their gate.

#![expect(unsafe_code, reason = "takes the bytes of a kernel that stands between two labels")]

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;
#[path = "lab/bare.rs"]
mod small;

use std::{
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kage_abi::{self as abi, BootPage};
use kage_machine::{
    Machine, MachineError, Memory, Missing, PAGE_SIZE, PageIndex, PageSet, PauseCause, Paused, control::Phase,
};
use kage_vmm::{process::host_now, remote::RemoteMachine};
use lab::Lab;
use small::{Bare, boot, kernel, until};

/// Rounds that the walker has gone.
const ROUNDS: u64 = abi::MEMORY + 0x8_0000;
/// How many pages it writes in a round.
const PAGES: u64 = ROUNDS + 8;
/// The first of them.
const FIRST: u32 = 0x800;
/// How long it waits between two rounds.
const PERIOD_NS: u32 = 1_000_000;

// Adds one to the first word of each of its pages, then waits at the door for a while, for ever.
kernel!(walking_kernel, WALKING_FIRST, WALKING_END,
    "2: mov ecx, [{pages}]",
    "mov edi, {first}",
    "3: test ecx, ecx",
    "jz 4f",
    "inc qword ptr [rdi]",
    "add rdi, 4096",
    "dec ecx",
    "jmp 3b",
    "4: inc qword ptr [{rounds}]",
    "mov rax, [{now}]",
    "add rax, {period}",
    "mov [{deadline}], rax",
    "mov al, {call_knock}",
    "out {door}, al",
    "jmp 2b";
    pages = const PAGES,
    first = const abi::MEMORY + FIRST as u64 * abi::PAGE,
    rounds = const ROUNDS,
    now = const boot(std::mem::offset_of!(BootPage, now_ns)),
    period = const PERIOD_NS,
    deadline = const boot(std::mem::offset_of!(BootPage, deadline_ns)),
    call_knock = const abi::call::KNOCK,
    door = const abi::DOOR_PORT,
);

/// A walker over so many pages.
fn walker(bare: &Bare, pages: u64) -> RemoteMachine {
    let machine = bare.start(|machine| Bare::set(machine, PAGES, pages));
    until("rounds", &machine, |machine| Bare::word(machine, ROUNDS) > 2);
    machine
}

/// A thread that answers faults.
struct Server {
    stop: Arc<AtomicBool>,
    /// Returns the pages it brought, and when each was asked for.
    thread: JoinHandle<Vec<(PageIndex, Instant)>>,
}

impl Server {
    /// Brings pages as they are in `from`; `delay` is asked before each.
    fn start(missing: Arc<dyn Missing>, from: Arc<dyn Memory>, delay: impl Fn() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let serve = move || {
            let (mut brought, mut bytes) = (Vec::new(), [0; PAGE_SIZE]);
            while !stopped.load(Ordering::Acquire) {
                let until = Instant::now() + Duration::from_millis(20);
                let Ok(wanted) = missing.wanted(until) else { break };
                let Some(page) = wanted else { continue };
                let asked = Instant::now();
                delay();
                from.read(page, &mut bytes);
                if missing.bring(page, &bytes).unwrap() {
                    brought.push((page, asked));
                }
            }
            brought
        };
        Self { stop, thread: std::thread::spawn(serve) }
    }

    fn stop(self) -> Vec<(PageIndex, Instant)> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

/// Has a shell miss all that a paused machine has.
fn miss_all(source: &RemoteMachine, shell: &mut RemoteMachine) -> (Arc<dyn Missing>, PageSet) {
    let all = source.memory().populated();
    let missing = shell.miss(&all).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(missing.left(), all);
    (missing, all)
}

/// Brings what is left; how many.
fn bring_rest(missing: &dyn Missing, from: &dyn Memory) -> usize {
    let mut bytes = [0; PAGE_SIZE];
    let left = missing.left();
    let brought = left.iter().filter(|&page| {
        from.read(page, &mut bytes);
        missing.bring(page, &bytes).unwrap()
    });
    brought.count()
}

fn restore(target: &mut RemoteMachine, paused: &Paused) {
    target.restore(&paused.state, paused.at).unwrap_or_else(|error| panic!("{error}"));
}

/// Pages that differ though they were not written.
fn differ(a: &RemoteMachine, b: &mut RemoteMachine) -> Vec<PageIndex> {
    let written = b.pause(PauseCause::Hold).unwrap().dirty;
    let (a, b) = (a.memory(), b.memory());
    let (mut one, mut other) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let unlike = |page: &PageIndex| {
        a.read(*page, &mut one);
        b.read(*page, &mut other);
        one != other && !written.contains(*page)
    };
    PageSet::full(a.geometry().pages()).iter().filter(unlike).collect()
}

#[test]
fn a_machine_moves_without_its_pages_which_come_as_it_touches_them() {
    Lab::run(|lab| {
        let mut source = lab.login();
        let mut stream = TcpStream::connect((lab.address(), 7)).expect("echo answers");
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut echo = |text: u8| {
            stream.write_all(&[text]).unwrap();
            let mut answer = [0];
            stream.read_exact(&mut answer).expect("the echo");
            assert_eq!(answer[0], text);
        };
        echo(1);
        let mut target = lab.arriving();
        let paused = source.pause(PauseCause::Switch).unwrap();
        let (missing, all) = miss_all(&source, &mut target);
        let server = Server::start(Arc::clone(&missing), source.memory(), || ());
        restore(&mut target, &paused);
        let started = target.run_gated().unwrap();
        source.release().unwrap();
        target.open_gate().unwrap();
        (2..10).for_each(&mut echo);
        let touched = all.len() - missing.left().len();
        println!("{touched} of {} pages touched, blackout {:?}", all.len(), started.at.since(paused.at));
        assert!(touched > 3 && !missing.left().is_empty());
        let rest = bring_rest(&*missing, &*source.memory());
        let brought = server.stop();
        assert_eq!(brought.len() + rest, all.len() as usize, "each page comes once");
        assert!(missing.left().is_empty() && !missing.bring(PageIndex(5), &[1; PAGE_SIZE]).unwrap());
        (10..20).for_each(&mut echo);
        assert_eq!(differ(&source, &mut target), []);
        target.resume().unwrap();
        source.end();
        // It is as any other from now on.
        let (mut target, _) = lab.move_machine(target);
        (20..30).for_each(&mut echo);
        target.end();
    });
}

#[test]
fn a_fault_is_served_at_once() {
    const COUNT: u64 = 2000;
    let bare = Bare::new(walking_kernel());
    let mut source = walker(&bare, COUNT);
    let paused = source.pause(PauseCause::Switch).unwrap();
    let mut target = bare.shell();
    let (missing, all) = miss_all(&source, &mut target);
    let server = Server::start(Arc::clone(&missing), source.memory(), || ());
    restore(&mut target, &paused);
    target.run_gated().unwrap();
    until("no page is missing", &target, |_| missing.left().is_empty());
    let brought = server.stop();
    assert_eq!(brought.len(), all.len() as usize);
    let mut took: Vec<_> = brought.windows(2).map(|pair| pair[1].1 - pair[0].1).collect();
    took.sort();
    println!(
        "{} faults: median {:?}, 99 % {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() * 99 / 100]
    );
    assert!(took[took.len() / 2] < Duration::from_millis(5));
    let rounds = Bare::word(&target, ROUNDS);
    until("rounds", &target, |target| Bare::word(target, ROUNDS) > rounds + 10);
    target.pause(PauseCause::Hold).unwrap();
    // Every page counts the rounds, but for the round in which it stands.
    let rounds = Bare::word(&target, ROUNDS);
    for page in 0..COUNT {
        let count = Bare::word(&target, abi::MEMORY + (u64::from(FIRST) + page) * abi::PAGE);
        assert!((rounds..=rounds + 1).contains(&count), "page {page}: {count} of {rounds}");
    }
    source.end();
    target.end();
}

#[test]
fn a_page_that_comes_late_fails_neither_guest_nor_request() {
    let bare = Bare::new(walking_kernel());
    let mut source = walker(&bare, 50);
    let paused = source.pause(PauseCause::Switch).unwrap();
    let mut target = bare.shell();
    let (missing, _) = miss_all(&source, &mut target);
    // Once in the restore, where the process itself waits longer than any answer may take, once in the guest.
    let (runs, late) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let (started, restored) = (Arc::clone(&runs), AtomicBool::new(false));
    let server = Server::start(Arc::clone(&missing), source.memory(), move || {
        if !restored.swap(true, Ordering::AcqRel) {
            std::thread::sleep(Duration::from_secs(11));
        } else if started.load(Ordering::Acquire) && !late.swap(true, Ordering::AcqRel) {
            std::thread::sleep(Duration::from_secs(6));
        }
    });
    let asked = Instant::now();
    restore(&mut target, &paused);
    assert!(asked.elapsed() > Duration::from_secs(10));
    runs.store(true, Ordering::Release);
    target.run_gated().unwrap();
    // Its guest waits; it answers all the same.
    std::thread::sleep(Duration::from_secs(1));
    let asked = Instant::now();
    assert_eq!(target.status().unwrap().0, Phase::Running { gate_open: false });
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert!(!missing.left().is_empty());
    let rounds = Bare::word(&source, ROUNDS);
    until("rounds", &target, |target| Bare::word(target, ROUNDS) > rounds + 10);
    assert_eq!(target.failure(), None);
    server.stop();
    source.end();
    target.end();
}

#[test]
fn who_waits_for_faults_of_a_process_that_dies_hears_of_it() {
    let bare = Bare::new(walking_kernel());
    let mut source = walker(&bare, 50);
    let paused = source.pause(PauseCause::Switch).unwrap();
    let mut target = bare.shell();
    let (missing, all) = miss_all(&source, &mut target);
    let waits = Arc::clone(&missing);
    let waiting = std::thread::spawn(move || {
        while waits.wanted(Instant::now() + Duration::from_secs(60))?.is_some() {}
        Ok::<_, kage_machine::Gone>(())
    });
    // The process waits within the restore, for ever.
    let process = target.process_id();
    let restoring = std::thread::spawn(move || {
        let result = target.restore(&paused.state, paused.at);
        (target, result)
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!restoring.is_finished() && !waiting.is_finished());
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    let killed = Instant::now();
    assert!(waiting.join().unwrap().is_err());
    let (mut target, result) = restoring.join().unwrap();
    assert!(matches!(result, Err(MachineError::Gone(_))), "{result:?}");
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    assert!(missing.bring(PageIndex(0), &[0; PAGE_SIZE]).is_err());
    assert_eq!(missing.left(), all);
    source.end();
    target.end();
}

#[test]
fn a_missing_page_is_not_touched_and_who_read_it_is_told_to_read_again() {
    let bare = Bare::new(walking_kernel());
    let mut source = walker(&bare, 50);
    let paused = source.pause(PauseCause::Switch).unwrap();
    let mut target = bare.shell();
    let last = bare.geometry().memory_pages - 1;
    let page = PageIndex(FIRST + 7);
    let mut beyond = PageSet::empty(last + 2);
    beyond.insert(PageIndex(last + 1));
    assert!(target.miss(&beyond).is_err(), "no page of memory");
    // What a shell holds goes.
    target.memory().write(page, &[7; PAGE_SIZE]);
    let (missing, all) = miss_all(&source, &mut target);
    assert!(target.miss(&all).is_err(), "twice");
    let server = Server::start(Arc::clone(&missing), source.memory(), || ());
    let memory = target.memory();
    let mut bytes = [1; PAGE_SIZE];
    memory.read(page, &mut bytes);
    assert_eq!(bytes, [0; PAGE_SIZE]);
    assert!(memory.populated().contains(page));
    // Overwritten before it came: that is its content, and it is not missing any more.
    let other = PageIndex(FIRST + 8);
    source.memory().read(other, &mut bytes);
    bytes[..8].copy_from_slice(&1_000_000u64.to_le_bytes());
    memory.write(other, &bytes);
    assert!(!missing.left().contains(other));
    restore(&mut target, &paused);
    assert!(missing.left().contains(page));
    assert!(!target.harvest().unwrap().contains(page), "it is not here yet");
    target.run_gated().unwrap();
    until("no page is missing", &target, |target| {
        bring_rest(&*missing, &*source.memory());
        Bare::word(target, abi::MEMORY + u64::from(other.0) * abi::PAGE) > 1_000_000
    });
    server.stop();
    assert!(target.pause(PauseCause::Hold).unwrap().dirty.contains(page));
    assert!(Bare::word(&target, abi::MEMORY + u64::from(page.0) * abi::PAGE) > 0);
    source.end();
    target.end();
}

#[test]
fn a_machine_whose_pages_are_missing_is_not_adopted() {
    Lab::run(|lab| {
        let mut source = lab.login();
        source.pause(PauseCause::Switch).unwrap();
        let mut target = lab.arriving();
        let path = lab.dir().join("alice.sock");
        target.move_socket(&path).unwrap();
        let (missing, _) = miss_all(&source, &mut target);
        drop(target);
        let refused = RemoteMachine::adopt(&path).err().expect("it lacks pages").to_string();
        assert!(refused.contains("pages of its memory are missing"), "{refused}");
        bring_rest(&*missing, &*source.memory());
        RemoteMachine::adopt(&path).unwrap().expect("it listens").end();
        source.end();
    });
}

#[test]
fn a_checkpoint_leaves_the_gate_shut_and_what_waited_in_it_can_be_let_out() {
    const NONE: [u32; 0] = [];
    Lab::run(|lab| {
        let mut source = lab.login();
        let socket = UdpSocket::bind("[::]:0").unwrap();
        let send = |number: u32| {
            socket.send_to(&number.to_le_bytes(), (lab.address(), 7)).unwrap();
        };
        // What comes within a while.
        let came = || {
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut bytes = [0; 4];
            let came = std::iter::from_fn(|| socket.recv(&mut bytes).ok().map(|_| u32::from_le_bytes(bytes)));
            came.collect::<Vec<_>>()
        };
        send(0);
        assert_eq!(came(), [0]);
        let mut machine = lab.arriving();
        let paused = source.pause(PauseCause::Switch).unwrap();
        let (from, to) = (source.memory(), machine.memory());
        let mut bytes = [0; PAGE_SIZE];
        for page in from.populated().iter() {
            from.read(page, &mut bytes);
            to.write(page, &bytes);
        }
        restore(&mut machine, &paused);
        machine.run_gated().unwrap();
        (1..4).for_each(send);
        assert_eq!(came(), NONE, "the gate is shut");
        let mut seen = 0;
        let first = machine.checkpoint(&mut |dirty| seen = dirty.len()).unwrap();
        assert!(seen > 0 && seen == first.dirty.len());
        assert_eq!(machine.status().unwrap().0, Phase::Running { gate_open: false });
        assert_eq!(machine.phase(), Phase::Running { gate_open: false });
        (4..6).for_each(send);
        assert_eq!(came(), NONE, "and shut again");
        let second = machine.checkpoint(&mut |_| ()).unwrap();
        assert_eq!(second.output.0.wrapping_sub(first.output.0), 2);
        let before = machine.status().unwrap().1;
        machine.let_out(first.output).unwrap();
        assert_eq!(came(), [1, 2, 3]);
        assert_eq!(machine.status().unwrap().1.sent_frames - before.sent_frames, 3);
        send(6);
        assert_eq!(came(), NONE);
        machine.let_out(second.output).unwrap();
        machine.let_out(first.output).unwrap();
        assert_eq!(came(), [4, 5], "a mark that lies behind lets nothing out");
        machine.open_gate().unwrap();
        assert_eq!(came(), [6]);
        send(7);
        assert_eq!(came(), [7]);
        let open = machine.checkpoint(&mut |_| ()).unwrap();
        assert_eq!(machine.phase(), Phase::Running { gate_open: true });
        machine.let_out(open.output).unwrap();
        send(8);
        assert_eq!(came(), [8]);
        source.end();
        machine.end();
    });
}

#[test]
fn a_checkpoint_takes_little_time() {
    let bare = Bare::new(walking_kernel());
    for pages in [0, 100] {
        let mut machine = walker(&bare, pages);
        let (mut took, mut stood) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            // A whole round, so that its pages are written again.
            let rounds = Bare::word(&machine, ROUNDS);
            until("a round", &machine, |machine| Bare::word(machine, ROUNDS) > rounds + 1);
            let asked = Instant::now();
            let mut written = 0;
            let paused = machine.checkpoint(&mut |dirty| written = dirty.len()).unwrap();
            took.push(asked.elapsed());
            stood.push(host_now().since(paused.at));
            assert!(u64::from(written) >= pages && written == paused.dirty.len());
        }
        took.sort();
        stood.sort();
        println!("{pages} pages written: asked {:?}, stood {:?} (medians)", took[100], stood[100]);
        assert!(stood[100] < Duration::from_millis(100));
        machine.end();
    }
}
