//! Tests of the registers, from the side of a driver and of a hostile guest.

use std::sync::{Arc, Mutex};

use guest_ring::{Buffer, GuestRing};
use proptest::prelude::*;
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

/// Guest memory.
const MEMORY_BYTES: usize = 1 << 20;

/// Offered features: one device feature in each half.
const OFFERED: u64 = 1 << 1 | VERSION_1 | 1 << 60;

const QUEUES: usize = 2;

/// Calls that the transport made.
#[derive(Debug, Default, PartialEq)]
struct Log {
    resets: Vec<u64>,
    served: Vec<usize>,
    raised: usize,
    notified: Vec<usize>,
    returned: Vec<usize>,
    dropped: Vec<usize>,
    suspended: usize,
    /// A pause leaves available chains in the vring.
    leaves: bool,
    /// `serve` always reports more.
    endless: bool,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Log>>);

impl Fake {
    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }
}

impl Device for Fake {
    fn id(&self) -> u32 {
        5
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn queues(&self) -> usize {
        QUEUES
    }
    fn read_config(&mut self, offset: u32, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = u8::try_from(at & 0xff).unwrap();
        }
    }
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}
    fn reset(&mut self, features: u64) {
        self.log().resets.push(features);
    }
    fn count_exits(&mut self, _count: u64) {}
    fn serve(&mut self, index: usize, memory: &Ram, queue: &mut Queue) -> Served {
        assert!(queue.ready(), "a queue that is not ready is served");
        self.log().served.push(index);
        let mut heads = Vec::new();
        let Ok(chains) = queue.iter(memory) else { return Served::Broken };
        heads.extend(chains.take(16).map(|chain| chain.head_index()));
        for head in &heads {
            if queue.add_used(memory, *head, 0).is_err() {
                return Served::Broken;
            }
        }
        Served::Done { notify: !heads.is_empty(), more: self.log().endless }
    }
    fn until_due(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
    fn due(&mut self, woken: bool) -> Vec<usize> {
        if woken { vec![1] } else { vec![0, 1] }
    }
    fn return_unused(&mut self, index: usize, _: &Ram, queue: &mut Queue) -> Served {
        assert!(queue.ready(), "chains are returned to a queue that is not ready");
        self.log().returned.push(index);
        Served::Done { notify: index == 0, more: false }
    }
    fn serves_before_pause(&self) -> bool {
        !self.log().leaves
    }
    fn drop_queue(&mut self, index: usize) {
        self.log().dropped.push(index);
    }
    fn suspend(&mut self) {
        self.log().suspended += 1;
    }
}

impl Interrupts for Fake {
    fn raise(&self) {
        self.log().raised += 1;
    }
    fn notify_device(&self, index: usize) {
        self.log().notified.push(index);
    }
}

struct Guest {
    registers: Transport<Fake>,
    fake: Fake,
    memory: Ram,
}

impl Guest {
    fn new() -> Self {
        let memory = Ram::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let fake = Fake::default();
        let device = Box::new(fake.clone());
        let registers = Transport::new(device, fake.clone(), memory.clone()).unwrap();
        Self { registers, fake, memory }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut word = [0xaa; 4];
        self.registers.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    fn accept(&mut self, features: u64) -> bool {
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 1 | 2);
        for which in [0, 1] {
            self.write(register::DRIVER_FEATURES_SEL, which);
            self.write(register::DRIVER_FEATURES, half(features, which));
        }
        self.write(register::STATUS, 1 | 2 | status::FEATURES_OK);
        self.read(register::STATUS) & status::FEATURES_OK != 0
    }

    fn place(&mut self, index: u32, size: u32, places: [u64; 3]) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, size);
        for (offset, place) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(places) {
            self.write(offset, half(place, 0));
            self.write(offset + 4, half(place, 1));
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// A driver that is ready to send on queue 0.
    fn start(&mut self) -> GuestRing {
        assert!(self.accept(VERSION_1));
        let ring = GuestRing::new(0x1000, 16);
        self.place(0, 16, [ring.table(), ring.avail(), ring.used()]);
        assert_eq!(self.read(register::QUEUE_READY), 1);
        self.write(register::STATUS, 1 | 2 | status::FEATURES_OK | status::DRIVER_OK);
        ring
    }
}

#[test]
fn a_driver_finds_the_device_and_is_served() {
    let mut guest = Guest::new();
    assert_eq!(guest.read(register::MAGIC).to_le_bytes(), *b"virt");
    assert_eq!((guest.read(register::VERSION), guest.read(register::DEVICE_ID)), (2, 5));
    assert_eq!(guest.read(CONFIG + 4), 0x0706_0504);
    let mut ring = guest.start();
    // Earlier notifications are not lost.
    assert_eq!(guest.fake.log().notified, [0, 1]);
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    assert!(!guest.registers.notified(0, 1));
    assert_eq!(guest.fake.log().served, [0]);
    assert_eq!(guest.fake.log().raised, 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), INTERRUPT_VRING);
    guest.registers.config_changed();
    assert_eq!(guest.read(register::INTERRUPT_STATUS), INTERRUPT_VRING | INTERRUPT_CONFIG);
    assert_eq!(guest.read(register::CONFIG_GENERATION), 1);
    guest.write(register::INTERRUPT_ACK, INTERRUPT_VRING);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), INTERRUPT_CONFIG);
    // Queue 1 was never placed.
    assert!(!guest.registers.notified(1, 1));
    assert_eq!(guest.fake.log().served, [0]);
}

#[test]
fn only_offered_features_are_negotiated_and_only_once() {
    for (features, agreed) in [
        (VERSION_1, true),
        (OFFERED, true),
        (0, false),
        (VERSION_1 | 1 << 2, false),
        (VERSION_1 | 1 << 61, false),
    ] {
        let mut guest = Guest::new();
        assert_eq!(guest.accept(features), agreed, "{features:#x}");
        let resets = if agreed { vec![features] } else { vec![] };
        assert_eq!(guest.fake.log().resets, resets);
    }
    let mut guest = Guest::new();
    guest.start();
    guest.write(register::DRIVER_FEATURES_SEL, 1);
    guest.write(register::DRIVER_FEATURES, u32::MAX);
    guest.write(register::STATUS, 1 | 2 | status::FEATURES_OK | status::DRIVER_OK);
    assert_eq!(guest.fake.log().resets, [VERSION_1]);
}

#[test]
fn queues_are_not_served_before_driver_ok_or_after_a_reset() {
    let mut guest = Guest::new();
    guest.write(register::STATUS, 1 | 2 | status::DRIVER_OK);
    assert_eq!(guest.read(register::STATUS) & status::DRIVER_OK, 0);
    guest.place(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(guest.read(register::QUEUE_READY), 0, "features are not negotiated");
    let mut ring = guest.start();
    guest.write(register::STATUS, 0);
    assert_eq!(guest.read(register::STATUS), 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    guest.registers.notified(0, 1);
    guest.registers.config_changed();
    assert!(guest.fake.log().served.is_empty());
    assert_eq!(guest.fake.log().raised, 0);
    assert_eq!(guest.fake.log().resets, [VERSION_1, 0]);
}

#[test]
fn an_invalid_vring_sets_needs_reset() {
    let end = MEMORY_BYTES as u64;
    for (size, places) in [
        (16, [0x1001, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        (16, [end, 0x2000, 0x3000]),
        (16, [0x1000, 0x2000, end - 8]),
        (16, [0x1000, !1, 0x3000]),
        (15, [0x1000, 0x2000, 0x3000]),
        (0, [0x1000, 0x2000, 0x3000]),
        (u32::from(MAX_QUEUE_SIZE) * 2, [0x1000, 0x2000, 0x3000]),
        (1 << 16 | 16, [0x1000, 0x2000, 0x3000]),
    ] {
        let mut guest = Guest::new();
        assert!(guest.accept(VERSION_1));
        guest.place(0, size, places);
        let status = guest.read(register::STATUS);
        assert_ne!(status & status::NEEDS_RESET, 0, "{size} {places:x?}");
        guest.write(register::STATUS, status | status::DRIVER_OK);
        guest.registers.notified(0, 1);
        assert!(guest.fake.log().served.is_empty());
        // After a reset the driver is served.
        guest.write(register::STATUS, 0);
        guest.start();
        guest.registers.notified(0, 1);
        assert_eq!(guest.fake.log().served, [0]);
    }
}

#[test]
fn queues_are_served_without_a_notification_while_the_guest_runs() {
    let mut guest = Guest::new();
    guest.registers.poll_timers(false);
    guest.start();
    assert_eq!(guest.registers.until_due(), Some(Duration::ZERO));
    // Queue 1 was never placed.
    guest.registers.poll_timers(true);
    assert!(guest.fake.log().served.is_empty());
    guest.registers.poll_timers(false);
    assert_eq!(guest.fake.log().served, [0]);
}

/// As for a disk, whose requests may take long.
#[test]
fn a_pause_leaves_available_chains_in_the_vring_if_the_device_asks_for_it() {
    let mut guest = Guest::new();
    guest.fake.log().leaves = true;
    let mut ring = guest.start();
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    guest.registers.pause();
    assert!(ring.take_used(&guest.memory).is_none());
    assert_eq!(guest.fake.log().returned, [0]);
    guest.registers.resume();
    guest.registers.notified(0, 0);
    assert!(ring.take_used(&guest.memory).is_some());
}

/// A hostile guest or peer may let the device's own writes add chains.
#[test]
fn a_pause_serves_an_endless_vring_a_limited_number_of_times() {
    let mut guest = Guest::new();
    guest.start();
    guest.fake.log().endless = true;
    guest.registers.pause();
    assert_eq!(guest.fake.log().served.len(), usize::from(MAX_QUEUE_SIZE));
    assert_eq!(guest.fake.log().suspended, 1);
}

#[test]
fn a_pause_serves_available_chains_and_then_nothing_until_resume() {
    let mut guest = Guest::new();
    let mut ring = guest.start();
    guest.fake.log().notified.clear();
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    guest.registers.pause();
    assert!(ring.take_used(&guest.memory).is_some());
    assert_eq!(guest.fake.log().returned, [0]);
    assert_eq!(guest.fake.log().suspended, 1);
    assert_eq!(guest.fake.log().raised, 2, "one for the served chain, one for returned chains");
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    guest.registers.notified(0, 1);
    guest.registers.poll_timers(false);
    guest.registers.pause();
    assert!(ring.take_used(&guest.memory).is_none());
    assert_eq!(guest.fake.log().suspended, 1);
    guest.registers.resume();
    assert_eq!(guest.fake.log().notified, [0, 1]);
    guest.registers.notified(0, 0);
    assert!(ring.take_used(&guest.memory).is_some());
    guest.registers.resume();
    assert_eq!(guest.fake.log().notified, [0, 1], "a second resume has no effect");
}

#[test]
fn disabling_a_queue_drops_its_state() {
    let mut guest = Guest::new();
    guest.start();
    guest.write(register::QUEUE_SEL, 0);
    guest.write(register::QUEUE_READY, 0);
    assert_eq!(guest.fake.log().dropped, [0]);
}

/// An access by the guest, or a call by the VMM.
#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Register(u64, u32),
    Notified(usize),
    Changed,
    PollTimers(bool),
    Pause,
    Resume,
}

fn access() -> impl Strategy<Value = Access> {
    let offsets = prop::sample::select(vec![
        register::DEVICE_FEATURES_SEL,
        register::DRIVER_FEATURES,
        register::DRIVER_FEATURES_SEL,
        register::QUEUE_SEL,
        register::QUEUE_SIZE,
        register::QUEUE_READY,
        register::QUEUE_NOTIFY,
        register::INTERRUPT_ACK,
        register::STATUS,
        QUEUE_DESC,
        QUEUE_DRIVER,
        QUEUE_DEVICE,
    ]);
    let values = prop_oneof![
        0u32..20,
        Just(1 | 2 | status::FEATURES_OK | status::DRIVER_OK),
        Just(half(VERSION_1, 1)),
        (0u32..0x100).prop_map(|page| page << 12),
        any::<u32>(),
    ];
    prop_oneof![
        1 => (any::<u16>(), 0usize..9).prop_map(|(at, len)| Access::Read(at.into(), len)),
        1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(at, data)| Access::Write(at.into(), data)),
        8 => (offsets, values).prop_map(|(at, value)| Access::Register(at, value)),
        2 => (0usize..4).prop_map(Access::Notified),
        1 => Just(Access::Changed),
        1 => any::<bool>().prop_map(Access::PollTimers),
        1 => Just(Access::Pause),
        2 => Just(Access::Resume),
    ]
}

proptest! {
    /// Whatever the guest does: nothing panics, only queues that were set up are served, only
    /// offered features are negotiated, and after a reset the device works as new.
    #[test]
    fn any_accesses_are_harmless(accesses in prop::collection::vec(access(), 0..200)) {
        let mut guest = Guest::new();
        for access in accesses {
            match access {
                Access::Read(at, len) => guest.registers.read(at, &mut vec![0; len]),
                Access::Write(at, data) => guest.registers.write(at, &data),
                Access::Register(at, value) => guest.write(at, value),
                Access::Notified(index) => {
                    let runs = guest.registers.runs();
                    let before = guest.fake.log().served.len();
                    guest.registers.notified(index, 1);
                    let after = guest.fake.log().served.len();
                    prop_assert!(after == before || (runs && index < QUEUES));
                }
                Access::Changed => guest.registers.config_changed(),
                Access::PollTimers(woken) => guest.registers.poll_timers(woken),
                Access::Pause => assert!(guest.registers.pause()),
                Access::Resume => guest.registers.resume(),
            }
            let status = guest.read(register::STATUS);
            if status & status::DRIVER_OK != 0 {
                prop_assert_ne!(status & status::FEATURES_OK, 0);
            }
        }
        for features in &guest.fake.log().resets {
            prop_assert_eq!(features & !OFFERED, 0);
        }
        guest.registers.resume();
        guest.write(register::STATUS, 0);
        let mut ring = guest.start();
        // Clears what the guest wrote to the vring's memory before.
        ring.reset(&guest.memory);
        ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
        let before = guest.fake.log().served.len();
        guest.registers.notified(0, 1);
        prop_assert_eq!(guest.fake.log().served.len(), before + 1);
        prop_assert_ne!(guest.read(register::INTERRUPT_STATUS) & INTERRUPT_VRING, 0);
    }
}

/// One machine saves the state, another restores it; the driver is served as before.
#[test]
fn a_device_continues_in_another_machine() {
    let mut guest = Guest::new();
    let mut ring = guest.start();
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    guest.registers.notified(0, 1);
    assert!(ring.take_used(&guest.memory).is_some());
    guest.registers.pause();
    let bytes = guest.registers.state().encode();
    let state = TransportState::decode(&bytes).unwrap();
    assert_eq!(state.negotiated(), VERSION_1);

    let mut other = Guest::new();
    let mut all = vec![0; MEMORY_BYTES];
    guest.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    other.memory.write_slice(&all, GuestAddress(0)).unwrap();
    other.registers.restore(&state).unwrap();
    assert_eq!(other.registers.state(), state);
    assert_eq!(other.fake.log().raised, 1, "an unacknowledged interrupt is raised again");
    assert_eq!(other.read(register::INTERRUPT_STATUS), INTERRUPT_VRING);
    ring.send(&other.memory, &[Buffer::readable(0x8000, 4)]);
    other.registers.notified(0, 1);
    assert!(ring.take_used(&other.memory).is_none(), "it is paused");
    other.registers.resume();
    assert_eq!(other.fake.log().notified, [0, 1]);
    other.registers.notified(0, 0);
    assert!(ring.take_used(&other.memory).is_some());
}

/// The dirty log records the device's writes like the vCPUs'.
#[test]
fn the_devices_writes_are_dirty() {
    let mut guest = Guest::new();
    let mut ring = guest.start();
    ring.send(&guest.memory, &[Buffer::readable(0x8000, 4)]);
    let region = guest.memory.iter().next().unwrap().get_mmap();
    region.bitmap().reset();
    guest.registers.notified(0, 1);
    let words = region.bitmap().get_and_reset();
    let used = ring.used() >> 12;
    assert_eq!(words.iter().map(|word| word.count_ones()).sum::<u32>(), 1, "{words:x?}");
    assert_eq!(words[usize::try_from(used / 64).unwrap()] >> (used % 64) & 1, 1);
}

/// Corrupts single fields; the offsets are those of `TransportState::encode`.
#[test]
fn invalid_states_are_refused() {
    let mut guest = Guest::new();
    guest.start();
    guest.registers.pause();
    let good = guest.registers.state().encode();
    let ring = 34;
    let changed = |at: usize, bytes: &[u8]| {
        let mut state = good.clone();
        state[at..at + bytes.len()].copy_from_slice(bytes);
        TransportState::decode(&state).and_then(|state| Guest::new().registers.restore(&state))
    };
    assert_eq!(changed(0, &[0]), Ok(()));
    for (what, at, bytes) in [
        ("a feature that is not offered", 8, &[0xff][..]),
        ("no VERSION_1 feature", 12, &[0]),
        ("an undefined status bit", 20, &[0x1f]),
        ("a driver that runs without features", 20, &[4]),
        ("an undefined interrupt bit", 24, &[4]),
        ("another number of queues", 32, &[1, 0]),
        ("more queues than any device has", 32, &[0xff, 0xff]),
        ("another maximum size", ring, &[16, 0]),
        ("more chains returned than taken", ring + 4, &[1, 0]),
        ("more chains taken than entries", ring + 2, &[17, 0]),
        ("an event index that was not negotiated", ring + 6, &[1]),
        ("an invalid flag", ring + 6, &[2]),
        ("a size that is no power of two", ring + 7, &[3, 0]),
        ("a size above the maximum", ring + 7, &[0, 8]),
        ("an unaligned table", ring + 10, &[1]),
        ("an unaligned available ring", ring + 18, &[1]),
        ("an unaligned used ring", ring + 26, &[2]),
        ("a table outside of memory", ring + 10, &[0, 0, 0, 1]),
        ("a used ring outside of memory", ring + 26, &[0, 0, 0x10, 0]),
    ] {
        assert!(changed(at, bytes).is_err(), "{what}");
    }
    for cut in 0..good.len() {
        assert!(TransportState::decode(&good[..cut]).is_err());
    }
}

proptest! {
    /// Any state is refused, or the guest is served as any other.
    #[test]
    fn any_state_is_refused_or_harmless(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 0..6),
        accesses in prop::collection::vec(0usize..QUEUES, 0..4),
    ) {
        let mut guest = Guest::new();
        guest.start();
        guest.registers.pause();
        let mut bytes = guest.registers.state().encode();
        let len = bytes.len();
        for (at, byte) in changes {
            bytes[at % len] = byte;
        }
        if let Ok(state) = TransportState::decode(&bytes)
            && guest.registers.restore(&state).is_ok()
        {
            guest.registers.resume();
            for index in accesses {
                guest.registers.notified(index, 1);
            }
            prop_assert_eq!(state.negotiated() & !OFFERED, 0);
        }
    }
}
