//! Programs in a machine: they run, share, end and move without harm to anything else.

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
        std::thread::sleep(Duration::from_millis(300));
        for _ in 0..5 {
            let blackout = desk.walk();
            eprintln!("{blackout:?}");
            std::thread::sleep(Duration::from_millis(200));
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
                at(&busy, 900)
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
