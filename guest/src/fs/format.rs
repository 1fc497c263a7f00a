//! What lies on the disk, byte for byte. All numbers are little-endian; blocks have 4 KiB. No I/O here.
//!
//! ```text
//!  block 0, 1   superblock, twice; the one with the higher sequence counts
//!  block 2 …    the rest of the first area: metadata blocks
//!  areas        of the superblock's `area_blocks` each; its bitmap says which hold metadata, the others hold data
//! ```
//!
//! *There is no journal and no order of writes*: the host makes a flush an atomic commit, so the disk is always as it
//! was at the end of one.
//!
//! **Superblock**: magic (8), checksum (8), version (4), `must` features (4), `may` features (4), blocks of an area (4),
//! blocks (8), identity (8), sequence (8), next index of a VID (8), index of the root (8); at 256 the areas' bitmap.
//! A disk of a newer version, or with a `must` feature that is not known, is not used at all; one with a `may` feature
//! that is not known is only read.
//!
//! **Metadata block**: magic (4), bytes used (4), checksum (8), its own number (4), zero (4), the disk's identity (8);
//! then items, one behind the other. A block of zeros is free. Each has a checksum of its own, knows where it lies and
//! to which disk it belongs, and holds whole items: one that is damaged costs the inodes it holds and no other.
//!
//! **Item**: bytes (2), kind (1), zero (1), part (4), index of the inode's VID (8), then
//! - *node* (kind 1): what it is (1: 1 directory, 2 file, 3 link, 4 removed), flags (1: bit 0 of the image, bit 1 the
//!   root, bit 2 its bytes are the image's), mode (2), names (2), bytes of the target (2), size (8), times of access,
//!   modification and change in nanoseconds since 1970 (8 each), blocks on the disk (8); the hash of its path in the image (16) if of the image; its names: parent (8),
//!   length (1), name; the target.
//! - *map* (kind 2): `part` is the group of 256 blocks of the file; runs: block (4), first in the group (2), count (2).
//!
//! Names belong to the inode that they name, not to the directory: so a rename, a removal or a new file changes one item
//! each, a damaged block loses no other file's name, and directories are put together at mount. An inode's item fits
//! in a block; that bounds how many names it can have.
//!
//! **The image's files.** An inode that comes from the image's tree is kept with the hash of its path there, so that its
//! VID stays. A file is *as a whole* either the image's, whose bytes then come from whatever image the machine has, or
//! its own: the first commit after a change of its content copies the rest. So an upgraded image can never be mixed
//! with what was written over its predecessor: unchanged files follow the image, changed ones stay, removed ones stay
//! removed (*removed* nodes), those that the new image no longer has are gone, and new ones appear unless something
//! else has their name.

use alloc::{rc::Rc, string::String, vec, vec::Vec};

use twox_hash::XxHash64;

use super::map::{GROUP, Run};
use crate::virtio::block::BLOCK;

/// Version of all this.
pub const VERSION: u32 = 1;
/// Smallest disk that is used.
pub const LEAST_BLOCKS: u64 = 64;
/// Bytes of a metadata block that items may take.
pub const ROOM: usize = BLOCK - HEADER;
/// First metadata block.
pub const FIRST_RECORD: u32 = 2;

const MAGIC: u64 = u64::from_le_bytes(*b"kagefile");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"kmet");
/// Bytes before a metadata block's items.
pub const HEADER: usize = 32;
/// Bytes before an item's content.
const ITEM: usize = 16;
/// Bytes of a node before its hash, names and target.
const NODE: usize = 48;
const RUN: usize = 8;
/// Where the bitmap of areas starts in the superblock, and how many areas it can hold.
const AREAS_AT: usize = 256;
/// Most areas.
pub const MOST_AREAS: u64 = ((BLOCK - AREAS_AT) * 8) as u64;

/// Why a disk cannot be used, or only be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Nothing was ever written.
    #[error("blank")]
    Blank,
    /// Not what was written.
    #[error("damaged")]
    Damaged,
    /// Of a version that is not known.
    #[error("of version {0}, newer than {VERSION}")]
    Newer(u32),
    /// With features that are not known.
    #[error("with unknown features {0:#x}")]
    Features(u32),
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FormatError> {
    let part = at.checked_add(N).and_then(|end| bytes.get(at..end));
    part.and_then(|part| part.try_into().ok()).ok_or(FormatError::Damaged)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, FormatError> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, FormatError> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, FormatError> {
    array(bytes, at).map(u64::from_le_bytes)
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    if let Some(into) = bytes.get_mut(at..at + part.len()) {
        into.copy_from_slice(part);
    }
}

/// The checksum of a block whose own lies at 8.
fn checksum(block: &[u8]) -> u64 {
    let (head, tail) = block.split_at(block.len().min(8));
    let seed = head.iter().fold(0, |seed: u64, &byte| seed << 8 | u64::from(byte));
    XxHash64::oneshot(seed, tail.get(8..).unwrap_or_default())
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|&byte| byte == 0)
}

/// The superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Super {
    /// Blocks of an area.
    pub area_blocks: u32,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Tells this file system from those that lay on the same blocks before.
    pub identity: u64,
    /// Counts commits.
    pub sequence: u64,
    /// Every index of a VID from here on is unused.
    pub next_index: u64,
    /// Index of the root.
    pub root: u64,
    /// For each area, whether it holds metadata.
    pub areas: Vec<u8>,
    /// Something of it is not known here: it may only be read.
    pub read_only: bool,
}

impl Super {
    /// That of a new disk.
    pub fn new(blocks: u64, identity: u64) -> Self {
        let area_blocks = blocks.div_ceil(16_384).next_power_of_two().clamp(16, 1 << 20) as u32;
        let areas = (blocks / u64::from(area_blocks)).div_ceil(8) as usize;
        let areas = vec![0; areas.min(MOST_AREAS as usize / 8)];
        Self { area_blocks, blocks, identity, sequence: 0, next_index: 0, root: 0, areas, read_only: false }
    }

    /// Numbers of the areas that hold metadata.
    pub fn record_areas(&self) -> impl Iterator<Item = u32> {
        (0..self.areas.len() as u32 * 8).filter(|&area| self.has(area))
    }

    fn has(&self, area: u32) -> bool {
        self.areas.get(area as usize / 8).is_some_and(|byte| byte >> (area % 8) & 1 == 1)
    }

    /// Notes an area that holds metadata; false when the bitmap has no place for it.
    pub fn add(&mut self, area: u32) -> bool {
        let Some(byte) = self.areas.get_mut(area as usize / 8) else { return false };
        *byte |= 1 << (area % 8);
        true
    }

    /// Makes room for a disk of more blocks, as far as the bitmap goes.
    pub fn grow(&mut self, blocks: u64) {
        let most = MOST_AREAS * u64::from(self.area_blocks);
        self.blocks = self.blocks.max(blocks.min(most));
        let areas = (self.blocks / u64::from(self.area_blocks)).div_ceil(8) as usize;
        self.areas.resize(areas.max(self.areas.len()), 0);
    }

    /// The block.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        put(&mut block, 0, &MAGIC.to_le_bytes());
        for (at, word) in [(16, VERSION), (28, self.area_blocks)] {
            put(&mut block, at, &word.to_le_bytes());
        }
        let words = [self.blocks, self.identity, self.sequence, self.next_index, self.root];
        for (index, word) in words.iter().enumerate() {
            put(&mut block, 32 + 8 * index, &word.to_le_bytes());
        }
        put(&mut block, AREAS_AT, &self.areas);
        let sum = checksum(&block);
        put(&mut block, 8, &sum.to_le_bytes());
        block
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        if is_zero(block) {
            return Err(FormatError::Blank);
        }
        if u64_at(block, 0)? != MAGIC || u64_at(block, 8)? != checksum(block) {
            return Err(FormatError::Damaged);
        }
        let version = u32_at(block, 16)?;
        if version != VERSION {
            return Err(FormatError::Newer(version));
        }
        let must = u32_at(block, 20)?;
        if must != 0 {
            return Err(FormatError::Features(must));
        }
        let area_blocks = u32_at(block, 28)?;
        let blocks = u64_at(block, 32)?;
        let sound = area_blocks.is_power_of_two()
            && (16..=1 << 20).contains(&area_blocks)
            && (LEAST_BLOCKS..u64::from(u32::MAX)).contains(&blocks);
        let areas = blocks / u64::from(area_blocks.max(1));
        if !sound || areas > MOST_AREAS {
            return Err(FormatError::Damaged);
        }
        let bitmap = block.get(AREAS_AT..AREAS_AT + areas.div_ceil(8) as usize);
        let mut bitmap = Vec::from(bitmap.ok_or(FormatError::Damaged)?);
        if let (Some(last), spare @ 1..) = (bitmap.last_mut(), areas % 8) {
            *last &= (1 << spare) - 1;
        }
        Ok(Self {
            area_blocks,
            blocks,
            identity: u64_at(block, 40)?,
            sequence: u64_at(block, 48)?,
            next_index: u64_at(block, 56)?,
            root: u64_at(block, 64)?,
            areas: bitmap,
            read_only: u32_at(block, 24)? != 0,
        })
    }
}

/// Makes a metadata block of its items, which start at [`HEADER`] and end at `used`.
pub fn seal(block: &mut [u8], used: usize, number: u32, identity: u64) {
    put(block, 0, &RECORD_MAGIC.to_le_bytes());
    put(block, 4, &(used as u32).to_le_bytes());
    put(block, 16, &number.to_le_bytes());
    put(block, 20, &[0; 4]);
    put(block, 24, &identity.to_le_bytes());
    let sum = checksum(block);
    put(block, 8, &sum.to_le_bytes());
}

/// Where the items of a metadata block end.
///
/// # Errors
/// [`FormatError`].
pub fn open(block: &[u8], number: u32, identity: u64) -> Result<usize, FormatError> {
    if is_zero(block) {
        return Err(FormatError::Blank);
    }
    let used = u32_at(block, 4)? as usize;
    let sound = u32_at(block, 0)? == RECORD_MAGIC
        && u64_at(block, 8)? == checksum(block)
        && u32_at(block, 16)? == number
        && u64_at(block, 24)? == identity
        && (HEADER..=BLOCK).contains(&used);
    if sound { Ok(used) } else { Err(FormatError::Damaged) }
}

/// Names an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Index of the inode's VID.
    pub index: u64,
    /// One of [`kind`].
    pub kind: u8,
    /// The group of a map.
    pub part: u32,
}

/// Kinds of items.
pub mod kind {
    /// An inode.
    pub const NODE: u8 = 1;
    /// Blocks of a file.
    pub const MAP: u8 = 2;
}

impl Key {
    /// That of an inode.
    pub const fn node(index: u64) -> Self {
        Self { index, kind: kind::NODE, part: 0 }
    }

    /// That of a group of a file.
    pub const fn map(index: u64, part: u32) -> Self {
        Self { index, kind: kind::MAP, part }
    }
}

/// An item in a metadata block.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Its name.
    pub key: Key,
    /// Where it starts.
    pub at: usize,
    /// Its bytes, all of them.
    pub length: usize,
    /// What follows the head.
    pub content: &'a [u8],
}

/// The items of a metadata block that ends at `used`; an error once, where they make no sense.
pub fn items(block: &[u8], used: usize) -> impl Iterator<Item = Result<Item<'_>, FormatError>> {
    let mut at = HEADER;
    core::iter::from_fn(move || {
        if at >= used {
            return None;
        }
        let item = item(block, at, used);
        at = item.as_ref().map_or(used, |item| at + item.length);
        Some(item)
    })
}

fn item(block: &[u8], at: usize, used: usize) -> Result<Item<'_>, FormatError> {
    let length = usize::from(u16_at(block, at)?);
    let bytes = block.get(at..at + length).filter(|_| length >= ITEM && at + length <= used);
    let bytes = bytes.ok_or(FormatError::Damaged)?;
    let [kind] = array(bytes, 2)?;
    let key = Key { index: u64_at(bytes, 8)?, kind, part: u32_at(bytes, 4)? };
    Ok(Item { key, at, length, content: bytes.get(ITEM..).unwrap_or_default() })
}

fn begin(out: &mut Vec<u8>, key: Key) {
    out.clear();
    out.extend_from_slice(&[0, 0, key.kind, 0]);
    out.extend_from_slice(&key.part.to_le_bytes());
    out.extend_from_slice(&key.index.to_le_bytes());
}

fn finish(out: &mut [u8]) {
    let length = out.len() as u16;
    put(out, 0, &length.to_le_bytes());
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// A directory.
    Directory = 1,
    /// A file.
    File = 2,
    /// A link.
    Link = 3,
    /// Something of the image that was removed.
    Removed = 4,
}

/// Hash of a path in the image.
pub type PathHash = [u8; 16];

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Index of its VID.
    pub index: u64,
    /// What it is.
    pub what: What,
    /// It is the root.
    pub root: bool,
    /// Mode bits.
    pub mode: u16,
    /// Bytes of a file.
    pub size: u64,
    /// Nanoseconds since 1970: accessed, modified, changed.
    pub times: [u64; 3],
    /// Blocks it has on the disk: says whether all its groups are there.
    pub blocks: u64,
    /// Where it comes from in the image.
    pub base: Option<PathHash>,
    /// A file whose bytes are the image's.
    pub lower: bool,
    /// Directories and names.
    pub names: Vec<(u64, Rc<str>)>,
    /// Where a link leads.
    pub target: Option<Rc<str>>,
}

const BASE: u8 = 1;
const ROOT: u8 = 2;
const LOWER: u8 = 4;

/// Bytes of a node's item.
pub fn node_bytes<'a>(names: impl Iterator<Item = &'a str>, target: usize) -> usize {
    ITEM + NODE + size_of::<PathHash>() + names.map(|name| 9 + name.len()).sum::<usize>() + target
}

impl Node {
    /// Writes its item.
    pub fn encode(&self, out: &mut Vec<u8>) {
        begin(out, Key::node(self.index));
        let target = self.target.as_deref().unwrap_or_default();
        let flags = if self.base.is_some() { BASE } else { 0 }
            | if self.root { ROOT } else { 0 }
            | if self.lower { LOWER } else { 0 };
        out.extend_from_slice(&[self.what as u8, flags]);
        for word in [self.mode, self.names.len() as u16, target.len() as u16] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.size].iter().chain(&self.times).chain(&[self.blocks]) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(self.base.as_ref().map_or(&[][..], |hash| &hash[..]));
        for (parent, name) in &self.names {
            out.extend_from_slice(&parent.to_le_bytes());
            out.push(name.len() as u8);
            out.extend_from_slice(name.as_bytes());
        }
        out.extend_from_slice(target.as_bytes());
        finish(out);
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`FormatError::Damaged`].
    pub fn decode(index: u64, content: &[u8]) -> Result<Self, FormatError> {
        let [what, flags] = array(content, 0)?;
        let what = match what {
            1 => What::Directory,
            2 => What::File,
            3 => What::Link,
            4 => What::Removed,
            _ => return Err(FormatError::Damaged),
        };
        let (count, target) = (u16_at(content, 4)?, usize::from(u16_at(content, 6)?));
        let mut at = NODE;
        let mut base = None;
        if flags & BASE != 0 {
            base = Some(array(content, at)?);
            at += size_of::<PathHash>();
        }
        let text = |at: usize, length: usize| -> Result<Rc<str>, FormatError> {
            let bytes = content.get(at..at + length).ok_or(FormatError::Damaged)?;
            core::str::from_utf8(bytes).map(Rc::from).map_err(|_| FormatError::Damaged)
        };
        // The content bounds the names: each takes at least nine bytes of it.
        let mut names = Vec::with_capacity(usize::from(count).min(content.len() / 9));
        for _ in 0..count {
            let parent = u64_at(content, at)?;
            let [length] = array(content, at + 8)?;
            names.push((parent, text(at + 9, length.into())?));
            at += 9 + usize::from(length);
        }
        let target = match what {
            What::Link => Some(text(at, target)?),
            What::Directory | What::File | What::Removed => None,
        };
        Ok(Self {
            index,
            what,
            root: flags & ROOT != 0,
            mode: u16_at(content, 2)?,
            size: u64_at(content, 8)?,
            times: [u64_at(content, 16)?, u64_at(content, 24)?, u64_at(content, 32)?],
            blocks: u64_at(content, 40)?,
            base,
            lower: flags & LOWER != 0,
            names,
            target,
        })
    }
}

/// Writes the item of a file's group.
pub fn encode_runs(out: &mut Vec<u8>, key: Key, runs: &[Run]) {
    begin(out, key);
    for run in runs {
        out.extend_from_slice(&run.block.to_le_bytes());
        out.extend_from_slice(&run.start.to_le_bytes());
        out.extend_from_slice(&run.count.to_le_bytes());
    }
    finish(out);
}

/// Reads the runs of a group: in order, within the group, none empty.
///
/// # Errors
/// [`FormatError::Damaged`].
pub fn decode_runs(content: &[u8]) -> Result<Vec<Run>, FormatError> {
    let mut runs = Vec::with_capacity(content.len() / RUN);
    let mut from = 0;
    if !content.len().is_multiple_of(RUN) {
        return Err(FormatError::Damaged);
    }
    for bytes in content.chunks_exact(RUN) {
        let run = Run { block: u32_at(bytes, 0)?, start: u16_at(bytes, 4)?, count: u16_at(bytes, 6)? };
        let end = u64::from(run.start) + u64::from(run.count);
        if run.count == 0 || u64::from(run.start) < from || end > GROUP {
            return Err(FormatError::Damaged);
        }
        from = end;
        runs.push(run);
    }
    Ok(runs)
}

/// Bytes of a group's item.
pub const fn runs_bytes(runs: usize) -> usize {
    ITEM + runs * RUN
}

/// Hash of a path in the image.
pub fn path_hash(path: &str) -> PathHash {
    let mut hash = PathHash::default();
    let (low, high) = hash.split_at_mut(8);
    low.copy_from_slice(&XxHash64::oneshot(0x6b61_6765, path.as_bytes()).to_le_bytes());
    high.copy_from_slice(&XxHash64::oneshot(0x7061_7468, path.as_bytes()).to_le_bytes());
    hash
}

/// Whether a name may stand in a directory.
pub fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= super::MAX_NAME && !name.contains(['/', '\0'])
}

/// A name for what has lost its own.
pub fn found_name(index: u64) -> String {
    alloc::format!("{index:x}")
}
