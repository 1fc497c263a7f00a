//! Key exchange `curve25519-sha256` (RFC 4253 §7–8, RFC 8731), as pure functions.
//!
//! One algorithm of each kind is offered, so negotiating is checking that the client has it too. Not here: when an
//! exchange happens and which messages it forbids; that is `transport`.

use alloc::string::String;
use alloc::vec::Vec;

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::cipher::{ChaChaPoly, KEY};
use crate::error::Error;
use crate::keys::HostKey;
use crate::message;
use crate::random::Random;
use crate::wire::{Reader, list_contains, names, put_bool, put_mpint, put_names, put_string, put_u32};

/// Two names of one algorithm, the older one from before it had an RFC.
const EXCHANGES: [&str; 2] = ["curve25519-sha256", "curve25519-sha256@libssh.org"];
const STRICT_SERVER: &str = "kex-strict-s-v00@openssh.com";
const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";
const EXT_INFO_CLIENT: &str = "ext-info-c";
const CIPHERS: &[&str] = &["chacha20-poly1305@openssh.com"];
/// Never used, since the cipher authenticates; but some clients want to agree on one before they look at ciphers.
const MACS: &[&str] = &["hmac-sha2-256-etm@openssh.com", "hmac-sha2-256"];
const COMPRESSIONS: &[&str] = &["none"];

/// A hash that identifies one exchange; the first one's is the session's identity.
pub type ExchangeHash = [u8; 32];

/// What both `KEXINIT`s together decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// The client numbers records from 0 after each `NEWKEYS` and forbids strays (OpenSSH's PROTOCOL §1.10).
    pub strict: bool,
    /// The client takes an `EXT_INFO` (RFC 8308).
    pub ext_info: bool,
    /// The client sent its next message on a wrong guess: it is to be dropped.
    pub drop_guess: bool,
}

/// Writes our `KEXINIT`.
pub fn offer(random: &mut dyn Random) -> Vec<u8> {
    let mut cookie = [0; 16];
    random.fill(&mut cookie);
    let mut out = Vec::from([message::KEXINIT]);
    out.extend_from_slice(&cookie);
    let [exchange, older] = EXCHANGES;
    put_names(&mut out, &[exchange, older, STRICT_SERVER]);
    put_names(&mut out, &[HostKey::ALGORITHM]);
    for kind in [CIPHERS, MACS, COMPRESSIONS] {
        put_names(&mut out, kind);
        put_names(&mut out, kind);
    }
    put_names(&mut out, &[]);
    put_names(&mut out, &[]);
    put_bool(&mut out, false);
    put_u32(&mut out, 0);
    out
}

/// Compares the client's `KEXINIT` with ours.
///
/// # Errors
/// A malformed message, or a kind of algorithm in which the client has none of ours.
pub fn agree(kexinit: &[u8]) -> Result<Agreement, Error> {
    let mut reader = Reader::new(kexinit);
    reader.bytes(1 + 16)?;
    let exchanges = reader.string()?;
    let host_keys = reader.string()?;
    let ciphers = [reader.string()?, reader.string()?];
    let _macs = [reader.string()?, reader.string()?];
    let compressions = [reader.string()?, reader.string()?];
    let _languages = [reader.string()?, reader.string()?];
    let follows = reader.boolean()?;
    reader.u32()?;

    need("key exchange", exchanges, &EXCHANGES)?;
    need("host key", host_keys, &[HostKey::ALGORITHM])?;
    for list in ciphers {
        need("cipher", list, CIPHERS)?;
    }
    for list in compressions {
        need("compression", list, COMPRESSIONS)?;
    }
    let first = |list, ours: &str| names(list).next() == Some(ours.as_bytes());
    let [preferred, _] = EXCHANGES;
    let guessed = first(exchanges, preferred) && first(host_keys, HostKey::ALGORITHM);
    Ok(Agreement {
        strict: list_contains(exchanges, STRICT_CLIENT),
        ext_info: list_contains(exchanges, EXT_INFO_CLIENT),
        drop_guess: follows && !guessed,
    })
}

fn need(kind: &'static str, offered: &[u8], ours: &[&str]) -> Result<(), Error> {
    const SHOWN: usize = 120;
    if ours.iter().any(|name| list_contains(offered, name)) {
        return Ok(());
    }
    let offered = String::from_utf8_lossy(offered.get(..SHOWN).unwrap_or(offered)).into_owned();
    Err(Error::NoCommonAlgorithm { kind, offered })
}

/// What an exchange hash is made of beside the keys.
pub struct Transcript<'a> {
    /// The client's identification line without its line end.
    pub client_version: &'a [u8],
    /// Ours.
    pub server_version: &'a [u8],
    /// The client's `KEXINIT`.
    pub client_kexinit: &'a [u8],
    /// Ours.
    pub server_kexinit: &'a [u8],
}

/// A finished exchange, before its keys are taken into use.
pub struct Exchanged {
    /// The `KEX_ECDH_REPLY` to send.
    pub reply: Vec<u8>,
    /// The exchange's hash.
    pub hash: ExchangeHash,
    /// The shared secret as an mpint.
    secret: Zeroizing<Vec<u8>>,
}

/// Answers the client's `KEX_ECDH_INIT`.
///
/// # Errors
/// A malformed message, or an ephemeral key of small order.
pub fn exchange(
    transcript: &Transcript<'_>,
    ecdh_init: &[u8],
    host_key: &HostKey,
    random: &mut dyn Random,
) -> Result<Exchanged, Error> {
    let mut reader = Reader::new(ecdh_init);
    reader.u8()?;
    let theirs = <[u8; 32]>::try_from(reader.string()?).map_err(|_| Error::EphemeralKey)?;
    let mut scalar = Zeroizing::new([0; 32]);
    random.fill(&mut *scalar);
    let ours = x25519_dalek::x25519(*scalar, x25519_dalek::X25519_BASEPOINT_BYTES);
    let shared = Zeroizing::new(x25519_dalek::x25519(*scalar, theirs));
    if bool::from(subtle::ConstantTimeEq::ct_eq(&shared[..], &[0; 32][..])) {
        return Err(Error::EphemeralKey);
    }
    // Room for all of it, so that no copy of the secret is left behind by growing.
    let mut secret = Zeroizing::new(Vec::with_capacity(4 + 1 + 32));
    put_mpint(&mut secret, &shared[..]);

    let blob = host_key.blob();
    let mut prefix = Vec::new();
    put_string(&mut prefix, transcript.client_version);
    put_string(&mut prefix, transcript.server_version);
    put_string(&mut prefix, transcript.client_kexinit);
    put_string(&mut prefix, transcript.server_kexinit);
    put_string(&mut prefix, &blob);
    put_string(&mut prefix, &theirs);
    put_string(&mut prefix, &ours);
    let hash: ExchangeHash = Sha256::new().chain_update(&prefix).chain_update(&secret[..]).finalize().into();

    let mut reply = Vec::from([message::KEX_ECDH_REPLY]);
    put_string(&mut reply, &blob);
    put_string(&mut reply, &ours);
    put_string(&mut reply, &host_key.sign(&hash));
    Ok(Exchanged { reply, hash, secret })
}

impl Exchanged {
    /// The key for what the client sends.
    pub fn client_to_server(&self, session: &ExchangeHash) -> ChaChaPoly {
        self.derive(b'C', session)
    }

    /// The key for what we send.
    pub fn server_to_client(&self, session: &ExchangeHash) -> ChaChaPoly {
        self.derive(b'D', session)
    }

    /// RFC 4253 §7.2; the cipher needs two hashes' worth.
    fn derive(&self, letter: u8, session: &ExchangeHash) -> ChaChaPoly {
        let start = || Sha256::new().chain_update(&self.secret[..]).chain_update(self.hash);
        let mut material = Zeroizing::new([0; KEY]);
        let (first, second) = material.split_at_mut(32);
        first.copy_from_slice(&start().chain_update([letter]).chain_update(session).finalize());
        second.copy_from_slice(&start().chain_update(&*first).finalize());
        ChaChaPoly::new(&material)
    }
}

/// The client's half of an exchange, for tests of the layers above.
#[cfg(test)]
pub mod client {
    use super::*;

    /// The ephemeral key of a client with this secret.
    pub fn public(scalar: [u8; 32]) -> [u8; 32] {
        x25519_dalek::x25519(scalar, x25519_dalek::X25519_BASEPOINT_BYTES)
    }

    /// Checks the server's `KEX_ECDH_REPLY` and comes to the same keys.
    pub fn finish(transcript: &Transcript<'_>, scalar: [u8; 32], reply: &[u8]) -> Exchanged {
        let mut reader = Reader::new(reply);
        assert_eq!(reader.u8(), Ok(message::KEX_ECDH_REPLY));
        let blob = reader.string().expect("host key");
        let theirs = reader.string().expect("ephemeral key");
        let signature = reader.string().expect("signature");
        let shared = x25519_dalek::x25519(scalar, theirs.try_into().expect("32 bytes"));
        let mut secret = Zeroizing::new(Vec::new());
        put_mpint(&mut secret, &shared);
        let mut hashed = Vec::new();
        put_string(&mut hashed, transcript.client_version);
        put_string(&mut hashed, transcript.server_version);
        put_string(&mut hashed, transcript.client_kexinit);
        put_string(&mut hashed, transcript.server_kexinit);
        put_string(&mut hashed, blob);
        put_string(&mut hashed, &public(scalar));
        put_string(&mut hashed, theirs);
        hashed.extend_from_slice(&secret);
        let hash: ExchangeHash = Sha256::digest(&hashed).into();
        let host = crate::keys::PublicKey::from_blob(blob).expect("a host key");
        host.verify(b"ssh-ed25519", &hash, signature).expect("the host's signature");
        Exchanged { reply: Vec::new(), hash, secret }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kexinit(lists: [&str; 10], follows: bool) -> Vec<u8> {
        let mut out = Vec::from([message::KEXINIT]);
        out.extend_from_slice(&[9; 16]);
        for list in lists {
            put_string(&mut out, list.as_bytes());
        }
        put_bool(&mut out, follows);
        put_u32(&mut out, 0);
        out
    }

    fn good(exchanges: &str) -> [&str; 10] {
        let cipher = "aes128-ctr,chacha20-poly1305@openssh.com";
        [exchanges, "rsa-sha2-512,ssh-ed25519", cipher, cipher, "x", "", "none,zlib", "none", "", ""]
    }

    #[test]
    fn our_own_offer_is_one_we_would_agree_to() {
        let offer = offer(&mut |bytes: &mut [u8]| bytes.fill(3));
        assert_eq!(agree(&offer), Ok(Agreement { strict: false, ext_info: false, drop_guess: false }));
    }

    #[test]
    fn extensions_and_guesses_are_noticed() {
        let lists = good("curve25519-sha256,ext-info-c,kex-strict-c-v00@openssh.com");
        let agreed = agree(&kexinit(lists, true)).expect("algorithms in common");
        // The first host key algorithm is not ours, so the guess that follows is wrong.
        assert_eq!(agreed, Agreement { strict: true, ext_info: true, drop_guess: true });
        let mut right = lists;
        right[1] = "ssh-ed25519";
        assert!(!agree(&kexinit(right, true)).expect("algorithms in common").drop_guess);
    }

    #[test]
    fn each_kind_without_a_common_algorithm_is_named() {
        for (index, kind) in
            [(0, "key exchange"), (1, "host key"), (2, "cipher"), (3, "cipher"), (7, "compression")]
        {
            let mut lists = good("curve25519-sha256@libssh.org");
            lists[index] = "nothing";
            let error = agree(&kexinit(lists, false)).expect_err("no common algorithm");
            assert_eq!(error, Error::NoCommonAlgorithm { kind, offered: "nothing".into() });
        }
    }

    #[test]
    fn ephemeral_keys_of_small_order_are_refused() {
        let transcript =
            Transcript { client_version: b"", server_version: b"", client_kexinit: b"", server_kexinit: b"" };
        let key = HostKey::from_seed(&[1; 32]);
        for point in [[0u8; 32], core::array::from_fn(|i| u8::from(i == 0))] {
            let mut init = Vec::from([message::KEX_ECDH_INIT]);
            put_string(&mut init, &point);
            let result = exchange(&transcript, &init, &key, &mut |bytes: &mut [u8]| bytes.fill(7));
            assert_eq!(result.err(), Some(Error::EphemeralKey));
        }
    }

    proptest! {
        #[test]
        fn a_cut_or_garbled_offer_never_panics(end in 0usize..400, garbage in prop::collection::vec(any::<u8>(), 0..200)) {
            let whole = kexinit(good("curve25519-sha256"), false);
            if let Some(cut) = whole.get(..end).filter(|cut| cut.len() < whole.len()) {
                prop_assert!(agree(cut).is_err());
            }
            let _ = agree(&garbage);
        }
    }
}
