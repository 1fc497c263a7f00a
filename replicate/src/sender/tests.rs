use std::{sync::Arc, thread};

use kage_machine::PageBytes;
use proptest::prelude::*;

use super::*;
use crate::{
    link::{Fault, MemoryLink, pair},
    receiver::{ReceiveError, Receiver},
    testing::{TestMemory, content, page},
};

const GO_ON: fn(&Progress) -> ControlFlow<()> = |_| ControlFlow::Continue(());

fn links() -> (MemoryLink, MemoryLink) {
    pair("owner".parse().unwrap(), "follower".parse().unwrap())
}

fn memories() -> (TestMemory, Arc<TestMemory>) {
    (TestMemory::new(150, 30), Arc::new(TestMemory::new(150, 30)))
}

/// Runs a follower until its link ends.
fn follow(memory: Arc<TestMemory>, mut link: MemoryLink) -> thread::JoinHandle<(Receiver, ReceiveError)> {
    thread::spawn(move || {
        let mut receiver = Receiver::new(memory);
        loop {
            if let Err(error) = receiver.receive_epoch(&mut link, None) {
                return (receiver, error);
            }
        }
    })
}

fn set(pages: impl IntoIterator<Item = u32>) -> PageSet {
    let mut set = PageSet::empty(180);
    for page in pages {
        set.insert(PageIndex(page));
    }
    set
}

/// A write of a whole page, or of a few bytes of it.
fn write() -> impl Strategy<Value = (u32, PageBytes, Option<(usize, u8)>)> {
    (0u32..180, page(), prop::option::of((0..PAGE_SIZE, any::<u8>())))
}

fn do_write(memory: &TestMemory, (page, bytes, patch): &(u32, PageBytes, Option<(usize, u8)>)) {
    let page = PageIndex(*page);
    let Some((at, value)) = *patch else { return memory.write(page, bytes) };
    let mut bytes = [0; PAGE_SIZE];
    memory.read(page, &mut bytes);
    bytes[at] = value;
    memory.write(page, &bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_follower_equals_its_owner_after_any_rounds_of_writes(
        rounds in prop::collection::vec(prop::collection::vec(write(), 0..60), 1..5),
        last in prop::collection::vec(write(), 0..40),
        cached in prop_oneof![Just(0usize), Just(20), Just(CACHED_PAGES)],
        rate in prop_oneof![Just(1e6), Just(60e6), Just(5e9)],
    ) {
        let (memory, copy) = memories();
        // A shell that was warmed with something else.
        copy.write(PageIndex(5), &[7; PAGE_SIZE]);
        let (mut link, other) = links();
        let follower = follow(copy.clone(), other);
        let mut sender = Sender::new(memory.geometry());
        sender.cache = Cache::new(cached);
        sender.link.record(1 << 30, Duration::from_secs_f64((1u64 << 30) as f64 / rate));
        let mut epoch = Epoch(0);
        for writes in rounds {
            epoch.0 += 1;
            writes.iter().for_each(|write| do_write(&memory, write));
            let pages = set(writes.iter().map(|(page, ..)| *page));
            let stats = sender.send_epoch(&mut link, &memory, &pages, epoch, &mut GO_ON.clone()).unwrap();
            prop_assert_eq!(stats.pages + stats.pages_zero + stats.pages_unchanged, u64::from(pages.len()));
        }
        epoch.0 += 1;
        last.iter().for_each(|write| do_write(&memory, write));
        let pages = set(last.iter().map(|(page, ..)| *page));
        let last = sender.encode_last(&memory, &pages, epoch, 8 << 20).unwrap();
        drop(link);
        let (mut receiver, end) = follower.join().unwrap();
        prop_assert!(matches!(end, ReceiveError::Link(LinkError::Closed)), "{:?}", end);
        prop_assert_eq!(receiver.apply_last(&last.bytes).unwrap(), last.mark);
        prop_assert!(memory.contents() == copy.contents());
        prop_assert_eq!(receiver.mirror().digest(), sender.digest());
        prop_assert!(receiver.mirror().scrub().is_empty());
    }

    #[test]
    fn a_broken_or_damaged_stream_ends_in_an_error_at_both_ends(
        writes in prop::collection::vec((0u32..180, page()), 20..80),
        frame in 0u64..4,
        byte in 0usize..200_000,
        kind in 0u8..3,
    ) {
        let (memory, copy) = memories();
        let (mut link, other) = links();
        link.set_fault(Some(match kind {
            0 => Fault::CutAfter { frames: frame },
            1 => Fault::Truncate { frame, keep: byte },
            _ => Fault::Corrupt { frame, byte },
        }));
        let follower = follow(copy, other);
        writes.iter().for_each(|(page, bytes)| memory.write(PageIndex(*page), bytes));
        let mut sender = Sender::new(memory.geometry());
        let pages = memory.populated();
        let outcome = (1..=4).try_for_each(|epoch| {
            memory.write(PageIndex(179), &content(3, epoch));
            let mut pages = pages.clone();
            pages.insert(PageIndex(179));
            sender.send_epoch(&mut link, &memory, &pages, Epoch(epoch), &mut GO_ON.clone()).map(|_| ())
        });
        prop_assert!(outcome.is_err());
        drop(link);
        let (_, end) = follower.join().unwrap();
        prop_assert!(!matches!(end, ReceiveError::Mismatch { .. }), "{:?}", end);
    }
}

#[test]
fn what_the_follower_holds_already_is_not_sent_again() {
    let (memory, copy) = memories();
    let (mut link, other) = links();
    let follower = follow(copy.clone(), other);
    let mut sender = Sender::new(memory.geometry());
    memory.write(PageIndex(1), &[1; PAGE_SIZE]);
    memory.write(PageIndex(2), &[2; PAGE_SIZE]);
    // Page 3 is zero and was never anything else: it costs nothing.
    let stats = sender.send_epoch(&mut link, &memory, &set([1, 2, 3]), Epoch(1), &mut GO_ON.clone()).unwrap();
    assert_eq!((stats.pages, stats.pages_zero, stats.pages_unchanged), (2, 0, 1));
    memory.zero(PageIndex(1));
    let stats = sender.send_epoch(&mut link, &memory, &set([1, 2, 3]), Epoch(2), &mut GO_ON.clone()).unwrap();
    assert_eq!((stats.pages, stats.pages_zero, stats.pages_unchanged), (0, 1, 2));
    assert!(stats.bytes_wire < 100);
    assert!(memory.contents() == copy.contents());
    drop(link);
    follower.join().unwrap();
}

#[test]
fn pages_outside_the_machine_are_not_sent() {
    let (memory, copy) = memories();
    let (mut link, other) = links();
    let follower = follow(copy, other);
    let mut sender = Sender::new(memory.geometry());
    let stats =
        sender.send_epoch(&mut link, &memory, &PageSet::full(4000), Epoch(1), &mut GO_ON.clone()).unwrap();
    assert_eq!(stats.pages, 0);
    drop(link);
    follower.join().unwrap();
}

#[test]
fn a_cancelled_epoch_returns_what_was_not_sent_and_the_next_one_mends_it() {
    let (memory, copy) = memories();
    (0..180).for_each(|page| memory.write(PageIndex(page), &content(3, u64::from(page) + 1)));
    let (mut link, other) = links();
    let follower = follow(copy.clone(), other);
    let mut sender = Sender::new(memory.geometry());
    let all = memory.populated();
    let mut stop = |_: &Progress| ControlFlow::Break(());
    let error = sender.send_epoch(&mut link, &memory, &all, Epoch(1), &mut stop).unwrap_err();
    let SendError::Cancelled { unsent } = error else { panic!("{error}") };
    assert!(!unsent.is_empty() && unsent.len() < 180);
    sender.send_epoch(&mut link, &memory, &unsent, Epoch(2), &mut GO_ON.clone()).unwrap();
    assert!(memory.contents() == copy.contents());
    drop(link);
    follower.join().unwrap();
}

#[test]
fn an_acknowledgement_that_was_not_waited_for_does_not_confuse_the_next_epoch() {
    let (memory, copy) = memories();
    memory.write(PageIndex(1), &[1; PAGE_SIZE]);
    let (mut link, mut other) = links();
    let mut sender = Sender::new(memory.geometry());
    let mut calls = 0;
    let mut stop = |_: &Progress| {
        calls += 1;
        // The first call is the batch's, the second comes while waiting for an answer.
        if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = sender.send_epoch(&mut link, &memory, &set([1]), Epoch(1), &mut stop).unwrap_err();
    assert!(matches!(error, SendError::Cancelled { unsent } if unsent.is_empty()));
    let mut receiver = Receiver::new(copy.clone());
    receiver.receive_epoch(&mut other, None).unwrap();
    let follower = thread::spawn(move || receiver.receive_epoch(&mut other, None).map(|_| other));
    memory.write(PageIndex(1), &[2; PAGE_SIZE]);
    sender.send_epoch(&mut link, &memory, &set([1]), Epoch(2), &mut GO_ON.clone()).unwrap();
    follower.join().unwrap().unwrap();
    assert!(memory.contents() == copy.contents());
}

#[test]
fn a_last_epoch_above_its_limit_changes_nothing() {
    let (memory, copy) = memories();
    (0..180).for_each(|page| memory.write(PageIndex(page), &content(3, u64::from(page) + 1)));
    let mut sender = Sender::new(memory.geometry());
    let pages = memory.populated();
    assert_eq!(
        sender.encode_last(&memory, &pages, Epoch(1), 300_000).unwrap_err(),
        LastError::TooLarge { cap: 300_000 }
    );
    assert_eq!(sender.digest(), 0);
    let last = sender.encode_last(&memory, &pages, Epoch(1), 1 << 20).unwrap();
    let mut receiver = Receiver::new(copy.clone());
    receiver.apply_last(&last.bytes).unwrap();
    assert!(memory.contents() == copy.contents());
}

#[test]
fn a_last_epoch_cut_or_changed_anywhere_is_refused() {
    let memory = TestMemory::new(20, 0);
    memory.write(PageIndex(1), &content(2, 5));
    memory.write(PageIndex(2), &content(1, 5));
    let last =
        Sender::new(memory.geometry()).encode_last(&memory, &memory.populated(), Epoch(1), 1 << 20).unwrap();
    let apply = |bytes: &[u8]| Receiver::new(Arc::new(TestMemory::new(20, 0))).apply_last(bytes);
    apply(&last.bytes).unwrap();
    for end in 0..last.bytes.len() {
        assert!(apply(&last.bytes[..end]).is_err(), "cut at {end}");
    }
    for byte in 0..last.bytes.len() {
        let mut bytes = last.bytes.clone();
        bytes[byte] ^= 0x40;
        if let Ok(mark) = apply(&bytes) {
            // A version is the only thing a digest of contents does not cover; the message's own
            // checksum does.
            assert_ne!((mark.epoch, mark.digest), (Epoch(1), 0), "byte {byte}");
            assert!(byte < 8 || (32..40).contains(&byte), "byte {byte}");
        }
    }
}

#[test]
fn a_follower_refuses_what_has_no_place() {
    let refused = |frames: Vec<Frame>| {
        let (mut link, mut other) = links();
        frames.iter().for_each(|frame| link.send(frame).unwrap());
        let error =
            Receiver::new(Arc::new(TestMemory::new(20, 0))).receive_epoch(&mut other, None).unwrap_err();
        let heard = link.recv(None).unwrap_err();
        assert!(matches!(heard, LinkError::Refused(_)), "{heard}");
        error
    };
    let batch = |epoch, page| {
        let mut writer = BatchWriter::new(Epoch(epoch));
        writer.push(PageIndex(page), Encoding::Zero, &[]);
        Frame::new(Kind::Pages, writer.finish(None))
    };
    let end = |epoch, records, digest| {
        Frame::new(Kind::EpochEnd, EpochMark { epoch: Epoch(epoch), records, digest }.emit().to_vec())
    };
    assert!(matches!(refused(vec![batch(1, 20)]), ReceiveError::Index { index: PageIndex(20), pages: 20 }));
    assert!(matches!(refused(vec![batch(2, 1), batch(1, 1)]), ReceiveError::Epoch { .. }));
    assert!(matches!(refused(vec![batch(1, 1), end(1, 2, 0)]), ReceiveError::Mismatch { .. }));
    assert!(matches!(refused(vec![batch(1, 1), end(1, 1, 9)]), ReceiveError::Mismatch { .. }));
    let stray = Frame::new(Kind::Directory, Vec::new());
    assert!(matches!(refused(vec![stray]), ReceiveError::Link(LinkError::Unexpected(Kind::Directory))));
    assert!(matches!(refused(vec![Frame::new(Kind::Pages, vec![0; 7])]), ReceiveError::Decode(_)));
}

#[test]
fn an_owner_hears_a_refusal_and_believes_no_false_acknowledgement() {
    let memory = TestMemory::new(20, 0);
    memory.write(PageIndex(1), &[1; PAGE_SIZE]);
    let answer = |frame: Frame| {
        let (mut link, mut other) = links();
        other.send(&frame).unwrap();
        Sender::new(memory.geometry())
            .send_epoch(&mut link, &memory, &set([1]), Epoch(1), &mut GO_ON.clone())
            .unwrap_err()
    };
    let refusal = kage_wire::Refusal::new(kage_wire::RefusalCode::Unavailable, "shutting down");
    assert!(matches!(answer(refusal.to_frame()), SendError::Link(LinkError::Refused(_))));
    let ack = EpochMark { epoch: Epoch(1), records: 1, digest: 5 }.emit().to_vec();
    assert!(matches!(answer(Frame::new(Kind::EpochAck, ack)), SendError::Mismatch { .. }));
    assert!(matches!(answer(Frame::new(Kind::EpochAck, vec![1])), SendError::Damaged(_)));
}

#[test]
fn a_limit_holds_and_a_cancel_is_heard_while_waiting() {
    let (memory, copy) = memories();
    (0..180).for_each(|page| memory.write(PageIndex(page), &content(3, u64::from(page) + 1)));
    let (mut link, other) = links();
    let follower = follow(copy, other);
    let mut sender = Sender::new(memory.geometry());
    sender.set_limit(Some(Rate::bytes_per_s(4e6)));
    let stats =
        sender.send_epoch(&mut link, &memory, &memory.populated(), Epoch(1), &mut GO_ON.clone()).unwrap();
    // 740 KB at 4 MB/s, less the burst and the last batch.
    let least = Duration::from_secs_f64((stats.bytes_wire - BURST - 100_000) as f64 / 4e6);
    assert!(stats.sending >= least, "{:?} below {least:?}", stats.sending);
    drop(link);
    follower.join().unwrap();
}

#[test]
fn a_page_changed_in_one_word_costs_a_few_bytes() {
    let (memory, copy) = memories();
    (0..150).for_each(|page| memory.write(PageIndex(page), &content(3, u64::from(page) + 1)));
    let (mut link, other) = links();
    let follower = follow(copy.clone(), other);
    let mut sender = Sender::new(memory.geometry());
    sender.set_limit(Some(Rate::bytes_per_s(100e6)));
    let pages = memory.populated();
    sender.send_epoch(&mut link, &memory, &pages, Epoch(1), &mut GO_ON.clone()).unwrap();
    for epoch in 2..5 {
        for page in 0..150 {
            do_write(&memory, &(page, [0; PAGE_SIZE], Some((8 * epoch as usize, epoch as u8))));
        }
        let stats = sender.send_epoch(&mut link, &memory, &pages, Epoch(epoch), &mut GO_ON.clone()).unwrap();
        assert_eq!(stats.pages, stats.pages_delta);
        assert!(stats.bytes_wire < 150 * 32, "{stats:?}");
    }
    assert!(sender.rates().ratio < 0.2);
    // What a last epoch changes is not what the cache holds: a stream that goes on does not use it.
    memory.write(PageIndex(0), &content(3, 77));
    memory.zero(PageIndex(1));
    let last = sender.encode_last(&memory, &pages, Epoch(5), 1 << 20).unwrap();
    drop(link);
    let (mut receiver, _) = follower.join().unwrap();
    receiver.apply_last(&last.bytes).unwrap();
    do_write(&memory, &(0, [0; PAGE_SIZE], Some((9, 9))));
    do_write(&memory, &(1, [0; PAGE_SIZE], Some((9, 9))));
    let last = sender.encode_last(&memory, &pages, Epoch(6), 1 << 20).unwrap();
    receiver.apply_last(&last.bytes).unwrap();
    assert!(memory.contents() == copy.contents());
}

#[test]
fn a_delta_that_is_none_is_refused() {
    let mut writer = BatchWriter::new(Epoch(1));
    writer.push(PageIndex(1), Encoding::Delta, &[0; 5]);
    let frame = Frame::new(Kind::Pages, writer.finish(None));
    let error = Receiver::new(Arc::new(TestMemory::new(20, 0))).apply(&frame).unwrap_err();
    assert!(matches!(error, ReceiveError::Decode(crate::codec::DecodeError::Page { index: PageIndex(1) })));
}

#[test]
fn what_goes_plainly_goes_whole_and_is_no_base_of_what_comes_after() {
    let (memory, copy) = memories();
    (0..150).for_each(|page| memory.write(PageIndex(page), &content(3, u64::from(page) + 1)));
    let (mut link, other) = links();
    let follower = follow(copy.clone(), other);
    let mut sender = Sender::new(memory.geometry());
    sender.set_limit(Some(Rate::bytes_per_s(100e6)));
    let pages = memory.populated();
    for (epoch, plain) in [(1, false), (2, true), (3, false), (4, false)] {
        sender.set_plain(plain);
        for page in 0..150 {
            do_write(&memory, &(page, [0; PAGE_SIZE], Some((8 * epoch as usize, epoch as u8))));
        }
        let stats = sender.send_epoch(&mut link, &memory, &pages, Epoch(epoch), &mut GO_ON.clone()).unwrap();
        assert_eq!(plain, stats.bytes_wire > stats.bytes_raw, "{stats:?}");
        assert_eq!(stats.pages_delta, if epoch == 4 { 150 } else { 0 });
    }
    drop(link);
    follower.join().unwrap();
    assert!(memory.contents() == copy.contents());
}
