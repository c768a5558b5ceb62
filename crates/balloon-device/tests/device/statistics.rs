//! The statistics queue: one buffer that the device keeps.

use crate::guest::*;
use balloon_abi::stats::{MAX_STATS, MAX_STATS_BYTES};
use balloon_abi::{Features, Stat, StatTag, Vq};
use balloon_device::Fault;
use guest_ring::Buffer;

const STATS: Features = CLASSIC.union(Features::STATS_VQ);

fn stat(tag: u16, value: u64) -> Stat {
    Stat { tag: StatTag(tag), value }
}

/// Posts a statistics buffer, as the driver.
fn post(guest: &mut Guest, stats: &[Stat]) -> u16 {
    let bytes: Vec<u8> = stats.iter().flat_map(|stat| stat.to_bytes()).collect();
    guest.write(MESSAGE, &bytes);
    send(guest, &[Buffer::readable(MESSAGE, bytes.len() as u32)])
}

fn send(guest: &mut Guest, chain: &[Buffer]) -> u16 {
    let memory = guest.memory.clone();
    let head = guest.side(Vq::Stats).ring.send(&memory, chain);
    guest.kick(Vq::Stats).unwrap();
    head
}

fn returned(guest: &mut Guest) -> Option<u32> {
    let memory = guest.memory.clone();
    guest.side(Vq::Stats).ring.take_used(&memory).map(|used| {
        assert_eq!(used.written_bytes, 0);
        used.head
    })
}

/// Requests statistics. Returns true if the driver must be notified.
fn ask(guest: &mut Guest) -> bool {
    let memory = guest.memory.clone();
    guest.balloon.request_stats(&memory, &mut guest.other.queue).unwrap()
}

#[test]
fn a_buffer_is_kept_until_statistics_are_requested() {
    let mut guest = Guest::new(STATS);
    assert!(!ask(&mut guest), "no buffer to return");
    let first = post(&mut guest, &[stat(4, 10), stat(5, 20)]);
    assert_eq!(returned(&mut guest), None);
    assert_eq!(guest.balloon.stats().values(), [stat(4, 10), stat(5, 20)]);
    assert!(ask(&mut guest));
    assert_eq!(returned(&mut guest), Some(first.into()));
    assert!(!ask(&mut guest), "the driver has not answered yet");
    assert_eq!(returned(&mut guest), None);
    post(&mut guest, &[stat(4, 11)]);
    assert_eq!(guest.balloon.stats().values(), [stat(4, 11)]);
    assert_eq!(guest.balloon.faults().total(), 0);
    guest.still_works();
}

#[test]
fn an_invalid_buffer_is_counted_and_kept() {
    for (chain, fault) in [
        (vec![], None),
        (vec![Buffer::readable(MESSAGE, 0)], None),
        (vec![Buffer::writable(MESSAGE, 100)], None),
        (vec![Buffer::readable(MESSAGE, 9)], None),
        (vec![Buffer::readable(MESSAGE, MAX_STATS_BYTES as u32)], None),
        (vec![Buffer::readable(MESSAGE, 5), Buffer::readable(MESSAGE + 5, 5)], None),
        (
            vec![Buffer::readable(MESSAGE, MAX_STATS_BYTES as u32 + 1)],
            Some(Fault::OversizedMessage),
        ),
        (vec![Buffer::readable(MESSAGE, u32::MAX)], Some(Fault::OversizedMessage)),
        (vec![Buffer::readable(NOWHERE, 10)], Some(Fault::BadDescriptor)),
        (vec![Buffer::readable(u64::MAX, 10)], Some(Fault::BadDescriptor)),
    ] {
        println!("{chain:?}");
        let mut guest = Guest::new(STATS);
        let head = send(&mut guest, &chain);
        assert_eq!(guest.balloon.faults().total(), u64::from(fault.is_some()));
        assert!(fault.is_none_or(|fault| guest.balloon.faults().get(fault) == 1));
        assert!(guest.balloon.stats().values().len() <= MAX_STATS);
        // A buffer is kept even if it is invalid: to return it requests new values.
        assert_eq!(returned(&mut guest), None);
        ask(&mut guest);
        assert_eq!(returned(&mut guest), Some(head.into()));
        post(&mut guest, &[stat(4, 1)]);
        assert_eq!(guest.balloon.stats().values(), [stat(4, 1)]);
    }
}

#[test]
fn extra_buffers_are_returned_unread() {
    let mut guest = Guest::new(STATS);
    let first = post(&mut guest, &[stat(4, 1)]);
    for value in 0..100 {
        let head = post(&mut guest, &[stat(4, 100 + value)]);
        assert_eq!(returned(&mut guest), Some(head.into()));
    }
    assert_eq!(guest.balloon.stats().values(), [stat(4, 1)]);
    assert_eq!(guest.balloon.stats().buffers(), 1);
    assert_eq!(guest.balloon.faults().get(Fault::ExtraStats), 100);
    ask(&mut guest);
    assert_eq!(returned(&mut guest), Some(first.into()));
    guest.still_works();
}

#[test]
fn the_buffer_is_returned_before_the_queue_stops() {
    let mut guest = Guest::new(STATS);
    let head = post(&mut guest, &[stat(4, 1)]);
    let memory = guest.memory.clone();
    assert!(guest.balloon.return_unused(Vq::Stats, &memory, &mut guest.other.queue).unwrap());
    assert_eq!(returned(&mut guest), Some(head.into()));
    assert!(!ask(&mut guest));
    // A vring that is gone is not written.
    post(&mut guest, &[stat(4, 2)]);
    guest.balloon.reset(STATS);
    assert!(!ask(&mut guest));
    assert!(guest.balloon.stats().is_from_former_driver());
    assert_eq!(guest.balloon.stats().values(), [stat(4, 2)]);
}

#[test]
fn the_first_buffer_of_a_legacy_driver_is_ignored() {
    let mut guest = Guest::new(STATS.without(Features::VERSION_1));
    post(&mut guest, &[stat(4, 1)]);
    assert_eq!(guest.balloon.stats().values(), []);
    ask(&mut guest);
    post(&mut guest, &[stat(4, 2)]);
    assert_eq!(guest.balloon.stats().values(), [stat(4, 2)]);
}
