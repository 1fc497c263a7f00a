//! The connection against a client in the same process, honest and hostile.

mod client;
mod hostile;

use super::*;
use crate::config::Limits;
use crate::event::{Program, Pty, Stream, WindowSize};
use crate::message::*;
use alloc::vec;
use client::{Client, Message, data, open, request, server, user_key};

const FIRST: ChannelId = ChannelId(0);

fn keepalive() -> Vec<u8> {
    Message::new(GLOBAL_REQUEST).string("keepalive@openssh.com").boolean(true).0
}

#[test]
fn the_algorithms_for_signatures_are_told_right_after_the_keys() {
    let mut server = server(Limits::default());
    let mut client = Client::keyed(&mut server, true);
    let info = client.take(EXT_INFO);
    let mut reader = Reader::new(&info[1..]);
    assert_eq!((reader.u32(), reader.string()), (Ok(1), Ok(&b"server-sig-algs"[..])));
    assert!(reader.string().expect("algorithms").starts_with(b"ssh-ed25519,"));
}

#[test]
fn none_is_answered_with_public_keys_and_a_key_is_first_asked_about() {
    let mut server = server(Limits::default());
    let mut client = Client::keyed(&mut server, false);
    client.send(&mut server, &Message::new(SERVICE_REQUEST).string("ssh-userauth").0).expect("a service");
    let start = || Message::new(USERAUTH_REQUEST).string("alice").string("ssh-connection");
    client.send(&mut server, &start().string("none").0).expect("an answer");
    assert_eq!(
        client.take(USERAUTH_FAILURE),
        Message::new(USERAUTH_FAILURE).string("publickey").boolean(false).0
    );

    let key = client::blob_of(&user_key());
    let question = start().string("publickey").boolean(false).string("ssh-ed25519").string(&key);
    client.send(&mut server, &question.0).expect("an answer");
    assert_eq!(
        client.take(USERAUTH_PK_OK),
        Message::new(USERAUTH_PK_OK).string("ssh-ed25519").string(&key).0
    );
    assert!(!server.is_authenticated());

    let proof = client.signed_request("alice", &user_key());
    client.send(&mut server, &proof).expect("an answer");
    client.take(USERAUTH_SUCCESS);
    assert!(matches!(&client.events[..], [Event::Authenticated { user, .. }] if user == "alice"));
    client.send(&mut server, &proof).expect("ignored");
    assert_eq!(client.events.len(), 1);
}

#[test]
fn a_program_runs_from_its_start_to_its_close() {
    let mut server = server(Limits::default());
    let mut client = Client::authenticated(&mut server);
    client.send(&mut server, &open(7, 100)).expect("a channel");
    let confirmation = Message::new(CHANNEL_OPEN_CONFIRMATION).u32(7).u32(0).u32(2 << 20).u32(32_768);
    assert_eq!(client.take(CHANNEL_OPEN_CONFIRMATION), confirmation.0);
    client.send(&mut server, &request(0, "exec", true).string("uptime").0).expect("a start");
    assert_eq!(client.take(CHANNEL_SUCCESS), Message::new(CHANNEL_SUCCESS).u32(7).0);
    let program = Program::Exec(b"uptime".to_vec());
    assert_eq!(client.events, [Event::Opened { channel: FIRST }, Event::Start { channel: FIRST, program }]);
    client.events.clear();

    client.send(&mut server, &data(0, b"input")).expect("data");
    assert_eq!(server.data(FIRST), b"input");
    server.consume(FIRST, 3);
    client.send(&mut server, &Message::new(CHANNEL_EOF).u32(0).0).expect("eof");
    assert!(!server.is_at_end(FIRST));
    server.consume(FIRST, 2);
    assert!(server.is_at_end(FIRST));
    assert_eq!(client.events, [Event::Data { channel: FIRST }, Event::Eof { channel: FIRST }]);

    assert_eq!(server.write(FIRST, Stream::Err, b"warning"), Ok(7));
    assert_eq!(server.write(FIRST, Stream::Out, &[1; 200]), Ok(93), "the rest of the window");
    server.finish(FIRST, 3);
    assert_eq!(server.write(FIRST, Stream::Out, b"late"), Err(ChannelEnded));
    client.receive(&mut server);
    let status = Message::new(CHANNEL_REQUEST).u32(7).string("exit-status").boolean(false).u32(3);
    let expected = [
        Message::new(CHANNEL_EXTENDED_DATA).u32(7).u32(1).string("warning").0,
        data(7, &[1; 93]),
        status.0,
        Message::new(CHANNEL_EOF).u32(7).0,
        Message::new(CHANNEL_CLOSE).u32(7).0,
    ];
    assert_eq!(client.received, expected);
    client.send(&mut server, &Message::new(CHANNEL_CLOSE).u32(0).0).expect("close");
    assert_eq!(client.events.last(), Some(&Event::Closed { channel: FIRST }));
    assert_eq!(server.write(FIRST, Stream::Out, b"late"), Err(ChannelEnded));
}

#[test]
fn terminal_environment_and_signals_reach_the_driver() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    let terminal =
        request(0, "pty-req", true).string("xterm").u32(80).u32(24).u32(640).u32(480).string([53, 0]);
    client.send(&mut server, &terminal.0).expect("granted");
    client.send(&mut server, &request(0, "env", true).string("LANG").string("C").0).expect("granted");
    let resized = request(0, "window-change", false).u32(100).u32(50).u32(0).u32(0);
    client.send(&mut server, &resized.0).expect("no answer");
    client.send(&mut server, &request(0, "signal", false).string("INT").0).expect("no answer");
    assert_eq!(client.numbers(), [CHANNEL_SUCCESS, CHANNEL_SUCCESS]);
    let size = WindowSize { columns: 80, rows: 24, width_px: 640, height_px: 480 };
    let pty = Pty { term: "xterm".into(), size, modes: vec![53, 0] };
    let larger = WindowSize { columns: 100, rows: 50, width_px: 0, height_px: 0 };
    let expected = [
        Event::Pty { channel: FIRST, pty },
        Event::Env { channel: FIRST, name: b"LANG".to_vec(), value: b"C".to_vec() },
        Event::WindowChange { channel: FIRST, size: larger },
        Event::Signal { channel: FIRST, name: "INT".into() },
    ];
    assert_eq!(client.events, expected);
    client.send(&mut server, &request(0, "subsystem", true).string([b'x'; 300]).0).expect("refused");
    assert_eq!(client.numbers().last(), Some(&CHANNEL_FAILURE));
}

#[test]
fn a_close_by_the_client_is_answered() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    client.send(&mut server, &Message::new(CHANNEL_CLOSE).u32(0).0).expect("close");
    assert_eq!(client.received, [Message::new(CHANNEL_CLOSE).u32(7).0]);
    assert_eq!(client.events, [Event::Closed { channel: FIRST }]);
}

#[test]
fn a_program_nobody_answered_for_is_refused() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    client.accepts = false;
    client.send(&mut server, &request(0, "shell", true).0).expect("a start");
    assert_eq!(client.numbers(), []);
    client.send(&mut server, &keepalive()).expect("a keepalive");
    assert_eq!(client.numbers(), [CHANNEL_FAILURE, REQUEST_FAILURE], "in the order of the requests");
    client.send(&mut server, &request(0, "shell", true).0).expect("a second start");
    assert_eq!(client.numbers(), [CHANNEL_FAILURE, REQUEST_FAILURE, CHANNEL_FAILURE]);
}

#[test]
fn channels_have_a_limit_and_numbers_are_not_used_again() {
    let mut server = server(Limits { channels: 2, ..Limits::default() });
    let mut client = Client::authenticated(&mut server);
    for id in 0..3 {
        client.send(&mut server, &open(id, 100)).expect("an answer");
    }
    assert_eq!(
        client.numbers(),
        [CHANNEL_OPEN_CONFIRMATION, CHANNEL_OPEN_CONFIRMATION, CHANNEL_OPEN_FAILURE]
    );
    client.send(&mut server, &Message::new(CHANNEL_CLOSE).u32(0).0).expect("close");
    client.received.clear();
    client.send(&mut server, &open(9, 100)).expect("an answer");
    let confirmation = client.take(CHANNEL_OPEN_CONFIRMATION);
    assert_eq!(confirmation[5..9], 2u32.to_be_bytes());
}

#[test]
fn channels_of_other_types_are_refused_with_a_reason() {
    let mut server = server(Limits::default());
    let mut client = Client::authenticated(&mut server);
    for (kind, code) in [("direct-tcpip", 1u32), ("x11", 3)] {
        let open = Message::new(CHANNEL_OPEN).string(kind).u32(4).u32(100).u32(100).string("rest");
        client.send(&mut server, &open.0).expect("an answer");
        let failure = client.take(CHANNEL_OPEN_FAILURE);
        assert_eq!(failure[1..9], [4u32.to_be_bytes(), code.to_be_bytes()].concat());
    }
    client
        .send(
            &mut server,
            &Message::new(GLOBAL_REQUEST).string("no-more-sessions@openssh.com").boolean(false).0,
        )
        .expect("noted");
    client.send(&mut server, &open(4, 100)).expect("an answer");
    client.take(CHANNEL_OPEN_FAILURE);
}

#[test]
fn requests_of_unknown_types_fail_and_messages_of_unknown_numbers_are_named() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    client.send(&mut server, &request(0, "auth-agent-req@openssh.com", true).0).expect("an answer");
    client.take(CHANNEL_FAILURE);
    client.send(&mut server, &request(0, "eow@openssh.com", false).0).expect("nothing");
    assert_eq!(client.numbers(), []);
    client.send(&mut server, &[192, 1, 2]).expect("an answer");
    // Records 0 to 4 under this key: service, proof, open, and the two requests.
    assert_eq!(client.take(UNIMPLEMENTED), Message::new(UNIMPLEMENTED).u32(5).0);
}

#[test]
fn data_is_granted_again_in_halves_of_the_window() {
    let mut server = server(Limits { receive_window: 1000, ..Limits::default() });
    let mut client = Client::with_channel(&mut server);
    client.send(&mut server, &data(0, &[0; 1000])).expect("data");
    server.consume(FIRST, 499);
    client.receive(&mut server);
    assert_eq!(client.numbers(), []);
    server.consume(FIRST, 1);
    client.receive(&mut server);
    assert_eq!(client.received, [Message::new(CHANNEL_WINDOW_ADJUST).u32(7).u32(500).0]);
    client.send(&mut server, &data(0, &[0; 500])).expect("data");
    let error = client.send(&mut server, &data(0, &[0; 1]));
    assert_eq!(error, Err(Error::WindowExceeded { channel: 0 }));
}

#[test]
fn nothing_of_a_channel_is_sent_during_a_key_exchange_and_all_of_it_after() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    server.renew_keys();
    assert_eq!(server.write(FIRST, Stream::Out, b"data"), Ok(0));
    assert_eq!(server.writable(FIRST), 0);
    server.exit_status(FIRST, 0);
    // What the client sent before it saw our KEXINIT is still taken, and answered later.
    client.send(&mut server, &keepalive()).expect("a keepalive");
    client.send(&mut server, &data(0, b"data")).expect("data");
    assert_eq!(client.numbers(), [KEXINIT]);
    client.exchange_keys(&mut server).expect("new keys");
    assert_eq!(client.numbers(), [CHANNEL_REQUEST, REQUEST_FAILURE]);
    assert_eq!(server.write(FIRST, Stream::Out, b"data"), Ok(4));
    assert_eq!(server.data(FIRST), b"data");
}

#[test]
fn keys_are_renewed_by_volume() {
    let mut server = server(Limits { rekey_bytes: 10_000, ..Limits::default() });
    let mut client = Client::with_channel(&mut server);
    for round in 1..4 {
        assert_eq!(server.write(FIRST, Stream::Out, &[0; 10_000]), Ok(10_000));
        assert_eq!(server.writable(FIRST), 0, "round {round}: an exchange is going on");
        client.receive(&mut server);
        assert_eq!(client.numbers(), [CHANNEL_DATA, KEXINIT]);
        client.exchange_keys(&mut server).expect("new keys");
        client.received.clear();
    }
}

#[test]
fn output_has_a_limit_and_input_waits_for_it() {
    let mut server = server(Limits { output: 50_000, ..Limits::default() });
    let mut client = Client::with_channel(&mut server);
    let taken = server.write(FIRST, Stream::Out, &[0; 200_000]).expect("open");
    assert!((40_000..=50_000).contains(&taken), "{taken}");
    assert!(server.output().len() < 51_000);
    // Answers pile up only so far; then the client has to read first.
    let mut taken = 0;
    loop {
        let question = client.seal(&keepalive());
        if server.input(&question).expect("a question") == 0 {
            break;
        }
        taken += 1;
        assert!(taken < 2000, "input is taken without end");
    }
    assert!(!server.takes_input());
    assert!(server.output().len() < 51_000 + 17_000);
    client.receive(&mut server);
    assert!(server.takes_input());
}

#[test]
fn both_sides_can_leave() {
    let mut one = server(Limits::default());
    let mut client = Client::with_channel(&mut one);
    client.send(&mut one, &Message::new(DISCONNECT).u32(11).string("bye").string("").0).expect("a farewell");
    let farewell = Event::Disconnected { reason: 11, text: "bye".into() };
    assert_eq!(client.events, [Event::Closed { channel: FIRST }, farewell]);
    assert!(one.is_closed());
    assert_eq!(one.input(b"more"), Err(Error::Closed));
    assert_eq!(one.write(FIRST, Stream::Out, b"more"), Err(ChannelEnded));

    let mut other = server(Limits::default());
    let mut client = Client::authenticated(&mut other);
    other.disconnect("the machine stops");
    client.receive(&mut other);
    let message = Message::new(DISCONNECT).u32(11).string("the machine stops").string("");
    assert_eq!(client.received, [message.0]);
    assert!(other.is_closed() && other.output().is_empty());
}

#[test]
fn every_byte_may_come_alone() {
    let mut server = server(Limits::default());
    let mut client = Client::with_channel(&mut server);
    let mut stream = client.seal(&data(0, &vec![3; 500]));
    stream.extend(client.seal(&keepalive()));
    for byte in stream {
        client.give(&mut server, &[byte]).expect("a byte");
    }
    assert_eq!(server.data(FIRST), [3; 500]);
    assert_eq!(client.numbers(), [REQUEST_FAILURE]);
}
