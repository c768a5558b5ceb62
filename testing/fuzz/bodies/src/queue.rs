//! The inflate or deflate queue: vrings, descriptors and messages of a script.

use std::time::Instant;

use balloon_abi::{Features, Vq};
use balloon_device::{BalloonDevice, MAX_CHAINS_PER_DRAIN, MemoryLayout};
use guest_ring::{Buffer, GuestRing, write_descriptor};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::checked::{Checked, check};
use crate::script::Script;

/// Guest memory: two adjacent regions, a gap, one more.
const REGIONS: [(u64, u64); 3] =
    [(0x10_0000, 0x30_0000), (0x40_0000, 0x40_0000), (0xa0_0000, 0x50_0000)];
const END: u64 = 0xf0_0000;
const RING: u64 = 0x10_0000;
/// The script's strings, one after the other.
const STRINGS: u64 = 0x11_0000;
const STRINGS_END: u64 = 0x12_0000;
const STATUS: u64 = 0x10_f000;
/// A valid driver's vring and message, which no step changes.
const HONEST: u64 = 0xef_0000;
const HONEST_PAGE: u64 = END / 4096 - 1;
/// Maximum steps of a script. A longer one finds nothing that two shorter ones do not.
const MAX_STEPS: usize = 200;

/// The inflate queue, starting with an empty balloon.
///
/// # Panics
/// An invariant does not hold.
pub fn inflate_queue(data: &[u8]) {
    run(Vq::Inflate, data);
}

/// The deflate queue, starting with a part of memory in the balloon.
///
/// # Panics
/// An invariant does not hold.
pub fn deflate_queue(data: &[u8]) {
    run(Vq::Deflate, data);
}

struct World {
    memory: GuestMemoryMmap,
    balloon: BalloonDevice<Checked>,
    ring: GuestRing,
    queue: Queue,
    strings: u64,
}

fn run(vq: Vq, data: &[u8]) {
    let mut script = Script::new(data);
    let mut world = World::new(&mut script);
    if vq == Vq::Deflate {
        world.honest(Vq::Inflate, 0x200, 0x300);
    }
    for _ in 0..MAX_STEPS {
        if script.is_over() {
            break;
        }
        world.step(vq, &mut script);
    }
    world.kick(vq);
    world.serves_a_valid_driver();
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let ranges = REGIONS.map(|(start, bytes)| {
            (GuestAddress(start), usize::try_from(bytes).expect("a few MiB"))
        });
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("anonymous memory");
        let mut balloon = BalloonDevice::new(Checked::default());
        let layout = MemoryLayout::new(REGIONS).expect("well-formed");
        balloon.reclaim_mut().set_layout(layout.clone());
        balloon.set_layout(layout);
        balloon.reset(features(script.u8()));
        let ring = GuestRing::new(RING, script.pick([16, 1, 4, 256]));
        let mut queue = ring.queue();
        queue.set_event_idx(balloon.negotiated().contains(Features::RING_EVENT_IDX));
        Self { memory, balloon, ring, queue, strings: STRINGS }
    }

    fn step(&mut self, vq: Vq, script: &mut Script<'_>) {
        match script.u8() % 16 {
            0..=3 => self.honest_shape(script),
            4 => self.kick(vq),
            5 => {
                let index = script.u8().into();
                let descriptor = self.descriptor(script);
                self.ring.write_descriptor(&self.memory, index, descriptor);
            }
            6 => self.ring.publish(&self.memory, u16::from(script.u8())),
            7 => self.ring.publish(&self.memory, script.u16()),
            8 => self.ring.set_avail_idx(&self.memory, script.u16()),
            9 => {
                let descriptor = self.descriptor(script);
                write_descriptor(&self.memory, STRINGS, u16::from(script.u8() % 64), descriptor);
            }
            10 => {
                let string = script.string();
                self.write(string);
            }
            11 => self.ring_elsewhere(script),
            12 => self.restart_driver(features(script.u8())),
            13 => self.move_memory(script.u8()),
            14 => self.config(script),
            // Writes any two bytes of the vring.
            _ => {
                let at = RING + u64::from(script.u16() % 0x2000);
                let _ = self.memory.write_obj(script.u16(), GuestAddress(at));
            }
        }
    }

    /// A chain of one or two messages and a status buffer, in any order.
    fn honest_shape(&mut self, script: &mut Script<'_>) {
        let mut message = Vec::new();
        for _ in 0..script.u8() % 4 {
            match script.u8() % 4 {
                0 => message.extend(script.string()),
                1 => {
                    let (start, pages) = (script.u64_up_to(END / 4096 - 16), script.u8());
                    let pfns = (0..u64::from(pages)).map(|i| start.wrapping_add(i));
                    message.extend(pfns.flat_map(|pfn| pfn.to_le_bytes()[..4].to_vec()));
                }
                _ => message.extend(script.record(END / 4096)),
            }
        }
        let message = self.write(&message);
        let mut status = Buffer::writable(STATUS, 4);
        let shape = script.u8();
        if shape & 8 != 0 {
            status = Buffer::writable(script.u64_up_to(END + 8), u32::from(script.u8()));
        }
        let chain: &[Buffer] = match shape % 8 {
            0..=3 => &[message, status],
            4 => &[message],
            5 => &[status, message],
            6 => &[message, status, message],
            _ => &[status],
        };
        self.ring.send(&self.memory, chain);
    }

    /// Writes bytes to free memory and returns them as a buffer.
    fn write(&mut self, bytes: &[u8]) -> Buffer {
        if self.strings + bytes.len() as u64 > STRINGS_END {
            self.strings = STRINGS;
        }
        let at = self.strings;
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
        self.strings += bytes.len() as u64;
        Buffer::readable(at, u32::try_from(bytes.len()).unwrap_or(u32::MAX))
    }

    fn descriptor(&self, script: &mut Script<'_>) -> Descriptor {
        let offset = u64::from(script.u8());
        let addr = script.pick([
            STRINGS,
            STATUS,
            END - 128,
            0x40_0000 - 128,
            0x80_0000 - 128,
            u64::MAX - 128,
            0,
        ]);
        let len = script.pick([16, 4, 8, 0, 64, 1024, 65536, u32::MAX, 1 << 20]);
        let flags = u16::from(script.u8() % 8);
        Descriptor::new(addr.wrapping_add(offset), len, flags, u16::from(script.u8()))
    }

    /// Serves the queue, and checks the number of returned chains.
    fn kick(&mut self, vq: Vq) {
        let (used, config) = (self.queue.next_used(), self.balloon.config());
        let result = self.balloon.process_queue(vq, &self.memory, &mut self.queue);
        let returned = usize::from(self.queue.next_used().wrapping_sub(used));
        match result {
            Ok(drained) => assert_eq!(drained.chains, returned),
            Err(_) => self.start_ring(),
        }
        assert!(returned <= MAX_CHAINS_PER_DRAIN);
        assert_eq!(self.balloon.config(), config);
        check(&self.balloon);
    }

    fn start_ring(&mut self) {
        self.ring.reset(&self.memory);
        self.queue = self.ring.queue();
        self.queue.set_event_idx(self.balloon.negotiated().contains(Features::RING_EVENT_IDX));
    }

    fn restart_driver(&mut self, features: Features) {
        self.balloon.reset(features);
        assert!(self.balloon.held().is_empty());
        self.start_ring();
        check(&self.balloon);
    }

    /// Moves parts of the vring to any address, in memory or not.
    fn ring_elsewhere(&mut self, script: &mut Script<'_>) {
        let base = script.pick([END - 64, 0x40_0000 - 64, 0x80_0000 - 64, 0, u64::MAX - 63, RING]);
        let at = GuestAddress(base.wrapping_add(u64::from(script.u8())));
        let _ = match script.u8() % 4 {
            0 => self.queue.try_set_desc_table_address(at),
            1 => self.queue.try_set_avail_ring_address(at),
            2 => self.queue.try_set_used_ring_address(at),
            _ => {
                self.queue.set_ready(false);
                Ok(())
            }
        };
    }

    fn move_memory(&mut self, which: u8) {
        let regions = (0..).zip(REGIONS).filter(|(bit, _)| which >> bit & 1 == 1).map(|(_, r)| r);
        let layout = MemoryLayout::new(regions).expect("well-formed");
        self.balloon.set_layout(layout.clone());
        self.balloon.reclaim_mut().set_layout(layout);
        check(&self.balloon);
    }

    fn config(&mut self, script: &mut Script<'_>) {
        let before = self.balloon.config();
        let offset = script.pick([4, 0, 8, 12, 16, 5, u32::MAX]);
        let data = script.string();
        let now = Instant::now();
        if self.balloon.write_config(offset, data, now).is_err() {
            assert_eq!(self.balloon.config(), before);
        }
        let after = self.balloon.read_config(now);
        assert_eq!(after.num_pages, before.num_pages);
        assert_eq!(after.free_page_hint_cmd_id, before.free_page_hint_cmd_id);
    }

    /// After any script, a valid driver is served.
    fn serves_a_valid_driver(&mut self) {
        let layout = MemoryLayout::new(REGIONS).expect("well-formed");
        self.balloon.reclaim_mut().set_layout(layout.clone());
        self.balloon.set_layout(layout);
        self.balloon.reset(features(0));
        self.honest(Vq::Inflate, HONEST_PAGE, 1);
        assert_eq!(self.balloon.held().len(), 1);
        self.honest(Vq::Deflate, HONEST_PAGE, 1);
        assert!(self.balloon.held().is_empty());
    }

    /// Sends a valid message of `pages` pages at `start`, on a separate vring.
    fn honest(&mut self, vq: Vq, start: u64, pages: u64) {
        let mut ring = GuestRing::new(HONEST, 4);
        ring.reset(&self.memory);
        let mut queue = ring.queue();
        let message: Vec<u8> = if self.balloon.negotiated().contains(Features::PAGE_BITMAP) {
            (start..start + pages).flat_map(|page| (page | 12 << 52).to_le_bytes()).collect()
        } else {
            (start..start + pages).flat_map(|page| page.to_le_bytes()[..4].to_vec()).collect()
        };
        let at = HONEST + 0x1000;
        self.memory.write_slice(&message, GuestAddress(at)).expect("memory");
        let len = u32::try_from(message.len()).expect("short");
        ring.send(&self.memory, &[Buffer::readable(at, len)]);
        let faults = self.balloon.faults().total();
        let drained = self.balloon.process_queue(vq, &self.memory, &mut queue);
        assert!(drained.is_ok_and(|drained| drained.chains == 1 && drained.notify));
        assert!(ring.take_used(&self.memory).is_some());
        assert_eq!(self.balloon.faults().total(), faults);
        check(&self.balloon);
    }
}

fn features(choice: u8) -> Features {
    let mut features = Features::VERSION_1;
    for (bit, feature) in (0..).zip([
        // Inverted, so that the first input tried uses bitmaps.
        Features::PAGE_BITMAP,
        Features::MUST_TELL_HOST,
        Features::RING_EVENT_IDX,
        Features::DEFLATE_ON_OOM,
    ]) {
        if (choice ^ 3) >> bit & 1 == 1 {
            features = features | feature;
        }
    }
    if choice & 0x80 != 0 { Features(u64::MAX) } else { features }
}
