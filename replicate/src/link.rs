//! Links: ordered, authenticated streams of frames between two daemons.
//!
//! One thread uses a link at a time and blocks on it; the switch path wants no scheduler between a
//! message and its thread. A link that returned anything but [`LinkError::Timeout`] is of no
//! further use, except for what its [`LinkError`] says.
//!
//! - [`tls`]: TLS 1.3 over TCP, for daemons.
//! - [`memory`]: a pair within a process, with faults on demand, for tests and simulation.
//!
//! Deliberately not here: what frames mean; reconnecting (a handover that lost its link decides
//! by the directory, not by trying again).

pub mod memory;
pub mod tls;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use kage_machine::HostName;
use kage_wire::{Frame, FrameError, HelloError, Kind, Refusal};

pub use memory::{Fault, MemoryLink, pair};
pub use tls::{ALPN, TlsError, TlsIdentity, TlsLink};

/// Why a link did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answers there.
    #[error("cannot reach {addr}: {source}; does its daemon run?")]
    Connect {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The deadline passed; the link can still be used.
    #[error("the peer did not answer in time")]
    Timeout,
    /// The peer takes nothing off the link any more.
    #[error("the peer has stopped reading")]
    Stalled,
    /// The peer closed between two frames.
    #[error("the peer closed the link")]
    Closed,
    /// The peer acknowledged nothing for some seconds: it, its host or the way there is gone.
    #[error("the peer is gone: nothing sent to it was acknowledged for {} s", tls::GONE_AFTER.as_secs())]
    Gone,
    /// The link ended within a frame.
    #[error("the link broke within a frame")]
    Truncated,
    /// The peer said why it will not go on.
    #[error(transparent)]
    Refused(Refusal),
    /// What arrived is no frame, or what was to be sent has none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer's first frame is refused.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// A frame of a kind that has no place here.
    #[error("the peer sent a {0:?} frame where none belongs")]
    Unexpected(Kind),
    /// Either side does not trust the other's certificate.
    #[error("certificate refused: {0}; certificates of one site come from one `kage init`")]
    Certificate(#[source] rustls::Error),
    /// The peer's certificate does not carry the name.
    #[error("the peer claims to be {claimed}, but its certificate does not carry that name")]
    Name {
        /// Name claimed, or expected.
        claimed: HostName,
    },
    /// The name cannot stand in a certificate.
    #[error("host name {0} cannot stand in a certificate; use letters, digits, '-' and '.'")]
    NameForm(HostName),
    /// TLS failed otherwise.
    #[error("TLS: {0}")]
    Tls(#[source] rustls::Error),
    /// The socket failed.
    #[error("link: {0}")]
    Io(#[from] io::Error),
}

impl LinkError {
    /// What to tell the peer, for errors the peer's bytes caused while it may still listen.
    #[must_use]
    pub fn as_refusal(&self) -> Option<Refusal> {
        use kage_wire::RefusalCode::{Name, Protocol};
        match self {
            Self::Hello(error) => Some(Refusal::from(error)),
            Self::Frame(error) => Some(Refusal::from(*error)),
            Self::Name { .. } => Some(Refusal::new(Name, self.to_string())),
            Self::Unexpected(_) => Some(Refusal::new(Protocol, self.to_string())),
            _ => None,
        }
    }
}

/// An ordered stream of frames to and from one peer.
pub trait Link: Send {
    /// Hands a frame to the transport; returns once the transport has taken all of it.
    ///
    /// # Errors
    /// [`LinkError`]; [`LinkError::Refused`] when the peer has meanwhile sent a refusal.
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError>;

    /// The next frame; waits for it until `deadline`, or for as long as the transport believes the
    /// peer alive. A refusal is an error.
    ///
    /// # Errors
    /// [`LinkError`].
    fn recv(&mut self, deadline: Option<Instant>) -> Result<Frame, LinkError>;

    /// Lets [`Link::recv`] look for frames without sleeping for so long before it sleeps; zero, the
    /// start, is at once. For the switch: an idle CPU takes 40 to 50 µs to wake, which was all but
    /// 10 of the 110 µs from 6 KB to its acknowledgement. Costs a CPU for that time.
    fn set_spin(&mut self, _spin: Duration) {}

    /// The peer, as its certificate says.
    fn peer(&self) -> &HostName;
}

impl<L: Link + ?Sized> Link for Box<L> {
    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        (**self).send(frame)
    }

    fn recv(&mut self, deadline: Option<Instant>) -> Result<Frame, LinkError> {
        (**self).recv(deadline)
    }

    fn set_spin(&mut self, spin: Duration) {
        (**self).set_spin(spin);
    }

    fn peer(&self) -> &HostName {
        (**self).peer()
    }
}

/// The next frame, which must be of `kind`.
///
/// # Errors
/// [`LinkError::Unexpected`] or what [`Link::recv`] returns.
pub fn recv_kind(link: &mut dyn Link, kind: Kind, deadline: Option<Instant>) -> Result<Frame, LinkError> {
    let frame = link.recv(deadline)?;
    if frame.kind == kind { Ok(frame) } else { Err(LinkError::Unexpected(frame.kind)) }
}

/// A refusal is an error to whoever receives it.
fn admit(frame: Frame) -> Result<Frame, LinkError> {
    match frame.kind {
        Kind::Refusal => Err(LinkError::Refused(Refusal::from_body(&frame.body))),
        _ => Ok(frame),
    }
}
