use std::io::Cursor;

use super::*;
use crate::scratch::Scratch;

fn key(byte: u8) -> blake3::Hash {
    blake3::hash(&[byte])
}

#[test]
fn kept_code_is_found_until_room_is_wanted() {
    let scratch = Scratch::new("code");
    let cache = Cache::open(scratch.path().join("code"), 300).unwrap();
    assert_eq!(cache.find(&key(1)), None);
    for byte in 1..=3 {
        cache.keep(&key(byte), &[byte; 50]);
    }
    assert_eq!(cache.find(&key(1)), Some(vec![1; 50]), "the oldest, now the newest");
    cache.keep(&key(4), &[4; 100]);
    assert_eq!(cache.find(&key(2)), None);
    assert_eq!(cache.find(&key(1)), Some(vec![1; 50]));
    assert_eq!(cache.find(&key(4)), Some(vec![4; 100]));
    cache.keep(&key(5), &[5; 500]);
    assert_eq!(cache.find(&key(5)), None, "larger than the bound");
}

#[test]
fn damaged_code_is_none() {
    let scratch = Scratch::new("damage");
    let cache = Cache::open(scratch.path().join("code"), 1000).unwrap();
    for at in [0, 31, 32, 81] {
        cache.keep(&key(1), &[1; 50]);
        let path = scratch.path().join("code").join(key(1).to_hex().as_str());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(cache.find(&key(1)), None);
    }
}

#[test]
fn a_machine_has_its_share_of_connections_and_all_have_theirs() {
    let serving = Arc::default();
    let mut places: Vec<_> = (0..CONNECTIONS_EACH).map(|_| Place::take(&serving, 1).unwrap()).collect();
    assert!(Place::take(&serving, 1).is_none());
    for interface in 2.. {
        match Place::take(&serving, interface) {
            Some(place) => places.push(place),
            None => break,
        }
    }
    assert_eq!(places.len(), CONNECTIONS);
    drop(places);
    assert!(Place::take(&serving, 1).is_some());
    assert!(serving.lock().unwrap().is_empty());
}

#[test]
fn who_never_finishes_a_request_is_left() {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    client.write_all(b"kagecomp").unwrap();
    let mut timed = Timed { stream, until: Instant::now() + Duration::from_millis(50) };
    let error = Request::read(&mut timed).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
}

#[test]
fn what_is_refused_is_answered() {
    let mut out = Vec::new();
    let refused = Request::read(&mut Cursor::new([0; 64])).unwrap().map(|_| Vec::new());
    reply(&mut out, &refused).unwrap();
    assert_eq!(out[..4], [2, 0, 0, 0]);
}
