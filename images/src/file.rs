//! The image file.
//!
//! ```text
//! 0   8  magic "KAGEIMG\0"
//! 8   4  format, little-endian, 1
//! 12  4  ABI version the kernel was built for
//! 16  8  bytes of kernel
//! 24 32  BLAKE3 of everything before and after this field
//! 56  …  kernel, an ELF executable
//! ```

use std::{fs, io, path::Path};

const MAGIC: [u8; 8] = *b"KAGEIMG\0";
const FORMAT: u32 = 1;
const HEADER: usize = 56;
const HASH_AT: usize = 24;
/// Largest image file read.
const MAX_BYTES: u64 = 256 << 20;

/// Why an image file is refused.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// It is no image, cut short, or altered.
    #[error("{path}: damaged image file ({what}); build or copy it again")]
    Damaged {
        /// The file.
        path: String,
        /// What does not hold.
        what: &'static str,
    },
    /// Made by a newer or older build.
    #[error(
        "{path}: image format {format}, ABI {abi}; this build reads format {FORMAT}, ABI {}",
        kage_abi::ABI_VERSION
    )]
    Version {
        /// The file.
        path: String,
        /// Its format.
        format: u32,
        /// Its ABI.
        abi: u32,
    },
}

/// An image, read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    kernel: Vec<u8>,
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..HASH_AT]);
    hasher.update(&bytes[HEADER..]);
    *hasher.finalize().as_bytes()
}

impl ImageFile {
    /// The default image, built with this program.
    #[must_use]
    pub fn embedded() -> Self {
        Self { kernel: include_bytes!(env!("KAGE_GUEST_KERNEL")).to_vec() }
    }

    /// The kernel, an ELF executable.
    #[must_use]
    pub fn kernel(&self) -> &[u8] {
        &self.kernel
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.kernel.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(kage_abi::ABI_VERSION.to_le_bytes());
        bytes.extend((self.kernel.len() as u64).to_le_bytes());
        bytes.extend([0; 32]);
        bytes.extend(&self.kernel);
        let hash = hash(&bytes);
        bytes[HASH_AT..HEADER].copy_from_slice(&hash);
        bytes
    }

    /// Checks the bytes of a file named `path` in errors.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] or [`ImageError::Version`].
    pub fn decode(path: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let damaged = |what| ImageError::Damaged { path: path.to_owned(), what };
        if word::<8>(bytes, 0) != Some(MAGIC) {
            return Err(damaged("no image header"));
        }
        let short = || damaged("cut short");
        let format = u32::from_le_bytes(word(bytes, 8).ok_or_else(short)?);
        let abi = u32::from_le_bytes(word(bytes, 12).ok_or_else(short)?);
        let length = u64::from_le_bytes(word(bytes, 16).ok_or_else(short)?);
        let expected: [u8; 32] = word(bytes, HASH_AT).ok_or_else(short)?;
        if format != FORMAT || abi != kage_abi::ABI_VERSION {
            return Err(ImageError::Version { path: path.to_owned(), format, abi });
        }
        if (bytes.len() as u64).checked_sub(HEADER as u64) != Some(length) {
            return Err(damaged("its length is not what its header says"));
        }
        if hash(bytes) != expected {
            return Err(damaged("its hash does not match"));
        }
        Ok(Self { kernel: bytes[HEADER..].to_vec() })
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn read(path: &Path) -> Result<Self, ImageError> {
        let name = path.display().to_string();
        let io = |source| ImageError::Io { path: name.clone(), source };
        if fs::metadata(path).map_err(io)?.len() > MAX_BYTES {
            return Err(ImageError::Damaged { path: name, what: "larger than any image" });
        }
        Self::decode(&name, &fs::read(path).map_err(io)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_refused_wherever_the_damage_is() {
        let image = ImageFile { kernel: (0..200u8).collect() };
        let bytes = image.encode();
        assert_eq!(ImageFile::decode("x", &bytes).unwrap(), image);
        for at in 0..bytes.len() {
            let mut altered = bytes.clone();
            altered[at] ^= 0x10;
            assert!(ImageFile::decode("x", &altered).is_err(), "byte {at}");
            assert!(ImageFile::decode("x", &bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut bytes = ImageFile { kernel: vec![1] }.encode();
        bytes[8] = 2;
        assert!(matches!(ImageFile::decode("x", &bytes), Err(ImageError::Version { format: 2, .. })));
    }
}
