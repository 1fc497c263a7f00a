//! What a machine offers its user, tried with the clients users have: OpenSSH and curl.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use kage_abi::stream::Stream as Content;
use kage_ssh::keys::HostKey;
use lab::{
    Lab,
    desk::{Desk, Terminal, hex, make_key, pages_in_use},
};
use sha2::{Digest, Sha256};

#[test]
fn a_command_runs_with_its_output_errors_and_status() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        assert!(desk.say("uptime").starts_with("up "));
        let output = desk.exec("echo out; exit 3");
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(3), &b"out\n"[..]));
        let output = desk.exec("nonsense");
        assert_eq!(output.status.code(), Some(127));
        assert!(
            output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).contains("no such command")
        );
        assert_eq!(desk.exec("true").status.code(), Some(0));
        assert_eq!(desk.exec("false").status.code(), Some(1));
        assert_eq!(desk.say("whoami; hostname"), "alice\nkage\n");
        assert_eq!(desk.say("false || echo 'a  b' \"$USER\" | cat && false || echo $?"), "a  b alice\n1\n");
        let file = "echo one > /tmp/f; echo two >> /tmp/f; cat < /tmp/f; sum /tmp/f; stat /tmp/f; ls /tmp; rm /tmp/f";
        let text = desk.say(file);
        let sum = hex(&Sha256::digest(b"one\ntwo\n"));
        assert!(text.starts_with(&format!("one\ntwo\n{sum}  /tmp/f\n/tmp/f: file, 8 bytes")), "{text}");
        assert!(text.ends_with("\nf\n"), "{text}");
        for line in ["help", "ls /", "ps", "date", "free", "ip", "stat /", "heartbeat", "pwd"] {
            assert!(!desk.say(line).is_empty(), "{line}");
        }
        assert!(desk.say("heartbeat").contains("longest gap"));
        assert_eq!(desk.exec("echo 'open").status.code(), Some(2));
        assert!(!desk.ssh(&["-s"]).arg("nonsense").output().unwrap().status.success());
    });
}

#[test]
fn a_script_on_standard_input_is_run_line_by_line() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let mut child = desk.ssh(&["-T"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"echo one\ncat\ntwo\nthree").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"one\ntwo\nthree"[..]));
    });
}

#[test]
fn a_terminal_edits_interrupts_and_ends() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let mut terminal = Terminal::open(&desk);
        terminal.keys("echo wrong\x15echo rihgt\x7f\x7f\x7fght\r");
        terminal.until("\r\nright\r\n");
        terminal.until("$ ");
        terminal.keys("count 100000\r");
        terminal.until("\r\n20\r\n");
        terminal.keys("\x03");
        assert!(terminal.until("kage:~$ ").contains("^C"));
        terminal.keys("echo $?\r");
        assert!(terminal.until("kage:~$ ").contains("\r\n130\r\n"));
        terminal.keys("cat\r");
        terminal.until("\r\n");
        terminal.keys("typed\r");
        terminal.until("typed\r\n");
        terminal.until("typed\r\n");
        terminal.keys("\x04");
        terminal.until("kage:~$ ");
        terminal.keys("exit 5\r");
        assert_eq!(terminal.child.wait().unwrap().code(), Some(5));
        let mut terminal = Terminal::open(&desk);
        terminal.keys("\x04");
        assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    });
}

#[test]
fn strangers_and_wrong_names_are_refused() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let right = std::mem::replace(&mut desk.key, make_key(lab, "stranger"));
        let output = desk.exec("true");
        assert_eq!(output.status.code(), Some(255));
        assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied"));
        desk.key = right;
        let output = desk.ssh(&["-l", "bob"]).args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(255), "{output:?}");
        assert!(desk.exec("true").status.success());
    });
}

#[test]
fn count_prints_every_line_once_and_in_order() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let started = Instant::now();
        let text = desk.say("count 2000");
        let took = started.elapsed();
        let expected: String = (1..=2000).map(|line| format!("{line}\n")).collect();
        assert!(text == expected);
        assert!((2.0..4.0).contains(&took.as_secs_f64()), "{took:?}");
    });
}

#[test]
fn count_loses_and_doubles_nothing_across_ten_moves() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut child = desk.ssh(&[]).args(["--", "count 4000"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for number in 1..=4000u32 {
            let line = lines.next().expect("a line").unwrap();
            assert_eq!(line, number.to_string());
            if number % 300 == 0 && number <= 3000 {
                desk.walk();
            }
        }
        assert!(lines.next().is_none());
        assert!(child.wait().unwrap().success());
    });
}

#[test]
fn sum_of_a_long_input_is_right_and_fast() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let mut bytes = vec![0; 20 << 20];
        Content::new(5).fill(&mut bytes);
        let path = lab.dir().join("input");
        fs::write(&path, &bytes).unwrap();
        let started = Instant::now();
        let output = desk
            .ssh(&[])
            .args(["--", "sum"])
            .stdin(File::open(&path).unwrap())
            .output()
            .expect("ssh is installed");
        let took = started.elapsed();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}  -\n", hex(&Sha256::digest(&bytes))));
        println!("ssh into the machine and sum: {:.1} MB/s", 20.97 / took.as_secs_f64());
    });
}

#[test]
fn a_killed_client_takes_its_commands_along() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let mut child = desk.ssh(&[]).args(["--", "dirty 10% 100/s"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("pages"), "{line}");
        child.kill().unwrap();
        child.wait().unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        while desk.say("ps").matches(" command").count() > 1 {
            assert!(Instant::now() < limit, "{}", desk.say("ps"));
        }
        // What it held is erased, for the sake of the next move.
        loop {
            let free = desk.say("free");
            let (full, _) = pages_in_use(desk.machine.as_ref().expect("the desk has a machine"));
            if full < 512 {
                break;
            }
            assert!(Instant::now() < limit, "{full} pages still hold something; {free}");
        }
    });
}

#[test]
fn a_machine_that_writes_all_the_time_moves_byte_for_byte() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut child =
            desk.ssh(&[]).args(["--", "dirty 30% 5000/s"]).stdout(Stdio::piped()).spawn().unwrap();
        BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
        for _ in 0..10 {
            desk.walk();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn dirty_fills_memory_leaves_the_rest_whole_and_lets_others_work() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let mut terminal = Terminal::open(&desk);
        terminal.keys("dirty 30% 5000/s\r");
        let text = terminal.until("rewritten at");
        let pages: u64 = text.rsplit("dirty: ").next().unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(pages > 12_500, "{text}");
        assert!(desk.say("uptime").starts_with("up "));
        let expected = {
            let mut bytes = vec![0; 4 << 20];
            Content::new(1).fill(&mut bytes);
            bytes
        };
        assert!(desk.curl(&[], "/stream?bytes=4194304&seed=1").stdout == expected);
        terminal.keys("\x03");
        let text = terminal.until("checksum");
        assert!(text.contains("whole"), "{text}");
        terminal.until("kage:~$ ");
        let text = desk.say("dirty 50% 1000/s --content random --words 1 --for 0.5");
        assert!(text.contains("whole"), "{text}");
        for wrong in
            ["dirty", "dirty 101% 5/s", "dirty 5% x", "dirty 5% 5/s --content what", "dirty 5% 5/s --words 0"]
        {
            assert_eq!(desk.exec(wrong).status.code(), Some(2), "{wrong}");
        }
    });
}

#[test]
fn http_tells_the_state_and_refuses_nonsense() {
    Lab::run(|lab| {
        let desk = Desk::new(lab);
        let state = String::from_utf8(desk.curl(&[], "/").stdout).unwrap();
        for part in ["\"user\":\"alice\"", &format!("\"address\":\"{}\"", lab.address()), "\"generation\":1"]
        {
            assert!(state.contains(part), "{state}");
        }
        let status = |arguments: &[&str], path: &str| {
            let all = [&["-o", "/dev/null", "-w", "%{http_code}"], arguments].concat();
            String::from_utf8(desk.curl(&all, path).stdout).unwrap()
        };
        assert_eq!(status(&[], "/nothing"), "404");
        assert_eq!(status(&["-X", "DELETE"], "/"), "405");
        assert_eq!(status(&[], "/stream?bytes=x"), "400");
        assert_eq!(status(&[], "/stream?bytes=99999999999999999999"), "400");
        assert_eq!(status(&["-H", &format!("X: {}", "x".repeat(9000))], "/"), "431");
        let head = String::from_utf8(desk.curl(&["-I"], "/stream?bytes=1000").stdout).unwrap();
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("Content-Length: 1000"), "{head}");
        // Two requests on one connection, the second split within a line.
        let mut stream = TcpStream::connect((lab.address(), 80)).unwrap();
        stream.write_all(b"GET /stream?bytes=3&seed=0 HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream.write_all(b"GET /stream?bytes=5&se").unwrap();
        stream.write_all(b"ed=0 HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.windows(15).filter(|window| window == b"HTTP/1.1 200 OK").count(), 2);
        let mut stream = TcpStream::connect((lab.address(), 80)).unwrap();
        stream.write_all(b"\x16\x03\x01 what is this\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    });
}

/// Reads a stream of the machine and compares it with what it should be; `at` is told how far it is.
fn read_stream(lab: &Lab, bytes: usize, seed: u64, mut at: impl FnMut(usize)) -> Duration {
    let mut stream = TcpStream::connect((lab.address(), 80)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let request = format!("GET /stream?bytes={bytes}&seed={seed} HTTP/1.1\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut reader = BufReader::with_capacity(1 << 20, stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    let started = Instant::now();
    let (mut got, mut hash) = (0, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = reader.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        got += count;
        at(got);
    }
    let took = started.elapsed();
    assert_eq!(got, bytes);
    let (mut expected, mut content) = (Sha256::new(), Content::new(seed));
    let mut left = bytes;
    while left > 0 {
        let count = left.min(buffer.len());
        content.fill(&mut buffer[..count]);
        expected.update(&buffer[..count]);
        left -= count;
    }
    assert_eq!(hex(&hash.finalize()), hex(&expected.finalize()));
    took
}

#[test]
fn a_long_stream_arrives_whole() {
    Lab::run(|lab| {
        let _desk = Desk::new(lab);
        let took = read_stream(lab, 50 << 20, 42, |_| {});
        println!("http stream: {:.1} MB/s", 52.4 / took.as_secs_f64());
    });
}

#[test]
fn a_stream_survives_moves() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut next = 5 << 20;
        let mut moves = 0;
        let took = read_stream(lab, 100 << 20, 43, |got| {
            if got >= next && moves < 8 {
                desk.walk();
                moves += 1;
                next = got + (10 << 20);
            }
        });
        println!("http stream of 100 MiB with {moves} moves: {took:?}");
    });
}

/// Sequence number of a machine's first SYN ACK and its first bytes of an SSH key exchange.
fn first_secrets(lab: &Lab) -> (u32, Vec<u8>) {
    use rustix::net::{AddressFamily, RecvFlags, SocketType, ipproto, recv, socket};
    let raw = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::TCP)).unwrap();
    let mut stream = TcpStream::connect((lab.address(), 22)).unwrap();
    // A raw socket over IPv6 gives packets from the TCP header on (ipv6(7)).
    let mut segment = [0; 2048];
    let sequence = loop {
        let (count, _) = recv(&raw, &mut segment[..], RecvFlags::empty()).unwrap();
        if count >= 20 && segment[..2] == 22u16.to_be_bytes() && segment[13] & 0x12 == 0x12 {
            break u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
        }
    };
    let mut bytes = vec![0; 64];
    stream.read_exact(&mut bytes).unwrap();
    (sequence, bytes)
}

#[test]
fn two_machines_of_one_template_share_no_key_nonce_or_sequence_number() {
    Lab::run(|lab| {
        use kage_machine::Machine;
        let mut secrets = Vec::new();
        for seed in [1, 2] {
            let mut machine = lab.login_with(String::new(), [seed; 32], [seed; 32]);
            let scan = Command::new("ssh-keyscan")
                .args(["-T", "10", "-t", "ed25519", &lab.address().to_string()])
                .output()
                .expect("ssh-keyscan is installed");
            let text = String::from_utf8_lossy(&scan.stdout).into_owned();
            assert!(text.contains(&HostKey::from_seed(&[seed; 32]).to_line()), "{text}");
            let (sequence, exchange) = first_secrets(lab);
            secrets.push((text, sequence, exchange));
            machine.end();
        }
        assert_ne!(secrets[0].0, secrets[1].0, "host keys");
        assert_ne!(secrets[0].1, secrets[1].1, "sequence numbers");
        assert_ne!(secrets[0].2, secrets[1].2, "cookies of the key exchange");
    });
}

fn nft(rules: &str) {
    let mut child =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft is installed");
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{rules}");
}

#[test]
fn what_was_lost_in_a_move_is_sent_again_at_once() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut stream = TcpStream::connect((lab.address(), 7)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut answer = [0; 5];
        stream.write_all(b"first").unwrap();
        stream.read_exact(&mut answer).unwrap();
        let rule = format!("ip6 saddr {} tcp sport 7 drop", lab.address());
        nft(&format!(
            "table inet loss {{\nchain drops {{\ntype filter hook input priority 0;\n{rule}\n}}\n}}\n"
        ));
        stream.write_all(b"again").unwrap();
        // Time for the answer to be lost.
        std::thread::sleep(Duration::from_millis(50));
        nft("delete table inet loss\n");
        desk.walk();
        let moved = Instant::now();
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"again");
        // The guest's own timer would have taken a second at least.
        assert!(moved.elapsed() < Duration::from_millis(500), "{:?}", moved.elapsed());
    });
}

#[test]
fn a_fresh_machine_is_small() {
    Lab::run(|lab| {
        let template = lab.pool.template_pages();
        let mut desk = Desk::new(lab);
        assert!(desk.say("uptime").starts_with("up "));
        let _terminal = Terminal::open(&desk);
        let (full, populated) = pages_in_use(desk.machine());
        println!("template {template} pages, with a shell open {full} full, {populated} populated");
        assert!(template <= 64 && full <= 192 && populated <= 256, "{template}, {full}, {populated}");
    });
}

#[test]
fn doors_stay_close_under_every_load() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let path = lab.dir().join("input");
        fs::write(&path, vec![1; 8 << 20]).unwrap();
        let megabytes = f64::from(8 << 20) / 1e6;
        let mut measure = |name: &str, load: &mut dyn FnMut(&Desk<'_>)| {
            desk.machine().set_heartbeat(true).unwrap();
            let started = Instant::now();
            load(&desk);
            let took = started.elapsed();
            let (beats, longest, stall) = desk.machine().heartbeat();
            println!(
                "{name}: {took:?} ({:.1} MB/s), {beats} beats, longest {longest:?}, stall {stall:?}",
                megabytes / took.as_secs_f64()
            );
            assert!(beats > 50, "{name}: {beats} beats");
            // A loaded host takes the processor away for several milliseconds; the guest itself keeps to one.
            assert!(longest < Duration::from_millis(100), "{name}: {longest:?}");
        };
        measure("idle", &mut |_| std::thread::sleep(Duration::from_millis(200)));
        measure("http stream", &mut |_| {
            read_stream(lab, 8 << 20, 1, |_| {});
        });
        measure("sum over ssh", &mut |desk| {
            let input = File::open(&path).unwrap();
            assert!(desk.ssh(&[]).args(["--", "sum"]).stdin(input).output().unwrap().status.success());
        });
        measure("cat over ssh", &mut |desk| {
            let input = File::open(&path).unwrap();
            let output = desk.ssh(&[]).args(["--", "cat"]).stdin(input).output().unwrap();
            assert_eq!(output.stdout.len(), 8 << 20);
        });
        measure("dirty", &mut |desk| {
            assert!(desk.say("dirty 30% 5000/s --for 0.5").contains("whole"));
        });
    });
}
