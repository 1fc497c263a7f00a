//! Frames: the unit of a link.
//!
//! ```text
//! 0  u8   kind          [`Kind`]
//! 1  u8   flags         0; reserved for the kind
//! 2  u16  reserved      0
//! 4  u32  length        bytes of body, at most [`Kind::max_body`]
//! 8  u32  checksum      CRC-32 (IEEE) of bytes 0..8 and the body
//! 12 body
//! ```
//! Integers are little-endian. TLS already authenticates every byte between two daemons; the
//! checksum finds what happens outside it: a buffer reused too early, memory that flips bits.

use std::fmt;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 12;

/// Bytes reserved for a body before any of it has arrived: a whole page frame, so that the stream's
/// frames are not copied while they grow. Reserved memory that nothing is written to costs nothing.
const FIRST_RESERVE: usize = Kind::Pages.max_body() as usize;

/// What a frame's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// [`crate::Hello`]: the first frame in either direction.
    Hello = 0,
    /// [`crate::Refusal`]: the sender of it will say no more.
    Refusal = 1,
    /// A message of [`crate::handover`].
    Handover = 2,
    /// A batch of pages ([`crate::pages`]).
    Pages = 3,
    /// The directory's own bytes.
    Directory = 4,
    /// [`crate::EpochMark`]: every page of the epoch has been sent; what the receiver must now hold.
    EpochEnd = 5,
    /// [`crate::EpochMark`]: what the receiver holds.
    EpochAck = 6,
}

impl Kind {
    /// All kinds, in the order of their codes.
    pub const ALL: [Self; 7] = [
        Self::Hello,
        Self::Refusal,
        Self::Handover,
        Self::Pages,
        Self::Directory,
        Self::EpochEnd,
        Self::EpochAck,
    ];

    /// The kind of a code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Largest body a receiver takes. The largest is the switch message, which carries the last
    /// epoch's pages; a last epoch above that goes over the bulk link first.
    #[must_use]
    pub const fn max_body(self) -> u32 {
        match self {
            Self::Hello | Self::Refusal => 4 << 10,
            Self::Handover => 16 << 20,
            Self::Pages => 512 << 10,
            Self::Directory => 4 << 20,
            Self::EpochEnd | Self::EpochAck => 64,
        }
    }
}

/// One frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub kind: Kind,
    /// Reserved for the kind; 0.
    pub flags: u8,
    /// At most [`Kind::max_body`] bytes.
    pub body: Vec<u8>,
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({:?}, flags {:#x}, {} bytes)", self.kind, self.flags, self.body.len())
    }
}

/// Why bytes are no frame, or a frame cannot be sent. After one of these a link is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A kind this build does not know.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// Reserved bytes are not zero.
    #[error("frame with reserved bits {0:#x}")]
    Reserved(u16),
    /// The body is larger than its kind may be.
    #[error("{kind:?} frame of {length} bytes is above the limit of {}", kind.max_body())]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// The length declared.
        length: u64,
    },
    /// Header or body changed on the way.
    #[error("{kind:?} frame is damaged: checksum {found:#010x} instead of {declared:#010x}")]
    Checksum {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        declared: u32,
        /// What the bytes give.
        found: u32,
    },
}

impl Frame {
    /// A frame without flags.
    #[must_use]
    pub const fn new(kind: Kind, body: Vec<u8>) -> Self {
        Self { kind, flags: 0, body }
    }

    /// The header that goes before the body.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]: no receiver would take it.
    pub fn header(&self) -> Result<[u8; HEADER_BYTES], FrameError> {
        let too_long = FrameError::TooLong { kind: self.kind, length: self.body.len() as u64 };
        let length = u32::try_from(self.body.len()).map_err(|_| too_long)?;
        if length > self.kind.max_body() {
            return Err(too_long);
        }
        let mut header = [0; HEADER_BYTES];
        header[0] = self.kind as u8;
        header[1] = self.flags;
        header[4..8].copy_from_slice(&length.to_le_bytes());
        let checksum = checksum(&header, &self.body);
        header[8..].copy_from_slice(&checksum.to_le_bytes());
        Ok(header)
    }

    /// Header and body in one buffer.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn emit(&self) -> Result<Vec<u8>, FrameError> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.body.len());
        bytes.extend_from_slice(&self.header()?);
        bytes.extend_from_slice(&self.body);
        Ok(bytes)
    }

    /// Bytes of header and body.
    #[must_use]
    pub const fn wire_len(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }
}

fn checksum(header: &[u8; HEADER_BYTES], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..8]);
    hasher.update(body);
    hasher.finalize()
}

#[derive(Clone, Copy, Debug)]
struct Head {
    kind: Kind,
    flags: u8,
    length: usize,
    bytes: [u8; HEADER_BYTES],
}

/// Makes frames of bytes in whatever pieces they arrive.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    header: [u8; HEADER_BYTES],
    have: usize,
    head: Option<Head>,
    body: Vec<u8>,
}

impl FrameDecoder {
    /// A decoder at the start of a frame.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes up to one frame's bytes from the front of `bytes`; returns how many it took, and the
    /// frame once whole. Call again with the rest.
    ///
    /// # Errors
    /// [`FrameError`]; the stream cannot be resynchronised.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Frame>), FrameError> {
        let mut taken = 0;
        let head = match self.head {
            Some(head) => head,
            None => {
                taken = bytes.len().min(HEADER_BYTES - self.have);
                self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
                self.have += taken;
                if self.have < HEADER_BYTES {
                    return Ok((taken, None));
                }
                let head = parse_header(&self.header)?;
                self.body = Vec::with_capacity(head.length.min(FIRST_RESERVE));
                self.head = Some(head);
                head
            }
        };
        let rest = &bytes[taken..];
        let part = rest.len().min(head.length - self.body.len());
        self.body.extend_from_slice(&rest[..part]);
        taken += part;
        if self.body.len() < head.length {
            return Ok((taken, None));
        }
        let body = std::mem::take(&mut self.body);
        (self.head, self.have) = (None, 0);
        let declared = u32::from_le_bytes([head.bytes[8], head.bytes[9], head.bytes[10], head.bytes[11]]);
        let found = checksum(&head.bytes, &body);
        if declared != found {
            return Err(FrameError::Checksum { kind: head.kind, declared, found });
        }
        Ok((taken, Some(Frame { kind: head.kind, flags: head.flags, body })))
    }

    /// Whether the bytes so far end between two frames: an end of stream elsewhere is a truncation.
    #[must_use]
    pub const fn is_at_boundary(&self) -> bool {
        self.head.is_none() && self.have == 0
    }
}

fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<Head, FrameError> {
    let kind = Kind::from_code(bytes[0]).ok_or(FrameError::Kind(bytes[0]))?;
    let reserved = u16::from_le_bytes([bytes[2], bytes[3]]);
    if reserved != 0 {
        return Err(FrameError::Reserved(reserved));
    }
    let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    if length > kind.max_body() {
        return Err(FrameError::TooLong { kind, length: u64::from(length) });
    }
    Ok(Head { kind, flags: bytes[1], length: length as usize, bytes: *bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_all(mut bytes: &[u8], piece: usize) -> Result<(Vec<Frame>, bool), FrameError> {
        let (mut decoder, mut frames) = (FrameDecoder::new(), Vec::new());
        while !bytes.is_empty() {
            let part = &bytes[..bytes.len().min(piece)];
            let (taken, frame) = decoder.feed(part)?;
            bytes = &bytes[taken..];
            frames.extend(frame);
        }
        Ok((frames, decoder.is_at_boundary()))
    }

    #[test]
    fn golden_bytes() {
        let frame = Frame { kind: Kind::Pages, flags: 0, body: b"kage".to_vec() };
        assert_eq!(
            frame.emit().unwrap(),
            [3, 0, 0, 0, 4, 0, 0, 0, 0xc7, 0xa3, 0x57, 0x3a, b'k', b'a', b'g', b'e'],
        );
        assert_eq!(Kind::ALL.map(|kind| kind as u8), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn truncation_at_every_byte_gives_no_frame() {
        let bytes = Frame::new(Kind::Handover, vec![7; 100]).emit().unwrap();
        for end in 0..bytes.len() {
            let (frames, boundary) = decode_all(&bytes[..end], 17).unwrap();
            assert!(frames.is_empty(), "cut at {end}");
            assert_eq!(boundary, end == 0, "cut at {end}");
        }
    }

    #[test]
    fn corruption_of_every_bit_is_found() {
        let frame = Frame::new(Kind::Handover, vec![7; 60]);
        let bytes = frame.emit().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // A longer length waits for bytes that never come: that is no frame either.
            assert!(decode_all(&bytes, 4096).map_or(true, |(frames, _)| frames.is_empty()), "bit {bit}");
        }
    }

    #[test]
    fn a_declared_length_reserves_little_before_bytes_arrive() {
        let mut decoder = FrameDecoder::new();
        let mut header = [0; HEADER_BYTES];
        header[0] = Kind::Handover as u8;
        header[4..8].copy_from_slice(&Kind::Handover.max_body().to_le_bytes());
        decoder.feed(&header).unwrap();
        assert!(decoder.body.capacity() <= FIRST_RESERVE);
        header[4..8].copy_from_slice(&(Kind::Handover.max_body() + 1).to_le_bytes());
        assert!(matches!(FrameDecoder::new().feed(&header), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_body_above_the_limit_is_not_emitted() {
        let frame = Frame::new(Kind::Hello, vec![0; 4097]);
        assert_eq!(frame.emit(), Err(FrameError::TooLong { kind: Kind::Hello, length: 4097 }));
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(
            bodies in prop::collection::vec((0usize..7, prop::collection::vec(any::<u8>(), 0..60)), 0..6),
            piece in 1usize..50,
        ) {
            let frames: Vec<_> = bodies.into_iter().map(|(kind, body)| Frame::new(Kind::ALL[kind], body)).collect();
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.emit().unwrap()).collect();
            prop_assert_eq!(decode_all(&bytes, piece), Ok((frames, true)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..9, piece in 1usize..80) {
            let _ = decode_all(&bytes, piece);
            let mut bytes = bytes;
            if bytes.len() > 8 {
                bytes[0] = kind;
                bytes[2..4].fill(0);
                bytes[5..8].fill(0);
                let _ = decode_all(&bytes, piece);
            }
        }
    }
}
