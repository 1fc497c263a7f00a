//! A pair of links within one process, with faults on demand.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel},
    time::Instant,
};

use kage_machine::HostName;
use kage_wire::{Frame, FrameDecoder};

use super::{Link, LinkError, admit};

/// What goes wrong with what one end sends. Frames are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The link breaks after that many frames: sending fails, the peer sees the end.
    CutAfter {
        /// Frames that still pass.
        frames: u64,
    },
    /// The link breaks within a frame.
    Truncate {
        /// The frame.
        frame: u64,
        /// Bytes of it that still pass.
        keep: usize,
    },
    /// A byte changes on the way; beyond the frame's end its last one.
    Corrupt {
        /// The frame.
        frame: u64,
        /// The byte within header and body.
        byte: usize,
    },
}

/// One end of a [`pair`]. Frames go through their bytes, as on a wire.
#[derive(Debug)]
pub struct MemoryLink {
    peer: HostName,
    to: Option<Sender<Vec<u8>>>,
    from: Receiver<Vec<u8>>,
    decoder: FrameDecoder,
    sent: u64,
    fault: Option<Fault>,
}

/// Two ends of one link: `a`'s, whose peer is `b`, and `b`'s.
#[must_use]
pub fn pair(a: HostName, b: HostName) -> (MemoryLink, MemoryLink) {
    let (to_b, from_a) = channel();
    let (to_a, from_b) = channel();
    let end = |peer, to, from| MemoryLink {
        peer,
        to: Some(to),
        from,
        decoder: FrameDecoder::new(),
        sent: 0,
        fault: None,
    };
    (end(b, to_b, from_b), end(a, to_a, from_a))
}

impl MemoryLink {
    /// Sets what will go wrong with what this end sends.
    pub fn set_fault(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// Frames sent so far.
    #[must_use]
    pub const fn frames_sent(&self) -> u64 {
        self.sent
    }
}

impl Link for MemoryLink {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let mut bytes = frame.emit()?;
        let number = self.sent;
        let mut cut = false;
        match self.fault {
            Some(Fault::CutAfter { frames }) if number >= frames => {
                (cut, bytes) = (true, Vec::new());
            }
            Some(Fault::Truncate { frame, keep }) if number >= frame => {
                cut = true;
                bytes.truncate(if number == frame { keep } else { 0 });
            }
            Some(Fault::Corrupt { frame, byte }) if number == frame => {
                let byte = byte.min(bytes.len() - 1);
                bytes[byte] ^= 0x10;
            }
            _ => {}
        }
        let to = self.to.as_ref().ok_or(LinkError::Closed)?;
        to.send(bytes).map_err(|SendError(_)| LinkError::Closed)?;
        self.sent += 1;
        if cut {
            self.to = None;
            return Err(LinkError::Closed);
        }
        Ok(())
    }

    fn recv(&mut self, deadline: Option<Instant>) -> Result<Frame, LinkError> {
        loop {
            let bytes = match deadline {
                None => self.from.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self.from.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(RecvTimeoutError::Timeout) => return Err(LinkError::Timeout),
                Err(RecvTimeoutError::Disconnected) if self.decoder.is_at_boundary() => {
                    return Err(LinkError::Closed);
                }
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Truncated),
            };
            // One message is at most one frame.
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (taken, frame) = self.decoder.feed(rest)?;
                rest = &rest[taken..];
                if let Some(frame) = frame {
                    return admit(frame);
                }
            }
        }
    }

    fn peer(&self) -> &HostName {
        &self.peer
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kage_wire::{FrameError, Kind, Refusal, RefusalCode};

    use super::*;

    fn links() -> (MemoryLink, MemoryLink) {
        pair("a".parse().unwrap(), "b".parse().unwrap())
    }

    fn frame(byte: u8) -> Frame {
        Frame::new(Kind::Handover, vec![byte; 20])
    }

    #[test]
    fn frames_arrive_in_order() {
        let (mut a, mut b) = links();
        assert_eq!((a.peer().as_str(), b.peer().as_str()), ("b", "a"));
        for byte in 0..5 {
            a.send(&frame(byte)).unwrap();
        }
        for byte in 0..5 {
            assert_eq!(b.recv(None).unwrap(), frame(byte));
        }
        let soon = Instant::now() + Duration::from_millis(5);
        assert!(matches!(b.recv(Some(soon)), Err(LinkError::Timeout)));
        drop(a);
        assert!(matches!(b.recv(None), Err(LinkError::Closed)));
        assert!(matches!(b.send(&frame(1)), Err(LinkError::Closed)));
    }

    #[test]
    fn faults_do_what_they_say() {
        let (mut a, mut b) = links();
        a.set_fault(Some(Fault::CutAfter { frames: 1 }));
        a.send(&frame(1)).unwrap();
        assert!(a.send(&frame(2)).is_err());
        assert!(b.recv(None).is_ok());
        assert!(matches!(b.recv(None), Err(LinkError::Closed)));

        let (mut a, mut b) = links();
        a.set_fault(Some(Fault::Truncate { frame: 0, keep: 13 }));
        assert!(a.send(&frame(1)).is_err());
        assert!(matches!(b.recv(None), Err(LinkError::Truncated)));

        let (mut a, mut b) = links();
        a.set_fault(Some(Fault::Corrupt { frame: 0, byte: 14 }));
        a.send(&frame(1)).unwrap();
        assert!(matches!(b.recv(None), Err(LinkError::Frame(FrameError::Checksum { .. }))));
    }

    #[test]
    fn a_refusal_is_an_error() {
        let (mut a, mut b) = links();
        let refusal = Refusal::new(RefusalCode::Unavailable, "cordoned");
        a.send(&refusal.to_frame()).unwrap();
        assert!(matches!(b.recv(None), Err(LinkError::Refused(seen)) if seen == refusal));
    }
}
