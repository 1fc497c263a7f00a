//! What the service can do.

use socket::Flow;

use crate::{Store, resp};

/// What a client is told that wants to store more than fits.
const FULL: &str = "full; delete something";

/// Runs one command and adds its reply.
pub fn run(store: &mut Store, words: &[&[u8]], output: &mut Vec<u8>) -> Flow {
    let Some((name, arguments)) = words.split_first() else { return Flow::Open };
    let name = name.to_ascii_uppercase();
    match (name.as_slice(), arguments) {
        (b"PING", []) => resp::status(output, "PONG"),
        (b"PING" | b"ECHO", [text]) => resp::bulk(output, Some(text)),
        (b"QUIT", _) => {
            resp::status(output, "OK");
            return Flow::Close;
        }
        (b"COMMAND" | b"CLIENT" | b"CONFIG", _) => resp::array(output, 0),
        (b"SET", [key, value]) => {
            if store.put(key, value.to_vec()) {
                changed(store, words);
                resp::status(output, "OK");
            } else {
                resp::error(output, FULL);
            }
        }
        (b"GET", [key]) => resp::bulk(output, store.get(key)),
        (b"DEL", keys) if !keys.is_empty() => {
            let gone = keys.iter().filter(|key| store.remove(key)).count();
            if gone > 0 {
                changed(store, words);
            }
            resp::integer(output, gone as i64);
        }
        (b"EXISTS", keys) => {
            let there = keys.iter().filter(|key| store.get(key).is_some()).count();
            resp::integer(output, there as i64);
        }
        (b"INCR", [key]) => add(store, words, key, Some(1), output),
        (b"DECR", [key]) => add(store, words, key, Some(-1), output),
        (b"INCRBY", [key, by]) => add(store, words, key, parse(by), output),
        (b"APPEND", [key, more]) => {
            let value = [store.get(key).unwrap_or_default(), more].concat();
            let length = value.len();
            if store.put(key, value) {
                changed(store, words);
                resp::integer(output, length as i64);
            } else {
                resp::error(output, FULL);
            }
        }
        (b"STRLEN", [key]) => resp::integer(output, store.get(key).map_or(0, <[u8]>::len) as i64),
        (b"KEYS", [pattern]) => {
            let found: Vec<_> = store.keys().filter(|key| matches(pattern, key)).collect();
            resp::array(output, found.len());
            found.iter().for_each(|key| resp::bulk(output, Some(key)));
        }
        (b"DBSIZE", []) => resp::integer(output, store.keys().count() as i64),
        (b"FLUSHALL", []) => {
            store.clear();
            changed(store, words);
            resp::status(output, "OK");
        }
        _ => resp::error(
            output,
            &format!("unknown command or wrong number of arguments: {}", String::from_utf8_lossy(&name)),
        ),
    }
    Flow::Open
}

/// Notes a command that changed something.
fn changed(store: &mut Store, words: &[&[u8]]) {
    let Some(mut log) = store.log.take() else { return };
    match log.append(words, store) {
        Ok(()) => store.log = Some(log),
        Err(error) => eprintln!("kv: cannot log: {error}"),
    }
}

fn parse(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn add(store: &mut Store, words: &[&[u8]], key: &[u8], by: Option<i64>, output: &mut Vec<u8>) {
    let before = store.get(key).map_or(Some(0), |value| parse(value));
    match before.zip(by).and_then(|(before, by)| before.checked_add(by)) {
        Some(after) => {
            if store.put(key, after.to_string().into_bytes()) {
                changed(store, words);
                resp::integer(output, after);
            } else {
                resp::error(output, FULL);
            }
        }
        None => resp::error(output, "value is not an integer or out of range"),
    }
}

/// Whether a pattern of `*`, `?` and bytes is the key.
fn matches(pattern: &[u8], key: &[u8]) -> bool {
    let (mut at, mut from) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while from < key.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, from));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == key[from] => {
                at += 1;
                from += 1;
            }
            _ => match star {
                Some((before, tried)) => {
                    star = Some((before, tried + 1));
                    (at, from) = (before + 1, tried + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}
