//! `kv`: a key-value service over TCP that speaks Redis' protocol (RESP 2), so that its clients and `nc` can use it.
//!
//! `kv [--port 6379] [--log FILE]`. All is kept in memory, which moves with the machine; with `--log` changes are also
//! appended to a file, and read from it at the start, so that they outlive the process; the file is written anew when it is
//! much longer than what is kept.
//!
//! Commands: PING ECHO SET GET DEL EXISTS INCR DECR INCRBY APPEND STRLEN KEYS DBSIZE FLUSHALL QUIT, as a RESP array or
//! as a line of words.

mod command;
mod log;
mod resp;

use std::{collections::BTreeMap, env, io, net::Ipv6Addr, path::Path, process::ExitCode};

use log::Log;
use socket::{Flow, Listener, OUTPUT, Protocol, serve};

/// Most bytes of all keys and values …
const CAPACITY: usize = 16 << 20;
/// … and of one, also by appending: a client that does not read holds one in memory.
const VALUE: usize = 1 << 20;

/// All that is kept.
#[derive(Default)]
pub struct Store {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
    /// Where changes are appended.
    pub log: Option<Log>,
}

impl Store {
    /// A key's value.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.values.get(key).map(Vec::as_slice)
    }

    /// About how many bytes it takes to log all of it.
    fn log_bytes(&self) -> u64 {
        (self.bytes + 40 * self.values.len()) as u64
    }

    /// All keys and values, in order of keys.
    pub fn all(&self) -> impl Iterator<Item = (&Vec<u8>, &Vec<u8>)> {
        self.values.iter()
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.values.keys()
    }

    /// Keeps a value; whether there was room.
    pub fn put(&mut self, key: &[u8], value: Vec<u8>) -> bool {
        let before = self.get(key).map_or(0, |value| key.len() + value.len());
        let after = self.bytes - before + key.len() + value.len();
        if after > CAPACITY || value.len() > VALUE {
            return false;
        }
        self.bytes = after;
        self.values.insert(key.to_vec(), value);
        true
    }

    /// Forgets a key; whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.values.remove(key);
        self.bytes -= removed.as_ref().map_or(0, |value| key.len() + value.len());
        removed.is_some()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.values.clear();
        self.bytes = 0;
    }
}

impl Protocol for Store {
    type State = ();

    fn receive(&mut self, (): &mut (), input: &mut Vec<u8>, output: &mut Vec<u8>) -> Flow {
        let mut used = 0;
        let flow = loop {
            // The rest once this has been written: a few bytes can ask for a value many times.
            if output.len() >= OUTPUT {
                break Flow::Open;
            }
            match resp::request(&input[used..]) {
                Ok(Some((words, length))) => {
                    used += length;
                    if command::run(self, &words, output) == Flow::Close {
                        break Flow::Close;
                    }
                }
                Ok(None) => break Flow::Open,
                Err(reason) => {
                    resp::error(output, reason);
                    break Flow::Close;
                }
            }
        };
        input.drain(..used);
        flow
    }
}

fn main() -> ExitCode {
    let mut port = 6379;
    let mut log = None;
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--port", Some(value)) if value.parse::<u16>().is_ok() => port = value.parse().unwrap_or(port),
            ("--log", Some(path)) => log = Some(path),
            _ => {
                eprintln!("usage: kv [--port 6379] [--log FILE]");
                return ExitCode::from(2);
            }
        }
    }
    match run(port, log.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kv: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(port: u16, log: Option<&str>) -> io::Result<()> {
    let mut store = Store::default();
    if let Some(path) = log {
        store.log = Some(Log::open(Path::new(path), &mut store)?);
    }
    let listener = Listener::bind(Ipv6Addr::UNSPECIFIED, port)?;
    println!("kv: {} keys, port {port}", store.values.len());
    serve(&listener, &mut store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_packet_makes_no_large_memory() {
        let mut store = Store::default();
        store.put(b"k", vec![7; VALUE]);
        let (mut input, mut output) = (b"GET k\r\n".repeat(60), Vec::new());
        let mut answers = 0;
        while !input.is_empty() {
            assert_eq!(store.receive(&mut (), &mut input, &mut output), Flow::Open);
            assert!(output.len() < OUTPUT + VALUE + 64, "{}", output.len());
            answers += output.len() / VALUE;
            output.clear();
        }
        assert_eq!(answers, 60);
    }

    #[test]
    fn values_have_a_bound() {
        let mut store = Store::default();
        assert!(!store.put(b"k", vec![0; VALUE + 1]));
        let mut output = Vec::new();
        for _ in 0..3 {
            let mut input =
                [b"*3\r\n$6\r\nAPPEND\r\n$1\r\nk\r\n$600000\r\n".as_slice(), &[1; 600_000], b"\r\n"].concat();
            store.receive(&mut (), &mut input, &mut output);
        }
        assert_eq!(store.get(b"k").unwrap().len(), 600_000);
    }
}
