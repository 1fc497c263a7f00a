//! What machines and the compile service say to each other.
//!
//! All numbers are little-endian:
//! ```text
//! request  "kagecomp" │ protocol u32, 1 │ length u8, engine │ length u32, module
//! reply    status u32 │ length u32, code or a reason
//! ```
//! One request a connection. A request changes nothing, so that a machine whose connection breaks asks again.

use std::io::{self, Read, Write};

use super::MAX_MODULE;

/// Port of the service on the gateway's address.
pub const PORT: u16 = 7702;

const MAGIC: [u8; 8] = *b"kagecomp";
const PROTOCOL: u32 = 1;
/// Longest reason sent.
const MAX_REASON: usize = 1 << 10;

/// Why there is no code: a reply's status and reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The module cannot be compiled.
    #[error("{0}")]
    Module(String),
    /// The request itself.
    #[error(
        "the compile service does not understand this machine; its image is older or newer than the host"
    )]
    Request,
    /// No compiler for this engine.
    #[error("this host compiles for other engines than {0}; register the machine's image here")]
    Engine(String),
    /// Too many ask at once.
    #[error("the compile service is busy; try again")]
    Busy,
    /// The host's own trouble.
    #[error("the host cannot compile: {0}")]
    Host(String),
}

impl Refusal {
    fn status(&self) -> u32 {
        match self {
            Self::Module(_) => 1,
            Self::Request => 2,
            Self::Engine(_) => 3,
            Self::Busy => 4,
            Self::Host(_) => 5,
        }
    }
}

/// What a machine wants compiled, for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The machine's engine.
    pub engine: String,
    /// The module.
    pub wasm: Vec<u8>,
}

impl Request {
    /// Reads a request; memory grows with what arrives, not with what is announced.
    ///
    /// # Errors
    /// Those of `from`; a request that is refused is an `Ok(Err(_))`.
    pub fn read(from: &mut impl Read) -> io::Result<Result<Self, Refusal>> {
        let mut head = [0; 13];
        from.read_exact(&mut head)?;
        let [magic @ .., a, b, c, d, engine_length] = head;
        if magic != MAGIC || u32::from_le_bytes([a, b, c, d]) != PROTOCOL {
            return Ok(Err(Refusal::Request));
        }
        let mut engine = vec![0; usize::from(engine_length)];
        from.read_exact(&mut engine)?;
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        let Ok(engine) = String::from_utf8(engine) else { return Ok(Err(Refusal::Request)) };
        if length > MAX_MODULE {
            let reason = format!("too large: more than {} MiB", MAX_MODULE >> 20);
            return Ok(Err(Refusal::Module(reason)));
        }
        let mut wasm = Vec::new();
        from.take(length as u64).read_to_end(&mut wasm)?;
        if wasm.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Ok(Self { engine, wasm }))
    }
}

/// Writes a reply.
///
/// # Errors
/// Those of `to`.
pub fn reply(to: &mut impl Write, outcome: &Result<Vec<u8>, Refusal>) -> io::Result<()> {
    match outcome {
        Ok(code) => reply_with(to, code.len() as u64, &mut code.as_slice()),
        Err(refusal) => refuse(to, refusal),
    }
}

/// Writes a reply whose `length` bytes of code are read from somewhere.
///
/// # Errors
/// Those of `to` and `code`, also when there is less of it.
pub fn reply_with(to: &mut impl Write, length: u64, code: &mut impl Read) -> io::Result<()> {
    head(to, 0, length)?;
    if io::copy(&mut code.take(length), to)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    to.flush()
}

/// Writes a reply that says why there is no code.
///
/// # Errors
/// Those of `to`.
pub fn refuse(to: &mut impl Write, refusal: &Refusal) -> io::Result<()> {
    let reason = refusal.to_string();
    let reason = reason.get(..reason.floor_char_boundary(MAX_REASON)).unwrap_or_default();
    head(to, refusal.status(), reason.len() as u64)?;
    to.write_all(reason.as_bytes())?;
    to.flush()
}

fn head(to: &mut impl Write, status: u32, length: u64) -> io::Result<()> {
    let length = u32::try_from(length).map_err(io::Error::other)?;
    to.write_all(&[status.to_le_bytes(), length.to_le_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(engine: &str, wasm: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(PROTOCOL.to_le_bytes());
        bytes.push(engine.len() as u8);
        bytes.extend(engine.as_bytes());
        bytes.extend((wasm.len() as u32).to_le_bytes());
        bytes.extend(wasm);
        bytes
    }

    #[test]
    fn a_request_is_read_whole_or_not_at_all() {
        let bytes = request("engine", b"module");
        let read = Request::read(&mut bytes.as_slice()).unwrap().unwrap();
        assert_eq!((read.engine.as_str(), read.wasm.as_slice()), ("engine", b"module".as_slice()));
        for at in 0..bytes.len() {
            assert!(Request::read(&mut &bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_without_reading_on() {
        let mut bytes = request("engine", b"");
        bytes[8] = 2;
        assert_eq!(Request::read(&mut bytes.as_slice()).unwrap(), Err(Refusal::Request));
        let mut bytes = request("e", b"");
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Request::read(&mut bytes.as_slice()).unwrap(), Err(Refusal::Module(_))));
    }

    #[test]
    fn replies_say_how_it_went() {
        let mut bytes = Vec::new();
        reply(&mut bytes, &Ok(vec![1, 2, 3])).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]);
        bytes.clear();
        reply(&mut bytes, &Err(Refusal::Module("x".repeat(5000)))).unwrap();
        assert_eq!(&bytes[..8], [1, 0, 0, 0, 0, 4, 0, 0]);
        assert_eq!(bytes.len(), 8 + MAX_REASON);
        bytes.clear();
        reply(&mut bytes, &Err(Refusal::Module("ä".repeat(700) + "x"))).unwrap();
        assert!(String::from_utf8(bytes[8..].to_vec()).unwrap().ends_with('ä'));
        bytes.clear();
        reply_with(&mut bytes, 3, &mut [1, 2, 3, 4].as_slice()).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]);
        assert!(reply_with(&mut bytes, 3, &mut [1].as_slice()).is_err());
    }
}
