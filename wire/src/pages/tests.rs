use proptest::prelude::*;

use super::*;

type OwnedRecord = (PageIndex, Encoding, Vec<u8>);

fn read(bytes: &[u8]) -> Result<(Epoch, Vec<OwnedRecord>), BatchError> {
    let batch = Batch::parse(bytes)?;
    let records = BatchReader::new(batch.records, batch.data)
        .map(|record| record.map(|record| (record.index, record.encoding, record.data.to_vec())))
        .collect::<Result<_, _>>()?;
    Ok((batch.epoch, records))
}

#[test]
fn golden_bytes_of_a_batch() {
    let mut writer = BatchWriter::new(Epoch(0x0102));
    writer.push(PageIndex(7), Encoding::Zero, &[]);
    writer.push(PageIndex(8), Encoding::Lz4, &[0xaa, 0xbb]);
    writer.push(PageIndex(9), Encoding::Elsewhere, &0x0102_0304_0506_0708u64.to_le_bytes());
    let golden = [
        2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 34, 0, 0, 0, // header
        7, 0, 0, 0, 0, 0, 0, 0, // zero
        8, 0, 0, 0, 2, 0, 2, 0, 0xaa, 0xbb, // lz4
        9, 0, 0, 0, 4, 0, 8, 0, 8, 7, 6, 5, 4, 3, 2, 1, // elsewhere
    ];
    assert_eq!(writer.finish(None), golden);
    assert_eq!(writer.records(), 0);
    writer.push(PageIndex(7), Encoding::Zero, &[]);
    assert_eq!(writer.finish(Some(&[0x5a])), [2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 8, 0, 0, 0, 0x5a]);
    assert_eq!(writer.records(), 0);
    assert_eq!(writer.record_bytes(), [0; 0]);
}

#[test]
fn golden_bytes_of_a_mark() {
    let mark = EpochMark { epoch: Epoch(3), records: 4, digest: 5 };
    let mut golden = vec![3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 5];
    golden.resize(28, 0);
    assert_eq!(mark.emit().to_vec(), golden);
    assert_eq!(EpochMark::parse(&golden), Ok(mark));
    for end in 0..golden.len() {
        assert_eq!(EpochMark::parse(&golden[..end]), Err(BatchError::Short), "cut at {end}");
    }
    golden.push(0);
    assert_eq!(EpochMark::parse(&golden), Err(BatchError::Trailing(1)));
}

fn sample() -> Vec<u8> {
    let mut writer = BatchWriter::new(Epoch(9));
    writer.push(PageIndex(1), Encoding::Lz4, &[3; 30]);
    writer.push(PageIndex(2), Encoding::Zero, &[]);
    writer.push(PageIndex(3), Encoding::Delta, &[4; 20]);
    writer.push(PageIndex(4), Encoding::Elsewhere, &[5; 8]);
    writer.finish(None)
}

#[test]
fn truncation_at_every_byte_is_refused() {
    let bytes = sample();
    assert!(read(&bytes).is_ok());
    for end in 0..bytes.len() {
        assert_eq!(read(&bytes[..end]), Err(BatchError::Short), "cut at {end}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert_eq!(read(&longer), Err(BatchError::Trailing(1)));
}

#[test]
fn limits_are_checked_before_anything_is_read() {
    let mut bytes = sample();
    bytes[8..10].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(matches!(Batch::parse(&bytes), Err(BatchError::TooLarge { .. })));
    let mut bytes = sample();
    bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Batch::parse(&bytes), Err(BatchError::TooLarge { .. })));
}

#[test]
fn unknown_codes_and_impossible_lengths_are_refused() {
    for (at, value, expected) in [
        (10, 2, BatchError::Code { what: "compression", code: 2 }),
        (11, 1, BatchError::Code { what: "reserved byte", code: 1 }),
        (20, 9, BatchError::Code { what: "encoding", code: 9 }),
        (21, 9, BatchError::Code { what: "reserved byte", code: 9 }),
        (20, 1, BatchError::Length { index: PageIndex(1), encoding: Encoding::Raw, length: 30 }),
        (20, 0, BatchError::Length { index: PageIndex(1), encoding: Encoding::Zero, length: 30 }),
        (20, 4, BatchError::Length { index: PageIndex(1), encoding: Encoding::Elsewhere, length: 30 }),
    ] {
        let mut bytes = sample();
        bytes[at] = value;
        assert_eq!(read(&bytes), Err(expected), "byte {at} = {value}");
    }
}

#[test]
fn a_full_batch_fits_a_frame() {
    let mut writer = BatchWriter::new(Epoch(1));
    while writer.has_room() {
        writer.push(PageIndex(0), Encoding::Raw, &[1; PAGE_SIZE]);
    }
    assert_eq!(writer.records(), 64);
    let batch = writer.finish(None);
    assert!(batch.len() <= crate::Kind::Pages.max_body() as usize);
    while writer.has_room() {
        writer.push(PageIndex(0), Encoding::Zero, &[]);
    }
    assert!(Batch::parse(&writer.finish(None)).is_ok());
}

#[test]
fn a_last_epoch_is_split_or_refused_at_every_cut() {
    let mark = EpochMark { epoch: Epoch(3), records: 4, digest: 5 };
    let mut buffer = mark.emit().to_vec();
    append_to_last_epoch(&mut buffer, &[1, 2, 3]);
    append_to_last_epoch(&mut buffer, &[4]);
    assert_eq!(split_last_epoch(&buffer), Ok((mark, vec![&[1, 2, 3][..], &[4][..]])));
    for end in 0..buffer.len() {
        // Between two batches a cut is only seen by the mark's record count and digest.
        assert_eq!(split_last_epoch(&buffer[..end]).is_ok(), end == 28 || end == 35, "cut at {end}");
    }
}

fn record() -> impl Strategy<Value = (u32, Encoding, Vec<u8>)> {
    (
        any::<u32>(),
        prop_oneof![
            Just((Encoding::Zero, Vec::new())),
            prop::collection::vec(any::<u8>(), PAGE_SIZE).prop_map(|data| (Encoding::Raw, data)),
            prop::collection::vec(any::<u8>(), 1..200).prop_map(|data| (Encoding::Lz4, data)),
            prop::collection::vec(any::<u8>(), 1..200).prop_map(|data| (Encoding::Delta, data)),
        ],
    )
        .prop_map(|(index, (encoding, data))| (index, encoding, data))
}

proptest! {
    #[test]
    fn batches_round_trip(epoch in any::<u64>(), records in prop::collection::vec(record(), 0..20)) {
        let mut writer = BatchWriter::new(Epoch(epoch));
        for (index, encoding, data) in &records {
            writer.push(PageIndex(*index), *encoding, data);
        }
        let expected: Vec<_> = records.into_iter().map(|(index, encoding, data)| (PageIndex(index), encoding, data)).collect();
        prop_assert_eq!(read(&writer.finish(None)), Ok((Epoch(epoch), expected)));
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), records in 0u16..30) {
        let _ = read(&bytes);
        let _ = split_last_epoch(&bytes);
        if bytes.len() >= BATCH_HEADER {
            bytes[8..10].copy_from_slice(&records.to_le_bytes());
            bytes[10..12].fill(0);
            bytes[14..16].fill(0);
            let _ = read(&bytes);
        }
    }
}
