//! Real machines on real KVM, each test in a network namespace of its own.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use kage_machine::{Machine, PauseCause};
use kage_vmm::remote::RemoteMachine;
use lab::Lab;

#[test]
fn a_login_answers_over_the_network() {
    Lab::run(|lab| {
        let mut machine = lab.login();
        let mut stream = TcpStream::connect((lab.address(), 7)).expect("echo answers");
        stream.write_all(b"hello over there").unwrap();
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello over there");

        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.send_to(b"datagram", (lab.address(), 7)).unwrap();
        let (count, from) = socket.recv_from(&mut answer).expect("an echo");
        assert_eq!((&answer[..count], from.ip()), (&b"datagram"[..], lab.address().into()));
        machine.end();
    });
}

#[test]
fn connections_live_through_twenty_moves_between_processes() {
    Lab::run(|lab| {
        let mut machine = lab.login();
        let mut stream = TcpStream::connect((lab.address(), 7)).expect("echo answers");
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut blackouts = Vec::new();
        for turn in 0..20u32 {
            let (next, blackout) = lab.move_machine(machine);
            machine = next;
            blackouts.push(blackout);
            stream.write_all(&turn.to_le_bytes()).unwrap();
            let mut answer = [0; 4];
            let asked = Instant::now();
            stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("after move {turn}: {error}"));
            assert_eq!(u32::from_le_bytes(answer), turn);
            println!("move {turn}: blackout {blackout:?}, echo {:?}", asked.elapsed());
        }
        blackouts.sort();
        println!("median blackout {:?}", blackouts[10]);
        machine.end();
    });
}

#[test]
fn a_released_machine_never_runs_again() {
    Lab::run(|lab| {
        let mut machine = lab.login();
        machine.pause(PauseCause::Switch).unwrap();
        machine.release().unwrap();
        assert!(machine.is_released());
        assert!(machine.resume().is_err());
        assert!(machine.run(true).is_err());
        machine.end();
    });
}

/// The user that a machine's process has become.
fn user(machine: &RemoteMachine) -> String {
    let path = format!("/proc/{}/status", machine.process_id().as_raw_nonzero());
    let status = std::fs::read_to_string(path).unwrap();
    status.lines().find(|line| line.starts_with("Uid:")).unwrap().to_owned()
}

#[test]
fn pools_of_one_daemon_share_neither_sockets_nor_users() {
    Lab::run(|lab| {
        let other = lab.another_pool();
        let mut users = std::collections::BTreeSet::new();
        for (at, pool) in [&lab.pool, &other, &lab.pool, &other].into_iter().enumerate() {
            let mut machine = pool.take_shell().unwrap();
            assert!(users.insert(user(&machine)), "{users:?}");
            // The socket that is moved is this machine's own: whoever comes there finds its process.
            let path = lab.dir().join(format!("user-{at}.sock"));
            machine.set_label(vec![1]).unwrap();
            machine.move_socket(&path).unwrap();
            let process = machine.process_id();
            drop(machine);
            let mut adopted = RemoteMachine::adopt(&path).unwrap().expect("it listens");
            assert_eq!(adopted.process_id(), process);
            adopted.end();
        }
    });
}

#[test]
fn an_adopted_machine_comes_with_all_it_has_and_ends_when_told() {
    Lab::run(|lab| {
        let mut machine = lab.login();
        let path = lab.dir().join("user-alice.sock");
        machine.move_socket(&path).unwrap();
        let (process, base) = (machine.process_id(), machine.base());
        assert_ne!(base, kage_machine::BaseHash::default());
        drop(machine);
        let mut machine = RemoteMachine::adopt(&path).unwrap().expect("it listens");
        assert_eq!((machine.process_id(), machine.base(), machine.label()), (process, base, &b"alice"[..]));
        assert!(machine.take_tap().is_some());
        assert_eq!(machine.memory().geometry(), lab.pool.geometry());
        let mut stream = TcpStream::connect((lab.address(), 7)).expect("echo answers");
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        machine.end();
        // Its tap and its disk are free.
        assert!(!machine.is_alive());
        assert!(RemoteMachine::adopt(&path).unwrap().is_none());
    });
}
