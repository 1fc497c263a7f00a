//! What a daemon and the worker of a machine's disk say to each other, beside the control socket.
//!
//! One `SOCK_SEQPACKET` connection. A packet is one postcard value and, behind it, the blocks' bytes it speaks of, in
//! its order. Each side takes the other's word for nothing: the VMM runs hostile code, and a daemon of another build
//! may have left the socket.

use kage_disk::Geometry;
use kage_machine::{PAGE_SIZE, PageBytes};
use serde::{Deserialize, Serialize};

/// Largest packet.
pub const LINE_PACKET: usize = 160 << 10;
/// Most blocks whose bytes go in one packet.
pub const MOST_BYTES: usize = 30;
/// Most blocks that one packet names.
pub const MOST_BLOCKS: usize = 2048;
/// Most bytes of a reason.
const MOST_REASON: usize = 512;
/// Most bytes of the log that one scrub reads: what it may find fits a packet.
pub const MOST_SCRUB: u64 = 8 << 20;

/// What becomes of a block of a disk that nobody runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// These bytes.
    Bytes,
    /// Zeros.
    Zeros,
    /// Missing here, unless it is held under this digest already.
    Elsewhere(u64),
}

/// What is given for a block that is missing or corrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Given {
    /// These bytes.
    Bytes,
    /// It is zeros.
    Zeros,
    /// Its digest.
    Expect(u64),
    /// Nobody has it: whoever reads it fails.
    Unavailable,
}

/// When a flush that the daemon asks for may make things durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Flush {
    /// Not between the writes of a guest's commit: after a crash half of one would be worse than none. Its end is
    /// waited for.
    Whole,
    /// As well; and the machine is this host's from here on, so that what [`Ask::Hold`] held up comes first.
    Settled,
    /// At once.
    Torn,
}

/// What the daemon asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Let blocks be this, each at most once; refused while the guest runs.
    Set(Vec<(u32, Content)>),
    /// Take what was missing or corrupt.
    Fill(Vec<(u32, Given)>),
    /// Commit nothing until a [`Flush::Settled`], or the gate's opening: the machine comes from a host that may yet keep it, and what is
    /// missing there may be what this log had at its last commit.
    Hold,
    /// Make everything durable.
    Flush(Flush),
    /// Read some of the log; answered by [`Tell::Scrubbed`].
    Scrub {
        /// About so many bytes.
        budget_bytes: u64,
    },
    /// Have the guest write and flush what it holds.
    Sync,
}

/// A numbered [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Its number, which the answer names.
    pub ticket: u64,
    /// What is asked.
    pub ask: Ask,
}

/// What the worker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tell {
    /// The disk is open, of this shape.
    Opened {
        /// Blocks of the disk.
        blocks: u64,
        /// Bytes of a segment of its log.
        segment_bytes: u32,
        /// Segments of its log.
        segments: u32,
    },
    /// The disk cannot be used any more.
    Failed {
        /// Why.
        reason: String,
    },
    /// Somebody waits for these.
    Need(Vec<u32>),
    /// The bytes of these are not what was written.
    Corrupt(Vec<u32>),
    /// What was asked is done, or why not.
    Done {
        /// Its number.
        ticket: u64,
        /// Why not.
        result: Result<(), String>,
    },
    /// To [`Ask::Scrub`].
    Scrubbed {
        /// Its number.
        ticket: u64,
        /// Bytes of the log read.
        checked_bytes: u64,
        /// Blocks whose bytes are not what was written, in order.
        corrupt: Vec<u32>,
        /// The end was reached.
        done: bool,
    },
}

impl Tell {
    /// The shape of an open disk.
    pub fn opened(geometry: Geometry) -> Self {
        let Geometry { blocks, segment_bytes, segments } = geometry;
        Self::Opened { blocks, segment_bytes, segments }
    }
}

/// A reason as it goes into a packet.
pub fn reason(of: impl ToString) -> String {
    let mut text = of.to_string();
    let mut end = text.len().min(MOST_REASON);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Encodes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Growing a vector cannot fail, and these types have no maps or unsized sequences.
    postcard::to_stdvec(message).unwrap_or_default()
}

/// Decodes a message that has no bytes behind it.
pub fn decode<'a, T: Deserialize<'a>>(packet: &'a [u8]) -> Option<T> {
    postcard::take_from_bytes(packet).ok().filter(|(_, rest)| rest.is_empty()).map(|(message, _)| message)
}

/// Decodes what a daemon asks, and the bytes behind it.
pub fn decode_asked(packet: &[u8]) -> Option<(Asked, Vec<&PageBytes>)> {
    let (asked, rest): (Asked, _) = postcard::take_from_bytes(packet).ok()?;
    let bytes: Vec<&PageBytes> =
        rest.chunks(PAGE_SIZE).map(|bytes| bytes.try_into().ok()).collect::<Option<_>>()?;
    let (named, with_bytes) = match &asked.ask {
        Ask::Set(blocks) => {
            (blocks.len(), blocks.iter().filter(|(_, content)| *content == Content::Bytes).count())
        }
        Ask::Fill(blocks) => {
            (blocks.len(), blocks.iter().filter(|(_, given)| *given == Given::Bytes).count())
        }
        Ask::Hold | Ask::Flush(_) | Ask::Scrub { .. } | Ask::Sync => (0, 0),
    };
    (named <= MOST_BLOCKS && with_bytes == bytes.len()).then_some((asked, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip_and_what_does_not_add_up_is_refused() {
        let ask = Ask::Set(vec![(7, Content::Bytes), (9, Content::Elsewhere(u64::MAX)), (8, Content::Zeros)]);
        let asked = Asked { ticket: 3, ask };
        let mut packet = encode(&asked);
        assert!(decode_asked(&packet).is_none(), "the bytes are not there");
        packet.extend([5; PAGE_SIZE]);
        assert_eq!(decode_asked(&packet), Some((asked, vec![&[5; PAGE_SIZE]])));
        packet.push(0);
        assert!(decode_asked(&packet).is_none(), "a byte too many");
        let tell = Tell::Done { ticket: 1, result: Err(reason("x".repeat(5000))) };
        let packet = encode(&tell);
        assert_eq!(decode::<Tell>(&packet), Some(tell));
        for end in 0..packet.len() {
            assert_eq!(decode::<Tell>(&packet[..end]), None);
        }
    }

    #[test]
    fn the_largest_messages_fit_a_packet() {
        let most = |content| (0..MOST_BLOCKS as u32).map(|at| (u32::MAX - at, content)).collect::<Vec<_>>();
        let set = Asked { ticket: u64::MAX, ask: Ask::Set(most(Content::Elsewhere(u64::MAX))) };
        let bytes = MOST_BYTES * (PAGE_SIZE + 6);
        assert!(encode(&set).len() + bytes < LINE_PACKET, "{}", encode(&set).len() + bytes);
        let corrupt = vec![u32::MAX; (MOST_SCRUB as usize + (4 << 20)) / PAGE_SIZE];
        let scrubbed = Tell::Scrubbed { ticket: u64::MAX, checked_bytes: u64::MAX, corrupt, done: true };
        assert!(encode(&scrubbed).len() < LINE_PACKET);
        assert!(encode(&Tell::Need(vec![u32::MAX; MOST_BLOCKS])).len() < LINE_PACKET);
    }
}
