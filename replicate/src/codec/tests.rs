use kage_machine::Epoch;
use proptest::prelude::*;

use super::*;
use crate::testing::page;

fn decode(bytes: &[u8]) -> Result<Vec<(PageIndex, Vec<u8>)>, DecodeError> {
    let mut pages = Vec::new();
    Decoder::new().decode(&Batch::parse(bytes)?, |index, content| {
        pages.push((
            index,
            match content {
                Content::Zero => vec![0; PAGE_SIZE],
                Content::Bytes(bytes) => bytes.to_vec(),
                Content::Delta(delta) => delta.to_vec(),
                Content::Elsewhere(digest) => digest.to_le_bytes().to_vec(),
            },
        ));
        Ok::<(), DecodeError>(())
    })?;
    Ok(pages)
}

fn encode(scheme: Scheme, pages: &[PageBytes]) -> Vec<u8> {
    let (mut encoder, mut writer) = (Encoder::new(), BatchWriter::new(Epoch(1)));
    for (index, bytes) in pages.iter().enumerate() {
        encoder.push(&mut writer, scheme, PageIndex(index as u32), bytes, None);
    }
    encoder.finish(&mut writer, scheme)
}

fn scheme() -> impl Strategy<Value = Scheme> {
    prop_oneof![Just(Scheme::Raw), Just(Scheme::Lz4), Just(Scheme::Zstd)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_page_survives_any_scheme(scheme in scheme(), pages in prop::collection::vec(page(), 0..8)) {
        let decoded = decode(&encode(scheme, &pages)).unwrap();
        prop_assert_eq!(decoded.len(), pages.len());
        for (index, (found, bytes)) in decoded.iter().enumerate() {
            prop_assert_eq!((found.0 as usize, &bytes[..]), (index, &pages[index][..]));
        }
    }

    #[test]
    fn damaged_batches_never_panic(
        scheme in scheme(),
        pages in prop::collection::vec(page(), 1..3),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = encode(scheme, &pages);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = decode(&bytes);
    }

    #[test]
    fn arbitrary_records_never_panic(mut tail in prop::collection::vec(any::<u8>(), 0..300), records in 0u16..9, packed in 0u8..2) {
        let mut bytes = vec![0; 16];
        bytes[8..10].copy_from_slice(&records.to_le_bytes());
        bytes[10] = packed;
        bytes[12..16].copy_from_slice(&(tail.len() as u32).to_le_bytes());
        if tail.len() > 8 {
            // The first record says LZ4 with what follows as its data.
            let length = (tail.len() - 8) as u16;
            tail[4..6].copy_from_slice(&[Encoding::Lz4 as u8, 0]);
            tail[6..8].copy_from_slice(&length.to_le_bytes());
        }
        bytes.extend(tail);
        let _ = decode(&bytes);
    }
}

#[test]
fn truncation_at_every_byte_is_refused() {
    let pages = [[5; PAGE_SIZE], [6; PAGE_SIZE]];
    for scheme in [Scheme::Lz4, Scheme::Zstd] {
        let bytes = encode(scheme, &pages);
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "{scheme:?} cut at {end}");
        }
    }
}

#[test]
fn a_batch_that_unpacks_to_more_than_it_declares_is_refused() {
    let mut bytes = encode(Scheme::Zstd, &[[5; PAGE_SIZE]; 4]);
    let declared = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
    bytes[12..16].copy_from_slice(&(declared - 1).to_le_bytes());
    assert!(matches!(decode(&bytes), Err(DecodeError::Records { .. })));
}

#[test]
fn fast_links_get_pages_as_they_are_and_thin_ones_the_best_compression() {
    let mbit = |rate: f64| Rate::bytes_per_s(rate * 1e6 / 8.0);
    let chooser = Chooser::default();
    assert_eq!(chooser.best(mbit(10_000.0)), Scheme::Raw);
    assert_eq!(chooser.best(mbit(50.0)), Scheme::Zstd);
    let cost = |encode, ratio| Cost { encode: Rate::bytes_per_s(encode), ratio };
    let (lz4, zstd) = (cost(600e6, 0.45), cost(150e6, 0.35));
    assert_eq!(choose(mbit(10_000.0), lz4, zstd), Scheme::Raw);
    assert_eq!(choose(mbit(1_000.0), lz4, zstd), Scheme::Lz4);
    assert_eq!(choose(mbit(50.0), lz4, zstd), Scheme::Zstd);
}

#[test]
fn incompressible_content_goes_as_it_is_once_that_was_seen() {
    let link = Rate::bytes_per_s(100e6);
    let mut chooser = Chooser::default();
    for _ in 0..100 {
        let scheme = chooser.next(link);
        chooser.record(scheme, 256 << 10, 257 << 10, std::time::Duration::from_micros(500));
    }
    assert_eq!(chooser.best(link), Scheme::Raw);
    // And when it changes, trying finds out.
    for _ in 0..4000 {
        let scheme = chooser.next(link);
        chooser.record(scheme, 256 << 10, 32 << 10, std::time::Duration::from_micros(500));
    }
    assert_ne!(chooser.best(link), Scheme::Raw);
}
