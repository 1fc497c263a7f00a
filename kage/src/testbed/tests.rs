//! Testbeds without daemons, in real namespaces. Needs root.

use std::{
    net::{Ipv6Addr, UdpSocket},
    os::unix::fs::PermissionsExt,
    thread,
    time::{Duration, Instant},
};

use kage_host::{
    roaming::radius::{Accounting, Packet},
    units::Rate,
};

use super::*;

fn spec(name: &str) -> TestbedSpec {
    let dir = std::env::temp_dir().join(format!("kage-tb-{}-{name}", std::process::id()));
    TestbedSpec { daemons: false, ..TestbedSpec::new(dir, "/bin/false") }
}

fn up(spec: TestbedSpec) -> ScopedTestbed {
    Testbed::scoped(spec, &Cancel::new().unwrap()).unwrap_or_else(|error| panic!("{error}"))
}

fn socket(testbed: &Testbed, name: &str, address: Ipv6Addr, port: u16) -> UdpSocket {
    let socket = testbed.within(name, || UdpSocket::bind((address, port))).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

fn assert_no_trace(dir: &Path) {
    let id = layout::id(dir);
    assert_eq!(namespace::all(&id).unwrap(), Vec::<String>::new());
    assert!(!dir.exists(), "{} is left", dir.display());
}

#[test]
fn hosts_reach_each_other_and_nothing_is_left_afterwards() {
    let testbed = up(spec("reach"));
    let status = testbed.status().unwrap();
    let dir = testbed.dir().to_owned();
    let names: Vec<_> = status.hosts.iter().map(|host| (host.name.as_str(), host.aps[0].as_str())).collect();
    assert_eq!(names, [("h1", "ap-1"), ("h2", "ap-2"), ("h3", "ap-3")]);
    assert_eq!(status.hosts[0].socket, dir.join("h1/run/host.sock"));
    let devices: Vec<_> =
        status.devices.iter().map(|device| (device.name.as_str(), device.ap.as_str())).collect();
    assert_eq!(devices, [("d1", "ap-1"), ("d2", "ap-2")]);
    assert_eq!((status.radius.port, status.radius.secret.len()), (1813, 32));

    let underlay = |number: usize| testbed.layout.hosts[number].underlay;
    let (one, three) = (socket(&testbed, "h1", underlay(0), 9), socket(&testbed, "h3", underlay(2), 9));
    one.send_to(b"hello", (underlay(2), 9)).unwrap();
    assert_eq!(three.recv_from(&mut [0; 8]).unwrap().1, (underlay(0), 9).into());
    testbed.set_link("h1", false).unwrap();
    one.send_to(b"lost", (underlay(2), 9)).unwrap();
    testbed.set_link("h1", true).unwrap();
    // A port that comes up again is on its bridge at once, but says so a moment later.
    let deadline = Instant::now() + Duration::from_secs(5);
    three.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut message = [0; 8];
    loop {
        one.send_to(b"again", (underlay(2), 9)).unwrap();
        if three.recv(&mut message).is_ok_and(|length| &message[..length] == b"again") {
            break;
        }
        assert!(Instant::now() < deadline, "the mended link carries nothing");
    }

    let output = testbed.output("d1", Command::new("ip").args(["-6", "route", "show", "default"])).unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("default via fe80::1 dev wlan0"));
    let error = testbed.output("h9", &mut Command::new("true")).unwrap_err();
    assert_eq!(error.exit_code(), 3);

    let mut sleeper = testbed.spawn("d1", Command::new("sleep").arg("60")).unwrap();
    drop(testbed);
    assert!(sleeper.wait().is_err(), "it was ended and collected");
    assert_no_trace(&dir);
    Testbed::remove(&dir).unwrap();
    assert_eq!(Testbed::open(&dir).unwrap_err().exit_code(), 3);
}

#[test]
fn a_move_is_reported_by_the_new_access_point() {
    let testbed = up(spec("move"));
    let secret = testbed.status().unwrap().radius.secret;
    let server = socket(&testbed, "h3", Ipv6Addr::UNSPECIFIED, 1813);
    let answering = thread::spawn(move || {
        let mut request = [0; 4096];
        let (length, from) = server.recv_from(&mut request).unwrap();
        let packet = Packet::parse(&request[..length]).unwrap();
        assert!(packet.is_request_of(secret.as_bytes()));
        // Somebody else's answer must not count.
        server.send_to(&packet.response(b"another secret"), from).unwrap();
        server.send_to(&packet.response(secret.as_bytes()), from).unwrap();
        Accounting::from_packet(&packet).unwrap()
    });
    let moved = testbed.move_device("d1", "ap-3", false).unwrap();
    let report = answering.join().unwrap();
    assert_eq!((moved.from.as_str(), moved.to.as_str(), moved.host.as_str()), ("ap-1", "ap-3", "h3"));
    assert_eq!(moved.accounting.unwrap().transmissions, 1);
    assert_eq!(report.status, Status::Start);
    assert_eq!(report.user_name.as_deref(), Some("alice"));
    assert_eq!(report.nas_identifier.as_deref(), Some("ap-3"));
    assert_eq!(report.calling_station_id.as_deref(), Some("02-6B-61-64-00-01"));
    assert_eq!(report.framed_ipv6_address, Some("fd4b:6167:65ff::1".parse().unwrap()));
    assert!(report.event_timestamp.is_some() && report.multi_session_id.is_some());
    assert_eq!(testbed.status().unwrap().devices[0].ap, "ap-3");

    let moved = testbed.move_device("d1", "ap-2", true).unwrap();
    assert!(moved.accounting.is_none());
    let output = testbed.output("d1", Command::new("ip").args(["-o", "link"])).unwrap();
    let links = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(links.contains("wlan2@") && !links.contains("wlan1@") && !links.contains("wlan0@"), "{links}");
    assert_eq!(testbed.move_device("d1", "ap-9", true).unwrap_err().exit_code(), 3);
    assert_eq!(testbed.move_device("h1", "ap-1", true).unwrap_err().exit_code(), 3);
}

#[test]
fn a_device_speaks_to_its_access_point_at_once_after_a_move() {
    let testbed = up(spec("at-once"));
    for (host, bridge) in [("h1", "kb-ap-1"), ("h2", "kb-ap-2")] {
        for arguments in [
            &["link", "set", bridge, "address", "02:6b:61:67:65:01"][..],
            &["addr", "add", "fe80::1/64", "dev", bridge, "nodad"],
            &["-6", "route", "add", "fd4b:6167:65ff::1/128", "dev", bridge],
            &["addr", "add", "fd00::7/128", "dev", bridge, "nodad"],
        ] {
            let output = testbed.output(host, Command::new("ip").args(arguments)).unwrap();
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let service: Ipv6Addr = "fd00::7".parse().unwrap();
    let device = socket(&testbed, "d1", "fd4b:6167:65ff::1".parse().unwrap(), 0);
    device.connect((service, 7)).unwrap();
    for (host, ap) in [("h1", None), ("h2", Some("ap-2")), ("h1", Some("ap-1"))] {
        if let Some(ap) = ap {
            testbed.move_device("d1", ap, true).unwrap();
        }
        let answering = socket(&testbed, host, service, 7);
        device.send(b"ping").unwrap();
        let (_, from) = answering.recv_from(&mut [0; 8]).unwrap();
        answering.send_to(b"pong", from).unwrap();
        assert_eq!(device.recv(&mut [0; 8]).unwrap(), 4);
    }
}

#[test]
fn links_have_the_rate_and_the_loss_asked_for() {
    let link = LinkShape { rate: Some(Rate(10_000_000)), loss_ppm: 200_000, ..LinkShape::default() };
    let testbed = up(TestbedSpec { link, devices: 0, hosts: 2, ..spec("shape") });
    let hosts = testbed.layout.hosts.clone();
    let underlay = move |number: usize| hosts[number].underlay;
    let (one, two) = (socket(&testbed, "h1", underlay(0), 9), socket(&testbed, "h2", underlay(1), 9));
    two.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    // Neighbour discovery loses frames too, and repeats them only every second.
    let deadline = Instant::now() + Duration::from_secs(20);
    while two.recv(&mut [0; 8]).is_err() {
        assert!(Instant::now() < deadline, "nothing arrives");
        one.send_to(b"hello", (underlay(1), 9)).unwrap();
    }
    while two.recv(&mut [0; 8]).is_ok() {}
    let counting = thread::spawn(move || {
        let (mut frames, mut last) = (0_u32, Instant::now());
        while two.recv(&mut [0; 2000]).is_ok() {
            frames += 1;
            last = Instant::now();
        }
        (frames, last)
    });
    // Half the rate for a second: nothing waits, so what is missing was lost.
    let start = Instant::now();
    for frame in 0..1000_u32 {
        let due = start + Duration::from_micros(1000) * frame;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        one.send_to(&[0; 577], (underlay(1), 9)).unwrap();
    }
    let (frames, _) = counting.join().unwrap();
    assert!((720..880).contains(&frames), "{frames} of 1000 arrived, 800 expected");

    // As fast as it goes for half a second: the link decides.
    let two = socket(&testbed, "h2", underlay(1), 10);
    let (start, to) = (Instant::now(), underlay(1));
    let sending = thread::spawn(move || {
        while start.elapsed() < Duration::from_millis(500) {
            one.send_to(&[0; 1200], (to, 10)).unwrap();
            thread::yield_now();
        }
    });
    two.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut bytes = 0;
    while two.recv(&mut [0; 2000]).is_ok() {
        bytes += 1262;
    }
    sending.join().unwrap();
    let mbit = f64::from(bytes) * 8.0 / 0.52 / 1e6 / 0.8;
    assert!((7.5..12.0).contains(&mbit), "{mbit} Mbit/s where 10 were asked for");
}

#[test]
fn a_testbed_is_not_made_twice_and_half_of_one_is_replaced() {
    let testbed = up(TestbedSpec { hosts: 1, devices: 0, ..spec("twice") });
    let again = TestbedSpec { hosts: 1, devices: 0, ..spec("twice") };
    let error = Testbed::up(again.clone(), &Cancel::new().unwrap()).unwrap_err();
    assert!(matches!(error, TestbedError::Exists(_)), "{error}");
    let mut state = testbed.state().unwrap();
    state.complete = false;
    state.write(testbed.dir()).unwrap();
    assert!(matches!(Testbed::open(testbed.dir()), Err(TestbedError::Absent(_))));
    Testbed::up(again, &Cancel::new().unwrap()).unwrap();
    let dir = testbed.dir().to_owned();
    // Without its record it is found all the same.
    std::fs::remove_dir_all(&dir).unwrap();
    Testbed::remove(&dir).unwrap();
    assert_no_trace(&dir);
}

#[test]
fn a_cancelled_or_failed_start_leaves_nothing() {
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let cancelled = spec("cancelled");
    let dir = cancelled.dir.clone();
    assert!(matches!(Testbed::up(cancelled, &cancel), Err(TestbedError::Cancelled)));
    assert_no_trace(&dir);

    let failing = TestbedSpec { daemons: true, ..spec("failing") };
    let dir = failing.dir.clone();
    std::fs::create_dir_all(&dir).unwrap();
    let program = dir.join("program");
    std::fs::write(&program, "#!/bin/sh\necho nothing works\nexit 7\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error =
        Testbed::up(TestbedSpec { binary: program.clone(), ..failing }, &Cancel::new().unwrap()).unwrap_err();
    assert!(error.to_string().contains("nothing works"), "{error}");
    // The directory was not empty before, so it stays.
    std::fs::remove_file(program).unwrap();
    std::fs::remove_dir(&dir).unwrap();
    assert_no_trace(&dir);
}
