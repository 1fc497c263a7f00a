//! Whatever a peer sends is a value or a typed error.
//!
//! `cargo +nightly fuzz run peer` in `wire/`.
#![no_main]

use kage_machine::PAGE_SIZE;
use kage_wire::{
    BatchReader, EpochMark, Frame, FrameDecoder, Have, Hello, Kind, Refusal, delta,
    pages::{Batch, split_last_epoch},
};
use libfuzzer_sys::fuzz_target;

fn batch(bytes: &[u8]) {
    if let Ok(batch) = Batch::parse(bytes) {
        assert!(BatchReader::new(batch.records, batch.data).count() <= batch.records + 1);
    }
}

fn body(frame: &Frame) {
    match frame.kind {
        Kind::Hello => drop(Hello::from_frame(frame)),
        Kind::Refusal => drop(Refusal::from_body(&frame.body)),
        Kind::Pages => batch(&frame.body),
        Kind::EpochEnd | Kind::EpochAck => drop(EpochMark::parse(&frame.body)),
        Kind::Handover | Kind::Directory => {}
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (mut decoder, mut rest) = (FrameDecoder::new(), bytes);
    while let Ok((taken, frame)) = decoder.feed(rest) {
        frame.iter().for_each(body);
        rest = &rest[taken..];
        if rest.is_empty() {
            break;
        }
    }
    // A checksum is hard to guess: the bodies by themselves.
    if let Some((&kind, bytes)) = bytes.split_first() {
        if let Some(kind) = Kind::from_code(kind) {
            body(&Frame::new(kind, bytes.to_vec()));
        }
        if let Ok((_, batches)) = split_last_epoch(bytes) {
            batches.into_iter().for_each(batch);
        }
        let _ = delta::apply(&mut [0; PAGE_SIZE], bytes);
        if let Ok(have) = Have::parse(bytes, 1 << 19) {
            assert_eq!(Have::of(&have), have);
        }
    }
});
