//! Programs in a machine: they run, share, end and move without harm to anything else.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Stdio,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use lab::{
    Lab, compile,
    desk::{Desk, Terminal},
};

/// Puts a program into the machine.
fn put(desk: &Desk<'_>, name: &str, text: &str) {
    put_bytes(desk, name, &wat::parse_str(text).expect("the test's own text"));
}

fn put_bytes(desk: &Desk<'_>, name: &str, bytes: &[u8]) {
    let mut child = desk
        .ssh(&[])
        .args(["--", &format!("cat > {name}")])
        .stdin(Stdio::piped())
        .spawn()
        .expect("ssh is installed");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Prints and leaves with a code of its own.
const HELLO: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\08\00\00\00\06\00\00\00hello\n")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 64)))
    (call $exit (i32.const 7))))"#;

const LOOP: &str = r#"(module (func (export "_start") (loop (br 0))))"#;

/// Steps of xorshift64 with every value written to memory and read back; prints the last in sixteen digits.
const WORK: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 17)
  (data (i32.const 0) "\10\00\00\00\11\00\00\00")
  (func (export "_start") (local $x i64) (local $n i32) (local $at i32)
    (local.set $x (i64.const 88172645463325252))
    (local.set $n (i32.const STEPS))
    (loop $step
      (local.set $x (i64.xor (local.get $x) (i64.shl (local.get $x) (i64.const 13))))
      (local.set $x (i64.xor (local.get $x) (i64.shr_u (local.get $x) (i64.const 7))))
      (local.set $x (i64.xor (local.get $x) (i64.shl (local.get $x) (i64.const 17))))
      (local.set $at (i32.add (i32.const 65536) (i32.and (i32.wrap_i64 (local.get $x)) (i32.const 0xffff8))))
      (local.set $x (i64.add (local.get $x) (i64.load (local.get $at))))
      (i64.store (local.get $at) (local.get $x))
      (br_if $step (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    DIGITS))"#;

/// Steps of the logistic map in both lanes of a vector; prints them mixed.
const FLOAT: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\10\00\00\00\11\00\00\00")
  (func (export "_start") (local $v v128) (local $x i64) (local $n i32) (local $at i32)
    (local.set $v (v128.const f64x2 0.25 0.375))
    (local.set $n (i32.const STEPS))
    (loop $step
      (local.set $v (f64x2.mul (f64x2.mul (local.get $v) (v128.const f64x2 3.75 3.875))
        (f64x2.sub (v128.const f64x2 1 1) (local.get $v))))
      (br_if $step (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (local.set $x (i64.xor (i64x2.extract_lane 0 (local.get $v)) (i64x2.extract_lane 1 (local.get $v))))
    DIGITS))"#;

/// Prints `$x`.
const DIGITS: &str = r#"
    (local.set $n (i32.const 15))
    (loop $digit
      (local.set $at (i32.wrap_i64 (i64.and (local.get $x) (i64.const 15))))
      (i32.store8 (i32.add (i32.const 16) (local.get $n))
        (i32.add (local.get $at) (select (i32.const 87) (i32.const 48) (i32.gt_u (local.get $at) (i32.const 9)))))
      (local.set $x (i64.shr_u (local.get $x) (i64.const 4)))
      (br_if $digit (i32.ge_s (local.tee $n (i32.sub (local.get $n) (i32.const 1))) (i32.const 0))))
    (i32.store8 (i32.const 32) (i32.const 10))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))"#;

/// A program of so many steps.
fn steps(text: &str, steps: u32) -> String {
    text.replace("DIGITS", DIGITS).replace("STEPS", &steps.to_string())
}

/// What [`FLOAT`] prints.
fn float(steps: u32) -> String {
    let mut lanes = [(0.25_f64, 3.75_f64), (0.375, 3.875)];
    for _ in 0..steps {
        for (x, r) in &mut lanes {
            *x = *x * *r * (1.0 - *x);
        }
    }
    format!("{:016x}\n", lanes[0].0.to_bits() ^ lanes[1].0.to_bits())
}

/// What [`WORK`] prints.
fn work(steps: u32) -> String {
    let mut memory = vec![0_u64; 1 << 17];
    let mut x = 88_172_645_463_325_252_u64;
    for _ in 0..steps {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let at = (x as u32 & 0xf_fff8) as usize / 8;
        x = x.wrapping_add(memory[at]);
        memory[at] = x;
    }
    format!("{x:016x}\n")
}

/// Programs started to measure one.
const STARTS: usize = 200;

/// Waits for input, then says what it got.
const READ: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\10\00\00\00\20\00\00\00")
  (func (export "_start")
    (if (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 4)) (then unreachable))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 64)))))"#;

/// A program of a few instructions, as a body of `_start` with a memory of one page.
fn body(text: &str) -> String {
    format!("(module (memory (export \"memory\") 1) (func $start (export \"_start\") {text}))")
}

#[test]
fn a_program_runs_and_its_code_is_kept() {
    Lab::run(|lab| {
        let compiles = compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "hello.wasm", HELLO);
        for command in ["./hello.wasm", "/home/alice/hello.wasm", "hello.wasm", "hello"] {
            let output = desk.exec(command);
            assert_eq!((output.status.code(), &output.stdout[..]), (Some(7), &b"hello\n"[..]), "{output:?}");
        }
        assert_eq!(compiles.load(Ordering::Relaxed), 1);
        assert_eq!(desk.say("hello | cat > out; cat < out; ./hello.wasm || echo $?"), "hello\nhello\n7\n");
        put(&desk, "hello.wasm", &HELLO.replace("hello", "jello"));
        assert_eq!(desk.exec("hello").stdout, b"jello\n");
        let output = desk.exec("export A=b; C=d env; echo $A$C");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("\nA=b") || text.starts_with("A=b"), "{text}");
        assert!(text.contains("\nC=d\n") && text.ends_with("\nb\n"), "{text}");
        // What a start costs: a script of many against one of as many built-ins.
        let script = |line: &str| {
            let mut child = desk.ssh(&["-T"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let started = Instant::now();
            child.stdin.take().unwrap().write_all(line.repeat(STARTS).as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.stdout, b"jello\n".repeat(STARTS));
            started.elapsed()
        };
        let (builtin, program) = (script("echo jello\n"), script("hello\n"));
        let each = program.saturating_sub(builtin) / STARTS as u32;
        eprintln!("start and end of a kept program: {each:?} more than a built-in");
    });
}

#[test]
fn a_program_wanted_by_many_at_once_is_compiled_once() {
    Lab::run(|lab| {
        let compiles = compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "hello", HELLO);
        let mut child = desk
            .ssh(&["-T"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = "./hello &\n".repeat(40) + "wait\n";
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.stdout, b"hello\n".repeat(40));
        assert_eq!(compiles.load(Ordering::Relaxed), 1);
        // Given up before its code has come, it leaves nothing behind, and the turn goes to the next.
        for round in 0..20 {
            put(&desk, "late", &HELLO.replace("hello", &format!("h{round:04}")));
            desk.exec("./late & kill -9 %1; wait");
        }
        assert_eq!(desk.say("late || true"), "h0019\n");
    });
}

#[test]
fn a_trap_ends_its_process_alone_and_says_why() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        let traps = [
            ("unreachable", "reached `unreachable`"),
            ("(drop (i32.div_u (i32.const 1) (i32.load (i32.const 0))))", "integer divide by zero"),
            ("(drop (i32.load (i32.const 70000)))", "out of bounds memory access"),
            ("(drop (i32.load offset=2147483640 (i32.const -1)))", "out of bounds memory access"),
            ("(i64.store (i32.const 65530) (i64.const 1))", "out of bounds memory access"),
            ("(call $start) (i32.store (i32.const 0) (i32.const 1))", "call stack exhausted"),
            ("(drop (i32.trunc_f32_s (f32.const nan)))", "invalid conversion to integer"),
        ];
        put(&desk, "work", &steps(WORK, 60_000_000));
        let mut worker = desk.ssh(&[]).args(["--", "./work"]).stdout(Stdio::piped()).spawn().unwrap();
        for (index, (text, reason)) in traps.iter().enumerate() {
            let name = format!("t{index}.wasm");
            put(&desk, &name, &body(text));
            let output = desk.exec(&format!("./{name}"));
            assert_eq!(output.status.code(), Some(134), "{text}: {output:?}");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(said, format!("./{name}: trap: {reason}\n"), "{text}");
        }
        let mut text = String::new();
        worker.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, work(60_000_000));
        assert!(worker.wait().unwrap().success());
        assert_eq!(desk.say("ps").lines().count(), 1);
    });
}

#[test]
fn what_is_no_program_is_refused_by_name() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put_bytes(&desk, "text", b"just text\n");
        put_bytes(&desk, "broken.wasm", b"\0asm\x01\0\0\0garbage");
        put(&desk, "lacks", r#"(module (import "env" "fork" (func)) (func (export "_start")))"#);
        put(&desk, "nostart", "(module (func (export \"main\")))");
        put(&desk, "wide", "(module (memory 65536) (func (export \"_start\")))");
        for (command, status, words) in [
            ("./missing", 127, "no such command"),
            ("missing", 127, "no such command"),
            ("./text", 126, "not a WebAssembly module"),
            ("./broken.wasm", 126, "broken.wasm"),
            ("./lacks", 126, "imports `fork` of `env`"),
            ("./nostart", 126, "_start"),
            ("./wide", 126, "memory"),
            ("/tmp", 127, "no such command"),
        ] {
            let output = desk.exec(command);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(status), "{command}: {said}");
            assert!(said.contains(words) && said.lines().count() == 1, "{command}: {said}");
        }
    });
}

#[test]
fn memory_has_a_limit() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        // Grows by 1 MiB until refused, touches all of it, then says how many it got.
        let grow = "(local $n i32) (local $at i32)
            (loop $more
              (if (i32.ne (memory.grow (i32.const 16)) (i32.const -1))
                (then (local.set $n (i32.add (local.get $n) (i32.const 1))) (br $more))))
            (local.set $at (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 4096)))
            (loop $touch
              (i32.store (local.get $at) (local.get $at))
              (br_if $touch (i32.gt_s (local.tee $at (i32.sub (local.get $at) (i32.const 4096))) (i32.const 0))))
            (if (i32.lt_s (local.get $n) (i32.const 32)) (then (loop (br 0))))
            unreachable";
        put(&desk, "grow", &body(grow));
        for _ in 0..3 {
            let output = desk.exec("./grow");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(134), "{said}");
            assert!(said.contains("refused memory") && said.contains("48 MiB"), "{said}");
        }
    });
}

#[test]
fn too_many_processes_are_refused_and_go_by_a_word() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "loop", &LOOP.replace("(func", "(memory 16) (func"));
        let mut child = desk
            .ssh(&["-T"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = "./loop &\n".repeat(60);
        lines.push_str("wait\n");
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let pids = || -> Vec<String> {
            let text = desk.say("ps");
            let rows = text.lines().skip(1);
            rows.filter_map(|line| line.split_whitespace().next()).map(String::from).collect()
        };
        // Each takes a stack and a memory of 1 MiB, of which 64 MiB hold some thirty.
        let started = Instant::now();
        let mut most = 0;
        while started.elapsed() < Duration::from_secs(20) {
            let now = pids().len();
            if now == most && now > 20 {
                break;
            }
            most = now;
        }
        assert!(most > 20, "{most}");
        while child.try_wait().unwrap().is_none() {
            let pids = pids();
            if !pids.is_empty() {
                desk.exec(&format!("kill -9 {}", pids.join(" ")));
            }
            assert!(started.elapsed() < Duration::from_secs(40));
        }
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        eprintln!(
            "{most} processes at a time; the others were told: {}",
            said.lines().find(|line| line.contains("kage:")).unwrap_or("-")
        );
        assert_eq!(desk.say("ps").lines().count(), 1);
    });
}

#[test]
fn programs_run_at_the_machines_speed() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "work", &steps(WORK, 100_000_000));
        let started = Instant::now();
        let expected = work(100_000_000);
        let native = started.elapsed();
        let mut child = desk.ssh(&[]).args(["--", "./work"]).stdout(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        let mut time = String::new();
        while child.try_wait().unwrap().is_none() {
            let text = desk.say("ps");
            if let Some(line) = text.lines().find(|line| line.ends_with("./work")) {
                time = line.into();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("work: native {native:?}, in a process {:?}; {time}", started.elapsed());
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, expected);
    });
}

#[test]
fn a_process_does_not_notice_a_move() {
    Lab::run(|lab| {
        compile::serve();
        let mut desk = Desk::new(lab);
        put(&desk, "work", &steps(WORK, 400_000_000));
        put(&desk, "float", &steps(FLOAT, 300_000_000));
        let mut other = desk.ssh(&[]).args(["--", "./float"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut worker = desk.ssh(&[]).args(["--", "./work"]).stdout(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while desk.say("ps").lines().count() < 3 {
            assert!(started.elapsed() < Duration::from_secs(20));
        }
        for _ in 0..5 {
            let blackout = desk.walk();
            eprintln!("{blackout:?}");
            // Both have run here.
            let times = || -> String { desk.say("ps") };
            let before = times();
            let started = Instant::now();
            while times() == before {
                assert!(started.elapsed() < Duration::from_secs(20), "no process runs: {before}");
            }
        }
        let running = desk.say("ps");
        assert!(running.contains("./work"), "{running}");
        let mut text = String::new();
        worker.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, work(400_000_000));
        assert!(worker.wait().unwrap().success());
        text.clear();
        other.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, float(300_000_000));
        // And one that is started where the machine is now.
        put(&desk, "hello", HELLO);
        assert_eq!(desk.exec("hello").stdout, b"hello\n");
    });
}

/// Echoes through the machine; returns the times of all, sorted.
fn echoes(lab: &Lab, count: usize) -> Vec<Duration> {
    let mut stream = TcpStream::connect((lab.address(), 7)).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let started = Instant::now();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            let took = started.elapsed();
            std::thread::sleep(Duration::from_millis(1));
            took
        })
        .collect();
    times.sort();
    times
}

#[test]
fn an_endless_loop_delays_no_echo() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "loop", LOOP);
        let quiet = echoes(lab, 500);
        let mut child = desk.ssh(&[]).args(["--", "./loop"]).spawn().unwrap();
        let started = Instant::now();
        while !desk.say("ps").contains("./loop") {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        let at = |times: &[Duration], share: usize| times[times.len() * share / 1000];
        let tell = |name: &str, times: &[Duration]| {
            let (median, late, last) = (at(times, 500), at(times, 990), times.last());
            eprintln!("echo {name}: p50 {median:?} p99 {late:?} max {last:?}");
        };
        tell("quiet", &quiet);
        // Whatever else the host runs only adds, so the best of some rounds is what the machine does.
        let best = (0..6)
            .map(|_| {
                let busy = echoes(lab, 500);
                tell("beside a loop", &busy);
                at(&busy, 990)
            })
            .min()
            .unwrap();
        assert!(best < Duration::from_millis(2), "{best:?}");
        let text = desk.say("ps");
        let line = text.lines().find(|line| line.ends_with("./loop")).unwrap();
        let pid = line.split_whitespace().next().unwrap();
        desk.say(&format!("kill {pid}"));
        assert_eq!(child.wait().unwrap().code(), Some(143));
        assert!(!desk.say("ps").contains("./loop"));
        // A connection that ends takes its process with it.
        let mut child = desk.ssh(&[]).args(["--", "./loop"]).spawn().unwrap();
        while !desk.say("ps").contains("./loop") {}
        child.kill().unwrap();
        child.wait().unwrap();
        let started = Instant::now();
        while desk.say("ps").contains("./loop") {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
    });
}

/// A program of calls: `imports` name them with their number of parameters.
fn calls(imports: &[(&str, usize)], pages: u32, data: &str, text: &str) -> String {
    let imports: String = imports
        .iter()
        .map(|(name, count)| {
            let parameters = "i32 ".repeat(*count);
            format!("(import \"wasi_snapshot_preview1\" \"{name}\" (func ${name} (param {parameters}) (result i32)))")
        })
        .collect();
    format!(
        "(module {imports}
          (import \"wasi_snapshot_preview1\" \"proc_exit\" (func $exit (param i32)))
          (memory (export \"memory\") {pages}) {data}
          (func (export \"_start\") (local $n i32) (local $r i32) {text}))"
    )
}

/// Makes names until it is refused or there are 20,000, and leaves with the reason or 0.
fn names(import: (&str, usize), call: &str) -> String {
    let text = "(loop $more
           (local.set $r (i32.const 7))
           (loop $digit
             (i32.store8 (i32.add (i32.const 16) (local.get $r))
               (i32.add (i32.const 97) (i32.and (i32.const 15)
                 (i32.shr_u (local.get $n) (i32.mul (i32.const 4) (local.get $r))))))
             (br_if $digit (i32.ge_s (local.tee $r (i32.sub (local.get $r) (i32.const 1))) (i32.const 0))))
           (local.set $n (i32.add (local.get $n) (i32.const 1)))
           (local.set $r CALL)
           (br_if $more (i32.and (i32.eqz (local.get $r)) (i32.lt_u (local.get $n) (i32.const 20000)))))
         (call $exit (local.get $r))";
    calls(&[import], 1, "(data (i32.const 0) \"a\")", &text.replace("CALL", call))
}

/// Names of one file.
fn links() -> String {
    let call = "(call $path_link (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 1) \
                 (i32.const 4) (i32.const 16) (i32.const 8))";
    names(("path_link", 7), call)
}

/// Names of as many directories.
fn directories() -> String {
    let call = "(call $path_create_directory (i32.const 4) (i32.const 16) (i32.const 8))";
    names(("path_create_directory", 3), call)
}

#[test]
fn endless_calls_delay_no_echo() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        let path = "bin/../".repeat(585);
        let endless = |call: &str| format!("(loop {call} (br 0))");
        let programs = [
            (
                "poll",
                calls(
                    &[("poll_oneoff", 4)],
                    4,
                    "",
                    &endless(
                        "(drop (call $poll_oneoff (i32.const 0) (i32.const 65536) (i32.const 1024) (i32.const 262000)))",
                    ),
                ),
            ),
            (
                "walk",
                calls(
                    &[("path_filestat_get", 5)],
                    1,
                    &format!("(data (i32.const 0) \"{path}\")"),
                    &endless(&format!(
                        "(drop (call $path_filestat_get (i32.const 3) (i32.const 0) (i32.const 0) (i32.const {}) (i32.const 8192)))",
                        path.len()
                    )),
                ),
            ),
            ("readdir", String::new()),
            (
                "sockets",
                calls(
                    &[("sock_open", 3), ("fd_close", 1)],
                    1,
                    "",
                    &endless(
                        "(drop (call $sock_open (i32.const 2) (i32.const 2) (i32.const 0))) (drop (call $fd_close (i32.load (i32.const 0))))",
                    ),
                ),
            ),
        ];
        for (name, text) in &programs {
            let text = match *name {
                // Its fourth parameter has 64 bits.
                "readdir" => r#"(module
                    (import "wasi_snapshot_preview1" "fd_readdir" (func $read (param i32 i32 i32 i64 i32) (result i32)))
                    (memory (export "memory") 33)
                    (func (export "_start")
                      (loop (drop (call $read (i32.const 4) (i32.const 65536) (i32.const 2097152) (i64.const 0) (i32.const 0)))
                        (br 0))))"#
                    .to_owned(),
                _ => text.clone(),
            };
            put(&desk, name, &text);
        }
        desk.say("mkdir few many; echo x > few/a; echo x > many/a");
        put(&desk, "links", &links());
        put(&desk, "directories", &directories());
        // As many names of one file as there may be, and many others, and the machine is none the worse.
        let full = desk.exec("cd few; ../links");
        assert!([34, 41, 51].contains(&full.status.code().unwrap_or(0)), "{full:?}");
        assert_eq!(desk.exec("cd many; ../directories").status.code(), Some(0));
        let started = Instant::now();
        let count = desk.say("ls many").lines().count();
        eprintln!("{count} names, listed in {:?}", started.elapsed());
        assert!(count > 10_000, "{count}");
        for (name, _) in programs {
            let mut child = desk.ssh(&[]).args(["--", &format!("cd many; ../{name}")]).spawn().unwrap();
            let started = Instant::now();
            let line = loop {
                let text = desk.say("ps");
                if let Some(line) = text.lines().find(|line| line.ends_with(name)) {
                    break line.to_owned();
                }
                assert!(started.elapsed() < Duration::from_secs(10), "{name}");
            };
            // Whatever else the host runs only adds, so the best of some rounds is what the machine does.
            let mut best = Duration::MAX;
            for _ in 0..6 {
                let times = echoes(lab, 300);
                let late = times[times.len() * 99 / 100];
                eprintln!("echo beside {name}: p50 {:?} p99 {late:?} max {:?}", times[150], times.last());
                best = best.min(late);
                if best < Duration::from_millis(2) {
                    break;
                }
            }
            assert!(best < Duration::from_millis(2), "{name}: {best:?}");
            desk.say(&format!("kill {}", line.split_whitespace().next().unwrap()));
            assert_eq!(child.wait().unwrap().code(), Some(143), "{name}");
        }
    });
}

#[test]
fn a_directory_is_read_whole_however_large_the_buffer() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        desk.say("mkdir many; echo x > many/a");
        put(&desk, "links", &links());
        // 32 bytes an entry: leaves with how many MiB they are, once the buffer of 2 MiB is not full.
        put(
            &desk,
            "readdir",
            r#"(module
                (import "wasi_snapshot_preview1" "fd_readdir" (func $read (param i32 i32 i32 i64 i32) (result i32)))
                (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
                (memory (export "memory") 33)
                (func (export "_start")
                  (if (call $read (i32.const 4) (i32.const 65536) (i32.const 2097152) (i64.const 0) (i32.const 0))
                    (then unreachable))
                  (call $exit (i32.div_u (i32.load (i32.const 0)) (i32.const 16384)))))"#,
        );
        desk.exec("cd many; ../links");
        let count = desk.say("ls many").lines().count();
        let read = desk.exec("cd many; ../readdir");
        let expected = ((count * 32).min(2 << 20) / 16384) as i32;
        let got = read.status.code().unwrap_or(-1);
        assert!((got - expected).abs() <= 1, "{got} for {expected} of {count}");
    });
}

#[test]
fn datagrams_are_refused_that_no_packet_can_be() {
    Lab::run(|lab| {
        lab.ipv4.set(Some([10, 1, 2, 3].into()));
        let desk = Desk::new(lab);
        compile::serve();
        let program = |own: &str, to: &str, bytes: u32| {
            calls(
                &[("sock_open", 3), ("sock_bind", 3), ("sock_send_to", 7)],
                2,
                &format!(
                    "(data (i32.const 16) \"\\20\\00\\00\\00\\04\\00\\00\\00\") (data (i32.const 32) \"{own}\")
                     (data (i32.const 48) \"\\40\\00\\00\\00\\04\\00\\00\\00\") (data (i32.const 64) \"{to}\")
                     (data (i32.const 80) \"\\60\\00\\00\\00\")"
                ),
                &format!(
                    "(i32.store (i32.const 84) (i32.const {bytes}))
                     (drop (call $sock_open (i32.const 1) (i32.const 1) (i32.const 0)))
                     (if (call $sock_bind (i32.load (i32.const 0)) (i32.const 16) (i32.const 5000)) (then unreachable))
                     (call $exit (call $sock_send_to (i32.load (i32.const 0)) (i32.const 80) (i32.const 1) (i32.const 48)
                       (i32.const 7) (i32.const 0) (i32.const 8)))"
                ),
            )
        };
        let (any, own, loopback) = ("\\00\\00\\00\\00", "\\0a\\01\\02\\03", "\\7f\\00\\00\\01");
        for (name, from, to, bytes, errno) in [
            ("between", own, loopback, 4, 4),
            ("within", own, own, 4, 0),
            ("loop", any, loopback, 4, 0),
            ("long", any, loopback, 60_000, 35),
        ] {
            put(&desk, name, &program(from, to, bytes));
            assert_eq!(desk.exec(&format!("./{name}")).status.code(), Some(errno), "{name}");
        }
        assert_eq!(desk.say("echo well"), "well\n");
    });
}

#[test]
fn what_programs_make_the_kernel_keep_leaves_room_for_others() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        // Reads a byte, then opens datagram sockets until there are no more, and keeps them for another byte.
        put(
            &desk,
            "hold",
            &calls(
                &[("sock_open", 3), ("sock_bind", 3), ("fd_read", 4), ("fd_write", 4)],
                1,
                "(data (i32.const 16) \"\\20\\00\\00\\00\\10\\00\\00\\00\") (data (i32.const 64) \"\\50\\00\\00\\00\\01\\00\\00\\00.\")",
                "(drop (call $fd_read (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 8)))
                 (loop $more
                   (local.set $r (call $sock_open (i32.const 2) (i32.const 1) (i32.const 0)))
                   (if (i32.eqz (local.get $r)) (then
                     (local.set $r (call $sock_bind (i32.load (i32.const 0)) (i32.const 16) (i32.const 0)))))
                   (br_if $more (i32.and (i32.eqz (local.get $r)) (i32.lt_u (local.get $n) (i32.const 20000)))))
                 (drop (call $fd_write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 8)))
                 (drop (call $fd_read (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 8)))
                 (call $exit (local.get $r))",
            ),
        );
        let mut holders: Vec<_> = (0..3)
            .map(|_| {
                let mut child = desk.ssh(&[]);
                child.args(["--", "./hold"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        let started = Instant::now();
        while desk.say("ps").matches("./hold").count() < 3 {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        for child in &mut holders {
            child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        }
        // Each holds all it gets.
        for child in &mut holders {
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        }
        eprintln!("{}", desk.say("free"));
        // The user gets in, works, and sees them.
        assert_eq!(desk.say("ps").matches("./hold").count(), 3);
        assert_eq!(desk.say("echo x | cat"), "x\n");
        for child in &mut holders {
            drop(child.stdin.take());
            let status = child.wait().unwrap().code();
            assert!(status == Some(42) || status == Some(41), "{status:?}");
        }
    });
}

#[test]
fn identities_that_the_host_cannot_give_are_refused_and_nothing_stands_still() {
    Lab::run(|lab| {
        lab.indices.set(20_000);
        compile::serve();
        let desk = Desk::new(lab);
        put(
            &desk,
            "use",
            &calls(
                &[("sock_open", 3), ("fd_close", 1)],
                1,
                "",
                "(loop $more
                   (local.set $r (call $sock_open (i32.const 2) (i32.const 2) (i32.const 0)))
                   (drop (call $fd_close (i32.load (i32.const 0))))
                   (br_if $more (i32.and (i32.eqz (local.get $r)) (i32.lt_u (local.get $n) (i32.const 20000)))))
                 (call $exit (local.get $r))",
            ),
        );
        let started = Instant::now();
        assert_eq!(desk.exec("./use").status.code(), Some(41));
        eprintln!("16,000 identities in {:?}", started.elapsed());
        // What needs none goes on, connections have theirs, and what needs one says what is the matter.
        assert_eq!(desk.say("echo well"), "well\n");
        let refused = desk.exec("./use");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no identity"), "{refused:?}");
        assert!(!desk.exec("mkdir new").status.success());
    });
}

#[test]
fn files_get_what_ended_processes_had() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "loop", &LOOP.replace("(func", "(memory 16) (func"));
        let mut child = desk.ssh(&["-T"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut keys = child.stdin.take().unwrap();
        keys.write_all("./loop &\n".repeat(25).as_bytes()).unwrap();
        let pids = || -> Vec<String> {
            let text = desk.say("ps");
            let rows = text.lines().filter(|line| line.ends_with("./loop"));
            rows.filter_map(|line| line.split_whitespace().next()).map(String::from).collect()
        };
        let started = Instant::now();
        while pids().len() < 25 {
            assert!(started.elapsed() < Duration::from_secs(20));
        }
        // The last one got the lowest memory, and stays.
        let mut old = pids();
        let last = old.pop().unwrap();
        desk.exec(&format!("kill -9 {}", old.join(" ")));
        while pids().len() > 1 {
            assert!(started.elapsed() < Duration::from_secs(30));
        }
        eprintln!("{}", desk.say("free"));
        let bytes = vec![7; 20 << 20];
        put_bytes(&desk, "big", &bytes);
        assert_eq!(desk.say("stat big").split_whitespace().nth(2), Some("20971520"));
        desk.say("rm big");
        // And processes get it back.
        keys.write_all("./loop &\n".repeat(20).as_bytes()).unwrap();
        while pids().len() < 21 {
            assert!(started.elapsed() < Duration::from_secs(60));
        }
        let mut all = pids();
        all.push(last);
        desk.exec(&format!("kill -9 {}", all.join(" ")));
        drop(keys);
        child.wait().unwrap();
    });
}

#[test]
fn a_terminal_interrupts_and_jobs_live_on() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "loop", LOOP);
        let mut terminal = Terminal::open(&desk);
        terminal.keys("./loop\r");
        let started = Instant::now();
        while !desk.say("ps").contains("./loop") {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        terminal.keys("\x03");
        assert!(terminal.until("kage:~$ ").contains("^C"));
        terminal.keys("echo $?\r");
        assert!(terminal.until("kage:~$ ").contains("\r\n130\r\n"));
        assert!(!desk.say("ps").contains("./loop"));
        terminal.keys("./loop &\r");
        terminal.until("[1]");
        terminal.until("kage:~$ ");
        terminal.keys("jobs\r");
        assert!(terminal.until("kage:~$ ").contains("[1] running    ./loop"));
        let started = Instant::now();
        while !desk.say("ps").contains("./loop") {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        terminal.keys("exit\r");
        assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
        let text = desk.say("ps");
        let line = text.lines().find(|line| line.ends_with("./loop")).expect("the job lives on");
        let pid = line.split_whitespace().next().unwrap();
        assert_eq!(desk.exec(&format!("kill -9 {pid}; wait {pid}")).status.code(), Some(137));
        assert!(!desk.say("ps").contains("./loop"));
        assert_eq!(desk.exec("./loop & kill %1; wait %1").status.code(), Some(130));
    });
}

#[test]
fn one_that_waits_is_killed_too_and_time_has_a_limit() {
    Lab::run(|lab| {
        compile::serve();
        let mut desk = Desk::new(lab);
        put(&desk, "read", READ);
        put(&desk, "loop", LOOP);
        assert_eq!(desk.say("echo word | ./read"), "word\n");
        for (signal, status) in [("TERM", 143), ("KILL", 137)] {
            let mut child = desk.ssh(&[]).args(["--", "./read"]).stdin(Stdio::piped()).spawn().unwrap();
            let started = Instant::now();
            let line = loop {
                let text = desk.say("ps");
                if let Some(line) =
                    text.lines().find(|line| line.contains("waiting") && line.ends_with("./read"))
                {
                    break line.to_string();
                }
                assert!(started.elapsed() < Duration::from_secs(10));
            };
            if status == 137 {
                desk.walk();
            }
            desk.say(&format!("kill -{signal} {}", line.split_whitespace().next().unwrap()));
            assert_eq!(child.wait().unwrap().code(), Some(status));
        }
        let output = desk.exec("limit time 1; ./loop");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*said), (Some(152), "./loop: has run for as long as it may\n"));
        assert_eq!(desk.say("./read < /etc/hostname"), "kage\n");
        assert_eq!(desk.say("ps").lines().count(), 1);
    });
}

#[test]
fn nothing_is_left_of_processes_that_ended() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "hello", HELLO);
        put(&desk, "loop", LOOP);
        put(&desk, "read", READ);
        put(&desk, "trap", &body("(i32.store (i32.const 65536) (i32.const 1))"));
        let lines = "hello; ./trap; ./loop & ./loop & sleep 0.003; kill -9 %1; kill %2; wait; ./read | ./loop & sleep 0.002; kill %1; wait\n";
        let script = |count: usize| {
            let mut child = desk
                .ssh(&["-T"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(lines.repeat(count).as_bytes()).unwrap();
            child.wait().unwrap();
        };
        let used = || {
            let text = desk.say("free");
            let used = text.lines().find_map(|line| line.strip_prefix("used ")).unwrap();
            used.trim().parse::<i64>().unwrap()
        };
        // Killed before its code has come, a program would be compiled anew each time.
        desk.say("limit time 1; ./loop || true");
        // The first rounds fill what is kept for reuse.
        script(20);
        let before = used();
        script(150);
        // Connections hold their buffers until they are closed at both ends.
        let start = Instant::now();
        while used() - before >= 256 << 10 && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let after = used();
        eprintln!("used after 120 processes {before}, after 1,200 {after}");
        assert!((after - before).abs() < 256 << 10, "{before}, then {after}");
        assert_eq!(desk.say("ps").lines().count(), 1);
    });
}
