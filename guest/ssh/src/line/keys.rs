//! From a terminal's bytes to keys: control characters, UTF-8, and the escape sequences of ECMA-48 and xterm.

/// A key, or what stands for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character to insert.
    Char(char),
    /// Return.
    Enter,
    /// Control-C.
    Interrupt,
    /// Control-D.
    DeleteOrEnd,
    /// Backspace, control-H.
    Backspace,
    /// Delete.
    Delete,
    /// Left arrow, control-B.
    Left,
    /// Right arrow, control-F.
    Right,
    /// Control-left, alt-B.
    WordLeft,
    /// Control-right, alt-F.
    WordRight,
    /// Home, control-A.
    Home,
    /// End, control-E.
    End,
    /// Up arrow, control-P.
    Previous,
    /// Down arrow, control-N.
    Next,
    /// Control-K.
    KillToEnd,
    /// Control-U.
    KillToStart,
    /// Control-W.
    KillWord,
    /// Alt-D.
    KillWordRight,
    /// Control-Y.
    Yank,
    /// Control-L.
    Clear,
}

/// Longest control sequence looked at; the rest of a longer one is dropped.
const MAX_SEQUENCE: usize = 16;

#[derive(Debug, Clone, Copy)]
enum State {
    Ground,
    Escape,
    /// After `ESC [`: its parameters so far.
    Control {
        parameters: [u8; MAX_SEQUENCE],
        length: usize,
    },
    /// After `ESC O`.
    Single,
    /// Within a character of more than one byte.
    Utf8 {
        bytes: [u8; 4],
        length: usize,
        wanted: usize,
    },
}

/// Turns bytes into keys, one byte at a time.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    after_return: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { state: State::Ground, after_return: false }
    }
}

impl Decoder {
    /// Takes one byte; up to two keys, because a broken character gives a replacement before its successor.
    pub fn take(&mut self, byte: u8) -> [Option<Key>; 2] {
        match self.state {
            State::Ground => [self.ground(byte), None],
            State::Escape => [self.escape(byte), None],
            State::Control { parameters, length } => [self.control(byte, parameters, length), None],
            State::Single => {
                self.state = State::Ground;
                [final_byte(byte, &[]), None]
            }
            State::Utf8 { bytes, length, wanted } => self.continuation(byte, bytes, length, wanted),
        }
    }

    fn ground(&mut self, byte: u8) -> Option<Key> {
        let after_return = core::mem::replace(&mut self.after_return, byte == b'\r');
        Some(match byte {
            b'\n' if after_return => return None,
            b'\r' | b'\n' => Key::Enter,
            0x01 => Key::Home,
            0x02 => Key::Left,
            0x03 => Key::Interrupt,
            0x04 => Key::DeleteOrEnd,
            0x05 => Key::End,
            0x06 => Key::Right,
            0x08 | 0x7f => Key::Backspace,
            0x0b => Key::KillToEnd,
            0x0c => Key::Clear,
            0x0e => Key::Next,
            0x10 => Key::Previous,
            0x15 => Key::KillToStart,
            0x17 => Key::KillWord,
            0x19 => Key::Yank,
            0x1b => {
                self.state = State::Escape;
                return None;
            }
            0x00..=0x1f => return None,
            0x20..=0x7e => Key::Char(char::from(byte)),
            0xc2..=0xdf => return self.lead(byte, 2),
            0xe0..=0xef => return self.lead(byte, 3),
            0xf0..=0xf4 => return self.lead(byte, 4),
            0x80..=0xc1 | 0xf5..=0xff => Key::Char(char::REPLACEMENT_CHARACTER),
        })
    }

    fn lead(&mut self, byte: u8, wanted: usize) -> Option<Key> {
        self.state = State::Utf8 { bytes: [byte, 0, 0, 0], length: 1, wanted };
        None
    }

    fn continuation(
        &mut self,
        byte: u8,
        mut bytes: [u8; 4],
        length: usize,
        wanted: usize,
    ) -> [Option<Key>; 2] {
        let broken = Some(Key::Char(char::REPLACEMENT_CHARACTER));
        self.state = State::Ground;
        if byte & 0xc0 != 0x80 {
            return [broken, self.ground(byte)];
        }
        if let Some(slot) = bytes.get_mut(length) {
            *slot = byte;
        }
        if length + 1 < wanted {
            self.state = State::Utf8 { bytes, length: length + 1, wanted };
            return [None, None];
        }
        let whole = bytes.get(..wanted).and_then(|bytes| core::str::from_utf8(bytes).ok());
        let character = whole.and_then(|text| text.chars().next());
        // C1 controls would be obeyed by some terminals when echoed.
        [character.filter(|character| !character.is_control()).map_or(broken, |c| Some(Key::Char(c))), None]
    }

    fn escape(&mut self, byte: u8) -> Option<Key> {
        self.state = match byte {
            b'[' => State::Control { parameters: [0; MAX_SEQUENCE], length: 0 },
            b'O' => State::Single,
            0x1b => State::Escape,
            _ => State::Ground,
        };
        match byte {
            b'b' => Some(Key::WordLeft),
            b'f' => Some(Key::WordRight),
            b'd' => Some(Key::KillWordRight),
            0x08 | 0x7f => Some(Key::KillWord),
            _ => None,
        }
    }

    fn control(&mut self, byte: u8, mut parameters: [u8; MAX_SEQUENCE], length: usize) -> Option<Key> {
        if (0x20..0x40).contains(&byte) {
            if let Some(slot) = parameters.get_mut(length) {
                *slot = byte;
            }
            self.state = State::Control { parameters, length: (length + 1).min(MAX_SEQUENCE) };
            return None;
        }
        self.state = if byte == 0x1b { State::Escape } else { State::Ground };
        final_byte(byte, parameters.get(..length).unwrap_or_default())
    }
}

/// What a sequence with these parameters and this last byte means.
fn final_byte(byte: u8, parameters: &[u8]) -> Option<Key> {
    let modified = matches!(parameters, b"1;5" | b"1;3" | b"5");
    Some(match byte {
        b'A' => Key::Previous,
        b'B' => Key::Next,
        b'C' if modified => Key::WordRight,
        b'C' => Key::Right,
        b'D' if modified => Key::WordLeft,
        b'D' => Key::Left,
        b'F' => Key::End,
        b'H' => Key::Home,
        b'~' => match parameters {
            b"1" | b"7" => Key::Home,
            b"4" | b"8" => Key::End,
            b"3" => Key::Delete,
            _ => return None,
        },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut decoder = Decoder::default();
        bytes.iter().flat_map(|byte| decoder.take(*byte)).flatten().collect()
    }

    #[test]
    fn sequences_of_common_terminals_are_known() {
        let cases: [(&[u8], Key); 12] = [
            (b"\x1b[A", Key::Previous),
            (b"\x1bOB", Key::Next),
            (b"\x1b[1;5C", Key::WordRight),
            (b"\x1bb", Key::WordLeft),
            (b"\x1b[H", Key::Home),
            (b"\x1b[4~", Key::End),
            (b"\x1b[3~", Key::Delete),
            (b"\x7f", Key::Backspace),
            (b"\x1b\x7f", Key::KillWord),
            (b"\r\n", Key::Enter),
            ("ä".as_bytes(), Key::Char('ä')),
            ("🦀".as_bytes(), Key::Char('🦀')),
        ];
        for (bytes, key) in cases {
            assert_eq!(keys(bytes), [key], "{bytes:?}");
        }
    }

    #[test]
    fn unknown_sequences_are_swallowed_whole() {
        assert_eq!(
            keys(b"\x1b[200~a\x1b[201~\x1b[38;5;1234567890123456;99mb\x1bZc"),
            ['a', 'b', 'c'].map(Key::Char)
        );
    }

    #[test]
    fn broken_characters_are_replaced_and_their_successor_kept() {
        let broken = Key::Char(char::REPLACEMENT_CHARACTER);
        assert_eq!(keys(b"\xc3a"), [broken, Key::Char('a')]);
        assert_eq!(keys(b"\xff\xe2\x82\r"), [broken, broken, Key::Enter]);
        assert_eq!(keys(b"\xed\xa0\x80"), [broken], "a surrogate");
        assert_eq!(keys("\u{9b}".as_bytes()), [broken], "a C1 control");
    }

    proptest! {
        #[test]
        fn text_comes_out_as_typed(text in "\\PC{0,50}") {
            let expected: Vec<Key> = text.chars().map(Key::Char).collect();
            prop_assert_eq!(keys(text.as_bytes()), expected);
        }

        #[test]
        fn no_bytes_give_a_control_character(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for key in keys(&bytes) {
                prop_assert!(!matches!(key, Key::Char(character) if character.is_control()));
            }
        }
    }
}
