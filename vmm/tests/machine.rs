//! Real machines on real KVM, each test in a network namespace of its own.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use kage_machine::{Machine, PauseCause};
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
