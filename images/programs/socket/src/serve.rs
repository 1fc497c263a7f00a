//! A loop that serves all connections of a listener.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    os::fd::AsRawFd as _,
};

use crate::{Listener, Stream, raw};

/// Connections at a time; for a further one that ends which has been silent longest.
const CONNECTIONS: usize = 64;
/// Bytes read in one go.
const CHUNK: usize = 16 << 10;
/// Input kept while it makes no whole request.
const INPUT: usize = 4 << 20;
/// Output above which no more input is looked at.
pub const OUTPUT: usize = 256 << 10;
/// Input and output kept of all connections: beyond it that ends which keeps most.
const KEPT: usize = 12 << 20;

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Open,
    /// It ends once its output is written.
    Close,
}

/// What a server says.
pub trait Protocol {
    /// What it keeps of a connection.
    type State: Default;

    /// Takes what it understands from the front of `input` and adds its answers to `output`, up to about [`OUTPUT`]: it
    /// is called again for the rest.
    fn receive(&mut self, state: &mut Self::State, input: &mut Vec<u8>, output: &mut Vec<u8>) -> Flow;

    /// Adds more of a long answer to an `output` that has been written.
    fn more(&mut self, _state: &mut Self::State, _output: &mut Vec<u8>) -> Flow {
        Flow::Open
    }
}

struct Connection<S> {
    stream: Stream,
    state: S,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    flow: Flow,
    /// When it last had something, in turns of the loop.
    heard: u64,
}

/// Serves for ever.
///
/// # Errors
/// Waiting for connections failed, or none can be had.
pub fn serve<P: Protocol>(listener: &Listener, protocol: &mut P) -> io::Result<()> {
    let mut connections: BTreeMap<u32, Connection<P::State>> = BTreeMap::new();
    let listening = listener.0.as_raw_fd() as u32;
    for turn in 0.. {
        let mut wanted = Vec::with_capacity(connections.len() + 1);
        wanted.push((listening, READ));
        for (fd, connection) in &connections {
            wanted.push((*fd, if connection.output.is_empty() { READ } else { WRITE }));
        }
        for fd in wait(&wanted)? {
            if fd == listening {
                if connections.len() >= CONNECTIONS {
                    drop_first(&mut connections, |connection| connection.heard);
                }
                match listener.accept() {
                    Ok(Some(stream)) => {
                        connections.insert(stream.0.as_raw_fd() as u32, Connection::new(stream, turn));
                    }
                    Ok(None) => {}
                    // No socket is left: there is one for it if one of those here ends.
                    Err(_) if !connections.is_empty() => {
                        drop_first(&mut connections, |connection| connection.heard);
                    }
                    Err(error) => return Err(error),
                }
            } else if let Some(connection) = connections.get_mut(&fd) {
                connection.heard = turn;
                if connection.turn(protocol).is_err() {
                    connections.remove(&fd);
                }
            }
            while connections.values().map(Connection::kept).sum::<usize>() > KEPT {
                drop_first(&mut connections, |connection| usize::MAX - connection.kept());
            }
        }
    }
    Ok(())
}

/// Ends the connection that comes first in an order.
fn drop_first<S, O: Ord>(
    connections: &mut BTreeMap<u32, Connection<S>>,
    order: impl Fn(&Connection<S>) -> O,
) {
    let first = connections.iter().min_by_key(|(_, connection)| order(connection)).map(|(fd, _)| *fd);
    if let Some(fd) = first {
        connections.remove(&fd);
    }
}

const READ: u8 = 1;
const WRITE: u8 = 2;

/// Descriptors that can be read or written, whichever is wanted of each.
fn wait(wanted: &[(u32, u8)]) -> io::Result<Vec<u32>> {
    let wanted: Vec<raw::Subscription> = wanted
        .iter()
        .map(|(fd, tag)| raw::Subscription {
            user: (*fd).into(),
            tag: *tag,
            _pad: [0; 7],
            fd: *fd,
            _rest: [0; 7],
        })
        .collect();
    let mut events = vec![raw::Event::default(); wanted.len()];
    let mut found = 0;
    // SAFETY: both arrays have `wanted.len()` entries and live until the call returns.
    let errno =
        unsafe { raw::poll_oneoff(wanted.as_ptr(), events.as_mut_ptr(), wanted.len(), &raw mut found) };
    crate::done(errno.into())?;
    Ok(events.iter().take(found).map(|event| event.user as u32).collect())
}

impl<S> Connection<S> {
    /// Bytes of memory it takes.
    fn kept(&self) -> usize {
        self.input.capacity() + self.output.capacity()
    }
}

impl<S: Default> Connection<S> {
    fn new(stream: Stream, heard: u64) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        Self { stream, state: S::default(), input, output, written: 0, flow: Flow::Open, heard }
    }

    /// Reads, answers and writes as much as goes without waiting; fails when the connection is over.
    fn turn(&mut self, protocol: &mut impl Protocol<State = S>) -> io::Result<()> {
        let mut ended = false;
        if self.output.is_empty() {
            let mut chunk = [0; CHUNK];
            match self.stream.0.read(&mut chunk) {
                Ok(0) => ended = true,
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            if self.input.len() > INPUT {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        loop {
            if self.output.is_empty() && self.flow == Flow::Open {
                self.flow = protocol.more(&mut self.state, &mut self.output);
            }
            let before = (self.input.len(), self.output.len());
            if self.flow == Flow::Open && self.output.len() < OUTPUT {
                self.flow = protocol.receive(&mut self.state, &mut self.input, &mut self.output);
            }
            self.flush()?;
            if !self.output.is_empty() {
                return Ok(());
            }
            if self.flow == Flow::Close || ended {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if before == (self.input.len(), 0) {
                return Ok(());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.written < self.output.len() {
            match self.stream.0.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        // Nothing of a long answer or request stays behind.
        self.output = Vec::new();
        self.input.shrink_to(CHUNK);
        self.written = 0;
        Ok(())
    }
}
