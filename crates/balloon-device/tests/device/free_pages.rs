//! Free page hinting and reporting: the descriptors' addresses are the message.

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

/// Returns a buffer that names pages.
fn free(page: u64, pages: u32) -> Buffer {
    Buffer::writable(page * 4096, pages * 4096)
}

/// Sends a command, as the guest.
fn send_command(guest: &mut Guest, command: u32) {
    guest.write(MESSAGE, &command.to_le_bytes());
    assert_eq!(guest.send_chain(Vq::FreePage, &[Buffer::readable(MESSAGE, 4)]), 0);
}

/// Returns a guest that has started to answer a request for hints, and its command id.
fn hinting_guest() -> (Guest, u32) {
    let mut guest = Guest::new(HINTS);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    send_command(&mut guest, id);
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
fn hints_are_collected_until_the_guest_stops() {
    let mut guest = Guest::new(HINTS);
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 0);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, id);
    send_command(&mut guest, id);
    guest.send_chain(Vq::FreePage, &[free(0x200, 0x200)]);
    guest.send_chain(Vq::FreePage, &[free(0xa00, 2), free(0x400, 1)]);
    assert_eq!(guest.balloon.hinting().phase(), HintPhase::Receiving);
    send_command(&mut guest, 0);
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
fn hints_are_not_requested_without_the_feature() {
    let mut guest = Guest::new(CLASSIC);
    let requested = guest.balloon.start_hinting(Instant::now());
    assert_eq!(requested, Err(HintError::NotNegotiated));
    assert_eq!(guest.balloon.config().free_page_hint_cmd_id, 0);
}

#[test]
fn hints_are_lost_with_their_driver_or_memory() {
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
fn a_command_of_the_wrong_length_is_refused() {
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
        let phase = if fault.is_none() { HintPhase::Receiving } else { HintPhase::Requested };
        assert_eq!(guest.balloon.hinting().phase(), phase, "{len} bytes");
        assert_eq!(guest.balloon.faults().total(), u64::from(fault.is_some()));
        assert!(fault.is_none_or(|fault| guest.balloon.faults().get(fault) == 1));
    }
    // In several descriptors, followed by pages. QEMU accepts this too.
    let mut guest = Guest::new(HINTS);
    let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
    guest.write(MESSAGE, &id.to_le_bytes());
    let (one, three) = (Buffer::readable(MESSAGE, 1), Buffer::readable(MESSAGE + 1, 3));
    guest.send_chain(Vq::FreePage, &[one, three, free(0x300, 1)]);
    assert_eq!(hinted(&guest), [(0x300, 1)]);
    guest.expects_fault(Fault::BadDescriptor, |guest| {
        guest.send_chain(Vq::FreePage, &[Buffer::readable(NOWHERE, 4)]);
    });
    for never_issued in [1, 2, id + 1, u32::MAX] {
        guest.expects_fault(Fault::StrayCommand, |guest| send_command(guest, never_issued));
    }
}

#[test]
fn pages_in_the_balloon_cannot_be_hinted_or_reported() {
    for (features, vq) in KIND {
        let mut guest = Guest::new(features);
        let message = guest.message([(0x210, 1)]);
        guest.accepts(Vq::Inflate, &message);
        if vq == Vq::FreePage {
            let id = guest.balloon.start_hinting(Instant::now()).unwrap().get();
            send_command(&mut guest, id);
        }
        guest.expects_fault(Fault::FreeInBalloon, |guest| {
            guest.send_chain(vq, &[free(0x300, 1), free(0x200, 0x20)]);
        });
        assert_eq!(hinted(&guest), [], "all or nothing");
        assert_eq!(guest.balloon.reports().pages, 0);
    }
}

#[test]
fn a_report_is_released_before_it_is_returned_and_not_tracked() {
    let mut guest = Guest::new(REPORTS);
    guest.send_chain(Vq::Reporting, &[free(0x400, 0x400), free(0x200, 0x200)]);
    // One set, so adjacent pages are one range.
    assert_eq!(released(&guest), [Event::ReleaseFree(set([(0x200, 0x600)]))]);
    assert_eq!(guest.held(), [], "a report is not in the balloon");
    let reports = *guest.balloon.reports();
    assert_eq!((reports.messages, reports.pages, reports.poisoned_pages), (1, 0x600, 0));
    guest.still_works();
    // The same pages can be reported again, and then inflated: reports are not tracked.
    guest.send_chain(Vq::Reporting, &[free(0x200, 1), free(0x200, 1)]);
    let message = guest.message([(0x200, 1)]);
    guest.accepts(Vq::Inflate, &message);
    assert_eq!(guest.balloon.faults().total(), 0);
}

#[test]
fn a_report_is_not_released_under_a_nonzero_poison() {
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
        // Inflated pages are released under any poison: the driver writes it again.
        guest.still_works();
        // The next driver starts without a poison.
        guest.balloon.reset(features);
        assert_eq!(guest.balloon.config().poison_val, 0);
    }
    let mut guest = Guest::new(REPORTS);
    let written = guest.balloon.write_config(12, &[1; 4], Instant::now());
    assert_eq!(written, Err(Fault::ConfigWrite), "a field that does not exist");
    assert_eq!(guest.balloon.config().poison_val, 0);
}

#[test]
fn a_report_with_readable_bytes_is_refused() {
    let mut guest = Guest::new(REPORTS);
    guest.write(MESSAGE, &[0; 8]);
    for len in [4, 8] {
        guest.expects_fault(Fault::MalformedFreePages, |guest| {
            guest.send_chain(Vq::Reporting, &[Buffer::readable(MESSAGE, len), free(0x200, 1)]);
        });
    }
}

#[test]
fn pages_outside_of_memory_are_refused() {
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
fn a_chain_without_pages_is_refused() {
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
fn truncated_chains_are_refused_and_indirect_tables_work() {
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

/// A chain is at most 4 GiB (virtio 1.3, section 2.7.5), and so is a report.
#[test]
fn a_chain_of_more_than_4_gib_is_refused() {
    for (features, vq) in KIND {
        let mut guest = Guest::new(features);
        guest.expects_fault(Fault::BadDescriptor, |guest| {
            guest.send_chain(vq, &[free(0x200, 1), Buffer::writable(0x20_0000, u32::MAX)]);
        });
    }
}

/// The number of descriptors bounds the cost of a drain, and each is at least a page.
#[test]
fn a_flood_is_served_in_several_drains() {
    let mut guest = Guest::new(REPORTS);
    let memory = guest.memory.clone();
    let chain = vec![free(0x200, 1); usize::from(RING_SIZE)];
    let head = guest.side(Vq::Reporting).ring.send(&memory, &chain);
    // The same chain, repeatedly.
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
    /// A report is released completely or not at all, and does not affect
    /// the balloon.
    #[test]
    fn reports_do_not_affect_the_balloon(ops in vec(op(), 1..40)) {
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
