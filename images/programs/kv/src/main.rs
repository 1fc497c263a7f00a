//! `kv`: a key-value service over TCP that speaks Redis' protocol (RESP 2), so that its clients and `nc` can use it.
//!
//! `kv [--port 6379] [--log FILE]`. All is kept in memory, which moves with the machine; with `--log` changes are also
//! appended to a file, and read from it at the start, so that they outlive the process.
//!
//! Commands: PING ECHO SET GET DEL EXISTS INCR DECR INCRBY APPEND STRLEN KEYS DBSIZE FLUSHALL QUIT, as a RESP array or
//! as a line of words.

mod command;
mod resp;

use std::{
    collections::BTreeMap,
    env,
    fs::{File, OpenOptions},
    io::{self, Read as _},
    net::Ipv6Addr,
    process::ExitCode,
};

use socket::{Flow, Listener, Protocol, serve};

/// Most bytes of all keys and values.
const CAPACITY: usize = 16 << 20;

/// All that is kept.
#[derive(Default)]
pub struct Store {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
    /// Where changes are appended.
    pub log: Option<File>,
}

impl Store {
    /// A key's value.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.values.get(key).map(Vec::as_slice)
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.values.keys()
    }

    /// Keeps a value; whether there was room.
    pub fn put(&mut self, key: &[u8], value: Vec<u8>) -> bool {
        let before = self.get(key).map_or(0, |value| key.len() + value.len());
        let after = self.bytes - before + key.len() + value.len();
        if after > CAPACITY {
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
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let mut before = Vec::new();
        file.read_to_end(&mut before)?;
        // What was cut short by a kill in the middle of a write is left out.
        let _ = store.receive(&mut (), &mut before, &mut Vec::new());
        file.set_len(file.metadata()?.len() - before.len() as u64)?;
        store.log = Some(file);
    }
    let listener = Listener::bind(Ipv6Addr::UNSPECIFIED, port)?;
    println!("kv: {} keys, port {port}", store.values.len());
    serve(&listener, &mut store)
}
