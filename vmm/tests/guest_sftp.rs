//! The guest's SFTP server, compiled for the host: what a client may do, and that nothing it sends does harm.

extern crate alloc;

#[path = "../../guest/src/fs/mod.rs"]
#[allow(dead_code, unused_imports)]
mod fs;
mod kernel;
#[path = "../../guest/src/local.rs"]
#[allow(unsafe_code)]
mod local;
#[path = "../../guest/src/service/sftp/packet.rs"]
#[allow(dead_code)]
mod packet;
#[path = "../../guest/src/service/sftp/server.rs"]
#[allow(dead_code)]
mod server;

/// The log goes to the terminal.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { println!($($argument)*) };
}

use std::sync::MutexGuard;

use kernel::{
    executor::{self, block_on},
    heap, memory, time, vid, virtio,
};
use packet::{Fields, Status, kind};
use proptest::prelude::*;
use server::Server;

fn machine() -> MutexGuard<'static, ()> {
    let alone = kernel::alone();
    memory::set_free_bytes(1 << 30);
    fs::start("alice", 64 << 20, core::iter::empty());
    alone
}

/// A packet of a kind and fields, each already as it is on the wire.
fn packet(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let body: Vec<u8> = fields.concat();
    let mut packet = (body.len() as u32 + 1).to_be_bytes().to_vec();
    packet.push(kind);
    packet.extend_from_slice(&body);
    packet
}

fn text(text: &str) -> Vec<u8> {
    bytes(text.as_bytes())
}

fn bytes(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

/// Gives a request and takes its only reply: its kind and what follows.
fn ask(server: &mut Server, request: &[u8]) -> (u8, Vec<u8>) {
    assert_eq!(server.input(request), request.len());
    block_on(server.answer());
    let output = server.output().to_vec();
    server.sent(output.len());
    let length = u32::from_be_bytes(output[..4].try_into().unwrap()) as usize;
    assert_eq!(length + 4, output.len(), "one reply");
    (output[4], output[5..].to_vec())
}

fn status(reply: &(u8, Vec<u8>)) -> u32 {
    assert_eq!(reply.0, kind::STATUS);
    u32::from_be_bytes(reply.1[4..8].try_into().unwrap())
}

const ID: [u8; 4] = [0, 0, 0, 7];
const NONE: [u8; 4] = [0; 4];

fn open(server: &mut Server, path: &str, flags: u32) -> Vec<u8> {
    let (number, reply) = ask(server, &packet(kind::OPEN, &[&ID, &text(path), &flags.to_be_bytes(), &NONE]));
    assert_eq!((number, &reply[..4]), (kind::HANDLE, &ID[..]));
    reply[4..].to_vec()
}

#[test]
fn a_session_writes_reads_lists_and_removes() {
    let _alone = machine();
    let mut server = Server::new("/home/alice");
    let (number, version) = ask(&mut server, &packet(kind::INIT, &[&3u32.to_be_bytes()]));
    assert_eq!((number, &version[..4]), (kind::VERSION, &3u32.to_be_bytes()[..]));
    let file = open(&mut server, "f", 2 | 8);
    let write = |at: u64, data: &[u8]| packet(kind::WRITE, &[&ID, &file, &at.to_be_bytes(), &bytes(data)]);
    assert_eq!(status(&ask(&mut server, &write(2, b"cd"))), Status::Ok as u32);
    assert_eq!(status(&ask(&mut server, &write(0, b"ab"))), Status::Ok as u32);
    let read = |at: u64| packet(kind::READ, &[&ID, &file, &at.to_be_bytes(), &100u32.to_be_bytes()]);
    let (number, data) = ask(&mut server, &read(1));
    assert_eq!((number, &data[4..]), (kind::DATA, &bytes(b"bcd")[..]));
    assert_eq!(status(&ask(&mut server, &read(4))), Status::Eof as u32);
    assert_eq!(status(&ask(&mut server, &packet(kind::CLOSE, &[&ID, &file]))), Status::Ok as u32);
    assert_eq!(status(&ask(&mut server, &read(1))), Status::Failure as u32);
    let (_, directory) = ask(&mut server, &packet(kind::OPENDIR, &[&ID, &text(".")]));
    let list = packet(kind::READDIR, &[&ID, &directory[4..]]);
    let (number, names) = ask(&mut server, &list);
    let mut fields = Fields(&names[4..]);
    assert_eq!((number, fields.u32()), (kind::NAME, Ok(3)));
    for name in [".", "..", "f"] {
        assert_eq!(fields.text(), Ok(name));
        assert!(fields.text().unwrap().ends_with(&format!(" {name}")));
        fields.attributes().unwrap();
    }
    assert_eq!(status(&ask(&mut server, &list)), Status::Eof as u32);
    let remove = packet(kind::REMOVE, &[&ID, &text("/home/alice/f")]);
    assert_eq!(status(&ask(&mut server, &remove)), Status::Ok as u32);
    assert_eq!(status(&ask(&mut server, &remove)), Status::NoSuchFile as u32);
}

#[test]
fn handles_and_packets_are_limited() {
    let _alone = machine();
    let mut server = Server::new("/home/alice");
    for number in 0..64 {
        open(&mut server, &format!("f{number}"), 2 | 8);
    }
    let more = packet(kind::OPEN, &[&ID, &text("more"), &10u32.to_be_bytes(), &NONE]);
    assert_eq!(status(&ask(&mut server, &more)), Status::Failure as u32);
    assert_eq!(status(&ask(&mut server, &packet(99, &[&ID]))), Status::Unsupported as u32);
    assert_eq!(status(&ask(&mut server, &packet(kind::REMOVE, &[&ID, &[0, 0]]))), Status::BadMessage as u32);
    let read = [&ID[..], &bytes(&[0; 4]), &[0; 8], &[0xff; 4]];
    for _ in 0..3 {
        // Nothing is taken while much waits, and nothing is lost.
        let mut write = vec![0; 100];
        write[0] = 1;
        let _ = server.input(&packet(kind::READ, &read));
        block_on(server.answer());
    }
    let waiting = server.output().len();
    assert!(waiting < 300 << 10);
    server.sent(waiting);
    assert_eq!(server.input(&[0xff; 8]), 8);
    assert!(server.is_broken());
    assert_eq!(server.input(b"more"), 0);
}

fn field() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "(/tmp/|/home/alice/|)[ab.]{0,3}(/[ab.]{0,3})?".prop_map(|path| text(&path)),
        (0u8..4).prop_map(|handle| bytes(&[0, 0, 0, handle])),
        prop_oneof![Just(0u32), Just(u32::MAX), 0u32..70].prop_map(|number| number.to_be_bytes().to_vec()),
        prop_oneof![Just(0u64), Just(u64::MAX), 0u64..70_000]
            .prop_map(|number| number.to_be_bytes().to_vec()),
        prop::sample::select(vec![
            "posix-rename@openssh.com",
            "hardlink@openssh.com",
            "fsync@openssh.com",
            "lsetstat@openssh.com",
            "limits@openssh.com",
            "expand-path@openssh.com",
            "statvfs@openssh.com",
            "~",
            "~/x",
        ])
        .prop_map(text),
        prop::collection::vec(any::<u8>(), 0..60),
    ]
}

proptest! {
    #[test]
    fn no_request_does_harm(
        requests in prop::collection::vec((prop_oneof![1u8..21, Just(200), any::<u8>()], prop::collection::vec(field(), 0..5)), 0..40),
        cut in 1usize..50,
    ) {
        let _alone = machine();
        let mut server = Server::new("/home/alice");
        let mut replies = 0;
        for (number, fields) in &requests {
            let parts: Vec<&[u8]> = std::iter::once(&ID[..]).chain(fields.iter().map(Vec::as_slice)).collect();
            let request = packet(*number, &parts);
            let mut rest = &request[..];
            while !rest.is_empty() {
                let taken = server.input(&rest[..rest.len().min(cut)]);
                prop_assert!(taken > 0);
                block_on(server.answer());
                rest = &rest[taken..];
            }
            // Every request is answered once, with its number.
            let output = server.output().to_vec();
            let mut reply = Fields(&output);
            let answer = reply.bytes().unwrap();
            prop_assert!(reply.0.is_empty(), "one answer");
            prop_assert!(*number == kind::INIT || answer[1..5] == ID);
            server.sent(output.len());
            replies += 1;
        }
        prop_assert_eq!(replies, requests.len());
        prop_assert!(!server.is_broken());
    }

    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..400)) {
        let _alone = machine();
        let mut server = Server::new("/home/alice");
        let mut rest = &bytes[..];
        while !rest.is_empty() && !server.is_broken() {
            let taken = server.input(rest);
            block_on(server.answer());
            rest = &rest[taken..];
            let waiting = server.output().len();
            server.sent(waiting);
        }
    }
}
