//! What programs in C find in a machine: WASI preview 1, and sockets.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lab::{Lab, compile, desk::Desk};

/// Compiles a program of this directory with Debian's clang.
fn build(lab: &Lab, name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let module = lab.dir().join(name).with_extension("wasm");
    let mut clang = Command::new("clang");
    clang.args(["--target=wasm32-wasi", "-O1", "-Wall", "-Werror", "-o"]).arg(&module);
    clang.arg("-I").arg(root.join("../images/include"));
    clang.arg(root.join("tests/programs").join(name).with_extension("c"));
    assert!(clang.status().expect("clang, lld, wasi-libc are installed").success());
    module
}

/// Carries a program into the machine.
fn put(desk: &Desk<'_>, name: &str) {
    let module = build(desk.lab, name);
    assert!(desk.client("scp").arg(module).arg(desk.remote("")).status().unwrap().success());
}

#[test]
fn a_program_in_c_finds_files_clocks_and_its_input() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "files");
        let mut child = desk
            .ssh(&[])
            .args(["--", "mkdir /tmp/w; cd /tmp/w; ~/files.wasm one 'two words'"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut keys = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let started = Instant::now();
        while !desk.say("ps").lines().any(|line| line.contains("waiting") && line.contains("files.wasm")) {
            assert!(started.elapsed() < Duration::from_secs(10));
        }
        keys.write_all(b"typed\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let rest: Vec<_> = lines.collect();
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(7), &b"all well\n"[..]), "{rest:?}");
        assert_eq!(desk.say("cat /tmp/from-program"), "tmp");
        let status = desk.exec("cd /tmp/w; ~/files.wasm one 'two words' < /etc/motd | cat").status;
        assert!(status.success());
    });
}

#[test]
fn a_program_in_c_opens_sockets_within_and_beyond_the_machine() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "sockets");
        // An echo service that is not the machine's own.
        let echo = TcpListener::bind("[::]:0").unwrap();
        let port = echo.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in echo.incoming() {
                let mut stream = stream.unwrap();
                let mut bytes = [0; 64];
                let count = stream.read(&mut bytes).unwrap();
                stream.write_all(&bytes[..count]).unwrap();
            }
        });
        let text = desk.say(&format!("~/sockets.wasm fe80::1 {port}"));
        assert!(text.starts_with("sockets work, "), "{text}");
        assert!(desk.say("sockets").lines().all(|line| !line.contains(" closed ")), "they went with it");
    });
}

#[test]
fn a_server_in_c_moves_with_its_connections() {
    Lab::run(|lab| {
        compile::serve();
        let mut desk = Desk::new(lab);
        put(&desk, "echo");
        let mut child =
            desk.ssh(&[]).args(["--", "~/echo.wasm 9000"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "listening");
        let address: SocketAddr = format!("[{}]:9000", lab.address()).parse().unwrap();
        let mut clients: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
        let before = desk.say("sockets");
        assert_eq!(before.lines().filter(|line| line.contains(":9000 ")).count(), 9, "{before}");
        for round in 0..4 {
            for (number, client) in clients.iter_mut().enumerate() {
                client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let text = format!("{round} and {number}\n");
                client.write_all(text.as_bytes()).unwrap();
                let mut back = vec![0; text.len()];
                client.read_exact(&mut back).unwrap();
                assert_eq!(back, text.as_bytes());
            }
            desk.walk();
        }
        let identities = |text: &str| -> Vec<String> {
            let of_program = text.lines().filter(|line| line.contains(":9000 "));
            of_program.map(|line| line.split(' ').next().unwrap_or_default().to_string()).collect()
        };
        assert_eq!(identities(&before), identities(&desk.say("sockets")));
        clients[0].write_all(b"end\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let mut rest = Vec::new();
        assert_eq!(clients[1].read_to_end(&mut rest).unwrap(), 0, "closed in order");
    });
}

/// Whatever a program passes, and wherever that has the kernel write in it: the program may come to a bad end, the
/// machine goes on.
#[test]
fn no_call_harms_the_machine() {
    Lab::run(|lab| {
        compile::serve();
        let desk = Desk::new(lab);
        put(&desk, "calls");
        let (mut ended, mut well) = (0, 0);
        for seed in 1..=12 {
            let line = format!("cd /tmp; ~/calls.wasm {seed} 30000 < /etc/motd");
            let mut child = desk.ssh(&[]).args(["--", &line]).stdout(Stdio::piped()).spawn().unwrap();
            let started = Instant::now();
            while child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // One that waits is ended with its session.
            let _ = child.kill();
            let output = child.wait_with_output().unwrap();
            ended += u32::from(output.status.code().is_some());
            well += u32::from(output.status.code() == Some(0));
            assert_ne!(output.status.code(), Some(9), "an errno that there is not");
            assert_eq!(desk.say("echo $?"), "0\n");
        }
        println!("{well} of 12 programs made every call, {ended} ended by themselves");
        assert!(well >= 3, "too few calls were made");
        let sockets = desk.say("sockets");
        assert!(sockets.lines().filter(|line| !line.contains(" listen ")).count() < 6, "{sockets}");
    });
}
