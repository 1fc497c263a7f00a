use std::sync::Arc;

use kage_machine::{ImageNumber, Term};

use super::*;
use crate::fake::FakeNet;

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn records() -> Records {
    let mut records = Records::default();
    for (name, octet) in [("a", 1u16), ("b", 2)] {
        let advertise = std::net::SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, octet], 7701));
        let record =
            HostRecord { advertise, underlay: advertise.ip(), api: None, incarnation: 1, cordoned: false };
        records.hosts.insert(host(name), record);
    }
    for (user, number, owner, wanted) in [
        ("alice", 1, "a", Wanted::Running),
        ("bob", 2, "b", Wanted::Running),
        ("carol", 3, "a", Wanted::Stopped),
        ("dave", 4, "gone", Wanted::Running),
    ] {
        let record = ImageRecord {
            term: Term(1),
            owner: host(owner),
            intent: None,
            backup: None,
            wanted,
            number: ImageNumber(number),
            indices: ImageRecord::FIRST_INDICES,
            ipv4: None,
            disk_origin: None,
            profile: crate::fake::profile(),
        };
        records.images.insert(user.parse().unwrap(), record);
    }
    for (address, at) in [("fd0d::1", "a"), ("fd0d::2", "b")] {
        let record = DeviceRecord {
            user: "alice".parse().unwrap(),
            host: host(at),
            ap: "ap-1".parse().unwrap(),
            since_ms: 0,
        };
        records.devices.insert(address.parse().unwrap(), record);
    }
    records
}

fn prefix() -> SitePrefix {
    "fd4b:6167:6500::/48".parse().unwrap()
}

#[test]
fn images_go_to_their_tap_or_to_their_owner() {
    let table = desired(&records(), &host("a"), prefix(), true);
    let vias: Vec<_> = table.images.values().map(|(_, via)| via.clone()).collect();
    assert_eq!(
        vias,
        [Via::Tap, Via::Host(host("b"))],
        "stopped images and owners without a tunnel have no route"
    );
    let devices: Vec<_> = table.devices.values().cloned().collect();
    assert_eq!(devices, [Via::Ap("ap-1".parse().unwrap()), Via::Host(host("b"))]);
    assert_eq!(table.peers.keys().collect::<Vec<_>>(), [&host("b")]);
}

#[test]
fn only_differences_are_applied_and_failures_are_tried_again() {
    let net = FakeNet::default();
    let wanted = desired(&records(), &host("a"), prefix(), true);
    net.fail_next("image");
    let have = apply(&net, &Table::default(), &wanted, &Held::new());
    assert_eq!(have.images.len(), 1);
    let calls = net.calls().len();
    let have = apply(&net, &have, &wanted, &Held::new());
    assert_eq!((net.calls().len(), &have), (calls + 1, &wanted));
    assert_eq!(apply(&net, &have, &wanted, &Held::new()), wanted);
    assert_eq!(net.calls().len(), calls + 1);
    let empty = apply(&net, &have, &Table { peers: have.peers.clone(), ..Table::default() }, &Held::new());
    assert!(empty.images.is_empty() && empty.devices.is_empty());
}

fn give(records: &mut Records, user: &str, ipv4: Option<&str>) {
    let image = records.images.get_mut(&user.parse().unwrap()).unwrap();
    image.ipv4 = ipv4.map(|address| address.parse().unwrap());
}

#[test]
fn an_ipv4_address_goes_where_its_image_goes() {
    let net = FakeNet::default();
    let mut records = records();
    let table = |records: &Records, ipv4| desired(records, &host("a"), prefix(), ipv4);
    give(&mut records, "alice", Some("10.77.0.5"));
    let have = apply(&net, &Table::default(), &table(&records, true), &Held::new());
    let to_tap = |call: &String| call.starts_with("ipv4 10.77.0.5") && call.ends_with("1 Tap");
    assert!(net.calls().iter().any(to_tap), "{:?}", net.calls());
    let before = net.calls().len();
    // Another address for her, and hers for somebody else: whichever record is seen first.
    give(&mut records, "alice", Some("10.77.0.6"));
    give(&mut records, "bob", Some("10.77.0.5"));
    let have = apply(&net, &have, &table(&records, true), &Held::new());
    assert_eq!(have.ipv4.len(), 2);
    give(&mut records, "alice", None);
    apply(&net, &have, &table(&records, true), &Held::new());
    let calls = net.calls().split_off(before);
    let starts: Vec<_> =
        calls.iter().map(|call| call.rsplit_once(' ').map_or("", |(start, _)| start)).collect();
    assert!(starts[0].starts_with("ipv4 10.77.0.5") && starts[1].starts_with("ipv4 10.77.0.6"), "{calls:?}");
    assert_eq!(calls[2..], ["forget_ipv4 10.77.0.6"], "and no /88 was touched");
    assert!(table(&records, false).ipv4.is_empty(), "a host without IPv4");
}

#[test]
fn no_device_takes_an_address_from_a_host_or_an_image() {
    let mut records = records();
    let device = records.devices.values().next().unwrap().clone();
    for address in ["192.168.1.10", "10.77.0.5", "fd00::2", "fd0d::7"] {
        records.devices.insert(address.parse().unwrap(), device.clone());
    }
    give(&mut records, "carol", Some("10.77.0.5"));
    let devices = |ipv4| -> Vec<String> {
        let table = desired(&records, &host("a"), prefix(), ipv4);
        table.devices.keys().map(ToString::to_string).collect()
    };
    assert_eq!(devices(true), ["192.168.1.10", "fd0d::1", "fd0d::2", "fd0d::7"]);
    assert_eq!(devices(false), ["fd0d::1", "fd0d::2", "fd0d::7"]);
}

#[test]
fn a_held_route_is_left_to_the_lifecycle() {
    let net = Arc::new(FakeNet::default());
    let keeper = Keeper::new(net.clone(), prefix(), true);
    let vid = Vid::of_image(prefix(), ImageNumber(1));
    let mut records = records();
    keeper.follow(desired(&records, &host("a"), prefix(), true));
    keeper.hold(vid);
    keeper.image(Addresses { vid, ipv4: None }, &Via::Host(host("b"))).unwrap();
    let calls = net.calls().len();
    keeper.follow(desired(&records, &host("a"), prefix(), true));
    assert_eq!(net.calls().len(), calls);
    keeper.let_go(vid, Term(2));
    keeper.follow(desired(&records, &host("a"), prefix(), true));
    assert_eq!(net.calls().len(), calls, "the directory as last seen is older than the change");
    if let Some(image) = records.images.get_mut(&"alice".parse().unwrap()) {
        (image.owner, image.term) = (host("a"), Term(3));
    }
    keeper.follow(desired(&records, &host("a"), prefix(), true));
    assert!(net.calls().last().unwrap().contains("Tap"), "{:?}", net.calls());
}

#[test]
fn what_a_former_daemon_left_and_nobody_wants_is_forgotten() {
    let net = Arc::new(FakeNet::default());
    let vid = |number| Vid::of_image(prefix(), ImageNumber(number));
    // One that is wanted, a stopped one in the lifecycle's hands, a deleted one, and another site's.
    for number in [2, 3, 77] {
        net.leave(vid(number).image_prefix(), 88);
    }
    net.leave("fd99::".parse().unwrap(), 88);
    for device in ["fd0d::1", "fd0d::9"] {
        net.leave(device.parse().unwrap(), 128);
    }
    let keeper = Keeper::new(net.clone(), prefix(), true);
    keeper.hold(vid(3));
    keeper.hold(vid(2));
    keeper.let_go(vid(2), Term(0));
    assert_eq!(net.calls(), [] as [String; 0], "before the directory was seen");
    net.fail_next("forget_image");
    for _ in 0..3 {
        keeper.follow(desired(&records(), &host("a"), prefix(), true));
    }
    let mut forgotten: Vec<_> = net.calls().into_iter().filter(|call| call.starts_with("forget")).collect();
    forgotten.sort();
    let expected = ["forget_device fd0d::9".to_owned(), format!("forget_image {}", vid(77))];
    assert_eq!(forgotten, expected);
    keeper.let_go(vid(3), Term(1));
    assert_eq!(net.calls().last().unwrap(), &format!("forget_image {}", vid(3)));
}
