//! The VMM's promises to a kernel about windows and upcalls, each shown by a kernel of a few instructions that stands
//! beside the test that boots it. What the product's kernel makes of them is tested with programs.

#![expect(unsafe_code, reason = "takes the bytes of kernels that stand between two labels")]

mod lab {
    pub mod bare;
}

use std::time::{Duration, Instant};

use kage_abi::{self as abi, BootPage, CodeRange, MapRange, frame, map_status, offset, upcall, window};
use kage_machine::{Machine, PAGE_SIZE, PageIndex, PageSet, PauseCause};
use kage_vmm::remote::RemoteMachine;
use lab::bare::{Bare, boot, kernel, until};

/// Where these kernels keep what they count, and where a test tells them what to do.
const NOTES: u64 = abi::MEMORY + 0x8_0000;
/// Frame table.
const TABLE: u64 = abi::MEMORY + 0x10_0000;
/// First frame that is mapped.
const FRAME: u32 = 0x800;

/// Upcalls of kind preempt.
const PREEMPTED: u64 = NOTES;
/// Upcalls of kind fault, and the last one's vector, address and instruction.
const FAULTS: u64 = NOTES + 8;
const VECTOR: u64 = NOTES + 16;
const ADDRESS: u64 = NOTES + 24;
const INSTRUCTION: u64 = NOTES + 32;
/// Bytes of instruction that the handler of a fault leaves out.
const SKIP: u64 = NOTES + 40;
/// Rounds of the process; it lies in its stack window.
const ROUNDS: u64 = abi::MEMORY + (FRAME as u64 + 1) * abi::PAGE;

// Copies its process to a frame, maps that executable and the next one as its stack, and enters it. The process
// counts in RAX and in all lanes of YMM0, whose upper half is what is lost first, and faults at label 9 when they
// differ; with a mode other than 0 it also faults once in each round.
kernel!(process_kernel, PROCESS_FIRST, PROCESS_END,
    "lea rax, [rip + 20f]",
    "mov [{upcall_entry}], rax",
    "mov rax, {code}",
    "mov [{code_ranges}], rax",
    "mov rax, {code_end}",
    "mov [{code_ranges} + 8], rax",
    "mov dword ptr [{preempt}], 1000",
    "mov eax, {table}",
    "mov [{frame_table}], rax",
    "mov dword ptr [{first_frame}], {frame}",
    "lea rsi, [rip + 30f]",
    "mov edi, {frame_at}",
    "mov ecx, 512",
    "rep movsb",
    "mov rax, {code} + {executable}",
    "mov [{table} + {frame} * 8], rax",
    "mov rax, {stack} + {writable}",
    "mov [{table} + {frame} * 8 + 8], rax",
    "mov dword ptr [{map}], {frame}",
    "mov dword ptr [{map} + 4], 2",
    "mov dword ptr [{map_count}], 1",
    "mov al, {call_map}",
    "out {door}, al",
    "mov rsp, {stack} + 0xfc0",
    "mov r15, {code}",
    "mov rbx, {stack}",
    "mov r12d, [{mode}]",
    "jmp r15",
    // The process.
    ".balign 16",
    "30:",
    "xor eax, eax",
    "mov ecx, 1",
    "vmovq xmm1, rcx",
    "vpbroadcastq ymm1, xmm1",
    "vpxor ymm0, ymm0, ymm0",
    "31:",
    "inc rax",
    "vpaddq ymm0, ymm0, ymm1",
    "vmovq rdx, xmm0",
    "cmp rdx, rax",
    "jne 9f",
    "vextracti128 xmm2, ymm0, 1",
    "vpextrq rdx, xmm2, 1",
    "cmp rdx, rax",
    "jne 9f",
    "mov [rbx], rax",
    "cmp r12d, 0",
    "je 31b",
    "cmp r12d, 1",
    "je 12f",
    "cmp r12d, 2",
    "je 13f",
    // #DE, two bytes.
    "mov r8, rax",
    "xor edx, edx",
    "xor ecx, ecx",
    "div ecx",
    "mov rax, r8",
    "jmp 31b",
    // #PF beyond the stack, seven bytes.
    "12: mov [rbx + 0x1000], rax",
    "jmp 31b",
    // #UD, two bytes.
    "13: ud2",
    "jmp 31b",
    "9: int3",
    "jmp 9b",
    // Upcalls.
    ".balign 16",
    "20:",
    "lea rsp, [rsp - 128]",
    "push qword ptr [{record_rip}]",
    "pushfq",
    "push rax",
    "push rcx",
    "cmp dword ptr [{record}], {preempt_kind}",
    "jne 21f",
    "inc qword ptr [{preempted}]",
    "jmp 22f",
    "21:",
    "mov eax, [{record} + 4]",
    "mov [{vector}], rax",
    "mov rax, [{record} + 24]",
    "mov [{address}], rax",
    "mov rax, [{record_rip}]",
    "mov [{instruction}], rax",
    "inc qword ptr [{faults}]",
    "mov rax, [{skip}]",
    "add [rsp + 24], rax",
    "mov qword ptr [{deadline}], 0",
    "mov al, {call_knock}",
    "out {door}, al",
    "22:",
    "pop rcx",
    "pop rax",
    "popfq",
    "ret 128";
    upcall_entry = const boot(std::mem::offset_of!(BootPage, upcall_entry)),
    code_ranges = const boot(std::mem::offset_of!(BootPage, code_ranges)),
    preempt = const boot(std::mem::offset_of!(BootPage, preempt_us)),
    frame_table = const boot(std::mem::offset_of!(BootPage, frame_table)),
    first_frame = const boot(std::mem::offset_of!(BootPage, first_frame)),
    map = const boot(std::mem::offset_of!(BootPage, map)),
    map_count = const boot(std::mem::offset_of!(BootPage, map_count)),
    record = const boot(std::mem::offset_of!(BootPage, upcall)),
    record_rip = const boot(std::mem::offset_of!(BootPage, upcall) + std::mem::offset_of!(abi::Upcall, rip)),
    deadline = const boot(std::mem::offset_of!(BootPage, deadline_ns)),
    code = const window::CODE,
    code_end = const window::END,
    stack = const window::STACK,
    table = const TABLE,
    frame = const FRAME,
    frame_at = const abi::MEMORY + FRAME as u64 * abi::PAGE,
    executable = const frame::PRESENT | frame::EXECUTABLE,
    writable = const frame::PRESENT | frame::WRITABLE,
    call_map = const abi::call::MAP,
    call_knock = const abi::call::KNOCK,
    door = const abi::DOOR_PORT,
    preempt_kind = const upcall::PREEMPT,
    preempted = const PREEMPTED,
    faults = const FAULTS,
    vector = const VECTOR,
    address = const ADDRESS,
    instruction = const INSTRUCTION,
    skip = const SKIP,
    mode = const MODE,
);

/// What a kernel is to do.
const MODE: u64 = NOTES + 48;

// Makes the door call that the test names, then knocks for ever without waiting.
kernel!(calling_kernel, CALLING_FIRST, CALLING_END,
    "mov eax, [{mode}]",
    "out {door}, al",
    "inc dword ptr [{preempted}]",
    "2: mov qword ptr [{deadline}], 0",
    "mov al, {call_knock}",
    "out {door}, al",
    "jmp 2b";
    mode = const MODE,
    preempted = const PREEMPTED,
    deadline = const boot(std::mem::offset_of!(BootPage, deadline_ns)),
    call_knock = const abi::call::KNOCK,
    door = const abi::DOOR_PORT,
);

#[test]
fn an_endless_loop_is_interrupted_each_millisecond_and_the_machine_answers() {
    let bare = Bare::new(process_kernel());
    let mut machine = bare.start(|_| {});
    until("a first round", &machine, |machine| Bare::word(machine, ROUNDS) > 0);
    let before = Bare::word(&machine, PREEMPTED);
    let started = Instant::now();
    let mut longest = Duration::ZERO;
    while started.elapsed() < Duration::from_millis(500) {
        let asked = Instant::now();
        machine.status().unwrap();
        longest = longest.max(asked.elapsed());
        std::thread::sleep(Duration::from_millis(3));
    }
    let elapsed = started.elapsed();
    let interrupted = Bare::word(&machine, PREEMPTED) - before;
    println!("in {elapsed:?}: {interrupted} upcalls, longest answer {longest:?}");
    assert!(u128::from(interrupted) > elapsed.as_millis() / 10, "{interrupted} upcalls in {elapsed:?}");
    assert_eq!(Bare::word(&machine, FAULTS), 0, "registers were lost");
    // What an upcall delivers includes the time.
    let now = |machine: &RemoteMachine| Bare::word(machine, boot(std::mem::offset_of!(BootPage, now_ns)));
    let told = now(&machine);
    until("time goes on", &machine, |machine| now(machine) > told);
    machine.end();
}

#[test]
fn process_code_moves_in_mid_instruction_with_its_mappings_and_vector_registers() {
    let bare = Bare::new(process_kernel());
    let mut machine = bare.start(|_| {});
    let mut inside = 0;
    for turn in 0..20 {
        let rounds = Bare::word(&machine, ROUNDS);
        until("another round", &machine, |machine| Bare::word(machine, ROUNDS) > rounds);
        let paused = machine.pause(PauseCause::Switch).unwrap();
        inside += u32::from((window::CODE..window::END).contains(&paused.state.vcpu.rip));
        let mut target = bare.shell();
        copy(&machine, &target);
        target.restore(&paused.state, paused.at).unwrap_or_else(|error| panic!("move {turn}: {error}"));
        machine.release().unwrap();
        machine.end();
        target.run(true).unwrap();
        machine = target;
    }
    let rounds = Bare::word(&machine, ROUNDS);
    until("a last round", &machine, |machine| Bare::word(machine, ROUNDS) > rounds);
    assert_eq!(Bare::word(&machine, FAULTS), 0, "registers were lost");
    println!("{inside} of 20 moves found the vCPU in process code, {rounds} rounds");
    assert!(inside > 0, "no move in process code");
    machine.end();
}

/// Has `to` hold what `from` holds.
fn copy(from: &RemoteMachine, to: &RemoteMachine) {
    let (from, to) = (from.memory(), to.memory());
    let (mut bytes, mut there) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for page in PageSet::full(from.geometry().pages()).iter() {
        from.read(page, &mut bytes);
        to.read(page, &mut there);
        if bytes != there {
            to.write(page, &bytes);
        }
    }
}

#[test]
fn a_shell_maps_nothing_of_the_machine_it_was_before() {
    const W: u64 = frame::PRESENT | frame::WRITABLE;
    let entry = |frame: u32| TABLE + u64::from(frame) * 8;
    let bare = Bare::new(process_kernel());
    // Faults in each round at the page behind its stack.
    let mut machine = bare.start(|machine| {
        Bare::set(machine, MODE, 1);
        Bare::set(machine, SKIP, 7);
    });
    until("a fault", &machine, |machine| Bare::word(machine, FAULTS) > 0);
    let paused = machine.pause(PauseCause::Hold).unwrap();
    // A rehearsal of it that has a page there.
    let mut shell = bare.shell();
    copy(&machine, &shell);
    Bare::set(&shell, entry(FRAME + 2), (window::STACK + 0x1000) | W);
    shell.restore(&paused.state, paused.at).unwrap();
    shell.run(false).unwrap();
    // The machine may have been paused between a fault and its count.
    let rounds = Bare::word(&shell, ROUNDS);
    until("its first rounds", &shell, |shell| Bare::word(shell, ROUNDS) > rounds + 1);
    let faults = Bare::word(&shell, FAULTS);
    until("rounds without a fault", &shell, |shell| Bare::word(shell, ROUNDS) > rounds + 1000);
    assert_eq!(Bare::word(&shell, FAULTS), faults);
    let refused_half_way = |shell: &mut RemoteMachine| {
        Bare::set(shell, entry(FRAME + 9), (window::STACK + 0x2000) | W);
        Bare::set(shell, entry(FRAME + 10), (window::STACK + 0x2000) | W);
        shell.restore(&paused.state, paused.at).unwrap_err();
    };
    shell.pause(PauseCause::Hold).unwrap();
    shell.forget().unwrap();
    refused_half_way(&mut shell);
    // The machine itself, whose stack lies in another frame.
    copy(&machine, &shell);
    let mut bytes = [0; PAGE_SIZE];
    machine.memory().read(PageIndex(FRAME + 1), &mut bytes);
    shell.memory().write(PageIndex(FRAME + 5), &bytes);
    Bare::set(&shell, entry(FRAME + 1), 0);
    Bare::set(&shell, entry(FRAME + 5), window::STACK | W);
    shell.restore(&paused.state, paused.at).unwrap();
    shell.run(true).unwrap();
    let faults = Bare::word(&machine, FAULTS);
    until("faults again", &shell, |shell| Bare::word(shell, FAULTS) > faults + 100);
    shell.end();
    machine.end();
}

// Goes from ring 3 into the end of the fault stubs, which then asks for mappings for ever.
kernel!(stubborn_kernel, STUBBORN_FIRST, STUBBORN_END,
    "mov rdx, [{mode}]",
    "mov eax, {call_map}",
    "jmp rdx";
    mode = const MODE,
    call_map = const abi::call::MAP,
);

#[test]
fn a_guest_that_pretends_to_be_in_a_fault_is_stopped_like_any_other() {
    let bare = Bare::new(stubborn_kernel());
    let mut machine = bare.start(|machine| Bare::set(machine, MODE, bare.stub_loop()));
    let asked = Instant::now();
    machine.pause(PauseCause::Hold).unwrap();
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    machine.end();
}

#[test]
fn faults_of_process_code_come_as_upcalls_and_change_no_register() {
    let bare = Bare::new(process_kernel());
    for (mode, vector, skip, address) in [(1, 14, 7, window::STACK + 0x1000), (2, 6, 2, 0), (3, 0, 2, 0)] {
        let mut machine = bare.start(|machine| {
            Bare::set(machine, MODE, mode);
            Bare::set(machine, SKIP, skip);
        });
        until("a thousand faults", &machine, |machine| Bare::word(machine, FAULTS) > 1000);
        let before = (Instant::now(), Bare::word(&machine, FAULTS));
        std::thread::sleep(Duration::from_millis(100));
        let count = Bare::word(&machine, FAULTS) - before.1;
        println!("vector {vector}: {:?} each", before.0.elapsed() / count.max(1) as u32);
        assert_eq!(Bare::word(&machine, VECTOR), vector);
        if vector == 14 {
            assert_eq!(Bare::word(&machine, ADDRESS), address);
        }
        let at = Bare::word(&machine, INSTRUCTION);
        assert!((window::CODE..window::CODE + 512).contains(&at), "{at:#x}");
        machine.end();
    }
}

/// Boots the calling kernel with frames mapped as `entries` says, and makes `call`.
fn call(bare: &Bare, call: u8, table: u64, ranges: &[MapRange], entries: &[(u32, u64)]) -> RemoteMachine {
    bare.start(|machine| {
        Bare::set(machine, MODE, call.into());
        Bare::set(machine, boot(std::mem::offset_of!(BootPage, frame_table)), table);
        let counts = ranges.len() as u64;
        // The status is the lower half of this word.
        Bare::set(machine, boot(std::mem::offset_of!(BootPage, map_status)), counts << 32 | 77);
        for (index, range) in ranges.iter().take(abi::MAP_RANGES).enumerate() {
            let word = u64::from(range.first) | u64::from(range.count) << 32;
            Bare::set(machine, boot(std::mem::offset_of!(BootPage, map) + index * 8), word);
        }
        set_entries(machine, entries);
    })
}

fn set_entries(machine: &RemoteMachine, entries: &[(u32, u64)]) {
    let words: Vec<_> =
        entries.iter().map(|&(number, entry)| (TABLE + u64::from(number) * 8, entry)).collect();
    Bare::set_all(machine, &words);
}

fn status(machine: &RemoteMachine) -> u32 {
    Bare::word(machine, boot(std::mem::offset_of!(BootPage, map_status))) as u32
}

#[test]
fn a_guest_that_maps_what_none_may_ends_and_its_host_says_why() {
    const W: u64 = frame::PRESENT | frame::WRITABLE;
    const X: u64 = frame::PRESENT | frame::EXECUTABLE;
    let bare = Bare::new(calling_kernel());
    let one = |first, count| vec![MapRange { first, count }];
    let last = (bare.geometry().memory_pages - 1, window::MEMORY | W);
    let cases = [
        ("writable and executable", TABLE, one(1, 1), vec![(1, window::CODE | W | X)], "entry"),
        ("executable beside code", TABLE, one(1, 1), vec![(1, window::MEMORY | X)], "entry"),
        ("below the windows", TABLE, one(1, 1), vec![(1, abi::MEMORY | W)], "entry"),
        ("above the windows", TABLE, one(1, 1), vec![(1, window::END | W)], "entry"),
        ("a bit that means nothing", TABLE, one(1, 1), vec![(1, window::MEMORY | W | 1 << 9)], "entry"),
        ("a kernel's half", TABLE, one(1, 1), vec![(1, 0xffff_8000_0000_0000 | W)], "entry"),
        (
            "a page twice",
            TABLE,
            one(1, 2),
            vec![(1, window::STACK | W), (2, window::STACK | W)],
            "another is",
        ),
        ("a frame too many", TABLE, one(last.0, 2), vec![last], "has not"),
        ("frames without end", TABLE, one(1, u32::MAX), vec![], "has not"),
        ("too many frames", TABLE, one(0, 4097), vec![], "at once"),
        ("too many ranges", TABLE, vec![MapRange::default(); 33], vec![], "at once"),
        ("a table beyond memory", 1 << 40, one(1, 1), vec![], "not in its memory"),
        ("a table that overflows", u64::MAX - 7, one(1, 1), vec![], "not in its memory"),
        ("a table not aligned", TABLE + 1, one(1, 1), vec![], "not in its memory"),
    ];
    for (what, table, ranges, entries, reason) in cases {
        let mut machine = call(&bare, abi::call::MAP, table, &ranges, &entries);
        until(what, &machine, |machine| machine.failure().is_some());
        let said = machine.failure().unwrap_or_default();
        println!("{what}: {said}");
        assert!(said.contains(reason), "{what}: {said}");
        machine.end();
    }
    let mut machine = call(&bare, 9, TABLE, &[], &[]);
    until("an unknown call", &machine, |machine| machine.failure().is_some());
    machine.end();
    // The same by a rebuild, and by a restore of a machine that was altered on its way.
    let mut machine = call(&bare, abi::call::REBUILD, TABLE, &[], &[(1, window::CODE | W | X)]);
    until("a rebuild", &machine, |machine| machine.failure().is_some());
    machine.end();
    let mut machine = call(&bare, abi::call::MAP, TABLE, &[], &[]);
    let paused = machine.pause(PauseCause::Switch).unwrap();
    let mut shell = bare.shell();
    Bare::set(&shell, boot(std::mem::offset_of!(BootPage, frame_table)), TABLE);
    Bare::set(&shell, TABLE + 8, window::CODE | W | X);
    let refused = shell.restore(&paused.state, paused.at).unwrap_err().to_string();
    assert!(refused.contains("entry"), "{refused}");
    shell.end();
    machine.end();
}

#[test]
fn tables_have_an_end_that_the_guest_is_told_of_and_a_full_memory_is_mapped_in_no_time() {
    const W: u64 = frame::PRESENT | frame::WRITABLE;
    let bare = Bare::new(calling_kernel());
    let pages = bare.geometry().memory_pages;
    // A page in each gigabyte: two tables each.
    let scattered: Vec<_> =
        (FRAME..FRAME + 2000).map(|at| (at, (window::MEMORY + (u64::from(at - FRAME) << 30)) | W)).collect();
    let ranges = [MapRange { first: FRAME, count: 2000 }];
    let mut machine = call(&bare, abi::call::MAP, TABLE, &ranges, &scattered);
    until("an answer", &machine, |machine| Bare::word(machine, PREEMPTED) > 0);
    assert_eq!(status(&machine), map_status::NO_TABLE);
    // Paused before it has drawn its conclusions, it goes on elsewhere.
    let paused = machine.pause(PauseCause::Switch).unwrap();
    let mut shell = bare.shell();
    copy(&machine, &shell);
    shell.restore(&paused.state, paused.at).unwrap();
    shell.run(true).unwrap();
    let now = |shell: &RemoteMachine| Bare::word(shell, boot(std::mem::offset_of!(BootPage, now_ns)));
    let told = now(&shell);
    until("another door", &shell, |shell| now(shell) > told);
    shell.end();
    machine.end();

    // Everything behind the first 8 MiB in a row.
    let dense: Vec<_> =
        (FRAME..pages).map(|at| (at, (window::MEMORY + u64::from(at - FRAME) * abi::PAGE) | W)).collect();
    let mut machine = call(&bare, abi::call::REBUILD, TABLE, &[], &dense);
    until("an answer", &machine, |machine| Bare::word(machine, PREEMPTED) > 0);
    assert_eq!(status(&machine), map_status::DONE);
    let paused = machine.pause(PauseCause::Switch).unwrap();
    for mapped in [false, true] {
        let mut took: Vec<_> = (0..5)
            .map(|_| {
                let mut shell = bare.shell();
                if mapped {
                    Bare::set(&shell, boot(std::mem::offset_of!(BootPage, frame_table)), TABLE);
                    set_entries(&shell, &dense);
                }
                let asked = Instant::now();
                shell.restore(&paused.state, paused.at).unwrap();
                let took = asked.elapsed();
                shell.end();
                took
            })
            .collect();
        took.sort();
        let frames = if mapped { dense.len() } else { 0 };
        println!("restore with {frames} frames mapped: {:?}", took[2]);
    }
    machine.end();
}

#[test]
fn a_kernel_that_hangs_is_noticed_though_alarms_ring() {
    // Beyond the published ranges nothing is interrupted, however short the period.
    let bare = Bare::new(process_kernel());
    let mut machine = bare.start(|machine| Bare::set(machine, MODE, 0));
    until("a first round", &machine, |machine| Bare::word(machine, ROUNDS) > 0);
    let page = PageIndex((offset::BOOT / abi::PAGE) as u32);
    let mut bytes = [0; PAGE_SIZE];
    let paused = machine.pause(PauseCause::Hold).unwrap();
    machine.memory().read(page, &mut bytes);
    let at = std::mem::offset_of!(BootPage, code_ranges);
    bytes[at..at + size_of::<CodeRange>()].fill(0);
    machine.memory().write(page, &bytes);
    assert!(!paused.dirty.is_empty());
    machine.resume().unwrap();
    until("an end", &machine, |machine| machine.failure().is_some());
    let reason = machine.failure().unwrap_or_default();
    assert!(reason.contains("has not opened its door"), "{reason}");
    machine.end();
}
