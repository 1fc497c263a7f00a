//! Guests that break: each ends alone, says where, and leaves its host as it was.

#[expect(dead_code, reason = "the lab serves all of these tests, each uses a part of it")]
mod lab;

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use lab::{Lab, desk::Desk};

/// Has the machine crash and returns why it ended and what its log says.
fn crash(lab: &Lab, how: &str) -> (String, String) {
    let mut desk = Desk::new(lab);
    let mut child = desk.ssh(&[]).args(["--", &format!("crash {how}")]).spawn().unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    while desk.machine().failure().is_none() {
        assert!(Instant::now() < limit, "the machine goes on after `crash {how}`");
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    let machine = desk.machine.take().expect("it was there");
    let said = (machine.failure().unwrap_or_default(), lab.logs(&machine));
    drop(machine);
    said
}

#[test]
fn a_guest_that_panics_faults_or_hangs_ends_alone_and_says_where() {
    Lab::run(|lab| {
        let (reason, log) = crash(lab, "panic");
        println!("{reason}\n{log}");
        assert!(reason.contains("fault or panic"), "{reason}");
        assert!(log.contains("asked to panic") && log.contains("crash::panic_at_once"), "{log}");
        let (reason, log) = crash(lab, "fault");
        println!("{reason}\n{log}");
        assert!(reason.contains("fault or panic"), "{reason}");
        assert!(log.contains("vector 14") && log.contains("read_nothing"), "{log}");
        let (reason, log) = crash(lab, "loop");
        println!("{reason}\n{log}");
        assert!(reason.contains("has not opened its door"), "{reason}");
        // The host goes on, with another machine.
        assert!(Desk::new(lab).say("uptime").starts_with("up "));
    });
}

#[test]
fn rings_full_of_nonsense_harm_the_guest_alone() {
    Lab::run(|lab| {
        let mut desk = Desk::new(lab);
        let mut child = desk.ssh(&[]).args(["--", "crash rings"]).spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(10);
        // The device stops, or the machine does; nothing hangs and nothing else is harmed.
        while TcpStream::connect_timeout(&(lab.address(), 7).into(), Duration::from_millis(200)).is_ok() {
            assert!(Instant::now() < limit, "the network still works");
        }
        let _ = child.kill();
        let _ = child.wait();
        let state = desk.machine().status().map(|(phase, ..)| phase);
        println!("after nonsense in the rings: {state:?}, {:?}", desk.machine().failure());
        drop(desk);
        assert!(Desk::new(lab).say("uptime").starts_with("up "));
    });
}
