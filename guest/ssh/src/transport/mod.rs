//! The transport layer: identification, key exchanges, records (RFC 4253).
//!
//! ```text
//!             identification line              KEXINIT sent at once
//! Greeting ──────────────────────▶ Records ─── and both sides go through: ──────────────────┐
//!                                                                                            ▼
//!   Idle ──our limits──▶ Proposed ──KEXINIT──▶ Agreed ──ECDH_INIT──▶ Replied ──NEWKEYS──▶ Idle
//!     └──────────────KEXINIT (answered with ours)──▶┘
//! ```
//!
//! Invariants. Messages of the upper layers leave only in `Idle` and `Replied`; in between they wait, in order, in
//! `deferred`, whose length is bounded. They arrive in `Idle` and `Proposed` only. In a strict first exchange nothing
//! but the expected message is accepted. After a `DISCONNECT` in either direction nothing is read or written.
//!
//! Not here: time. Renewing keys by age and giving up on a silent peer are the caller's, by calling
//! [`Transport::renew_keys`] or dropping the connection.

pub mod kex;
pub mod record;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::buffer::Buffer;
use crate::cipher::ChaChaPoly;
use crate::error::Error;
use crate::keys::{HostKey, SIGNATURE_ALGORITHMS};
use crate::message::{self, Reason};
use crate::random::Random;
use crate::wire::{Reader, put_names, put_string, put_u32};
use kex::{ExchangeHash, Transcript};
use record::{Opened, Opener, Sealer};

/// Our identification (RFC 4253 §4.2).
const VERSION: &[u8] = b"SSH-2.0-Kage_1";
/// Longest identification line accepted, with its line end.
const MAX_VERSION: usize = 255;
/// Most messages that wait for the end of a key exchange. One exchange is one round trip, in which OpenSSH sends at
/// most a handful of requests; window adjustments do not wait here.
const MAX_DEFERRED: usize = 256;
/// Bytes of answers that may pile up beyond the output limit before nothing more is read.
const ANSWERS: usize = 16 * 1024;

/// How much a transport may hold and when it renews keys.
#[derive(Debug, Clone, Copy)]
pub struct TransportLimits {
    /// Bytes of output after which no more channel data is taken.
    pub output: usize,
    /// Bytes in one direction after which new keys are negotiated.
    pub rekey_bytes: u64,
}

enum Stage {
    Greeting(Vec<u8>),
    Records,
    Closed,
}

enum Exchange {
    Idle,
    Proposed { ours: Vec<u8> },
    Agreed { ours: Vec<u8>, theirs: Vec<u8>, drop_guess: bool },
    Replied { incoming: ChaChaPoly },
}

/// A message for the layers above, or the peer's farewell.
#[derive(Debug)]
pub enum Arrival {
    /// A message that is none of the transport's.
    Message(Opened),
    /// The peer left.
    Disconnected {
        /// Its reason code.
        reason: u32,
        /// What it said.
        text: Vec<u8>,
    },
}

/// One side of a connection below authentication.
pub struct Transport {
    random: Box<dyn Random>,
    host_key: HostKey,
    limits: TransportLimits,
    stage: Stage,
    client_version: Vec<u8>,
    exchange: Exchange,
    opener: Opener,
    sealer: Sealer,
    output: Buffer,
    deferred: VecDeque<Vec<u8>>,
    session: Option<ExchangeHash>,
    /// The first exchange is complete in both directions.
    established: bool,
    strict: bool,
    ext_info: bool,
    may_renew: bool,
}

impl Transport {
    /// Starts by greeting and offering algorithms: the client needs not be heard for that, which saves a round trip.
    pub fn new(host_key: HostKey, limits: TransportLimits, random: Box<dyn Random>) -> Self {
        let mut transport = Self {
            random,
            host_key,
            limits,
            stage: Stage::Greeting(Vec::new()),
            client_version: Vec::new(),
            exchange: Exchange::Idle,
            opener: Opener::default(),
            sealer: Sealer::default(),
            output: Buffer::default(),
            deferred: VecDeque::new(),
            session: None,
            established: false,
            strict: false,
            ext_info: false,
            may_renew: false,
        };
        let greeting = transport.output.back();
        greeting.extend_from_slice(VERSION);
        greeting.extend_from_slice(b"\r\n");
        transport.propose();
        transport
    }

    /// Bytes to send to the peer.
    pub fn output(&self) -> &[u8] {
        self.output.bytes()
    }

    /// Forgets `count` bytes of output that were sent.
    pub fn sent(&mut self, count: usize) {
        self.output.consume(count);
    }

    /// Whether the connection ended, by either side; output may be left.
    pub fn is_closed(&self) -> bool {
        matches!(self.stage, Stage::Closed)
    }

    /// Whether input would be taken: the peer has to read before it may write more.
    pub fn takes_input(&self) -> bool {
        !self.is_closed() && self.output.len() <= self.limits.output + ANSWERS
    }

    /// The session's identity, once the first exchange is done.
    pub fn session(&self) -> Option<&ExchangeHash> {
        self.session.as_ref()
    }

    /// Allows renewing keys by volume; from authentication on, as OpenSSH expects.
    pub fn allow_renewal(&mut self) {
        self.may_renew = true;
    }

    /// Takes from the front of `bytes` up to the next message for the layers above.
    ///
    /// # Errors
    /// What the peer did wrong; the caller then calls [`Transport::disconnect`].
    pub fn input(&mut self, bytes: &mut &[u8]) -> Result<Option<Arrival>, Error> {
        while !bytes.is_empty() && self.takes_input() {
            if let Stage::Greeting(line) = &mut self.stage {
                if greeting(line, bytes)? {
                    self.client_version = core::mem::take(line);
                    self.stage = Stage::Records;
                }
                continue;
            }
            let Some(opened) = self.opener.take(bytes)? else { continue };
            if let Some(arrival) = self.arrived(opened)? {
                return Ok(Some(arrival));
            }
        }
        Ok(None)
    }

    /// Gives back a message's memory.
    pub fn recycle(&mut self, opened: Opened) {
        self.opener.recycle(opened);
    }

    /// Handles what is the transport's own and passes on the rest.
    fn arrived(&mut self, opened: Opened) -> Result<Option<Arrival>, Error> {
        let number = opened.payload().first().copied().unwrap_or_default();
        let first_and_strict = self.strict && !self.established;
        match number {
            message::DISCONNECT => {
                self.stage = Stage::Closed;
                let mut reader = Reader::new(opened.payload());
                let (_, reason, text) = (reader.u8()?, reader.u32()?, reader.string()?);
                return Ok(Some(Arrival::Disconnected { reason, text: text.to_vec() }));
            }
            message::IGNORE | message::DEBUG | message::UNIMPLEMENTED if !first_and_strict => {}
            message::KEXINIT => self.kexinit(&opened)?,
            message::KEX_ECDH_INIT => self.ecdh_init(opened.payload())?,
            message::NEWKEYS => self.newkeys()?,
            message::EXT_INFO if self.established => {}
            _ => {
                let context = "a key exchange is going on";
                return match self.exchange {
                    Exchange::Idle | Exchange::Proposed { .. } if self.established => {
                        Ok(Some(Arrival::Message(opened)))
                    }
                    _ => Err(Error::Unexpected { number, context }),
                };
            }
        }
        self.opener.recycle(opened);
        self.renew_worn_keys();
        Ok(None)
    }

    fn kexinit(&mut self, opened: &Opened) -> Result<(), Error> {
        if matches!(self.exchange, Exchange::Idle) {
            self.propose();
        }
        let Exchange::Proposed { ours } = &mut self.exchange else {
            return Err(Error::Unexpected {
                number: message::KEXINIT,
                context: "a key exchange is going on",
            });
        };
        let agreed = kex::agree(opened.payload())?;
        if self.session.is_none() {
            self.strict = agreed.strict;
            self.ext_info = agreed.ext_info;
            if agreed.strict && opened.sequence != 0 {
                let context = "the first message of a strict key exchange must be KEXINIT";
                return Err(Error::Unexpected { number: message::KEXINIT, context });
            }
        }
        let ours = core::mem::take(ours);
        self.exchange =
            Exchange::Agreed { ours, theirs: opened.payload().to_vec(), drop_guess: agreed.drop_guess };
        Ok(())
    }

    fn ecdh_init(&mut self, payload: &[u8]) -> Result<(), Error> {
        let Exchange::Agreed { ours, theirs, drop_guess } = &mut self.exchange else {
            return Err(Error::Unexpected {
                number: message::KEX_ECDH_INIT,
                context: "no key exchange is going on",
            });
        };
        if core::mem::take(drop_guess) {
            return Ok(());
        }
        let transcript = Transcript {
            client_version: &self.client_version,
            server_version: VERSION,
            client_kexinit: theirs,
            server_kexinit: ours,
        };
        let exchanged = kex::exchange(&transcript, payload, &self.host_key, &mut *self.random)?;
        let first = self.session.is_none();
        let session = *self.session.get_or_insert(exchanged.hash);
        self.exchange = Exchange::Replied { incoming: exchanged.client_to_server(&session) };
        self.seal(&exchanged.reply)?;
        self.seal(&[message::NEWKEYS])?;
        self.sealer.change_keys(exchanged.server_to_client(&session), self.strict);
        if first && self.ext_info {
            let mut info = Vec::from([message::EXT_INFO]);
            put_u32(&mut info, 1);
            put_string(&mut info, b"server-sig-algs");
            put_names(&mut info, SIGNATURE_ALGORITHMS);
            self.seal(&info)?;
        }
        while let Some(waiting) = self.deferred.pop_front() {
            self.seal(&waiting)?;
        }
        Ok(())
    }

    fn newkeys(&mut self) -> Result<(), Error> {
        match core::mem::replace(&mut self.exchange, Exchange::Idle) {
            Exchange::Replied { incoming } => {
                self.opener.change_keys(incoming, self.strict);
                self.established = true;
                Ok(())
            }
            Exchange::Idle | Exchange::Proposed { .. } | Exchange::Agreed { .. } => {
                Err(Error::Unexpected { number: message::NEWKEYS, context: "no key exchange is complete" })
            }
        }
    }

    /// Starts an exchange if none is going on.
    pub fn renew_keys(&mut self) {
        if self.established && matches!(self.exchange, Exchange::Idle) {
            self.propose();
        }
    }

    fn renew_worn_keys(&mut self) {
        let most = self.limits.rekey_bytes;
        let worn = |usage: record::Usage| usage.bytes >= most || usage.records >= 1 << 30;
        if self.may_renew && (worn(self.sealer.usage()) || worn(self.opener.usage())) {
            self.renew_keys();
        }
    }

    fn propose(&mut self) {
        let ours = kex::offer(&mut *self.random);
        // A worn-out key cannot be here: renewal starts at half its records, and the peer's data stops too.
        if self.seal(&ours).is_ok() {
            self.exchange = Exchange::Proposed { ours };
        }
    }

    fn seal(&mut self, payload: &[u8]) -> Result<(), Error> {
        self.seal_with(|out| out.extend_from_slice(payload))
    }

    fn seal_with(&mut self, payload: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
        self.sealer.seal(self.output.back(), &mut *self.random, payload)
    }

    /// Whether the layers above may send now, with nothing waiting before them.
    fn is_free(&self) -> bool {
        matches!(self.exchange, Exchange::Idle | Exchange::Replied { .. })
            && self.deferred.is_empty()
            && matches!(self.stage, Stage::Records)
    }

    /// Sends a message of the layers above, now or after the key exchange that is going on.
    pub fn send(&mut self, payload: &[u8]) {
        if self.is_closed() {
            return;
        }
        if self.is_free() {
            // Only a worn-out key fails, and then the next record the peer sends does, too, and ends it.
            let _ = self.seal(payload);
            self.renew_worn_keys();
        } else {
            self.deferred.push_back(payload.to_vec());
        }
    }

    /// Fails when more messages wait for the end of a key exchange than an honest peer would cause.
    ///
    /// # Errors
    /// [`Error::Flood`].
    pub fn check_deferred(&self) -> Result<(), Error> {
        if self.deferred.len() > MAX_DEFERRED { Err(Error::Flood) } else { Ok(()) }
    }

    /// Bytes of channel data that would be taken now.
    pub fn room(&self) -> usize {
        if self.is_free() { self.limits.output.saturating_sub(self.output.len()) } else { 0 }
    }

    /// Sends channel data, which never waits: the caller asked [`Transport::room`].
    pub fn send_data(&mut self, payload: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
        self.seal_with(payload)?;
        self.renew_worn_keys();
        Ok(())
    }

    /// Answers a message of unknown meaning. Allowed at any time.
    ///
    /// # Errors
    /// A worn-out key.
    pub fn unimplemented(&mut self, sequence: u32) -> Result<(), Error> {
        let mut payload = Vec::from([message::UNIMPLEMENTED]);
        put_u32(&mut payload, sequence);
        self.seal(&payload)
    }

    /// Ends the connection, telling the peer why; nothing is read or written afterwards.
    pub fn disconnect(&mut self, reason: Reason, text: &str) {
        match self.stage {
            Stage::Closed => return,
            Stage::Greeting(_) if reason == Reason::ProtocolVersionNotSupported => {
                self.output.back().extend_from_slice(b"Protocol mismatch.\r\n");
            }
            Stage::Greeting(_) | Stage::Records => {
                let mut payload = Vec::from([message::DISCONNECT]);
                put_u32(&mut payload, reason as u32);
                put_string(&mut payload, text.as_bytes());
                put_string(&mut payload, b"");
                let _ = self.seal(&payload);
            }
        }
        self.deferred.clear();
        self.stage = Stage::Closed;
    }
}

/// Gathers the identification line; whether it is complete, and then without its end.
fn greeting(line: &mut Vec<u8>, bytes: &mut &[u8]) -> Result<bool, Error> {
    while let Some((byte, rest)) = bytes.split_first() {
        *bytes = rest;
        if *byte == b'\n' {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            let known = line.starts_with(b"SSH-2.0-") || line.starts_with(b"SSH-1.99-");
            return if known { Ok(true) } else { Err(Error::NotSsh) };
        }
        // An HTTP client or a port scanner is told at its first byte, not at its 255th.
        if line.len() >= MAX_VERSION - 1
            || *byte == 0
            || (line.len() < 4 && b"SSH-".get(line.len()) != Some(byte))
        {
            return Err(Error::NotSsh);
        }
        line.push(*byte);
    }
    Ok(false)
}
