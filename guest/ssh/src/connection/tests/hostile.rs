//! Peers that break the rules: each is told why, and nothing panics or grows.

use super::client::{Client, Message, blob_of, data, open, request, server, user_key};
use crate::config::Limits;
use crate::connection::Connection;
use crate::error::Error;
use crate::keys::HostKey;
use crate::message::*;
use crate::wire::Truncated;
use alloc::vec;
use alloc::vec::Vec;
use ed25519_dalek::SigningKey;
use proptest::prelude::*;

/// The reason the peer is told for the error it caused.
#[track_caller]
fn assert_told(server: &mut Connection, client: &mut Client, reason: Reason) {
    assert!(server.is_closed());
    client.receive(server);
    let farewell = client.take(DISCONNECT);
    assert_eq!(farewell[1..5], (reason as u32).to_be_bytes());
}

#[test]
fn other_protocols_are_turned_away_at_their_first_bytes() {
    for greeting in [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x03\x01", b"SSH-1.5-old\n", b"SSHx", b"\0"] {
        let mut server = server(Limits::default());
        assert_eq!(server.input(greeting), Err(Error::NotSsh), "{greeting:?}");
        assert!(server.output().ends_with(b"Protocol mismatch.\r\n"));
    }
    let mut patient = server(Limits::default());
    let endless: Vec<u8> = b"SSH-2.0-".iter().copied().chain(core::iter::repeat_n(b'x', 1000)).collect();
    assert_eq!(patient.input(&endless), Err(Error::NotSsh));
}

#[test]
fn a_damaged_record_ends_the_connection() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    let mut record = client.seal(&data(0, b"data"));
    let last = record.len() - 1;
    record[last] ^= 1;
    assert!(matches!(client.give(&mut server, &record), Err(Error::BadTag(_))));
    assert_eq!(client.events, [], "nothing of it was delivered");
    assert_told(&mut server, &mut client, Reason::MacError);
}

#[test]
fn a_strict_exchange_takes_no_strays() {
    // The Terrapin attack: something slipped in before the keys are there.
    let mut early = server(Limits::default());
    let mut client = Client::greeted(&mut early);
    client.send(&mut early, &Message::new(IGNORE).string("stray").0).expect("not known to be strict yet");
    let kexinit = client.kexinit();
    client.send(&mut early, &kexinit).expect("a client that is not strict");

    let mut strict = server(Limits::default());
    let mut client = Client::greeted(&mut strict);
    client.send(&mut strict, &Message::new(IGNORE).string("stray").0).expect("not known to be strict yet");
    let kexinit = with_strict(&client);
    let error = client.send(&mut strict, &kexinit).expect_err("a stray before it");
    assert!(matches!(error, Error::Unexpected { number: KEXINIT, .. }));

    let mut between = server(Limits::default());
    let mut client = Client::greeted(&mut between);
    let kexinit = with_strict(&client);
    client.send(&mut between, &kexinit).expect("the first message");
    let error = client.send(&mut between, &Message::new(IGNORE).string("stray").0).expect_err("a stray");
    assert!(matches!(error, Error::Unexpected { number: IGNORE, .. }));
}

fn with_strict(client: &Client) -> Vec<u8> {
    let position =
        client.kexinit().windows(7).position(|window| window == b"nothing").expect("the placeholder");
    let mut kexinit = client.kexinit();
    // The list grows by the difference in length.
    kexinit.splice(position..position + 7, *b"kex-strict-c-v00@openssh.com");
    let length = u32::from_be_bytes(kexinit[17..21].try_into().expect("4 bytes")) + 28 - 7;
    kexinit[17..21].copy_from_slice(&length.to_be_bytes());
    kexinit
}

#[test]
fn messages_out_of_their_place_are_refused() {
    for number in [NEWKEYS, KEX_ECDH_INIT, SERVICE_REQUEST, USERAUTH_REQUEST, CHANNEL_OPEN, EXT_INFO] {
        let mut server = server(Limits::default());
        let mut client = Client::greeted(&mut server);
        let error = client.send(&mut server, &Message::new(number).string("x").0).expect_err("too early");
        assert!(matches!(error, Error::Unexpected { .. }), "{number}: {error}");
    }
    for number in [GLOBAL_REQUEST, CHANNEL_OPEN, CHANNEL_DATA, USERAUTH_REQUEST, 192] {
        let mut server = server(Limits::default());
        let mut client = Client::keyed(&mut server, true);
        let error =
            client.send(&mut server, &Message::new(number).string("x").0).expect_err("not authenticated");
        assert!(matches!(error, Error::Unexpected { .. }), "{number}: {error}");
        assert_told(&mut server, &mut client, Reason::ProtocolError);
    }
    for number in [CHANNEL_OPEN_CONFIRMATION, CHANNEL_OPEN_FAILURE, CHANNEL_SUCCESS, CHANNEL_FAILURE] {
        let mut server = server(Limits::default());
        let mut client = Client::with_channel(&mut server);
        let error = client.send(&mut server, &Message::new(number).u32(0).0).expect_err("nothing was asked");
        assert!(matches!(error, Error::Unexpected { .. }), "{number}: {error}");
    }
    let mut other = server(Limits::default());
    let mut client = Client::keyed(&mut other, true);
    let error = client.send(&mut other, &Message::new(SERVICE_REQUEST).string("ssh-connection").0);
    assert_eq!(error, Err(Error::Service));
}

#[test]
fn messages_for_channels_that_are_not_there_are_refused() {
    for number in [CHANNEL_DATA, CHANNEL_EOF, CHANNEL_CLOSE, CHANNEL_WINDOW_ADJUST, CHANNEL_REQUEST] {
        let mut server = server(Limits::default());
        let mut client = Client::with_channel(&mut server);
        let error = client.send(&mut server, &Message::new(number).u32(1).string("x").0);
        assert_eq!(error, Err(Error::NoSuchChannel { channel: 1 }));
    }
}

#[test]
fn a_window_cannot_be_made_to_overflow() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    let adjust = Message::new(CHANNEL_WINDOW_ADJUST).u32(0).u32(u32::MAX).0;
    assert_eq!(client.send(&mut server, &adjust), Err(Error::WindowOverflow { channel: 0 }));
}

#[test]
fn attempts_to_authenticate_are_counted() {
    let mut server = server(Limits { auth_failures: 3, ..Limits::default() });
    let mut client = Client::keyed(&mut server, true);
    client.send(&mut server, &Message::new(SERVICE_REQUEST).string("ssh-userauth").0).expect("a service");
    let stranger = SigningKey::from_bytes(&[1; 32]);
    for attempt in 1..=3 {
        // Asking for the service again does not start the count again.
        client.send(&mut server, &Message::new(SERVICE_REQUEST).string("ssh-userauth").0).expect("a service");
        let proof = client.signed_request("alice", &stranger);
        let expected = if attempt < 3 { Ok(()) } else { Err(Error::TooManyAttempts) };
        assert_eq!(client.send(&mut server, &proof), expected);
    }
    assert_told(&mut server, &mut client, Reason::NoMoreAuthMethodsAvailable);
}

#[test]
fn asking_about_a_key_is_no_endless_pastime() {
    let mut server = server(Limits::default());
    let mut client = Client::keyed(&mut server, true);
    client.send(&mut server, &Message::new(SERVICE_REQUEST).string("ssh-userauth").0).expect("a service");
    let question =
        Message::new(USERAUTH_REQUEST).string("alice").string("ssh-connection").string("publickey");
    let question = question.boolean(false).string("ssh-ed25519").string(blob_of(&user_key())).0;
    let asked = (0..1000).take_while(|_| client.send(&mut server, &question).is_ok()).count();
    assert_eq!(asked, 99);
}

#[test]
fn a_proof_holds_for_its_session_user_and_key_only() {
    let mut server = server(Limits::default());
    let mut client = Client::keyed(&mut server, true);
    client.send(&mut server, &Message::new(SERVICE_REQUEST).string("ssh-userauth").0).expect("a service");
    let right = client.signed_request("alice", &user_key());
    let session = core::mem::replace(&mut client.session, [1; 32]);
    let other_session = client.signed_request("alice", &user_key());
    client.session = session;
    let other_user = client.signed_request("root", &user_key());
    let mut swapped = other_user.clone();
    swapped.splice(5..9, *b"alice");
    swapped[1..5].copy_from_slice(&5u32.to_be_bytes());
    let mut longer = right.clone();
    longer.push(0);
    for wrong in [other_session, other_user, swapped, longer] {
        client.send(&mut server, &wrong).expect("a failure");
        client.take(USERAUTH_FAILURE);
        assert!(!server.is_authenticated());
    }
    client.send(&mut server, &right).expect("a success");
    assert!(server.is_authenticated());
}

#[test]
fn requests_cannot_pile_up_behind_a_key_exchange() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    server.renew_keys();
    let question = Message::new(GLOBAL_REQUEST).string("x").boolean(true).0;
    let taken = (0..10_000).take_while(|_| client.send(&mut server, &question).is_ok()).count();
    assert_eq!(taken, 256);
    assert!(server.is_closed());
}

#[test]
fn without_common_algorithms_the_peer_learns_which() {
    let mut server = server(Limits::default());
    let mut client = Client::greeted(&mut server);
    let mut kexinit = client.kexinit();
    let at = kexinit.windows(8).position(|window| window == b"chacha20").expect("the cipher");
    kexinit[at] = b'x';
    let error = client.send(&mut server, &kexinit).expect_err("no cipher");
    assert!(matches!(error, Error::NoCommonAlgorithm { kind: "cipher", .. }));
    assert_told(&mut server, &mut client, Reason::KeyExchangeFailed);
}

#[test]
fn host_keys_say_nothing_of_their_seed() {
    let key = HostKey::from_seed(&[42; 32]);
    let shown = std::format!("{key:?}");
    assert!(shown.starts_with("HostKey(SHA256:") && !shown.contains("42"), "{shown}");
}

#[test]
fn a_message_cut_anywhere_is_refused() {
    let messages = [
        open(3, 100),
        request(0, "pty-req", true).string("xterm").u32(80).u32(24).u32(0).u32(0).string("").0,
        request(0, "exec", true).string("ls").0,
        request(0, "window-change", false).u32(80).u32(24).u32(0).u32(0).0,
        data(0, b"data"),
        Message::new(CHANNEL_WINDOW_ADJUST).u32(0).u32(10).0,
        Message::new(GLOBAL_REQUEST).string("x").boolean(true).0,
        Message::new(DISCONNECT).u32(11).string("bye").0,
    ];
    for whole in messages {
        for end in 1..whole.len() {
            let mut server = server(Limits::default());
            let mut client = Client::with_channel(&mut server);
            assert_eq!(client.send(&mut server, &whole[..end]), Err(Error::Truncated(Truncated)), "{end}");
        }
    }
}

/// A message of a number that means something, with fields that may.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let names = prop::sample::select(vec![
        "session",
        "exec",
        "shell",
        "pty-req",
        "env",
        "subsystem",
        "window-change",
        "signal",
        "ssh-userauth",
        "ssh-connection",
        "publickey",
        "none",
        "alice",
        "keepalive@openssh.com",
        "ssh-ed25519",
    ]);
    let field = prop_oneof![
        names.prop_map(|name| Message::default().string(name).0),
        (0u32..3).prop_map(|number| Message::default().u32(number).0),
        any::<u32>().prop_map(|number| Message::default().u32(number).0),
        any::<bool>().prop_map(|flag| Message::default().boolean(flag).0),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let number =
        prop_oneof![any::<u8>(), prop::sample::select(vec![5u8, 20, 50, 80, 90, 93, 94, 95, 96, 97, 98])];
    (number, prop::collection::vec(field, 0..8)).prop_map(|(number, fields)| {
        let mut message = vec![number];
        message.extend(fields.concat());
        message
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_at_all_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..600), greet: bool) {
        if greet {
            bytes.splice(0..0, *b"SSH-2.0-x\r\n");
        }
        let mut server = server(Limits::default());
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match server.input(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(_) => break,
            }
            while server.event().is_some() {}
        }
        prop_assert!(server.output().len() < 2000);
    }

    #[test]
    fn any_messages_from_a_user_never_panic_and_memory_stays_bounded(messages in prop::collection::vec(message(), 1..30)) {
        let mut server = server(Limits { channels: 3, receive_window: 1000, ..Limits::default() });
        let mut client = Client::with_channel(&mut server);
        for message in messages {
            // The client does not go through with exchanges it starts here.
            if client.send(&mut server, &message).is_err() {
                break;
            }
            if client.received.last().is_some_and(|last| last[0] == NEWKEYS) {
                break;
            }
        }
        prop_assert!(server.channels.len() <= 3);
        prop_assert!(server.channels.values().all(|channel| channel.unread().len() <= 1000));
    }
}
