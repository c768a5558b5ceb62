//! Page-bitmap messages, valid and invalid.

use crate::guest::*;
use balloon_abi::limits::MAX_MESSAGE_BYTES;
use balloon_abi::{Features, MessageStatus, Vq};
use balloon_device::Fault;
use guest_ring::Buffer;

#[test]
fn records_of_several_granules_are_one_set() {
    let mut guest = Guest::new(BITMAP);
    let mut message = record_bytes(0x200, 21, &[0b101]);
    message.extend(record_bytes(0x101, 12, &[0b11, 1 << 63]));
    message.extend(record_bytes(0xc00, 21, &[]));
    guest.accepts(Vq::Inflate, &message);
    let expected = [(0x101, 2), (0x101 + 127, 1), (0x200, 0x200), (0x600, 0x200), (0xc00, 0x200)];
    assert_eq!(guest.held(), expected);
    assert_eq!(guest.balloon.reclaim().events, [Event::Release(set(expected))]);
    assert_eq!(guest.balloon.faults().total(), 0);
    assert_eq!(guest.balloon.counters().inflated_pages, guest.balloon.held().len());
}

#[test]
fn a_block_may_span_adjacent_regions() {
    let mut guest = Guest::new(BITMAP);
    // Pages 0x200 to 0x400 are in the first region, 0x400 to 0x600 in the second.
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 12, &[u64::MAX; 16]));
    assert_eq!(guest.held(), [(0x200, 0x400)]);
}

#[test]
fn blocks_outside_of_memory_are_refused() {
    let outside = [
        ("before the first region", record_bytes(0, 20, &[])),
        ("ends in the first region", record_bytes(0, 22, &[])),
        ("in the gap", record_bytes(GAP.start, 12, &[])),
        ("reaches into the gap", record_bytes(GAP.start - 1, 12, &[0b11])),
        ("starts in the gap", record_bytes(GAP.end - 1, 12, &[0b11])),
        ("over the whole gap", record_bytes(0x400, 21, &[0b1111])),
        ("just after the end", record_bytes(END_PAGE, 12, &[])),
        ("across the end", record_bytes(0xe00, 21, &[])),
        ("the highest page number", record_bytes((1 << 52) - 1, 12, &[])),
        ("beyond the highest page number", record_bytes((1 << 52) - 1, 12, &[u64::MAX; 63])),
        ("the largest granule at the end", record_bytes((1 << 52) - (1 << 18), 30, &[])),
        ("the largest record", record_bytes(0, 30, &[u64::MAX; 63])),
        ("good, then bad", [record_bytes(0x200, 21, &[]), record_bytes(0, 12, &[])].concat()),
    ];
    let mut guest = Guest::new(BITMAP);
    for (what, message) in outside {
        println!("{what}");
        guest.refuses(Vq::Inflate, &message, Fault::OutsideMemory, MessageStatus::OutsideMemory);
        guest.refuses(Vq::Deflate, &message, Fault::OutsideMemory, MessageStatus::OutsideMemory);
    }
    assert_eq!(guest.held(), []);
}

#[test]
fn only_set_bits_must_lie_in_memory() {
    let mut guest = Guest::new(BITMAP);
    // Starts before memory and ends beyond it; the set bit is at page 0x100.
    let mut words = [0; 63];
    words[4] = 1;
    guest.accepts(Vq::Inflate, &record_bytes(0, 12, &words));
    // The record spans the gap, with no bit in it.
    guest.accepts(Vq::Inflate, &record_bytes(0x600, 21, &[0b101]));
    // No bit set, outside of memory.
    guest.accepts(Vq::Inflate, &record_bytes(0, 30, &[0; 63]));
    assert_eq!(guest.held(), [(0x100, 1), (0x600, 0x200), (0xa00, 0x200)]);
    assert_eq!(guest.balloon.faults().total(), 0);
}

#[test]
fn malformed_records_are_refused() {
    let malformed = [
        ("half a header", vec![0; 7]),
        ("a header and a half", [record_bytes(0x200, 12, &[]), vec![0; 4]].concat()),
        ("a missing bitmap", raw_header(0x200, 12, 1)),
        ("62 of 63 words", [raw_header(0x200, 12, 63), vec![0; 62 * 8]].concat()),
        ("a truncated word", [raw_header(0x200, 12, 1), vec![0; 7]].concat()),
        ("a granule too small", raw_header(0x200, 11, 0)),
        ("a granule of one byte", raw_header(0x200, 0, 0)),
        ("a granule too large", raw_header(0, 31, 0)),
        ("a granule larger than any", raw_header(0, 63, 63)),
        ("not aligned to 2 MiB", raw_header(0x201, 21, 0)),
        ("not aligned to 4 MiB", raw_header(0x200, 22, 0)),
        ("not aligned to 1 GiB", raw_header(1 << 17, 30, 0)),
        ("good, then bad", [record_bytes(0x200, 21, &[]), raw_header(1, 21, 0)].concat()),
        ("all ones", vec![0xff; 64]),
    ];
    let mut guest = Guest::new(BITMAP);
    for (what, message) in malformed {
        println!("{what}");
        guest.refuses(Vq::Inflate, &message, Fault::MalformedRecord, MessageStatus::Malformed);
        guest.refuses(Vq::Deflate, &message, Fault::MalformedRecord, MessageStatus::Malformed);
    }
}

#[test]
fn a_page_twice_in_one_message_is_refused() {
    let block = record_bytes(0x200, 21, &[]);
    let repeated = [
        ("the same block", [block.clone(), block.clone()].concat()),
        ("a page of a block", [block.clone(), record_bytes(0x2ff, 12, &[])].concat()),
        ("a block around a page", [record_bytes(0x2ff, 12, &[]), block.clone()].concat()),
        (
            "two bitmaps",
            [record_bytes(0x200, 12, &[1 << 5]), record_bytes(0x205, 12, &[1])].concat(),
        ),
        ("4 MiB over 2 MiB", [record_bytes(0x600, 21, &[]), record_bytes(0x400, 22, &[])].concat()),
    ];
    let mut guest = Guest::new(BITMAP);
    for (what, message) in repeated {
        println!("{what}");
        guest.refuses(Vq::Inflate, &message, Fault::RepeatedPage, MessageStatus::RepeatedPage);
        guest.refuses(Vq::Deflate, &message, Fault::RepeatedPage, MessageStatus::RepeatedPage);
    }
}

#[test]
fn the_longest_message_is_accepted_and_a_longer_one_refused() {
    let mut guest = Guest::new(BITMAP);
    // Empty bitmaps: the longest message that names no page.
    let longest = [raw_header(0x200, 12, 63), vec![0; 63 * 8]].concat().repeat(128);
    assert_eq!(longest.len(), MAX_MESSAGE_BYTES);
    guest.accepts(Vq::Inflate, &longest);
    let longer = [longest, raw_header(0x200, 12, 0)].concat();
    guest.refuses(Vq::Inflate, &longer, Fault::OversizedMessage, MessageStatus::Malformed);
    guest.refuses(Vq::Inflate, &[], Fault::EmptyMessage, MessageStatus::Malformed);
    guest.refuses(Vq::Deflate, &[], Fault::EmptyMessage, MessageStatus::Malformed);
}

#[test]
fn a_message_may_be_split_anywhere() {
    let message = [record_bytes(0x200, 12, &[3, 5]), record_bytes(0x400, 21, &[])].concat();
    let len = u32::try_from(message.len()).unwrap();
    for at in 0..=len {
        let mut guest = Guest::new(BITMAP);
        guest.write(MESSAGE, &message);
        let written = guest.send_chain(
            Vq::Inflate,
            &[
                Buffer::readable(MESSAGE, at),
                Buffer::writable(STATUS, 4),
                Buffer::readable(MESSAGE + u64::from(at), len - at),
            ],
        );
        assert_eq!((written, guest.status()), (4, 0));
        assert_eq!(guest.held(), [(0x200, 2), (0x240, 1), (0x242, 1), (0x400, 0x200)]);
    }
}

#[test]
fn inflating_twice_releases_twice_and_holds_once() {
    let mut guest = Guest::new(BITMAP);
    let message = record_bytes(0x200, 21, &[]);
    guest.accepts(Vq::Inflate, &message);
    guest.accepts(Vq::Inflate, &message);
    assert_eq!(guest.held(), [(0x200, 0x200)]);
    let release = Event::Release(set([(0x200, 0x200)]));
    assert_eq!(guest.balloon.reclaim().events, [release.clone(), release]);
}

#[test]
fn a_deflate_retains_only_pages_in_the_balloon() {
    let mut guest = Guest::new(BITMAP);
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 12, &[]));
    guest.balloon.reclaim_mut().events.clear();
    guest.accepts(Vq::Deflate, &record_bytes(0x200, 21, &[]));
    assert_eq!(guest.held(), []);
    assert_eq!(guest.balloon.faults().get(Fault::NotInBalloon), 1);
    assert_eq!(guest.balloon.faults().total(), 1);
    // The host provides memory only for pages that were in the balloon.
    let strange = Event::Cancel { pages: set([(0x201, 0x1ff)]), returned: 0 };
    let taken_out = Event::Retain { pages: set([(0x200, 1)]), returned: 0 };
    assert_eq!(guest.balloon.reclaim().events, [strange, taken_out]);
    guest.still_works();
}

#[test]
fn a_resumed_driver_may_deflate_any_page() {
    let mut guest = Guest::new(BITMAP);
    guest.balloon.resume(0x200, 0, std::time::Instant::now());
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 12, &[]));
    guest.balloon.reclaim_mut().events.clear();
    guest.accepts(Vq::Deflate, &record_bytes(0x200, 21, &[]));
    assert_eq!((guest.held(), guest.balloon.faults().total()), (vec![], 0));
    let kept = Event::Retain { pages: set([(0x200, 0x200)]), returned: 0 };
    assert_eq!(guest.balloon.reclaim().events, [kept]);
}

#[test]
fn a_reset_retains_all_pages_and_changes_the_format() {
    let mut guest = Guest::new(BITMAP);
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 21, &[]));
    guest.write_actual(0x200);
    guest.balloon.reclaim_mut().events.clear();
    guest.balloon.reset(CLASSIC);
    assert_eq!(guest.held(), []);
    assert_eq!(guest.balloon.config().actual, 0);
    let kept = Event::Retain { pages: set([(0x200, 0x200)]), returned: 0 };
    assert_eq!(guest.balloon.reclaim().events, [kept]);
    guest.still_works();
    // The former block is now two page numbers, the second outside of memory.
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 21, &[]));
    assert_eq!(guest.held(), [(0x200, 1)]);
    assert_eq!(guest.balloon.faults().get(Fault::OutsideMemory), 1);
}

#[test]
fn features_that_were_not_offered_are_dropped() {
    let mut guest = Guest::new(Features(u64::MAX));
    assert_eq!(guest.balloon.queues().index(Vq::Deflate), Some(1));
    assert_eq!(guest.balloon.queues().index(Vq::Request), Some(5));
    guest.balloon.withhold(Features::STATS_VQ | Features::REPORTING | Features::REQUEST_VQ);
    guest.balloon.reset(Features(u64::MAX));
    let index = |vq| guest.balloon.queues().index(vq);
    let indices = [Vq::Stats, Vq::FreePage, Vq::Reporting, Vq::Request].map(index);
    assert_eq!(indices, [None, Some(2), None, None]);
    guest.still_works();
}
