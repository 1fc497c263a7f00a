//! A client that does what a test tells it, right or wrong.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use ed25519_dalek::{Signer as _, SigningKey};

use crate::config::{Account, Config, Limits};
use crate::connection::Connection;
use crate::error::Error;
use crate::event::Event;
use crate::keys::{HostKey, PublicKey};
use crate::message;
use crate::transport::kex::{Transcript, client};
use crate::transport::record::{Opener, Sealer};
use crate::wire::{put_bool, put_names, put_string, put_u32};

const VERSION: &[u8] = b"SSH-2.0-Test";

pub fn user_key() -> SigningKey {
    SigningKey::from_bytes(&[77; 32])
}

pub fn blob_of(key: &SigningKey) -> Vec<u8> {
    let mut blob = Vec::new();
    put_string(&mut blob, b"ssh-ed25519");
    put_string(&mut blob, key.verifying_key().as_bytes());
    blob
}

pub fn server(limits: Limits) -> Connection {
    let keys = vec![PublicKey::from_blob(&blob_of(&user_key())).expect("a key")];
    let accounts = vec![Account { user: "alice".into(), keys }];
    let config = Config { host_key: HostKey::from_seed(&[5; 32]), accounts, limits };
    let mut count = 0u8;
    Connection::new(Arc::new(config), move |bytes: &mut [u8]| {
        for byte in bytes {
            count = count.wrapping_mul(5).wrapping_add(17);
            *byte = count;
        }
    })
}

/// Its messages are fields written one after the other.
#[derive(Default, Clone)]
pub struct Message(pub Vec<u8>);

impl Message {
    pub fn new(number: u8) -> Self {
        Self(vec![number])
    }

    pub fn string(mut self, value: impl AsRef<[u8]>) -> Self {
        put_string(&mut self.0, value.as_ref());
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        put_u32(&mut self.0, value);
        self
    }

    pub fn boolean(mut self, value: bool) -> Self {
        put_bool(&mut self.0, value);
        self
    }
}

#[derive(Default)]
pub struct Client {
    sealer: Sealer,
    opener: Opener,
    pub session: [u8; 32],
    strict: bool,
    /// Messages from the server not looked at yet.
    pub received: Vec<Vec<u8>>,
    /// Events of the server not looked at yet.
    pub events: Vec<Event>,
    /// Whether programs are accepted.
    pub accepts: bool,
}

impl Client {
    /// Says hello and reads the server's hello; keys come later.
    pub fn greeted(server: &mut Connection) -> Self {
        let mut client = Self { accepts: true, ..Self::default() };
        client.give(server, b"SSH-2.0-Test\r\n").expect("a greeting");
        let end = server.output().iter().position(|byte| *byte == b'\n').expect("a line");
        assert_eq!(&server.output()[..end], b"SSH-2.0-Kage_1\r");
        server.sent(end + 1);
        client
    }

    /// Up to the first keys.
    pub fn keyed(server: &mut Connection, strict: bool) -> Self {
        let mut client = Self::greeted(server);
        client.strict = strict;
        client.exchange_keys(server).expect("a key exchange");
        client
    }

    /// Up to a user who is in.
    pub fn authenticated(server: &mut Connection) -> Self {
        let mut client = Self::keyed(server, true);
        client
            .send(server, &Message::new(message::SERVICE_REQUEST).string("ssh-userauth").0)
            .expect("a service");
        let request = client.signed_request("alice", &user_key());
        client.send(server, &request).expect("a proof");
        assert!(server.is_authenticated());
        client.received.clear();
        client.events.clear();
        client
    }

    /// Up to a channel without a program.
    pub fn with_channel(server: &mut Connection) -> Self {
        let mut client = Self::authenticated(server);
        client.send(server, &open(7, 1 << 20)).expect("a channel");
        client.received.clear();
        client.events.clear();
        client
    }

    pub fn kexinit(&self) -> Vec<u8> {
        let mut out = vec![message::KEXINIT];
        out.extend_from_slice(&[1; 16]);
        let strict = if self.strict { "kex-strict-c-v00@openssh.com" } else { "nothing" };
        put_names(&mut out, &["curve25519-sha256", "ext-info-c", strict]);
        put_names(&mut out, &["ssh-ed25519"]);
        for list in ["chacha20-poly1305@openssh.com", "hmac-sha2-256", "none"] {
            put_names(&mut out, &[list]);
            put_names(&mut out, &[list]);
        }
        put_names(&mut out, &[]);
        put_names(&mut out, &[]);
        put_bool(&mut out, false);
        put_u32(&mut out, 0);
        out
    }

    /// A whole exchange, first or later; the server's `KEXINIT` may have come before.
    pub fn exchange_keys(&mut self, server: &mut Connection) -> Result<(), Error> {
        let ours = self.kexinit();
        self.send(server, &ours)?;
        let theirs = self.take(message::KEXINIT);
        let scalar = [9; 32];
        self.send(server, &Message::new(message::KEX_ECDH_INIT).string(client::public(scalar)).0)?;
        let reply = self.take(message::KEX_ECDH_REPLY);
        let transcript = Transcript {
            client_version: VERSION,
            server_version: b"SSH-2.0-Kage_1",
            client_kexinit: &ours,
            server_kexinit: &theirs,
        };
        let exchanged = client::finish(&transcript, scalar, &reply);
        if self.session == [0; 32] {
            self.session = exchanged.hash;
        }
        self.take(message::NEWKEYS);
        self.opener.change_keys(exchanged.server_to_client(&self.session), self.strict);
        self.send(server, &[message::NEWKEYS])?;
        self.sealer.change_keys(exchanged.client_to_server(&self.session), self.strict);
        self.receive(server);
        Ok(())
    }

    pub fn signed_request(&self, user: &str, key: &SigningKey) -> Vec<u8> {
        let request =
            Message::new(message::USERAUTH_REQUEST).string(user).string("ssh-connection").string("publickey");
        let request = request.boolean(true).string("ssh-ed25519").string(blob_of(key));
        let mut signed = Vec::new();
        put_string(&mut signed, &self.session);
        signed.extend_from_slice(&request.0);
        let mut signature = Vec::new();
        put_string(&mut signature, b"ssh-ed25519");
        put_string(&mut signature, &key.sign(&signed).to_bytes());
        request.string(signature).0
    }

    pub fn seal(&mut self, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut padding = |bytes: &mut [u8]| bytes.fill(0);
        self.sealer.seal(&mut out, &mut padding, |out| out.extend_from_slice(payload)).expect("fresh keys");
        out
    }

    /// Sends one message and takes in what comes of it.
    pub fn send(&mut self, server: &mut Connection, payload: &[u8]) -> Result<(), Error> {
        let record = self.seal(payload);
        self.give(server, &record)
    }

    /// Hands over bytes and takes in what comes of them.
    pub fn give(&mut self, server: &mut Connection, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let taken = server.input(bytes)?;
            bytes = &bytes[taken..];
            while let Some(event) = server.event() {
                if let (Event::Start { channel, .. }, true) = (&event, self.accepts) {
                    server.accept(*channel);
                }
                self.events.push(event);
            }
            if !bytes.is_empty() {
                self.receive(server);
            }
        }
        if self.session != [0; 32] || server.output().first() != Some(&b'S') {
            self.receive(server);
        }
        Ok(())
    }

    /// Reads the server's output, but for what is under keys not there yet.
    pub fn receive(&mut self, server: &mut Connection) {
        while !server.output().is_empty() {
            if self.received.last().is_some_and(|last| last[..] == [message::NEWKEYS]) {
                return;
            }
            let output = server.output().to_vec();
            let mut rest = &output[..];
            let opened = self.opener.take(&mut rest).expect("a good record");
            server.sent(output.len() - rest.len());
            self.received.extend(opened.map(|opened| opened.payload().to_vec()));
        }
    }

    /// The first message of that number, taken out.
    pub fn take(&mut self, number: u8) -> Vec<u8> {
        let index = self.received.iter().position(|message| message[0] == number);
        self.received.remove(index.unwrap_or_else(|| panic!("no message {number} in {:?}", self.numbers())))
    }

    pub fn numbers(&self) -> Vec<u8> {
        self.received.iter().map(|message| message[0]).collect()
    }
}

/// Opens a session under the client's number `id`.
pub fn open(id: u32, window: u32) -> Vec<u8> {
    Message::new(message::CHANNEL_OPEN).string("session").u32(id).u32(window).u32(32_768).0
}

/// A request on the server's channel `id`; what follows are its fields.
pub fn request(id: u32, kind: &str, wants_reply: bool) -> Message {
    Message::new(message::CHANNEL_REQUEST).u32(id).string(kind).boolean(wants_reply)
}

pub fn data(id: u32, bytes: &[u8]) -> Vec<u8> {
    Message::new(message::CHANNEL_DATA).u32(id).string(bytes).0
}
