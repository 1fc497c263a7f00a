//! Lists of digests and blocks, to other hosts and from them.
//!
//! ```text
//! list     varint blocks, then runs: varint zeros skipped ∥ varint count ∥ count digests (8 bytes, LE; 0: not held)
//!          behind the last run: zeros
//! wanted   up to 64 × (block 4 bytes ∥ digest 8 bytes, LE; 0: whatever it is)
//! given    a byte for each: 0 not held, 1 bytes, 2 zeros; then 4096 bytes for each 1
//! ```
//! Whatever bytes arrive, a decoder takes them or says no, and reserves no more than the disk's size allows.

use std::sync::{Arc, OnceLock};

use http::Method;
use kage_directory::ImageRecord;
use kage_machine::{
    HostName, PAGE_SIZE, PageBytes, UserName,
    disk::{Block, Disk, block_digest},
};

use crate::{
    api::error::{Code, ErrorBody},
    http::Call,
    lifecycle::{Daemon, Image, blocking},
};

/// Blocks of one question.
pub const BLOCKS: usize = 64;

/// How long a list may take: 4 MiB at 1 Mbit/s.
const LIST: std::time::Duration = std::time::Duration::from_secs(40);

/// How long blocks may take: 256 KiB at 1 Mbit/s, and waiting behind others.
const READ: std::time::Duration = std::time::Duration::from_secs(10);

/// Unknown digest.
const ANY: u64 = 0;

/// Digest of a block of zeros.
pub(super) fn zeros_digest() -> u64 {
    static ZEROS: OnceLock<u64> = OnceLock::new();
    *ZEROS.get_or_init(|| block_digest(&[0; PAGE_SIZE]))
}

/// A block that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which.
    pub block: u32,
    /// Its digest; `None`: whatever the origin has.
    pub digest: Option<u64>,
}

impl Wanted {
    fn may_be(&self, digest: u64) -> bool {
        self.digest.is_none_or(|wanted| wanted == digest)
    }
}

/// What a host has of a block that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// Not this.
    Nothing,
    /// Its bytes.
    Bytes(Box<PageBytes>),
    /// It is zeros.
    Zeros,
}

/// All blocks of a disk, as a host says it has them.
pub(super) struct List {
    /// `None` for zeros.
    digests: Vec<Option<u64>>,
}

impl List {
    /// What a block is there.
    pub fn block(&self, block: u32) -> Block {
        match self.digests.get(block as usize) {
            None | Some(None) => Block::Zeros,
            Some(Some(ANY)) => Block::Missing(None),
            Some(Some(digest)) => Block::Held(*digest),
        }
    }

    pub fn encode(disk: &dyn Disk) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, disk.blocks());
        let (mut skipped, mut run) = (0, Vec::new());
        let mut held_before = 0;
        for block in 0..=disk.blocks() {
            let held = match disk.block(block) {
                _ if block == disk.blocks() => None,
                Block::Zeros => None,
                Block::Held(digest) => Some(digest),
                Block::Missing(_) => Some(ANY),
            };
            match held {
                Some(digest) => {
                    run.extend_from_slice(&digest.to_le_bytes());
                    held_before += 1;
                }
                None => {
                    if held_before > 0 {
                        put_varint(&mut bytes, skipped);
                        put_varint(&mut bytes, held_before);
                        bytes.append(&mut run);
                        (skipped, held_before) = (0, 0);
                    }
                    skipped += 1;
                }
            }
        }
        bytes
    }

    pub fn decode(mut bytes: &[u8], blocks: u32) -> Option<Self> {
        if take_varint(&mut bytes)? != blocks {
            return None;
        }
        let mut digests: Vec<Option<u64>> = vec![None; blocks as usize];
        let mut next = 0_usize;
        while !bytes.is_empty() {
            next = next.checked_add(take_varint(&mut bytes)? as usize)?;
            let count = take_varint(&mut bytes)? as usize;
            let end = next.checked_add(count)?;
            let run = bytes.get(..count.checked_mul(8)?)?;
            bytes = bytes.get(run.len()..)?;
            for (slot, digest) in digests.get_mut(next..end)?.iter_mut().zip(run.as_chunks::<8>().0) {
                *slot = Some(u64::from_le_bytes(*digest));
            }
            next = end;
        }
        Some(Self { digests })
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0_u32;
    for shift in [0, 7, 14, 21, 28] {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u32::from(byte & 0x7f);
        if shift == 28 && part > 0xf {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn encode_wanted(wanted: &[Wanted]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(wanted.len() * 12);
    for Wanted { block, digest } in wanted {
        bytes.extend_from_slice(&block.to_le_bytes());
        bytes.extend_from_slice(&digest.unwrap_or(ANY).to_le_bytes());
    }
    bytes
}

fn decode_wanted(bytes: &[u8]) -> Option<Vec<Wanted>> {
    let (pairs, rest) = bytes.as_chunks::<12>();
    if !rest.is_empty() || pairs.len() > BLOCKS {
        return None;
    }
    let of = |[a, b, c, d, digest @ ..]: [u8; 12]| Wanted {
        block: u32::from_le_bytes([a, b, c, d]),
        digest: Some(u64::from_le_bytes(digest)).filter(|digest| *digest != ANY),
    };
    Some(pairs.iter().copied().map(of).collect())
}

fn encode_given(given: &[Given]) -> Vec<u8> {
    let mut bytes: Vec<u8> = given
        .iter()
        .map(|given| match given {
            Given::Nothing => 0,
            Given::Bytes(_) => 1,
            Given::Zeros => 2,
        })
        .collect();
    for given in given {
        if let Given::Bytes(block) = given {
            bytes.extend_from_slice(&**block);
        }
    }
    bytes
}

/// Blocks that have not the digest that was asked for count as not given.
fn decode_given(bytes: &[u8], wanted: &[Wanted]) -> Option<Vec<Given>> {
    let (kinds, mut rest) = bytes.split_at_checked(wanted.len())?;
    let mut all = Vec::with_capacity(wanted.len());
    for (kind, wanted) in kinds.iter().zip(wanted) {
        all.push(match kind {
            0 => Given::Nothing,
            1 => {
                let (block, behind) = rest.split_first_chunk::<PAGE_SIZE>()?;
                rest = behind;
                if wanted.may_be(block_digest(block)) {
                    Given::Bytes(Box::new(*block))
                } else {
                    Given::Nothing
                }
            }
            2 if wanted.may_be(zeros_digest()) => Given::Zeros,
            2 => Given::Nothing,
            _ => return None,
        });
    }
    rest.is_empty().then_some(all)
}

fn given_by(disk: &dyn Disk, wanted: Wanted) -> Given {
    match disk.block(wanted.block) {
        Block::Zeros if wanted.may_be(zeros_digest()) => Given::Zeros,
        Block::Held(digest) if wanted.may_be(digest) => {
            let mut bytes = Box::new([0; PAGE_SIZE]);
            match disk.read(wanted.block, &mut bytes) {
                Block::Held(digest) if wanted.may_be(digest) => Given::Bytes(bytes),
                Block::Zeros if wanted.may_be(zeros_digest()) => Given::Zeros,
                Block::Held(_) | Block::Zeros | Block::Missing(_) => Given::Nothing,
            }
        }
        Block::Zeros | Block::Held(_) | Block::Missing(_) => Given::Nothing,
    }
}

/// Blocks of a disk and of what an earlier stay left, which is good for blocks by digest only.
pub(super) fn give(disk: Option<&dyn Disk>, aside: Option<&dyn Disk>, wanted: Wanted) -> Given {
    let first = disk.map_or(Given::Nothing, |disk| given_by(disk, wanted));
    match (first, aside) {
        (Given::Nothing, Some(aside)) if wanted.digest.is_some() => given_by(aside, wanted),
        (first, _) => first,
    }
}

impl Daemon {
    /// The list of what this host has of an image's disk, for another host.
    ///
    /// # Errors
    /// Unknown images, and those of which nothing is here.
    pub(crate) async fn serve_list(self: &Arc<Self>, user: &UserName) -> Result<Vec<u8>, ErrorBody> {
        // None of these semaphores is ever closed.
        let _turn = self.disk_limits.lists.acquire().await.map_err(ErrorBody::failed)?;
        let (daemon, user) = (self.clone(), user.clone());
        blocking(move || {
            let record = daemon.existing(&user)?.record;
            let image = daemon.image(&user);
            let disk = daemon.disk(&image, &record)?;
            let list = disk.as_ref().map(|disk| List::encode(&**disk));
            daemon.stayed(&image, disk.as_ref())?;
            list.ok_or_else(|| daemon.nothing_of(&user))
        })
        .await
    }

    /// What this host has of the blocks that another host wants.
    ///
    /// # Errors
    /// Unknown images, and questions that are none.
    pub(crate) async fn serve_blocks(
        self: &Arc<Self>,
        user: &UserName,
        question: &[u8],
    ) -> Result<Vec<u8>, ErrorBody> {
        let wanted = decode_wanted(question)
            .ok_or_else(|| ErrorBody::bad_request(format!("not a list of up to {BLOCKS} blocks")))?;
        let _turn = self.disk_limits.answers.acquire().await.map_err(ErrorBody::failed)?;
        let (daemon, user) = (self.clone(), user.clone());
        blocking(move || {
            let record = daemon.existing(&user)?.record;
            let image = daemon.image(&user);
            let disk = daemon.disk(&image, &record)?;
            let aside = daemon.aside(&image, &record);
            let given: Vec<Given> =
                wanted.iter().map(|wanted| give(disk.as_deref(), aside.as_deref(), *wanted)).collect();
            daemon.stayed(&image, disk.as_ref())?;
            if disk.is_none() && aside.is_none() {
                return Err(daemon.nothing_of(&user));
            }
            Ok(encode_given(&given))
        })
        .await
    }

    /// Whether what was just looked at is the image's disk still: a log that is closed meanwhile has nothing, which is
    /// no answer, and whoever asked is to ask again.
    fn stayed(&self, image: &Image, disk: Option<&Arc<dyn Disk>>) -> Result<(), ErrorBody> {
        let went = match disk {
            Some(disk) => self.is_gone(image, disk),
            None => image.disk.is_lent(),
        };
        if !went {
            return Ok(());
        }
        let message = format!("{}'s disk at host {} is just changing hands; try again", image.user, self.me);
        Err(ErrorBody::new(Code::Busy, message))
    }

    fn nothing_of(&self, user: &UserName) -> ErrorBody {
        ErrorBody::new(Code::NotFound, format!("host {} has nothing of {user}'s disk", self.me))
    }

    /// Asks a host for its list.
    ///
    /// # Errors
    /// As the call, or that it makes no sense.
    pub(super) async fn ask_list(
        &self,
        host: &HostName,
        user: &UserName,
        record: &ImageRecord,
    ) -> Result<List, ErrorBody> {
        let _turn = self.disk_limits.questions.acquire().await.map_err(ErrorBody::failed)?;
        let call = Call::new(Method::GET, format!("/v1/images/{user}/disk/digests")).patience(LIST);
        let answer = self.peers.call(host, self.address(host)?, &call).await?;
        if !answer.status.is_success() {
            return Err(answer.into_error());
        }
        let blocks = u32::try_from(record.profile.disk_bytes / PAGE_SIZE as u64).unwrap_or(0);
        List::decode(&answer.body, blocks)
            .ok_or_else(|| ErrorBody::failed(format!("host {host}'s list of {user}'s disk is damaged")))
    }

    /// Asks a host for blocks, at most [`BLOCKS`].
    ///
    /// # Errors
    /// As the call, or that it makes no sense.
    pub(super) async fn ask_blocks(
        &self,
        host: &HostName,
        user: &UserName,
        wanted: &[Wanted],
    ) -> Result<Vec<Given>, ErrorBody> {
        let _turn = self.disk_limits.questions.acquire().await.map_err(ErrorBody::failed)?;
        let path = format!("/v1/images/{user}/disk/blocks");
        let call = Call::new(Method::POST, path).bytes(encode_wanted(wanted)).patience(READ);
        let answer = self.peers.call(host, self.address(host)?, &call).await?;
        if !answer.status.is_success() {
            return Err(answer.into_error());
        }
        decode_given(&answer.body, wanted)
            .ok_or_else(|| ErrorBody::failed(format!("host {host}'s blocks of {user}'s disk are damaged")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeDisk;

    fn page(number: u8) -> PageBytes {
        [number; PAGE_SIZE]
    }

    #[test]
    fn a_list_says_every_block_and_no_cut_one_passes() {
        let disk = FakeDisk::zeros(300);
        for block in [0, 1, 7, 200, 299] {
            disk.put(block, &page(block as u8 + 1));
        }
        disk.lose(5, None);
        let bytes = List::encode(&disk);
        assert_eq!(bytes[..4], [0xac, 2, 0, 2], "golden");
        let list = List::decode(&bytes, 300).unwrap();
        for block in 0..300 {
            let expected = match disk.block(block) {
                Block::Missing(_) => Block::Missing(None),
                other => other,
            };
            assert_eq!(list.block(block), expected, "{block}");
        }
        for end in 1..bytes.len() {
            if let Some(list) = List::decode(&bytes[..end], 300) {
                // Only between runs: the rest is taken for zeros, which is why whole answers have a length.
                assert_eq!(list.block(299), Block::Zeros);
            }
        }
        assert!(List::decode(&bytes, 299).is_none() && List::decode(&[], 0).is_none());
    }

    #[test]
    fn questions_and_answers_come_through() {
        let wanted = [Wanted { block: 7, digest: Some(9) }, Wanted { block: 1, digest: None }];
        let bytes = encode_wanted(&wanted);
        assert_eq!(bytes[..12], [7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], "golden");
        assert_eq!(decode_wanted(&bytes).unwrap(), wanted);
        assert!(decode_wanted(&bytes[..23]).is_none());
        assert!(decode_wanted(&[0; 12 * (BLOCKS + 1)]).is_none());
        let wanted = [
            Wanted { block: 7, digest: Some(block_digest(&page(3))) },
            Wanted { block: 8, digest: None },
            Wanted { block: 9, digest: Some(1) },
        ];
        let given = [Given::Bytes(Box::new(page(3))), Given::Zeros, Given::Bytes(Box::new(page(4)))];
        let bytes = encode_given(&given);
        let taken = decode_given(&bytes, &wanted).unwrap();
        assert_eq!(taken, [given[0].clone(), Given::Zeros, Given::Nothing], "another block's bytes");
        for end in 0..bytes.len() {
            assert!(decode_given(&bytes[..end], &wanted).is_none());
        }
    }

    proptest! {
        #[test]
        fn whatever_arrives_is_taken_or_refused(bytes: Vec<u8>, blocks in 0..2000_u32) {
            let _ = List::decode(&bytes, blocks);
            let _ = decode_wanted(&bytes);
            let _ = decode_given(&bytes, &[Wanted { block: 1, digest: None }; 3]);
        }
    }
}
