//! A small SSH server on loopback, and the programs it runs: the driver that the crate's users write, for tests.
//!
//! One thread per connection waits in `poll(2)` for what the connection can use: input while it takes any, room in
//! the socket while it has output. Programs are steps that use what data and window there are.

mod programs;

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use kage_ssh::{ChannelId, Config, Connection, Event};
use programs::{Running, Surroundings};
use rustix::event::{PollFd, PollFlags, poll};

pub use programs::pattern;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The client said goodbye.
    Disconnected,
    /// The client vanished.
    HungUp,
    /// The client broke the protocol.
    Broken,
}

/// A listening server; stops when dropped.
pub struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU32>,
    ends: Mutex<mpsc::Receiver<Ended>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(config: Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
        let port = listener.local_addr().expect("bound").port();
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (sender, ends) = mpsc::channel();
        let (config, stopped, count) = (Arc::new(config), stop.clone(), accepted.clone());
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let (config, sender) = (config.clone(), sender.clone());
                let stream = stream.expect("accepts");
                std::thread::spawn(move || sender.send(serve(&stream, config).expect("socket works")));
            }
        });
        Self { port, stop, accepted, ends: Mutex::new(ends), acceptor: Some(acceptor) }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections so far.
    pub fn accepted(&self) -> u32 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Waits for the next connection to end.
    pub fn next_end(&self) -> Ended {
        self.ends.lock().expect("one test").recv_timeout(Duration::from_secs(60)).expect("a connection ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn randomness() -> impl FnMut(&mut [u8]) {
    let mut source = std::fs::File::open("/dev/urandom").expect("/dev/urandom");
    move |bytes: &mut [u8]| source.read_exact(bytes).expect("/dev/urandom")
}

/// Drives one connection to its end.
fn serve(mut stream: &TcpStream, config: Arc<Config>) -> io::Result<Ended> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let mut connection = Connection::new(config, randomness());
    let mut programs: BTreeMap<ChannelId, Running> = BTreeMap::new();
    let mut surroundings: BTreeMap<ChannelId, Surroundings> = BTreeMap::new();
    let mut received: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut ended = None;
    loop {
        // Everything that needs no waiting, until nothing moves.
        loop {
            let taken = match connection.input(&received) {
                Ok(taken) => taken,
                Err(_) => {
                    ended = ended.or(Some(Ended::Broken));
                    received.len()
                }
            };
            received.drain(..taken);
            let mut moved = taken > 0;
            while let Some(event) = connection.event() {
                moved = true;
                if matches!(event, Event::Disconnected { .. }) {
                    ended = Some(Ended::Disconnected);
                }
                handle(event, &mut connection, &mut programs, &mut surroundings);
            }
            programs.retain(|channel, program| {
                let step = program.step(*channel, &mut connection);
                moved |= step.moved;
                !step.done
            });
            if !moved || ended.is_some() {
                break;
            }
        }
        let mut sent = false;
        while !connection.output().is_empty() {
            match stream.write(connection.output()) {
                Ok(count) => {
                    connection.sent(count);
                    sent = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Ok(ended.unwrap_or(Ended::HungUp)),
            }
        }
        if let (Some(ended), true) = (ended, connection.output().is_empty()) {
            return Ok(ended);
        }
        if sent && ended.is_none() {
            // There is room again that a program may have waited for.
            continue;
        }
        let reads = received.is_empty() && ended.is_none();
        let writes = !connection.output().is_empty();
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, reads);
        flags.set(PollFlags::OUT, writes);
        let mut wait = [PollFd::new(stream, flags)];
        if !flags.is_empty() {
            poll(&mut wait, None)?;
        }
        if reads && wait[0].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(Ended::HungUp),
                Ok(count) => received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Ok(Ended::HungUp),
            }
        }
    }
}

fn handle(
    event: Event,
    connection: &mut Connection,
    programs: &mut BTreeMap<ChannelId, Running>,
    surroundings: &mut BTreeMap<ChannelId, Surroundings>,
) {
    match event {
        Event::Env { channel, name, value } => {
            surroundings.entry(channel).or_default().variables.push((name, value));
        }
        Event::Pty { channel, pty } => surroundings.entry(channel).or_default().pty = Some(pty),
        Event::Start { channel, program } => {
            match Running::start(program, surroundings.remove(&channel).unwrap_or_default()) {
                Some(running) => {
                    connection.accept(channel);
                    programs.insert(channel, running);
                }
                None => {
                    connection.refuse(channel);
                    connection.close(channel);
                }
            }
        }
        Event::Closed { channel } => {
            programs.remove(&channel);
            surroundings.remove(&channel);
        }
        Event::WindowChange { channel, size } => {
            if let Some(Running::Shell(shell)) = programs.get_mut(&channel) {
                shell.editor.resize(size.columns);
            }
        }
        Event::Authenticated { .. }
        | Event::Opened { .. }
        | Event::Data { .. }
        | Event::Eof { .. }
        | Event::Signal { .. }
        | Event::Disconnected { .. } => {}
    }
}
