//! The data types of SSH messages: bytes, integers, strings, name-lists, multiple-precision integers (RFC 4251 §5).
//!
//! [`Reader`] takes a peer's bytes apart and never indexes or allocates: every field is a borrowed slice of the
//! message, and a length beyond the message's end is [`Truncated`]. Writing appends to a `Vec<u8>` that the caller
//! bounds. Not here: what the messages mean.

use alloc::vec::Vec;

/// A message ended before the field that was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message ended before its last field")]
pub struct Truncated;

/// Reads the fields of one message from front to back.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Everything not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Whether every byte was read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `count` bytes as they are.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Truncated> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Truncated> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Truncated> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A boolean; any value but 0 is true.
    pub fn boolean(&mut self) -> Result<bool, Truncated> {
        self.u8().map(|byte| byte != 0)
    }

    /// A big-endian 32-bit integer.
    pub fn u32(&mut self) -> Result<u32, Truncated> {
        self.array().map(u32::from_be_bytes)
    }

    /// A length-prefixed string of arbitrary bytes.
    pub fn string(&mut self) -> Result<&'a [u8], Truncated> {
        let before = self.rest;
        let length = self.u32()?;
        let taken = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let Some((string, rest)) = taken else {
            self.rest = before;
            return Err(Truncated);
        };
        self.rest = rest;
        Ok(string)
    }
}

/// Whether the comma-separated `list` holds `name`.
pub fn list_contains(list: &[u8], name: &str) -> bool {
    names(list).any(|entry| entry == name.as_bytes())
}

/// The entries of a comma-separated name-list, in order; none for the empty list.
pub fn names(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|byte| *byte == b',').filter(|name| !name.is_empty())
}

/// Appends a big-endian 32-bit integer.
pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// Appends a boolean.
pub fn put_bool(out: &mut Vec<u8>, value: bool) {
    out.push(u8::from(value));
}

/// Appends a length-prefixed string. Ours are all far below 4 GiB; a longer one would be cut there.
pub fn put_string(out: &mut Vec<u8>, value: &[u8]) {
    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
    put_u32(out, length);
    out.extend_from_slice(value.get(..length as usize).unwrap_or(value));
}

/// Appends a name-list.
pub fn put_names(out: &mut Vec<u8>, names: &[&str]) {
    let length: usize = names.iter().map(|name| name.len() + 1).sum();
    put_u32(out, u32::try_from(length.saturating_sub(1)).unwrap_or(u32::MAX));
    for (index, name) in names.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(name.as_bytes());
    }
}

/// Appends a non-negative big-endian number as an `mpint`: no leading zeros, but one where the top bit is set.
pub fn put_mpint(out: &mut Vec<u8>, number: &[u8]) {
    let start = number.iter().position(|byte| *byte != 0).unwrap_or(number.len());
    let digits = number.get(start..).unwrap_or_default();
    let sign = digits.first().is_some_and(|top| top & 0x80 != 0);
    put_u32(out, u32::try_from(digits.len() + usize::from(sign)).unwrap_or(u32::MAX));
    if sign {
        out.push(0);
    }
    out.extend_from_slice(digits);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn mpints_are_those_of_rfc_4251() {
        let cases: [(&[u8], &[u8]); 3] = [
            (&[0, 0], &[0, 0, 0, 0]),
            (&[0x09, 0xa3, 0x78, 0xf9], &[0, 0, 0, 4, 0x09, 0xa3, 0x78, 0xf9]),
            (&[0, 0x80], &[0, 0, 0, 2, 0, 0x80]),
        ];
        for (number, expected) in cases {
            let mut out = Vec::new();
            put_mpint(&mut out, number);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn name_lists_keep_their_order_and_an_empty_one_has_no_entries() {
        let mut out = Vec::new();
        put_names(&mut out, &["zlib", "none"]);
        assert_eq!(out, b"\0\0\0\x09zlib,none");
        let mut empty = Vec::new();
        put_names(&mut empty, &[]);
        assert_eq!(empty, [0; 4]);
        assert_eq!(names(b"").count(), 0);
        assert!(list_contains(b"a,b,c", "c"));
        assert!(!list_contains(b"a,bc", "b"));
    }

    #[test]
    fn a_string_longer_than_the_message_is_refused_and_nothing_is_consumed() {
        let bytes = [0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.string(), Err(Truncated));
        assert_eq!(reader.rest(), bytes);
    }

    proptest! {
        #[test]
        fn fields_read_back_as_written(string in prop::collection::vec(any::<u8>(), 0..300), number: u32, flag: bool) {
            let mut out = vec![];
            put_string(&mut out, &string);
            put_u32(&mut out, number);
            put_bool(&mut out, flag);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.string(), Ok(&string[..]));
            prop_assert_eq!(reader.u32(), Ok(number));
            prop_assert_eq!(reader.boolean(), Ok(flag));
            prop_assert!(reader.is_empty());
            for end in 0..out.len() {
                let mut cut = Reader::new(&out[..end]);
                let all = cut.string().and_then(|_| cut.u32()).and_then(|_| cut.boolean());
                prop_assert_eq!(all, Err(Truncated));
            }
        }
    }
}
