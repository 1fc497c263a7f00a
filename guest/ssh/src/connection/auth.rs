//! Authentication by public key (RFC 4252 §7); nothing else is offered.
//!
//! An unknown user, a key not listed and a wrong signature are answered alike. A key is looked up before its
//! signature is checked, so strangers cost no curve arithmetic.

use alloc::string::String;
use alloc::vec::Vec;

use super::{Connection, Phase};
use crate::error::Error;
use crate::event::Event;
use crate::keys::PublicKey;
use crate::message;
use crate::wire::{Reader, put_bool, put_names, put_string};

/// Attempts of any outcome; asking about keys one has costs no failure, but is no endless pastime either.
const MAX_ATTEMPTS: u32 = 100;

/// How a user authenticates so far.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Attempts {
    made: u32,
    failed: u32,
}

enum Verdict {
    /// Nothing proved; counted as a failure unless the client only asked what there is.
    No { counts: bool },
    /// A proof by this key would do.
    WouldDo,
    /// Proved.
    Yes { fingerprint: String },
}

impl Connection {
    /// Grants the authentication service, which must be asked for first.
    pub(super) fn service_request(&mut self, payload: &[u8]) -> Result<(), Error> {
        let mut reader = Reader::new(payload);
        reader.u8()?;
        let service = reader.string()?;
        if service != b"ssh-userauth" {
            return Err(Error::Service);
        }
        if matches!(self.phase, Phase::Service) {
            self.phase = Phase::Auth(Attempts::default());
        }
        let mut reply = Vec::from([message::SERVICE_ACCEPT]);
        put_string(&mut reply, service);
        self.transport.send(&reply);
        Ok(())
    }

    /// Judges one attempt and answers it.
    pub(super) fn auth_request(&mut self, mut attempts: Attempts, payload: &[u8]) -> Result<(), Error> {
        attempts.made += 1;
        let mut reader = Reader::new(payload);
        reader.u8()?;
        let user = reader.string()?;
        let service = reader.string()?;
        let method = reader.string()?;
        if service != b"ssh-connection" {
            return Err(Error::Service);
        }
        let verdict = match method {
            b"publickey" => self.judge(user, payload, &mut reader)?,
            b"none" => Verdict::No { counts: attempts.made > 1 },
            _ => Verdict::No { counts: true },
        };
        match verdict {
            Verdict::No { counts } => {
                attempts.failed += u32::from(counts);
                let mut reply = Vec::from([message::USERAUTH_FAILURE]);
                put_names(&mut reply, &["publickey"]);
                put_bool(&mut reply, false);
                self.transport.send(&reply);
            }
            Verdict::WouldDo => {
                let mut reply = Vec::from([message::USERAUTH_PK_OK]);
                reply.extend_from_slice(reader.rest());
                self.transport.send(&reply);
            }
            Verdict::Yes { fingerprint } => {
                self.transport.send(&[message::USERAUTH_SUCCESS]);
                self.transport.allow_renewal();
                self.phase = Phase::Open;
                let user = String::from_utf8_lossy(user).into_owned();
                self.events.push_back(Event::Authenticated { user, fingerprint });
                return Ok(());
            }
        }
        if attempts.failed >= self.config.limits.auth_failures || attempts.made >= MAX_ATTEMPTS {
            return Err(Error::TooManyAttempts);
        }
        self.phase = Phase::Auth(attempts);
        Ok(())
    }

    /// Judges a key, and its signature if there is one. Leaves `reader` at the algorithm when the key would do,
    /// because the answer repeats algorithm and key.
    fn judge<'a>(&self, user: &[u8], payload: &'a [u8], reader: &mut Reader<'a>) -> Result<Verdict, Error> {
        let proves = reader.boolean()?;
        let start = reader.clone();
        let algorithm = reader.string()?;
        let blob = reader.string()?;
        let no = Ok(Verdict::No { counts: true });
        let Ok(key) = PublicKey::from_blob(blob) else { return no };
        if !key.signs_with(algorithm) || !self.config.allows(user, &key) {
            return no;
        }
        if !proves {
            let well_formed = reader.is_empty();
            *reader = start;
            return if well_formed { Ok(Verdict::WouldDo) } else { no };
        }
        // What is signed: the session, and the request up to its signature.
        let Some(session) = self.transport.session() else { return no };
        let request = payload.get(..payload.len() - reader.rest().len()).unwrap_or_default();
        let signature = reader.string()?;
        let mut signed = Vec::with_capacity(4 + session.len() + request.len());
        put_string(&mut signed, session);
        signed.extend_from_slice(request);
        match key.verify(algorithm, &signed, signature) {
            Ok(()) if reader.is_empty() => Ok(Verdict::Yes { fingerprint: key.fingerprint() }),
            _ => no,
        }
    }
}
