//! The classic message: an array of page numbers.

use crate::guest::*;
use balloon_abi::limits::MAX_PFN_ARRAY_BYTES;
use balloon_abi::{Features, Vq};
use balloon_device::Fault;
use guest_ring::Buffer;

#[test]
fn page_numbers_in_any_order_are_one_set() {
    let mut guest = Guest::new(CLASSIC);
    let pages = (0x300..0x340).chain((0x200..0x240).rev()).chain([0x240, 0xa00, 0x7ff]);
    guest.accepts(Vq::Inflate, &pfns(pages));
    let expected = [(0x200, 0x41), (0x300, 0x40), (0x7ff, 1), (0xa00, 1)];
    assert_eq!(guest.held(), expected);
    assert_eq!(guest.balloon.reclaim().events, [Event::Release(set(expected))]);
    assert_eq!(guest.balloon.faults().total(), 0);
}

/// Without `MUST_TELL_HOST` the guest may use a page as soon as the message is returned.
#[test]
fn without_must_tell_host_pages_are_released_immediately() {
    let mut guest = Guest::new(Features::VERSION_1);
    guest.accepts(Vq::Inflate, &pfns([0x200]));
    assert_eq!(guest.balloon.reclaim().events, [Event::ReleaseNow(set([(0x200, 1)]))]);
    assert_eq!(guest.held(), [(0x200, 1)]);
}

#[test]
fn a_repeated_page_number_counts_once() {
    let mut guest = Guest::new(CLASSIC);
    guest.accepts(Vq::Inflate, &pfns([0x200, 0x200, 0x201, 0x200, 0x201]));
    assert_eq!(guest.held(), [(0x200, 2)]);
    assert_eq!(guest.balloon.counters().inflated_pages, 2);
}

#[test]
fn each_page_outside_of_memory_is_counted_and_skipped() {
    let mut guest = Guest::new(CLASSIC);
    let outside = [0, FIRST_PAGE - 1, GAP.start, GAP.end - 1, END_PAGE, u64::from(u32::MAX)];
    guest.accepts(Vq::Inflate, &pfns(outside));
    assert_eq!(guest.held(), []);
    assert_eq!(guest.balloon.faults().get(Fault::OutsideMemory), outside.len() as u64);
    guest.still_works();
    // Runs that cross a boundary, in both directions.
    let runs = (GAP.start - 2..GAP.start + 2).chain((GAP.end - 2..GAP.end + 2).rev());
    guest.accepts(Vq::Inflate, &pfns(runs));
    assert_eq!(guest.held(), [(GAP.start - 2, 2), (GAP.end, 2)]);
    assert_eq!(guest.balloon.faults().get(Fault::OutsideMemory), outside.len() as u64 + 4);
    assert_eq!(guest.balloon.faults().total(), outside.len() as u64 + 4);
    for event in &guest.balloon.reclaim().events {
        if let Event::Release(pages) = event {
            assert!(pages.ranges().all(|range| guest.balloon.layout().covers(range)));
        }
    }
}

#[test]
fn a_truncated_page_number_is_ignored() {
    let mut guest = Guest::new(CLASSIC);
    let mut message = pfns([0x200, 0x201]);
    message.pop();
    guest.accepts(Vq::Inflate, &message);
    assert_eq!(guest.held(), [(0x200, 1)]);
}

#[test]
fn no_status_is_written_even_with_a_buffer() {
    let mut guest = Guest::new(CLASSIC);
    assert_eq!(guest.send(Vq::Inflate, &pfns([0x200])), NO_STATUS);
    assert_eq!(guest.send(Vq::Inflate, &[]), NO_STATUS);
    assert_eq!(guest.balloon.faults().get(Fault::EmptyMessage), 1);
    assert_eq!(guest.balloon.faults().total(), 1);
}

#[test]
fn the_longest_array_is_accepted_and_a_longer_one_refused() {
    let mut guest = Guest::new(CLASSIC);
    let longest = pfns((0..MAX_PFN_ARRAY_BYTES as u64 / 4).map(|i| 0x200 + i % 0x200));
    guest.accepts(Vq::Inflate, &longest);
    assert_eq!(guest.held(), [(0x200, 0x200)]);
    let longer = [longest, pfns([0x500])].concat();
    guest.expects_fault(Fault::OversizedMessage, |guest| guest.accepts(Vq::Inflate, &longer));
}

/// A driver uses the pages when a classic deflate is returned: no status reports that
/// the device refused it.
#[test]
fn a_refused_classic_deflate_cancels_all_releases() {
    let mut guest = Guest::new(CLASSIC);
    guest.accepts(Vq::Inflate, &pfns(0x200..0x210));
    let everything = set([(0x200, 0x10)]);
    let oversized = pfns([0x200; MAX_PFN_ARRAY_BYTES / 4 + 1]);
    guest.balloon.reclaim_mut().events.clear();
    guest.accepts(Vq::Deflate, &oversized);
    let bad = [Buffer::readable(NOWHERE, 4)];
    guest.send_chain(Vq::Deflate, &bad);
    let kept = |returned| Event::Cancel { pages: everything.clone(), returned };
    assert_eq!(guest.balloon.reclaim().events, [kept(0), kept(1)]);
    assert_eq!(*guest.balloon.held(), everything, "the device cannot tell which pages");
    guest.still_works();
}

#[test]
fn a_deflate_of_pages_outside_of_the_balloon_is_counted() {
    let mut guest = Guest::new(CLASSIC);
    guest.accepts(Vq::Inflate, &pfns([0x200, 0x202]));
    guest.accepts(Vq::Deflate, &pfns([0x200, 0x201]));
    assert_eq!(guest.held(), [(0x202, 1)]);
    assert_eq!(guest.balloon.faults().get(Fault::NotInBalloon), 1);
    assert_eq!(guest.balloon.faults().total(), 1);
    let [.., cancelled, retained] = &guest.balloon.reclaim().events[..] else { panic!() };
    assert_eq!(*cancelled, Event::Cancel { pages: set([(0x201, 1)]), returned: 0 });
    assert_eq!(*retained, Event::Retain { pages: set([(0x200, 1)]), returned: 0 });
}
