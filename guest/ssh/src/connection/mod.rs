//! One client's connection: authentication, then session channels (RFC 4252, RFC 4254).
//!
//! ```text
//! Service ──SERVICE_REQUEST──▶ Auth ──a proved key──▶ Open ──DISCONNECT, either way──▶ closed
//! ```
//!
//! Sans-IO: bytes go in by [`Connection::input`], come out by [`Connection::output`]; what happened is asked for by
//! [`Connection::event`]. At most one message's events wait at a time, because `input` takes nothing while any do.
//! Everything a peer can make grow is bounded by [`Limits`](crate::Limits): channels × receive window, the output,
//! and the answers waiting for a key exchange.
//!
//! Not here: time (drop a connection that does not authenticate, call [`Connection::keepalive`] and
//! [`Connection::renew_keys`] as you see fit), forwarding, agents, X11.

mod auth;
mod channels;

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString as _};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::channel::Channel;
use crate::config::Config;
use crate::error::Error;
use crate::event::{ChannelId, Event};
use crate::message::{self, Reason};
use crate::random::Random;
use crate::transport::record::Opened;
use crate::transport::{Arrival, Transport, TransportLimits};
use crate::wire::{Reader, put_bool, put_string};
use auth::Attempts;
pub use channels::ChannelEnded;

enum Phase {
    Service,
    Auth(Attempts),
    Open,
}

/// The server's side of one SSH connection.
pub struct Connection {
    config: Arc<Config>,
    transport: Transport,
    phase: Phase,
    channels: BTreeMap<u32, Channel>,
    next_channel: u32,
    /// The client said it opens no further channel.
    no_more_sessions: bool,
    events: VecDeque<Event>,
    /// A request to start a program that has not been answered, and whether an answer is wanted.
    unanswered: Option<(u32, bool)>,
    keepalives: u32,
}

impl Connection {
    /// Starts a connection; its greeting is in the output at once.
    pub fn new(config: Arc<Config>, random: impl Random + 'static) -> Self {
        let limits = TransportLimits { output: config.limits.output, rekey_bytes: config.limits.rekey_bytes };
        let transport = Transport::new(config.host_key.clone(), limits, Box::new(random));
        Self {
            config,
            transport,
            phase: Phase::Service,
            channels: BTreeMap::new(),
            next_channel: 0,
            no_more_sessions: false,
            events: VecDeque::new(),
            unanswered: None,
            keepalives: 0,
        }
    }

    /// Takes bytes received from the peer and returns how many of them; the rest is to be given again, once events
    /// were taken and output was sent. Takes none while there are events or too much output.
    ///
    /// # Errors
    /// What the peer did wrong. The connection is closed then; its output tells the peer why.
    pub fn input(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        let mut rest = bytes;
        if self.events.is_empty() {
            self.refuse_unanswered();
            while self.events.is_empty() && !rest.is_empty() && self.transport.takes_input() {
                if let Err(error) = self.step(&mut rest) {
                    self.transport.disconnect(error.reason(), &error.to_string());
                    self.close_all();
                    return Err(error);
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Whether [`Connection::input`] would take bytes: no event waits, and the output is not too long.
    pub fn takes_input(&self) -> bool {
        self.events.is_empty() && self.transport.takes_input()
    }

    /// The next event.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Bytes to send to the peer.
    pub fn output(&self) -> &[u8] {
        self.transport.output()
    }

    /// Forgets `count` bytes of output that were sent.
    pub fn sent(&mut self, count: usize) {
        self.transport.sent(count);
    }

    /// Whether the connection ended; send the rest of the output, then close the socket.
    pub fn is_closed(&self) -> bool {
        self.transport.is_closed()
    }

    /// Whether a user proved a key.
    pub fn is_authenticated(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Ends the connection and tells the peer why.
    pub fn disconnect(&mut self, text: &str) {
        self.transport.disconnect(Reason::ByApplication, text);
        self.close_all();
    }

    /// Negotiates new keys now.
    pub fn renew_keys(&mut self) {
        if self.is_authenticated() {
            self.transport.renew_keys();
        }
    }

    /// Asks the peer for a sign of life; [`Connection::unanswered_keepalives`] tells whether there was one.
    pub fn keepalive(&mut self) {
        if self.is_authenticated() && !self.is_closed() {
            let mut request = Vec::from([message::GLOBAL_REQUEST]);
            put_string(&mut request, b"keepalive@openssh.com");
            put_bool(&mut request, true);
            self.transport.send(&request);
            self.keepalives = self.keepalives.saturating_add(1);
        }
    }

    /// How many questions for a sign of life were asked since the last answer.
    pub fn unanswered_keepalives(&self) -> u32 {
        self.keepalives
    }

    /// Handles one arrival.
    fn step(&mut self, rest: &mut &[u8]) -> Result<(), Error> {
        match self.transport.input(rest)? {
            None => {}
            Some(Arrival::Disconnected { reason, text }) => {
                const SHOWN: usize = 256;
                let text = String::from_utf8_lossy(text.get(..SHOWN).unwrap_or(&text)).into_owned();
                self.close_all();
                self.events.push_back(Event::Disconnected { reason, text });
            }
            Some(Arrival::Message(opened)) => {
                let result = self.message(&opened);
                self.transport.recycle(opened);
                result?;
            }
        }
        self.transport.check_deferred()
    }

    fn message(&mut self, opened: &Opened) -> Result<(), Error> {
        let payload = opened.payload();
        let number = payload.first().copied().unwrap_or_default();
        match (&self.phase, number) {
            (_, message::SERVICE_REQUEST) => self.service_request(payload),
            (Phase::Auth(attempts), message::USERAUTH_REQUEST) => self.auth_request(*attempts, payload),
            // RFC 4252 §5.1: requests after success are ignored.
            (Phase::Open, message::USERAUTH_REQUEST) => Ok(()),
            (Phase::Open, message::GLOBAL_REQUEST) => self.global_request(payload),
            (Phase::Open, message::REQUEST_SUCCESS | message::REQUEST_FAILURE) => {
                self.keepalives = 0;
                Ok(())
            }
            (Phase::Open, message::CHANNEL_OPEN..=message::CHANNEL_FAILURE) => {
                self.channel_message(number, payload)
            }
            (Phase::Open, _) => self.transport.unimplemented(opened.sequence),
            (Phase::Service | Phase::Auth(_), _) => {
                Err(Error::Unexpected { number, context: "the user is not authenticated" })
            }
        }
    }

    fn global_request(&mut self, payload: &[u8]) -> Result<(), Error> {
        let mut reader = Reader::new(payload);
        reader.u8()?;
        let name = reader.string()?;
        let wants_reply = reader.boolean()?;
        if name == b"no-more-sessions@openssh.com" {
            self.no_more_sessions = true;
        }
        // OpenSSH takes a failure for an answer to its keepalive, as its own server gives one.
        if wants_reply {
            self.transport.send(&[message::REQUEST_FAILURE]);
        }
        Ok(())
    }

    /// Lets every channel go, with an event each.
    fn close_all(&mut self) {
        self.unanswered = None;
        for (id, _) in core::mem::take(&mut self.channels) {
            self.events.push_back(Event::Closed { channel: ChannelId(id) });
        }
    }
}

#[cfg(test)]
mod tests;
