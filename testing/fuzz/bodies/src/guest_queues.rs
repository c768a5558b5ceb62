//! The queues of statistics, hints and reporting: chains of a script, and a host that starts and
//! stops requests at any time.

use std::time::Instant;

use balloon_abi::stats::MAX_STATS;
use balloon_abi::{Features, Vq};
use balloon_device::{BalloonDevice, HintPhase, MAX_CHAINS_PER_DRAIN, MemoryLayout};
use guest_ring::{Buffer, GuestRing};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::checked::{Checked, check};
use crate::script::Script;

/// Guest memory: two adjacent regions, a gap, one more.
const REGIONS: [(u64, u64); 3] =
    [(0x10_0000, 0x30_0000), (0x40_0000, 0x40_0000), (0xa0_0000, 0x50_0000)];
const RING: u64 = 0x10_0000;
const STRINGS: u64 = 0x11_0000;
const STRINGS_END: u64 = 0x12_0000;
/// The balloon's vring, and a valid driver's, each followed by a message.
const BALLOON: u64 = 0xee_0000;
const HONEST: u64 = 0xed_0000;
const MESSAGE: u64 = 0x1000;
/// A page that no script inflates.
const HONEST_PAGE: u64 = 0xef0;
const MAX_STEPS: usize = 200;

/// The statistics queue.
///
/// # Panics
/// An invariant does not hold.
pub fn stats_queue(data: &[u8]) {
    World::new(Vq::Stats).run(data);
}

/// The queue of free page hints.
///
/// # Panics
/// An invariant does not hold.
pub fn hint_queue(data: &[u8]) {
    World::new(Vq::FreePage).run(data);
}

/// The queue of free page reporting.
///
/// # Panics
/// An invariant does not hold.
pub fn reporting_queue(data: &[u8]) {
    World::new(Vq::Reporting).run(data);
}

struct World {
    vq: Vq,
    memory: GuestMemoryMmap,
    balloon: BalloonDevice<Checked>,
    ring: GuestRing,
    queue: Queue,
    strings: u64,
}

impl World {
    fn new(vq: Vq) -> Self {
        let ranges = REGIONS.map(|(start, bytes)| {
            (GuestAddress(start), usize::try_from(bytes).expect("a few MiB"))
        });
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("anonymous memory");
        let ring = GuestRing::new(RING, 16);
        let mut world = Self {
            vq,
            memory,
            balloon: BalloonDevice::new(Checked::default()),
            queue: ring.queue(),
            ring,
            strings: STRINGS,
        };
        world.place(7);
        world.balloon.reset(world.features(0));
        world
    }

    fn features(&self, choice: u8) -> Features {
        let mut features = self.vq.feature() | Features::VERSION_1;
        for (bit, feature) in
            (0..).zip([Features::PAGE_POISON, Features::RING_EVENT_IDX, self.vq.feature()])
        {
            if choice >> bit & 1 == 1 {
                features = Features(features.0 ^ feature.0);
            }
        }
        features
    }

    /// Sets some of the regions as guest memory.
    fn place(&mut self, which: u8) {
        let regions = (0..).zip(REGIONS).filter(|(bit, _)| which >> bit & 1 == 1).map(|(_, r)| r);
        let layout = MemoryLayout::new(regions).expect("well-formed");
        self.balloon.set_layout(layout.clone());
        self.balloon.reclaim_mut().set_layout(layout);
    }

    fn run(mut self, data: &[u8]) {
        let mut script = Script::new(data);
        for _ in 0..MAX_STEPS {
            if script.is_over() {
                break;
            }
            self.step(&mut script);
            self.check();
        }
        self.kick();
        self.serves_a_valid_driver();
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.u8() % 16 {
            0..=4 => {
                let chain: Vec<Buffer> =
                    (0..script.u8() % 6).map(|_| self.buffer(script)).collect();
                self.ring.send(&self.memory, &chain);
            }
            5 | 6 => self.kick(),
            7 => self.host(script.u8()),
            8 => {
                // Inflates or deflates the page.
                let (page, pages) = (script.u64_up_to(0xeb0), u64::from(script.u8() % 64));
                let vq = if script.flag() { Vq::Inflate } else { Vq::Deflate };
                self.balloon_message(vq, page, pages);
            }
            9 => {
                let poison = [script.u8(); 4];
                let _ = self.balloon.write_config(12, &poison, Instant::now());
            }
            10 => self.restart_driver(script.u8()),
            11 => self.place(script.u8()),
            12 => {
                let (addr, len) = (script.u64_up_to(0xf10) << 12, script.u64_up_to(1 << 13));
                let len = u32::try_from(len & 0xffff_ffff).expect("32 bits");
                let (flags, next) = (u16::from(script.u8() % 8), u16::from(script.u8() % 20));
                let slot = u16::from(script.u8() % 16);
                self.ring.write_descriptor(
                    &self.memory,
                    slot,
                    Descriptor::new(addr, len, flags, next),
                );
            }
            13 => self.ring.publish(&self.memory, u16::from(script.u8() % 20)),
            14 => self.ring.set_avail_idx(&self.memory, script.u16()),
            _ => {
                let at = RING + u64::from(script.u16() % 0x400);
                let _ = self.memory.write_obj(script.u16(), GuestAddress(at));
            }
        }
    }

    /// A message, or a buffer of pages.
    fn buffer(&mut self, script: &mut Script<'_>) -> Buffer {
        match script.u8() % 8 {
            0 => {
                let number = match script.u8() {
                    // The last id, or one near it.
                    back @ 128.. => self
                        .balloon
                        .hinting()
                        .id()
                        .map_or(0, |id| id.get().wrapping_add(u32::from(back - 128) % 3)),
                    small => u32::from(small) % 3,
                };
                self.write(&number.to_le_bytes())
            }
            1 => {
                let bytes = script.string();
                self.write(bytes)
            }
            2 => Buffer::readable(script.u64_up_to(1 << 24), u32::from(script.u16())),
            3 => {
                let addr = script.pick([0, u64::MAX, 1 << 52, 1 << 63, 0x80_0000, !0xfff]);
                let len = script.pick([0, 1, 4096, 8192, u32::MAX]);
                Buffer::writable(addr.wrapping_add(script.u8().into()), len)
            }
            _ => {
                let (page, pages) = (script.u64_up_to(0xf10), u32::from(script.u8()));
                Buffer::writable(page << 12, pages << 12)
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Buffer {
        if self.strings + bytes.len() as u64 > STRINGS_END {
            self.strings = STRINGS;
        }
        let at = self.strings;
        self.strings += bytes.len() as u64;
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
        Buffer::readable(at, u32::try_from(bytes.len()).expect("short"))
    }

    fn host(&mut self, what: u8) {
        match what % 4 {
            0 => drop(self.balloon.start_hinting(Instant::now())),
            1 => self.balloon.stop_hinting(),
            2 => self.balloon.hinting_done(),
            _ => {
                let asked = self.balloon.request_stats(&self.memory, &mut self.queue);
                if asked.is_err() {
                    self.start_ring();
                }
            }
        }
    }

    fn kick(&mut self) {
        let used = self.queue.next_used();
        let held = self.balloon.held().clone();
        let result = self.balloon.process_queue(self.vq, &self.memory, &mut self.queue);
        let returned = usize::from(self.queue.next_used().wrapping_sub(used));
        match result {
            Ok(drained) => {
                let kept = drained.chains - returned;
                assert!(kept == 0 || (self.vq == Vq::Stats && kept == 1));
                assert!(drained.chains <= MAX_CHAINS_PER_DRAIN);
            }
            Err(_) => self.start_ring(),
        }
        assert_eq!(*self.balloon.held(), held, "the queue changed the balloon");
    }

    fn start_ring(&mut self) {
        self.balloon.forget_pending(self.vq);
        self.ring.reset(&self.memory);
        self.queue = self.ring.queue();
        self.queue.set_event_idx(self.balloon.negotiated().contains(Features::RING_EVENT_IDX));
    }

    fn restart_driver(&mut self, choice: u8) {
        self.balloon.reset(self.features(choice));
        let phase = self.balloon.hinting().phase();
        assert!(matches!(phase, HintPhase::Idle | HintPhase::Lost), "{phase:?}");
        self.start_ring();
    }

    fn check(&self) {
        check(&self.balloon);
        let hinting = self.balloon.hinting();
        let is_memory = |range| self.balloon.layout().covers(range);
        assert!(hinting.pages().ranges().all(is_memory));
        let none_yet =
            matches!(hinting.phase(), HintPhase::Idle | HintPhase::Requested | HintPhase::Lost);
        assert!(!none_yet || hinting.pages().is_empty());
        let stats = self.balloon.stats().values();
        assert!(stats.len() <= MAX_STATS && stats.is_sorted_by_key(|stat| stat.tag));
        let command = self.balloon.config().free_page_hint_cmd_id;
        let asks = matches!(hinting.phase(), HintPhase::Requested | HintPhase::Receiving);
        assert_eq!(asks, command > 1);
    }

    /// Sends a valid chain on a separate vring. It is returned unless it is kept pending.
    fn honest(&mut self, at: u64, vq: Vq, bytes: &[u8], pages: &[Buffer]) -> (GuestRing, Queue) {
        let mut ring = GuestRing::new(at, 4);
        ring.reset(&self.memory);
        let mut queue = ring.queue();
        self.memory.write_slice(bytes, GuestAddress(at + MESSAGE)).expect("memory");
        let len = u32::try_from(bytes.len()).expect("short");
        let mut chain = vec![Buffer::readable(at + MESSAGE, len)];
        chain.retain(|buffer| buffer.len > 0);
        chain.extend(pages);
        ring.send(&self.memory, &chain);
        let served = self.balloon.process_queue(vq, &self.memory, &mut queue);
        assert!(served.is_ok_and(|drained| drained.chains == 1));
        (ring, queue)
    }

    fn balloon_message(&mut self, vq: Vq, page: u64, pages: u64) {
        let numbers = (page..page + pages.max(1)).flat_map(|pfn| pfn.to_le_bytes()[..4].to_vec());
        let numbers: Vec<u8> = numbers.collect();
        let (mut ring, _) = self.honest(BALLOON, vq, &numbers, &[]);
        assert!(ring.take_used(&self.memory).is_some());
    }

    /// After any script, a valid driver is served.
    fn serves_a_valid_driver(&mut self) {
        self.place(7);
        self.balloon.reset(self.vq.feature() | Features::VERSION_1);
        let faults = self.balloon.faults().total();
        let free = [Buffer::writable(HONEST_PAGE << 12, 4096)];
        match self.vq {
            Vq::Stats => {
                let (mut ring, mut queue) = self.honest(HONEST, Vq::Stats, &[0; 10], &[]);
                assert!(ring.take_used(&self.memory).is_none());
                let asked = self.balloon.request_stats(&self.memory, &mut queue);
                assert!(asked.is_ok_and(|notify| notify));
                assert!(ring.take_used(&self.memory).is_some());
                assert_eq!(self.balloon.stats().values().len(), 1);
            }
            Vq::FreePage => {
                let id = self.balloon.start_hinting(Instant::now()).expect("negotiated");
                self.honest(HONEST, Vq::FreePage, &id.get().to_le_bytes(), &free);
                self.honest(HONEST, Vq::FreePage, &[0; 4], &[]);
                assert_eq!(self.balloon.hinting().phase(), HintPhase::Complete);
                assert_eq!(self.balloon.hinting().pages().len(), 1);
            }
            _ => {
                let before = self.balloon.reports().pages;
                self.honest(HONEST, Vq::Reporting, &[], &free);
                assert_eq!(self.balloon.reports().pages, before + 1);
            }
        }
        self.balloon_message(Vq::Inflate, HONEST_PAGE, 1);
        assert_eq!(self.balloon.held().len(), 1);
        assert_eq!(self.balloon.faults().total(), faults);
        check(&self.balloon);
    }
}
