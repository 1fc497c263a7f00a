//! An image and its file.
//!
//! ```text
//! 0    8  magic "KAGEIMG\0"
//! 8    4  format, little-endian, 2
//! 12   4  ABI version the kernel was built for
//! 16   8  bytes of body as it lies here
//! 24   8  bytes of body decompressed
//! 32  32  BLAKE3 of the body as it lies here
//! 64  32  public key of the signer (ed25519)
//! 96  64  signature (RFC 8032) of bytes 0 to 96
//! 160  …  body: zstd of postcard of (manifest, engine, kernel, files, programs, compiler)
//! ```
//! The signature covers every byte: the header itself, and the body by its hash. It is checked, and its key looked for
//! among the trusted ones, before anything of the body is read. What comes out of a checked file is still checked for
//! sense, since a signer can err.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    path::Path,
    sync::{Arc, OnceLock},
};

use ed25519_dalek::Signer as _;
use serde::{Deserialize, Serialize};

use crate::{
    base::{Base, BaseError},
    embedded,
    keys::{PublicKey, SigningKey},
    manifest::Manifest,
};

const MAGIC: [u8; 8] = *b"KAGEIMG\0";
const FORMAT: u32 = 2;
const SIGNED: usize = 96;
const HEADER: usize = 160;
/// Largest image file read, and largest body.
const MAX_BYTES: u64 = 256 << 20;
/// What compresses 10 MB of code in half a second.
const LEVEL: i32 = 9;
/// Most files and directories.
const MAX_FILES: usize = 8 << 10;
/// Longest path.
const MAX_PATH: usize = 1024;

/// Why an image is refused.
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
    #[error("{path}: image format {format}, this program reads format {FORMAT}; {}", cure(*format > FORMAT))]
    Format {
        /// The file.
        path: String,
        /// Its format.
        format: u32,
    },
    /// Its kernel speaks another language than this VMM.
    #[error(
        "{path}: made for ABI {abi}, this program has ABI {}; {}",
        kage_abi::ABI_VERSION, cure(*abi > kage_abi::ABI_VERSION)
    )]
    Abi {
        /// The file.
        path: String,
        /// Its ABI.
        abi: u32,
    },
    /// No machine can be made of it.
    #[error("{path}: {source}")]
    Unfit {
        /// The file.
        path: String,
        /// Why not.
        source: BaseError,
    },
    /// Nobody signed it.
    #[error("{path}: not signed; build it with `kage image build --key FILE`")]
    Unsigned {
        /// The file.
        path: String,
    },
    /// Somebody signed it whom nobody here trusts.
    #[error(
        "{path}: signed by {key}, which is not trusted here; add it to [image] trusted_keys if it should be"
    )]
    Untrusted {
        /// The file.
        path: String,
        /// The signer.
        key: PublicKey,
    },
}

fn cure(newer: bool) -> &'static str {
    if newer { "use the kage that made it, or a newer one" } else { "build the image again" }
}

/// Whose images are taken.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Anybody's: for looking at a file, not for running it.
    Anyone,
    /// Those signed by one of these keys.
    Keys(Vec<PublicKey>),
}

/// What lies at a path of an image's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A directory.
    Directory,
    /// A file.
    File(#[serde(with = "as_bytes")] Cow<'static, [u8]>),
    /// A symbolic link.
    Link(String),
}

/// A path of an image's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Absolute, without `.` and `..`.
    pub path: String,
    /// What is there.
    pub node: Node,
}

/// A program, compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    name: Cow<'static, str>,
    #[serde(with = "as_bytes")]
    code: Cow<'static, [u8]>,
}

impl Program {
    /// A program and its code.
    pub fn new(name: impl Into<Cow<'static, str>>, code: impl Into<Cow<'static, [u8]>>) -> Self {
        Self { name: name.into(), code: code.into() }
    }

    /// Its first name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its code for the image's engine.
    #[must_use]
    pub fn code(&self) -> &[u8] {
        &self.code
    }
}

/// What an image is: everything that a machine of it starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Body {
    /// Kept as TOML: what it leaves out has no place in postcard.
    #[serde(with = "as_text")]
    pub manifest: Manifest,
    pub engine: Cow<'static, str>,
    #[serde(with = "as_bytes")]
    pub kernel: Cow<'static, [u8]>,
    /// Parents first.
    pub files: Vec<FileEntry>,
    /// As in the manifest, in its order.
    pub programs: Vec<Program>,
    /// The executable that makes code for `engine`, so that hosts can serve machines of this image whatever engine
    /// they themselves were built with.
    #[serde(with = "as_bytes")]
    pub compiler: Cow<'static, [u8]>,
}

/// Bytes in one go: serde itself takes them one by one, which for an image is a quarter of a second.
mod as_bytes {
    use std::borrow::Cow;

    use serde::{Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &Cow<'static, [u8]>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    struct Owned;

    impl de::Visitor<'_> for Owned {
        type Value = Cow<'static, [u8]>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            Ok(Cow::Owned(bytes.to_owned()))
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Cow<'static, [u8]>, D::Error> {
        from.deserialize_bytes(Owned)
    }
}

mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de, ser};

    use super::Manifest;

    pub fn serialize<S: Serializer>(manifest: &Manifest, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&toml::to_string(manifest).map_err(ser::Error::custom)?)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Manifest, D::Error> {
        Manifest::parse(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

/// An image. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ImageFile {
    body: Arc<Body>,
    hash: [u8; 32],
    signer: Option<PublicKey>,
}

impl PartialEq for ImageFile {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for ImageFile {}

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

impl ImageFile {
    /// The default image, built with this program and trusted as part of it.
    #[must_use]
    pub fn embedded() -> Self {
        static EMBEDDED: OnceLock<ImageFile> = OnceLock::new();
        EMBEDDED.get_or_init(|| Self::new(embedded::body(), None)).clone()
    }

    /// An image of a kernel and nothing else, for trying kernels.
    #[must_use]
    pub fn bare(kernel: Vec<u8>) -> Self {
        let manifest = Manifest {
            name: "bare".to_owned(),
            memory: 64 << 20,
            disk: 0,
            files: None,
            programs: Vec::new(),
            services: Vec::new(),
            limits: crate::manifest::Limits::default(),
        };
        let (engine, kernel, compiler) =
            (Cow::Borrowed(""), Cow::Owned(kernel), Cow::Borrowed([].as_slice()));
        Self::new(Body { manifest, engine, kernel, files: Vec::new(), programs: Vec::new(), compiler }, None)
    }

    pub(crate) fn new(body: Body, signer: Option<PublicKey>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        // Texts and vectors cannot fail to serialise.
        let text = toml::to_string(&body.manifest).unwrap_or_default();
        add(text.as_bytes());
        add(body.engine.as_bytes());
        add(&body.kernel);
        for count in [body.programs.len(), body.files.len()] {
            add(&(count as u64).to_le_bytes());
        }
        for program in &body.programs {
            add(program.name.as_bytes());
            add(&program.code);
        }
        for file in &body.files {
            add(file.path.as_bytes());
            let (kind, content) = match &file.node {
                Node::Directory => (0, &[][..]),
                Node::File(bytes) => (1, &**bytes),
                Node::Link(target) => (2, target.as_bytes()),
            };
            add(&[kind]);
            add(content);
        }
        let hash = *hasher.finalize().as_bytes();
        Self { body: Arc::new(body), hash, signer }
    }

    /// What it is made of, in words.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.body.manifest
    }

    /// The kernel, an ELF executable.
    #[must_use]
    pub fn kernel(&self) -> &[u8] {
        &self.body.kernel
    }

    /// What its programs are compiled for.
    #[must_use]
    pub fn engine(&self) -> &str {
        &self.body.engine
    }

    /// The executable that compiles for [`engine`](Self::engine).
    #[must_use]
    pub fn compiler(&self) -> &[u8] {
        &self.body.compiler
    }

    /// Its programs.
    #[must_use]
    pub fn programs(&self) -> &[Program] {
        &self.body.programs
    }

    /// Its tree, parents first.
    #[must_use]
    pub fn files(&self) -> &[FileEntry] {
        &self.body.files
    }

    /// Checks that machines of it, with as much memory as they need at least, can be made.
    ///
    /// # Errors
    /// [`BaseError`].
    pub fn check_base(&self) -> Result<(), BaseError> {
        Base::build(self, self.manifest().geometry()?).map(|_| ())
    }

    /// Who signed the file this was read from.
    #[must_use]
    pub fn signer(&self) -> Option<&PublicKey> {
        self.signer.as_ref()
    }

    /// BLAKE3 of everything that a machine of it sees in its base: hosts that move a machine between them must have
    /// images with the same.
    #[must_use]
    pub fn content_hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The file's bytes, signed.
    ///
    /// # Errors
    /// Compression failed.
    pub fn encode(&self, key: &SigningKey) -> io::Result<Vec<u8>> {
        let plain = postcard::to_stdvec(&*self.body).map_err(io::Error::other)?;
        let body = zstd::bulk::compress(&plain, LEVEL)?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(kage_abi::ABI_VERSION.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend((plain.len() as u64).to_le_bytes());
        bytes.extend(blake3::hash(&body).as_bytes());
        bytes.extend(key.public().0);
        bytes.extend(key.0.sign(&bytes).to_bytes());
        bytes.extend(body);
        Ok(bytes)
    }

    /// Checks the bytes of a file named `path` in errors.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn decode(path: &str, bytes: &[u8], trust: &Trust) -> Result<Self, ImageError> {
        let path = || path.to_owned();
        let damaged = |what| ImageError::Damaged { path: path(), what };
        let short = || damaged("cut short");
        if word::<8>(bytes, 0) != Some(MAGIC) {
            return Err(damaged("no image header"));
        }
        let format = u32::from_le_bytes(word(bytes, 8).ok_or_else(short)?);
        if format != FORMAT {
            return Err(ImageError::Format { path: path(), format });
        }
        let header = bytes.get(..HEADER).ok_or_else(short)?;
        let signed = header.get(..SIGNED).ok_or_else(short)?;
        let key = PublicKey(word(bytes, 64).ok_or_else(short)?);
        let signature: [u8; 64] = word(bytes, SIGNED).ok_or_else(short)?;
        if signature == [0; 64] {
            return Err(ImageError::Unsigned { path: path() });
        }
        if !key.verifies(signed, &signature) {
            return Err(damaged("its signature does not match"));
        }
        if let Trust::Keys(trusted) = trust
            && !trusted.contains(&key)
        {
            return Err(ImageError::Untrusted { path: path(), key });
        }
        let abi = u32::from_le_bytes(word(bytes, 12).ok_or_else(short)?);
        if abi != kage_abi::ABI_VERSION {
            return Err(ImageError::Abi { path: path(), abi });
        }
        let length = u64::from_le_bytes(word(bytes, 16).ok_or_else(short)?);
        let plain = u64::from_le_bytes(word(bytes, 24).ok_or_else(short)?);
        let expected: [u8; 32] = word(bytes, 32).ok_or_else(short)?;
        let body = bytes.get(HEADER..).unwrap_or_default();
        if body.len() as u64 != length {
            return Err(damaged("its length is not what its header says"));
        }
        if *blake3::hash(body).as_bytes() != expected {
            return Err(damaged("its hash does not match"));
        }
        if plain > MAX_BYTES {
            return Err(damaged("larger than any image"));
        }
        let plain = zstd::bulk::decompress(body, usize::try_from(plain).unwrap_or(usize::MAX))
            .map_err(|_| damaged("it cannot be decompressed"))?;
        let body: Body = postcard::from_bytes(&plain).map_err(|_| damaged("its content cannot be read"))?;
        if !body
            .manifest
            .programs
            .iter()
            .map(|entry| &*entry.name)
            .eq(body.programs.iter().map(Program::name))
        {
            return Err(damaged("its programs are not those of its manifest"));
        }
        check_tree(&body.files).map_err(damaged)?;
        let image = Self::new(body, Some(key));
        image.check_base().map_err(|source| ImageError::Unfit { path: path(), source })?;
        Ok(image)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn read(path: &Path, trust: &Trust) -> Result<Self, ImageError> {
        let name = path.display().to_string();
        let io = |source| ImageError::Io { path: name.clone(), source };
        let file = File::open(path).map_err(io)?;
        // A device or a pipe has no length, and no end.
        if !file.metadata().map_err(io)?.is_file() {
            return Err(ImageError::Damaged { path: name, what: "not a file" });
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ImageError::Damaged { path: name, what: "larger than any image" });
        }
        Self::decode(&name, &bytes, trust)
    }
}

/// Checks that a tree can be made as it is: absolute paths, each once, parents first.
pub(crate) fn check_tree(files: &[FileEntry]) -> Result<(), &'static str> {
    if files.len() > MAX_FILES {
        return Err("more than 8192 files");
    }
    let mut directories = BTreeSet::from([""]);
    let mut all = BTreeSet::new();
    for file in files {
        let path = file.path.as_str();
        let parts = path.strip_prefix('/').ok_or("a file's path does not start with /")?;
        if path.len() > MAX_PATH || path.contains('\0') {
            return Err("a file's path is too long, or has a zero byte");
        }
        if parts.split('/').any(|part| ["", ".", ".."].contains(&part) || part.len() > 255) {
            return Err("a file's path has an empty, special or too long part");
        }
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if !directories.contains(parent) {
            return Err("a file's directory does not come before it");
        }
        if !all.insert(path) {
            return Err("a path is there twice");
        }
        if file.node == Node::Directory {
            directories.insert(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
