use super::table::*;

extern crate std;
use std::{vec, vec::Vec};

fn entries() -> Vec<Entry<'static>> {
    vec![
        Entry {
            index: 1,
            facts: Facts::Process {
                state: ProcessState::Waiting,
                pid: 7,
                cpu_ns: 1_500_000,
                memory_bytes: 3 << 20,
            },
            text: "sqlite",
        },
        Entry { index: 2, facts: Facts::File { state: FileState::File, bytes: 9 }, text: "/tmp/größe" },
        Entry {
            index: super::INDEX_MAX,
            facts: Facts::Socket {
                state: SocketState::Established,
                protocol: Protocol::Tcp,
                local: Endpoint { address: [1; 16], port: 22 },
                remote: Some(Endpoint { address: [2; 16], port: 40_000 }),
                bytes_in: 5,
                bytes_out: 6,
            },
            text: "",
        },
        Entry {
            index: 4,
            facts: Facts::Socket {
                state: SocketState::Open,
                protocol: Protocol::Udp,
                local: Endpoint { address: [0; 16], port: 7 },
                remote: None,
                bytes_in: 0,
                bytes_out: 0,
            },
            text: "echo",
        },
    ]
}

fn table(entries: &[Entry<'_>], all: u32) -> Vec<u8> {
    let mut bytes = header(entries.len() as u32, all).to_vec();
    entries.iter().for_each(|entry| write(entry, |part| bytes.extend_from_slice(part)));
    bytes
}

fn parsed(bytes: &[u8]) -> (Result<u32, Damage>, Vec<Entry<'_>>) {
    let mut found = Vec::new();
    (read(bytes, |entry| found.push(entry)), found)
}

#[test]
fn what_is_written_is_read() {
    let bytes = table(&entries(), 9);
    assert_eq!(parsed(&bytes), (Ok(9), entries()));
}

#[test]
fn a_table_keeps_its_bytes() {
    let file = Entry { index: 3, facts: Facts::File { state: FileState::Directory, bytes: 2 }, text: "/a" };
    let golden = [
        b'k', b'r', b'e', b's', 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, //
        22, 0, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'/', b'a',
    ];
    assert_eq!(table(&[file], 1), golden);
}

#[test]
fn a_table_cut_anywhere_is_refused() {
    let bytes = table(&entries(), 4);
    for end in 0..bytes.len() {
        assert!(parsed(&bytes[..end]).0.is_err(), "cut at {end}");
    }
}

#[test]
fn no_byte_of_a_table_can_do_harm() {
    let good = table(&entries(), 4);
    for at in 0..good.len() {
        for value in [0, 1, 2, 3, 4, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let (_, found) = parsed(&bytes);
            assert!(found.len() <= 4);
        }
    }
}

#[test]
fn kinds_of_later_versions_are_passed_over() {
    let mut bytes = table(&entries()[..2], 2);
    bytes[HEADER + 2] = 9;
    assert_eq!(parsed(&bytes), (Ok(2), entries()[1..2].to_vec()));
}

#[test]
fn a_long_path_is_cut_at_a_character() {
    let long: std::string::String = "é".repeat(TEXT_MAX);
    let entry = Entry { index: 1, facts: Facts::File { state: FileState::File, bytes: 0 }, text: &long };
    let bytes = table(&[entry], 1);
    let (result, found) = parsed(&bytes);
    assert_eq!((result, found[0].text.len()), (Ok(1), TEXT_MAX));
}
