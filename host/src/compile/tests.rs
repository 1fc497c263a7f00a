use std::{io::Cursor, sync::mpsc};

use super::*;
use crate::scratch::Scratch;

fn key(byte: u8) -> blake3::Hash {
    blake3::hash(&[byte])
}

/// The code kept, read as a reply would be.
fn kept(cache: &Cache, byte: u8) -> Option<Vec<u8>> {
    let (file, length) = cache.find(&key(byte))?;
    let mut code = Vec::new();
    file.take(length).read_to_end(&mut code).unwrap();
    Some(code)
}

#[test]
fn kept_code_is_found_until_room_is_wanted() {
    let scratch = Scratch::new("code");
    let cache = Cache::open(scratch.path().join("code"), 300).unwrap();
    assert_eq!(kept(&cache, 1), None);
    for byte in 1..=3 {
        cache.keep(&key(byte), &[byte; 50]);
    }
    assert_eq!(kept(&cache, 1), Some(vec![1; 50]), "the oldest, now the newest");
    cache.keep(&key(4), &[4; 100]);
    assert_eq!(kept(&cache, 2), None);
    assert_eq!(kept(&cache, 1), Some(vec![1; 50]));
    assert_eq!(kept(&cache, 4), Some(vec![4; 100]));
    cache.keep(&key(5), &[5; 500]);
    assert_eq!(kept(&cache, 5), None, "larger than the bound");
}

#[test]
fn damaged_code_is_none() {
    let scratch = Scratch::new("damage");
    let code = scratch.path().join("code");
    let cache = Cache::open(code.clone(), 1000).unwrap();
    for at in [0, 31, 32, 81] {
        cache.keep(&key(1), &[1; 50]);
        let path = code.join(key(1).to_hex().as_str());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(kept(&cache, 1), None);
    }
    std::fs::write(code.join("new-7-1"), "half").unwrap();
    drop(Cache::open(code.clone(), 1000).unwrap());
    assert_eq!(std::fs::read_dir(&code).unwrap().count(), 0, "what was not written to its end is no code");
}

/// The bytes of a request, without its last `left_out`.
fn request(protocol: u32, wasm: &[u8], left_out: usize) -> Vec<u8> {
    let length = (wasm.len() as u32).to_le_bytes();
    let mut bytes = [b"kagecomp".as_slice(), &protocol.to_le_bytes(), &[1, b'e'], &length, wasm].concat();
    bytes.truncate(bytes.len() - left_out);
    bytes
}

/// A listening socket, and connections to it that come over as many interfaces as one likes.
struct Line(TcpListener);

impl Line {
    fn new() -> Self {
        Self(TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap())
    }

    fn connect(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.0.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (client, self.0.accept().unwrap().0)
    }
}

fn reply_to(client: &mut TcpStream) -> (u32, Vec<u8>) {
    let (mut head, mut body) = ([0; 8], Vec::new());
    client.read_exact(&mut head).unwrap();
    client.read_to_end(&mut body).unwrap();
    let [a, b, c, d, e, f, g, h] = head;
    assert_eq!(body.len() as u32, u32::from_le_bytes([e, f, g, h]));
    (u32::from_le_bytes([a, b, c, d]), body)
}

#[test]
fn greedy_machines_leave_room_for_others_and_are_told() {
    let line = Line::new();
    let desk = Desk { places: Places::new(8, 4), partings: Places::new(8, 4) };
    let code = |request: &Request, _: &TcpStream| Ok(Code::Made(request.wasm.clone()));
    // Two that connect and say nothing: they take all there is.
    let mut silent = Vec::new();
    for interface in [1, 2] {
        for _ in 0..4 {
            let (client, stream) = line.connect();
            desk.receive(interface, stream, code);
            silent.push(client);
        }
    }
    let (mut more, stream) = line.connect();
    desk.receive(1, stream, code);
    assert_eq!(reply_to(&mut more).0, 4, "busy");
    for interface in [3, 4] {
        let (mut client, stream) = line.connect();
        desk.receive(interface, stream, code);
        client.write_all(&request(1, b"module", 0)).unwrap();
        assert_eq!(reply_to(&mut client), (0, b"module".to_vec()));
    }
}

#[test]
fn a_refusal_arrives_however_much_is_still_sent() {
    let line = Line::new();
    let (mut client, stream) = line.connect();
    let served = thread::spawn(move || answer(&stream, |_, _| panic!("it is no request")));
    // More than fits the buffers of both ends.
    client.write_all(&request(9, &vec![7; 16 << 20], 0)).unwrap();
    assert_eq!(reply_to(&mut client).0, 2);
    drop(client);
    served.join().unwrap().unwrap();
}

#[test]
fn who_gives_up_is_waited_for_no_longer() {
    let line = Line::new();
    let (mut client, stream) = line.connect();
    let (told, asked) = mpsc::channel();
    let served = thread::spawn(move || {
        answer(&stream, |_, stream| {
            told.send(()).unwrap();
            let mut command = Command::new("sleep");
            let until = Instant::now() + Duration::from_secs(60);
            match run::run(command.arg("60"), b"", stream, until, 1) {
                Ok(Ended::Unwanted) => Err(NoCode::Gone),
                _ => panic!("it went on"),
            }
        })
    });
    client.write_all(&request(1, b"module", 0)).unwrap();
    asked.recv().unwrap();
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(served.join().unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn who_never_finishes_a_request_is_left() {
    let line = Line::new();
    let (mut client, stream) = line.connect();
    client.write_all(&request(1, b"module", 1)).unwrap();
    let mut timed = Timed { stream: &stream, until: Instant::now() + Duration::from_millis(50) };
    let error = Request::read(&mut timed).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
}

#[test]
fn what_is_refused_is_answered() {
    let mut out = Vec::new();
    let refused = Request::read(&mut Cursor::new([0; 64])).unwrap().unwrap_err();
    refuse(&mut out, &refused).unwrap();
    assert_eq!(out[..4], [2, 0, 0, 0]);
}

#[test]
fn memory_bounds_how_many_compilers_run() {
    assert_eq!(available_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
    assert_eq!(available_bytes("MemTotal: 9 kB\n"), None);
    assert_eq!(most_compilers(0), 1);
    assert!((1..=COMPILERS).contains(&most_compilers(1)));
}
