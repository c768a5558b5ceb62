//! Hints and reports: descriptors whose addresses are the message.

use std::time::Instant;

use crate::guest::*;
use balloon_abi::{Features, Vq};
use balloon_device::{Fault, HintError, HintPhase};
use guest_ring::{Buffer, INDIRECT, NEXT, WRITE, write_descriptor};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;

const HINTS: Features = CLASSIC.union(Features::FREE_PAGE_HINT);
const REPORTS: Features = CLASSIC.union(Features::REPORTING);
const POISON: Features = REPORTS.union(Features::PAGE_POISON);
const KIND: [(Features, Vq); 2] = [(HINTS, Vq::FreePage), (REPORTS, Vq::Reporting)];

/// Pages as the guest names them.
fn free(page: u64, pages: u32) -> Buffer {
    Buffer::writable(page * 4096, pages * 4096)
}

/// The guest says a command.
fn says(guest: &mut Guest, command: u32) {
    guest.write(MESSAGE, &command.to_le_bytes());
    assert_eq!(guest.send_chain(Vq::FreePage, &[Buffer::readable(MESSAGE, 4)]), 0);
}

/// A guest that was asked and has begun to answer.
fn hinting_guest() -> (Guest, u32) {
    let mut guest = Guest::new(HINTS);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    says(&mut guest, id);
    (guest, id)
}

fn hinted(guest: &Guest) -> Vec<(u64, u64)> {
    let pages = guest.balloon.hinting().pages();
    pages.ranges().map(|range| (range.start(), range.pages())).collect()
}

fn released(guest: &Guest) -> Vec<Event> {
    guest.balloon.reclaim().events.clone()
}

#[test]
fn a_round_of_hints() {
    let mut guest = Guest::new(HINTS);
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 0);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, id);
    says(&mut guest, id);
    guest.send_chain(Vq::FreePage, &[free(0x200, 0x200)]);
    guest.send_chain(Vq::FreePage, &[free(0xa00, 2), free(0x400, 1)]);
    assert_eq!(guest.balloon.hinting().phase(), HintPhase::Receiving);
    says(&mut guest, 0);
    assert_eq!(guest.balloon.hinting().phase(), HintPhase::Complete);
    assert_eq!(hinted(&guest), [(0x200, 0x201), (0xa00, 2)]);
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 0);
    guest.balloon.hinting_done();
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 1);
    assert_eq!(hinted(&guest), []);
    assert_eq!(released(&guest), [], "nothing is released because of a hint");
    assert_eq!(guest.balloon.faults().total(), 0);
    guest.still_works();
}

#[test]
fn a_driver_without_the_feature_is_not_asked() {
    let mut guest = Guest::new(CLASSIC);
    let asked = guest.balloon.start_hinting(Instant::now());
    assert_eq!(asked, Err(HintError::NotNegotiated));
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 0);
}

#[test]
fn hints_are_lost_with_their_driver_and_with_their_memory() {
    let (mut guest, _) = hinting_guest();
    guest.send_chain(Vq::FreePage, &[free(0x200, 1), free(0xb00, 1)]);
    let two = balloon_device::MemoryLayout::new(REGIONS.into_iter().take(2)).unwrap();
    guest.balloon.set_layout(two);
    assert_eq!(hinted(&guest), [(0x200, 1)]);
    guest.balloon.reset(HINTS);
    assert_eq!(guest.balloon.hinting().phase(), HintPhase::Lost);
    assert_eq!((hinted(&guest), guest.balloon.config().free_page_hint_cmd_id), (vec![], 0));
}

#[test]
fn commands_of_any_shape() {
    for (len, fault) in [
        (1, Some(Fault::MalformedFreePages)),
        (3, Some(Fault::MalformedFreePages)),
        (4, None),
        (5, Some(Fault::MalformedFreePages)),
        (8, Some(Fault::MalformedFreePages)),
        (u32::MAX, Some(Fault::MalformedFreePages)),
    ] {
        let mut guest = Guest::new(HINTS);
        let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
        guest.write(MESSAGE, &u64::from(id).to_le_bytes());
        guest.send_chain(Vq::FreePage, &[Buffer::readable(MESSAGE, len)]);
        let phase = if fault.is_none() { HintPhase::Receiving } else { HintPhase::Asked };
        assert_eq!(guest.balloon.hinting().phase(), phase, "{len} bytes");
        assert_eq!(guest.balloon.faults().total(), u64::from(fault.is_some()));
        assert!(fault.is_none_or(|fault| guest.balloon.faults().get(fault) == 1));
    }
    // In pieces, with pages right behind it, as QEMU takes it too.
    let mut guest = Guest::new(HINTS);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    guest.write(MESSAGE, &id.to_le_bytes());
    let (one, three) = (Buffer::readable(MESSAGE, 1), Buffer::readable(MESSAGE + 1, 3));
    guest.send_chain(Vq::FreePage, &[one, three, free(0x300, 1)]);
    assert_eq!(hinted(&guest), [(0x300, 1)]);
    guest.expects_fault(Fault::BadDescriptor, |guest| {
        guest.send_chain(Vq::FreePage, &[Buffer::readable(NOWHERE, 4)]);
    });
    for never_given in [1, 2, id + 1, u32::MAX] {
        guest.expects_fault(Fault::StrayCommand, |guest| says(guest, never_given));
    }
}

#[test]
fn pages_in_the_balloon_are_not_free() {
    for (features, vq) in KIND {
        let mut guest = Guest::new(features);
        let message = guest.message([(0x210, 1)]);
        guest.accepts(Vq::Inflate, &message);
        if vq == Vq::FreePage {
            let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
            says(&mut guest, id);
        }
        guest.expects_fault(Fault::FreeInBalloon, |guest| {
            guest.send_chain(vq, &[free(0x300, 1), free(0x200, 0x20)]);
        });
        assert_eq!(hinted(&guest), [], "all or nothing");
        assert_eq!(guest.balloon.reports().pages, 0);
    }
}

#[test]
fn a_report_is_released_before_it_comes_back_and_forgotten() {
    let mut guest = Guest::new(REPORTS);
    guest.send_chain(Vq::Reporting, &[free(0x400, 0x400), free(0x200, 0x200)]);
    // One set, so neighbours are one range, however they were named.
    assert_eq!(released(&guest), [Event::ReleaseFree(set([(0x200, 0x600)]))]);
    assert_eq!(guest.held(), [], "it is not in the balloon");
    let reports = *guest.balloon.reports();
    assert_eq!((reports.messages, reports.pages, reports.poisoned_pages), (1, 0x600, 0));
    guest.still_works();
    // Once more, and in the balloon after that: nothing of it is remembered.
    guest.send_chain(Vq::Reporting, &[free(0x200, 1), free(0x200, 1)]);
    let message = guest.message([(0x200, 1)]);
    guest.accepts(Vq::Inflate, &message);
    assert_eq!(guest.balloon.faults().total(), 0);
}

#[test]
fn poison_is_heeded() {
    for (features, poison_val, releases) in
        [(POISON, 0, true), (POISON, 0xaaaa_aaaa, false), (POISON, 1, false)]
    {
        let mut guest = Guest::new(features);
        guest.balloon.write_config(12, &u32::to_le_bytes(poison_val), Instant::now()).unwrap();
        assert_eq!(guest.balloon.config().poison_val, poison_val);
        guest.send_chain(Vq::Reporting, &[free(0x200, 4)]);
        let events = if releases { vec![Event::ReleaseFree(set([(0x200, 4)]))] } else { vec![] };
        assert_eq!(released(&guest), events);
        let reports = *guest.balloon.reports();
        assert_eq!((reports.pages, reports.poisoned_pages), (4, if releases { 0 } else { 4 }));
        // What is inflated is released whatever the poison: its driver writes it anew.
        guest.still_works();
        // The next driver begins without.
        guest.balloon.reset(features);
        assert_eq!(guest.balloon.config().poison_val, 0);
    }
    let mut guest = Guest::new(REPORTS);
    let written = guest.balloon.write_config(12, &[1; 4], Instant::now());
    assert_eq!(written, Err(Fault::ConfigWrite), "a field that does not exist");
    assert_eq!(guest.balloon.config().poison_val, 0);
}

#[test]
fn a_report_is_no_place_for_bytes() {
    let mut guest = Guest::new(REPORTS);
    guest.write(MESSAGE, &[0; 8]);
    for len in [4, 8] {
        guest.expects_fault(Fault::MalformedFreePages, |guest| {
            guest.send_chain(Vq::Reporting, &[Buffer::readable(MESSAGE, len), free(0x200, 1)]);
        });
    }
}

#[test]
fn pages_that_do_not_exist() {
    for (features, vq) in KIND {
        for (addr, len) in [
            (0, 0x1000),
            (GAP.start * 4096, 0x1000),
            (GAP.start * 4096 - 0x1000, 0x2000),
            (END_PAGE * 4096 - 0x1000, 0x2000),
            (MIB, u32::MAX - 0x1000),
            (1 << 52, 0x1000),
            (1 << 63, u32::MAX - 0x1000),
            (!0xfff, 0x1000),
            (u64::MAX, u32::MAX - 0x1000),
        ] {
            println!("{vq:?}: {len:#x} bytes at {addr:#x}");
            let mut guest =
                if vq == Vq::FreePage { hinting_guest().0 } else { Guest::new(features) };
            guest.expects_fault(Fault::OutsideMemory, |guest| {
                guest.send_chain(vq, &[free(0x200, 1), Buffer::writable(addr, len)]);
            });
            assert_eq!(hinted(&guest), []);
        }
    }
}

#[test]
fn chains_that_name_nothing() {
    for (features, vq) in KIND {
        let chains: [&[Buffer]; 4] = [
            &[],
            &[Buffer::writable(0x20_0000, 0)],
            &[Buffer::writable(0x20_0001, 0x1000), Buffer::writable(0x20_0800, 0x1000)],
            &[Buffer::readable(u64::MAX, 0)],
        ];
        for chain in chains {
            let mut guest = Guest::new(features);
            guest.expects_fault(Fault::EmptyMessage, |guest| {
                guest.send_chain(vq, chain);
            });
        }
    }
}

#[test]
fn chains_that_break_off_and_tables() {
    for (_, vq) in KIND {
        let memory_table = MIB + 0x40000;
        for (descriptor, fault) in [
            (
                Descriptor::new(0x20_0000, 0x1000, WRITE | NEXT, RING_SIZE),
                Some(Fault::BadDescriptor),
            ),
            (Descriptor::new(0x20_0000, 0x1000, WRITE | NEXT, 0), Some(Fault::BadDescriptor)),
            (Descriptor::new(memory_table, 32, INDIRECT, 0), None),
            (Descriptor::new(NOWHERE, 32, INDIRECT, 0), Some(Fault::EmptyMessage)),
        ] {
            let mut guest =
                if vq == Vq::FreePage { hinting_guest().0 } else { Guest::new(REPORTS) };
            let memory = guest.memory.clone();
            for (slot, page) in [(0, 0x200u64), (1, 0x202)] {
                let flags = WRITE | if slot == 0 { NEXT } else { 0 };
                let entry = Descriptor::new(page * 4096, 4096, flags, slot + 1);
                assert!(write_descriptor(&memory, memory_table, slot, entry));
            }
            let ring = &mut guest.side(vq).ring;
            let slot = 5;
            let descriptor = Descriptor::new(
                descriptor.addr().0,
                descriptor.len(),
                descriptor.flags(),
                if descriptor.next() == 0 { slot } else { descriptor.next() },
            );
            ring.write_descriptor(&memory, slot, descriptor);
            ring.publish(&memory, slot);
            guest.kick_for(vq, slot);
            let pages: u64 = match vq {
                Vq::FreePage => guest.balloon.hinting().pages().len(),
                _ => guest.balloon.reports().pages,
            };
            assert_eq!(pages, if fault.is_none() { 2 } else { 0 });
            assert_eq!(guest.balloon.faults().total(), u64::from(fault.is_some()));
            assert!(fault.is_none_or(|fault| guest.balloon.faults().get(fault) == 1));
        }
    }
}

/// No chain may be longer (virtio 1.3, section 2.7.5), so no report is either.
#[test]
fn chains_of_more_than_4_gib() {
    for (features, vq) in KIND {
        let mut guest = Guest::new(features);
        guest.expects_fault(Fault::BadDescriptor, |guest| {
            guest.send_chain(vq, &[free(0x200, 1), Buffer::writable(0x20_0000, u32::MAX)]);
        });
    }
}

/// What one drain may cost is bounded by descriptors, and each is a page or more.
#[test]
fn a_flood_is_served_in_parts() {
    let mut guest = Guest::new(REPORTS);
    let memory = guest.memory.clone();
    let chain = vec![free(0x200, 1); usize::from(RING_SIZE)];
    let head = guest.side(Vq::Reporting).ring.send(&memory, &chain);
    // The same chain, over and over.
    for _ in 0..3 {
        guest.side(Vq::Reporting).ring.publish(&memory, head);
    }
    let drained = guest.kick(Vq::Reporting).unwrap();
    assert_eq!((drained.chains, drained.more), (4, false));
    assert_eq!(guest.balloon.reports().messages, 4);
    assert_eq!(guest.balloon.faults().total(), 0);
}

#[derive(Clone, Debug)]
enum Op {
    Inflate(u64),
    Deflate(u64),
    Report(Vec<(u64, u32, bool)>),
    Poison(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let page = 0x200..0x300u64;
    let named = (0x1f0..0x310u64, 0..64u32, prop::bool::weighted(0.05));
    prop_oneof![
        page.clone().prop_map(Op::Inflate),
        page.prop_map(Op::Deflate),
        vec(named, 1..6).prop_map(Op::Report),
        prop_oneof![Just(0), Just(0xaaaa_aaaa)].prop_map(Op::Poison),
    ]
}

proptest! {
    /// A report is released whole where nothing speaks against it, else not at all;
    /// and what is in the balloon is as if there were no reports.
    #[test]
    fn reports_and_the_balloon_do_not_disturb_each_other(ops in vec(op(), 1..40)) {
        let mut guest = Guest::new(POISON);
        let (mut held, mut poison) = (std::collections::BTreeSet::new(), 0u32);
        for op in ops {
            guest.balloon.reclaim_mut().events.clear();
            match op {
                Op::Inflate(page) => {
                    let message = guest.message([(page, 1)]);
                    guest.accepts(Vq::Inflate, &message);
                    held.insert(page);
                }
                Op::Deflate(page) => {
                    let message = guest.message([(page, 1)]);
                    guest.accepts(Vq::Deflate, &message);
                    held.remove(&page);
                }
                Op::Poison(value) => {
                    guest.balloon.write_config(12, &value.to_le_bytes(), Instant::now()).unwrap();
                    poison = value;
                }
                Op::Report(named) => {
                    let buffers: Vec<Buffer> = named
                        .iter()
                        .map(|(page, pages, outside)| {
                            free(if *outside { page + 0x1000 } else { *page }, *pages)
                        })
                        .collect();
                    guest.send_chain(Vq::Reporting, &buffers);
                    let pages: std::collections::BTreeSet<u64> = named
                        .iter()
                        .flat_map(|(page, pages, _)| *page..page + u64::from(*pages))
                        .collect();
                    let outside = named.iter().any(|(_, pages, outside)| *outside && *pages > 0);
                    let fine = !outside && !pages.is_empty() && pages.is_disjoint(&held);
                    let expected = if fine && poison == 0 {
                        vec![Event::ReleaseFree(set(pages.into_iter().map(|page| (page, 1))))]
                    } else {
                        vec![]
                    };
                    prop_assert_eq!(&guest.balloon.reclaim().events, &expected);
                }
            }
            let now: std::collections::BTreeSet<u64> = guest
                .held()
                .into_iter()
                .flat_map(|(start, pages)| start..start + pages)
                .collect();
            prop_assert_eq!(&now, &held);
        }
    }
}
