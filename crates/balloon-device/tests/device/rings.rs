//! Valid and invalid vrings, and the configuration space.

use std::time::Instant;

use crate::guest::*;
use balloon_abi::limits::MAX_MESSAGE_BYTES;
use balloon_abi::{Features, Vq};
use balloon_device::{
    BalloonDevice, Drained, Fault, MAX_BYTES_PER_DRAIN, MAX_CHAINS_PER_DRAIN, MemoryLayout,
    QueueError,
};
use guest_ring::{Buffer, GuestRing};
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// Expects one `BadRing` fault, and a vring that is set up again to work.
fn expects_bad_ring(guest: &mut Guest, bad: impl FnOnce(&mut Guest)) -> Error {
    let (held, faults) = (guest.balloon.held().clone(), *guest.balloon.faults());
    bad(guest);
    let result = guest.kick(Vq::Inflate);
    let Err(QueueError::BadRing { vq: Vq::Inflate, source }) = result else {
        panic!("{result:?}");
    };
    let mut expected = faults;
    expected.count(Fault::BadRing);
    assert_eq!(*guest.balloon.faults(), expected);
    assert_eq!(*guest.balloon.held(), held);
    guest.inflate.set_up(&guest.memory);
    guest.still_works();
    source
}

#[test]
fn an_available_index_that_jumps_is_a_bad_ring() {
    for form in [BITMAP, CLASSIC] {
        for jump in [RING_SIZE + 1, 0x8000, u16::MAX] {
            let mut guest = Guest::new(form);
            let source = expects_bad_ring(&mut guest, |guest| {
                guest.inflate.ring.set_avail_idx(&guest.memory, jump);
            });
            assert!(matches!(source, Error::InvalidAvailRingIndex), "{source}");
        }
    }
}

#[test]
fn a_head_outside_of_the_ring_is_a_bad_ring() {
    for form in [BITMAP, CLASSIC] {
        for head in [RING_SIZE, RING_SIZE + 1, u16::MAX] {
            let mut guest = Guest::new(form);
            let source = expects_bad_ring(&mut guest, |guest| {
                guest.inflate.ring.publish(&guest.memory, head);
            });
            assert!(matches!(source, Error::InvalidDescriptorIndex), "{source}");
        }
    }
}

#[test]
fn chains_before_a_bad_head_are_served_and_returned() {
    let mut guest = Guest::new(BITMAP);
    let memory = guest.memory.clone();
    guest.write(MESSAGE, &record_bytes(0x200, 12, &[]));
    guest.inflate.ring.send(&memory, &[Buffer::readable(MESSAGE, 8)]);
    guest.inflate.ring.publish(&memory, u16::MAX);
    assert!(guest.kick(Vq::Inflate).is_err());
    assert_eq!(guest.held(), [(0x200, 1)]);
    assert!(guest.inflate.ring.take_used(&memory).is_some());
    assert!(guest.inflate.ring.take_used(&memory).is_none());
}

#[test]
fn a_repeated_chain_is_served_each_time() {
    let mut guest = Guest::new(BITMAP);
    let memory = guest.memory.clone();
    guest.write(MESSAGE, &record_bytes(0x200, 12, &[]));
    let head = guest.inflate.ring.send(&memory, &[Buffer::readable(MESSAGE, 8)]);
    for _ in 1..RING_SIZE {
        guest.inflate.ring.publish(&memory, head);
    }
    let drained = guest.kick(Vq::Inflate).unwrap();
    let expected = Drained { chains: usize::from(RING_SIZE), notify: true, more: false };
    assert_eq!(drained, expected);
    assert_eq!(guest.held(), [(0x200, 1)]);
    for _ in 0..RING_SIZE {
        assert_eq!(guest.inflate.ring.take_used(&memory).unwrap().head, u32::from(head));
    }
    guest.still_works();
}

/// Vrings partly outside of memory. The last four bytes of memory contain an index, but
/// no entry after it. The device does not wait for an index that never
/// catches up.
/// The field with which the device disables notifications overlaps the available index:
/// the index changes with each check, and no chain is available.
#[test]
fn an_index_that_overlaps_avail_event_is_a_bad_ring() {
    for form in [BITMAP, CLASSIC] {
        let mut guest = Guest::new(form);
        let source = expects_bad_ring(&mut guest, |guest| {
            let used = guest.inflate.ring.used();
            let queue = &mut guest.inflate.queue;
            queue.try_set_avail_ring_address(GuestAddress(used - 2)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
            queue.set_next_avail(1);
            queue.set_next_used(1);
        });
        assert!(matches!(source, Error::InvalidAvailRingIndex), "{source}");
    }
}

#[test]
fn a_ring_outside_of_memory_is_a_bad_ring() {
    let end = END_PAGE * 4096;
    let well = GuestRing::new(2 * MIB, RING_SIZE);
    let (table, avail, used) = (well.table(), well.avail(), well.used());
    for (what, table, avail, used) in [
        ("all outside of memory", NOWHERE, NOWHERE + 0x100, NOWHERE + 0x200),
        ("all at the end of the address space", u64::MAX - 15, u64::MAX - 1, u64::MAX - 3),
        ("no available ring", table, NOWHERE, used),
        ("no available entries", table, end - 4, used),
        ("no used ring", table, avail, NOWHERE),
        ("no used entries", table, avail, end - 4),
    ] {
        println!("{what}");
        let mut guest = Guest::new(BITMAP);
        let memory = guest.memory.clone();
        well.clone().send(&memory, &[]);
        memory.write_obj(1u16.to_le(), GuestAddress(end - 2)).unwrap();
        let mut queue = well.queue();
        queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        guest.inflate.queue = queue;
        let result = guest.kick(Vq::Inflate);
        assert!(matches!(result, Err(QueueError::BadRing { .. })), "{result:?}");
        assert_eq!(guest.balloon.faults().get(Fault::BadRing), 1);
        guest.inflate.set_up(&memory);
        guest.still_works();
    }
}

/// An unreadable descriptor is an empty chain, which is returned.
#[test]
fn a_descriptor_table_outside_of_memory_is_an_empty_message() {
    let mut guest = Guest::new(BITMAP);
    guest.inflate.queue.try_set_desc_table_address(GuestAddress(NOWHERE)).unwrap();
    guest.expects_fault(Fault::EmptyMessage, |guest| {
        guest.send_chain(Vq::Inflate, &[Buffer::readable(MESSAGE, 8)]);
        let memory = guest.memory.clone();
        guest.inflate.set_up(&memory);
    });
}

#[test]
fn a_queue_that_was_not_set_up_is_not_accessed() {
    let mut guest = Guest::new(BITMAP);
    let source = expects_bad_ring(&mut guest, |guest| guest.inflate.queue.set_ready(false));
    assert!(matches!(source, Error::QueueNotReady));

    // Its addresses have default values before a driver sets them. Nothing is
    // written there.
    let used_flags = GuestAddress(guest.inflate.ring.used());
    guest.memory.write_obj(0xaaaau16, used_flags).unwrap();
    guest.inflate.queue.set_ready(false);
    assert!(guest.kick(Vq::Inflate).is_err());
    assert_eq!(guest.memory.read_obj::<u16>(used_flags).unwrap(), 0xaaaa);
}

#[test]
fn an_empty_queue_needs_no_notification() {
    let mut guest = Guest::new(BITMAP);
    assert_eq!(guest.kick(Vq::Deflate).unwrap(), Drained::default());
}

/// With EVENT_IDX the driver is notified only if it requested it.
#[test]
fn event_indices_control_notifications() {
    let mut guest = Guest::new(BITMAP | Features::RING_EVENT_IDX);
    guest.inflate.queue.set_event_idx(true);
    guest.write(MESSAGE, &record_bytes(0x200, 12, &[]));
    let memory = guest.memory.clone();
    let used_event = GuestAddress(guest.inflate.ring.avail() + 4 + u64::from(RING_SIZE) * 2);
    let avail_event = GuestAddress(guest.inflate.ring.used() + 4 + u64::from(RING_SIZE) * 8);
    for (round, (wanted, notify)) in [(0u16, true), (5, false), (2, true)].into_iter().enumerate() {
        memory.write_obj(wanted.to_le(), used_event).unwrap();
        guest.inflate.ring.send(&memory, &[Buffer::readable(MESSAGE, 8)]);
        assert_eq!(guest.kick(Vq::Inflate).unwrap().notify, notify, "round {round}");
        // The device requests a notification at the next chain.
        let requested = u16::from_le(memory.read_obj(avail_event).unwrap());
        assert_eq!(usize::from(requested), round + 1);
    }
}

/// A vring of 2048 chains, more than one call serves.
#[test]
fn a_full_ring_does_not_starve_other_queues() {
    const SIZE: u16 = 2048;
    let mut guest = Guest::new(BITMAP);
    let memory = guest.memory.clone();
    let mut ring = GuestRing::new(2 * MIB, SIZE);
    let mut queue = ring.queue();
    guest.write(MESSAGE, &record_bytes(0x200, 12, &[]));
    for _ in 0..SIZE {
        ring.send(&memory, &[Buffer::readable(MESSAGE, 8)]);
    }
    let mut drain = || guest.balloon.process_queue(Vq::Inflate, &memory, &mut queue).unwrap();
    let half = Drained { chains: MAX_CHAINS_PER_DRAIN, notify: true, more: true };
    assert_eq!(drain(), half);
    assert_eq!(drain(), Drained { more: false, ..half });
    assert_eq!(drain(), Drained::default());
    let mut returned = 0;
    while ring.take_used(&memory).is_some() {
        returned += 1;
    }
    assert_eq!(returned, SIZE);
}

#[test]
fn large_messages_end_a_drain_early() {
    let mut guest = Guest::new(BITMAP);
    let memory = guest.memory.clone();
    let per_drain = MAX_BYTES_PER_DRAIN / MAX_MESSAGE_BYTES;
    let messages = usize::from(RING_SIZE);
    for _ in 0..messages {
        let buffers = [Buffer::readable(MESSAGE, MAX_MESSAGE_BYTES as u32)];
        guest.inflate.ring.send(&memory, &buffers);
    }
    let mut chains = 0;
    while chains < messages {
        let drained = guest.kick(Vq::Inflate).unwrap();
        assert_eq!(drained.chains, per_drain.min(messages - chains));
        chains += drained.chains;
        assert_eq!(drained.more, chains < messages);
    }
}

/// A driver starts with an empty balloon, and does not report a target that is already
/// reached.
#[test]
fn a_change_ends_when_the_driver_reaches_the_target() {
    let mut guest = Guest::new(BITMAP);
    let now = Instant::now();
    let reached = |guest: &Guest| guest.balloon.change().unwrap().reached_at().is_some();
    guest.balloon.set_target(0, now);
    assert!(!reached(&guest), "it may still inflate to an older target");
    guest.balloon.read_config(now);
    assert!(reached(&guest));
    guest.balloon.set_target(3, now);
    assert!(!reached(&guest));
    guest.balloon.write_config(4, &3u32.to_le_bytes(), now).unwrap();
    assert!(reached(&guest));
    guest.balloon.reset(BITMAP);
    assert!(!reached(&guest));
    guest.balloon.write_config(4, &3u32.to_le_bytes(), now).unwrap();
    guest.balloon.set_target(0, now);
    assert!(!reached(&guest));
    guest.balloon.reset(BITMAP);
    assert!(reached(&guest));
}

#[test]
fn a_suspended_device_cancels_releases_and_keeps_its_balloon() {
    let mut guest = Guest::new(BITMAP);
    guest.send(Vq::Inflate, &record_bytes(0x200, 12, &[0b1011]));
    let held = guest.balloon.held().clone();
    assert_eq!(held.len(), 3);
    guest.balloon.reclaim_mut().events.clear();
    guest.balloon.suspend();
    // No page is retained: the guest may only be paused.
    let expected = Event::Cancel { pages: held.clone(), returned: 0 };
    assert_eq!(guest.balloon.reclaim_mut().events, [expected]);
    assert_eq!(*guest.balloon.held(), held);
}

#[test]
fn a_config_write_outside_of_the_drivers_fields_is_refused() {
    let mut guest = Guest::new(BITMAP);
    let now = Instant::now();
    guest.balloon.set_target(7, now);
    let before = guest.balloon.config();
    for (offset, bytes) in [
        (0, &[1u8; 4][..]),
        (8, &[1; 4]),
        (4, &[1; 8]),
        (4, &[1; 3]),
        (4, &[]),
        (5, &[1; 4]),
        (16, &[1; 4]),
        (u32::MAX, &[1; 4]),
        (0, &[1; 16]),
    ] {
        guest.expects_fault(Fault::ConfigWrite, |guest| {
            let refused = guest.balloon.write_config(offset, bytes, now);
            assert_eq!(refused, Err(Fault::ConfigWrite), "{offset}+{}", bytes.len());
        });
        assert_eq!(guest.balloon.config(), before);
    }
    assert_eq!(guest.balloon.read_config(now).num_pages, 7);
}

#[test]
fn only_the_target_triggers_a_flush() {
    let mut guest = Guest::new(BITMAP);
    guest.balloon.set_target(8, Instant::now());
    guest.write_actual(7);
    assert_eq!(guest.balloon.reclaim().events, []);
    assert!(guest.balloon.change().unwrap().reached_at().is_none());
    guest.write_actual(8);
    assert_eq!(guest.balloon.reclaim().events, [Event::Flush]);
    assert!(guest.balloon.change().unwrap().reached_at().is_some());
    guest.write_actual(u32::MAX);
    assert!(guest.balloon.change().unwrap().reached_at().is_none());
}

#[test]
fn a_reset_leaves_the_target_unreached() {
    let mut guest = Guest::new(BITMAP);
    let reached = |guest: &Guest| guest.balloon.change().unwrap().reached_at().is_some();
    guest.balloon.set_target(8, Instant::now());
    guest.write_actual(8);
    assert!(reached(&guest));
    guest.balloon.reset(Features::NONE);
    assert!(!reached(&guest), "the balloon is empty");
    // Without a driver, the empty balloon reaches a target of 0.
    guest.balloon.set_target(0, Instant::now());
    assert!(reached(&guest));
    guest.balloon.set_target(8, Instant::now());
    assert!(!reached(&guest));
}

#[test]
fn a_target_reverted_unseen_is_reached_on_the_config_read() {
    let mut guest = Guest::new(BITMAP);
    guest.balloon.set_target(8, Instant::now());
    guest.balloon.set_target(0, Instant::now());
    // It may still inflate to the old target and report that.
    assert!(guest.balloon.change().unwrap().reached_at().is_none());
    guest.balloon.read_config(Instant::now());
    assert!(guest.balloon.change().unwrap().reached_at().is_some());
}

#[test]
fn a_new_layout_forgets_only_pages_that_are_gone() {
    let mut guest = Guest::new(BITMAP);
    // Held across both adjacent regions, and in the last one.
    guest.accepts(Vq::Inflate, &record_bytes(0x200, 21, &[0b10111]));
    assert_eq!(guest.held(), [(0x200, 0x600), (0xa00, 0x200)]);
    guest.balloon.reclaim_mut().events.clear();
    let smaller = MemoryLayout::new([REGIONS[0], REGIONS[2]]).unwrap();
    guest.balloon.set_layout(smaller);
    assert_eq!(guest.held(), [(0x200, 0x200), (0xa00, 0x200)]);
    // Removed pages must not be released later from memory mapped in their place.
    let gone = Event::Cancel { pages: set([(0x400, 0x400)]), returned: 0 };
    assert_eq!(guest.balloon.reclaim().events, [gone]);
    guest.still_works();
}

#[test]
fn a_device_without_memory_refuses_everything() {
    let mut guest = Guest::new(BITMAP);
    guest.balloon.set_layout(MemoryLayout::default());
    let message = record_bytes(0x200, 12, &[]);
    assert_eq!(guest.send(Vq::Inflate, &message), balloon_abi::MessageStatus::OutsideMemory as u32);
    assert_eq!(guest.balloon.faults().get(Fault::OutsideMemory), 1);
    assert_eq!(guest.balloon.layout().pages(), 0);
    assert_eq!(guest.held(), []);
    assert!(BalloonDevice::<Recorder>::FEATURES.contains(BITMAP));
}
