//! A disk of the VMM: vrings, chains and requests of a script, with a model of the disk's contents.

mod model;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use guest_ring::{Buffer, GuestRing, INDIRECT, NEXT, WRITE, write_descriptor};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm::DiskOptions;
use vmm::raw::Disk;

use crate::script::Script;
use model::{Image, Model, SECTOR, SECTORS};

/// Two adjacent regions, a gap, one more.
const REGIONS: [(u64, usize); 3] = [(0x1_0000, 0x1_0000), (0x2_0000, 0x1_8000), (0x4_0000, 0x8000)];
const RING: u64 = 0x1_0000;
/// Descriptor tables, headers and status bytes of pending chains.
const TABLES: u64 = 0x1_4000;
const TABLE_BYTES: u64 = 160 * 16;
const HEADERS: u64 = 0x1_c000;
const STATUSES: u64 = 0x1_d000;
/// Data buffers, outside of the vring.
const DATA: u64 = 0x2_0000;
const DATA_END: u64 = 0x3_8000;
const MORE_DATA: u64 = 0x4_0000;
const MORE_DATA_END: u64 = 0x4_8000;
/// A status that no device writes.
const UNTOUCHED: u8 = 0xee;
/// Maximum pending chains.
const MAX_CHAINS: usize = 12;
/// Maximum steps of a script. A longer one finds nothing that two shorter ones do not.
const MAX_STEPS: usize = 100;
/// Feature bits (virtio 1.3, 5.2.3 and 6).
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;

/// The virtqueue of a disk.
///
/// # Panics
/// An invariant does not hold.
pub fn disk_queue(data: &[u8]) {
    let mut script = Script::new(data);
    let mut world = World::new(&mut script);
    for _ in 0..MAX_STEPS {
        if script.is_over() {
            break;
        }
        world.step(&mut script);
    }
    world.kick(false);
    world.serves_a_valid_driver();
}

struct World {
    disk: Disk,
    file: File,
    ring: GuestRing,
    features: u64,
    model: Model,
    /// Pending chains, unless the script wrote to the vring directly.
    waiting: Vec<(u16, Vec<Buffer>)>,
    slots: usize,
    wild: bool,
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory"));
        static DISK: LazyLock<Vec<u8>> =
            LazyLock::new(|| (0..SECTORS * SECTOR / 8).flat_map(|at| pattern(at, 1)).collect());
        let disk = DISK.clone();
        file.write_all_at(&disk, 0).expect("room");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        let read_only = script.pick([false, false, false, true]);
        let ring = GuestRing::new(RING, script.pick([64, 16, 4, 1, 256]));
        let options = DiskOptions { path, read_only };
        // The discard unit of a block device, or of a file.
        let unit_bytes = if ring.size() == 16 { 4096 } else { 1 };
        let device = Disk::new(&options, &REGIONS, ring.queue(), unit_bytes).expect("a small disk");
        let model = Model { disk, read_only, unit_bytes, unknown: Vec::new() };
        let (waiting, slots, wild) = (Vec::new(), 0, false);
        let mut world = Self { disk: device, file, ring, features: 0, model, waiting, slots, wild };
        world.restart_driver(script.u8());
        world
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.u8() % 16 {
            0..=5 => self.request(script),
            6 | 7 => self.kick(false),
            8 => self.kick(true),
            9 => self.fill(script),
            10 => self.restart_driver(script.u8()),
            11 => {
                // A request is running.
                self.disk.serve_once();
                self.restart_driver(script.u8());
                self.sync_model();
            }
            12 => {
                let table = script.pick([self.ring.table(), TABLES]);
                let (index, descriptor) = (script.u8(), self.descriptor(script));
                write_descriptor(self.disk.memory(), table, index.into(), descriptor);
                self.wild = true;
            }
            13 => {
                self.ring.publish(self.disk.memory(), script.pick([0, 1, 63, 256, u16::MAX]));
                self.wild = true;
            }
            14 => {
                self.ring.set_avail_idx(self.disk.memory(), script.u16());
                self.wild = true;
            }
            _ => self.ring_elsewhere(script),
        }
    }

    /// Sends a request of any shape.
    fn request(&mut self, script: &mut Script<'_>) {
        if self.waiting.len() >= MAX_CHAINS {
            return;
        }
        let number = self.waiting.len() as u64;
        let kind = script.pick([0u32, 1, 4, 8, 11, 13, 2, u32::MAX]);
        let sector = match script.u8() {
            255 => script.u64(),
            near @ 240.. => SECTORS - u64::from(near - 240),
            small => small.into(),
        };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let header_at = HEADERS + number * 16;
        self.put(header_at, &header);
        let status_at = STATUSES + number;
        self.put(status_at, &[UNTOUCHED]);
        let shape = script.u8();
        let cut = if shape & 1 == 0 { 16 } else { u32::from(script.u8() % 17) };
        let header_at = if shape & 0x8e == 0x8e { u64::MAX - 15 } else { header_at };
        let mut buffers = vec![
            Buffer::readable(header_at, cut),
            Buffer::readable(header_at.wrapping_add(cut.into()), 16 - cut),
        ];
        let count = script.pick([1u8, 2, 0, 3, 1, 5, 130, 1]);
        for _ in 0..count {
            let writable = if shape & 2 == 0 { kind == 0 || kind == 8 } else { script.flag() };
            let buffer = if matches!(kind, 11 | 13) && !writable {
                self.ranges(script)
            } else {
                self.buffer(script)
            };
            buffers.push(Buffer { writable, ..buffer });
        }
        if shape & 2 != 0 && shape & 4 == 0 {
            // In the required order.
            buffers.sort_by_key(|buffer| buffer.writable);
        }
        match (shape >> 4) % 4 {
            // The status follows the data in the same buffer.
            1 if buffers.last().is_some_and(|last| last.writable && last.len < 1 << 20) => {
                let last = buffers.last_mut().expect("there is one");
                last.len += 1;
            }
            2 => {}
            _ => buffers.push(Buffer::writable(status_at, 1)),
        }
        self.send(buffers, shape & 8 != 0);
    }

    /// Makes a chain available, in free descriptors or as an indirect table.
    fn send(&mut self, buffers: Vec<Buffer>, indirect: bool) {
        let size = usize::from(self.ring.size());
        let free = size - self.slots;
        let memory = self.disk.memory();
        if free == 0 {
            return;
        }
        if !indirect && buffers.len() <= free {
            self.slots += buffers.len();
            let head = self.ring.send(memory, &buffers);
            self.waiting.push((head, buffers));
            return;
        }
        let table = TABLES + self.waiting.len() as u64 * TABLE_BYTES;
        for (index, buffer) in (0u16..).zip(&buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if buffer.writable { WRITE } else { 0 };
            let descriptor = Descriptor::new(buffer.addr, buffer.len, flags, index + 1);
            write_descriptor(memory, table, index, descriptor);
        }
        let bytes = u32::try_from(buffers.len() * 16).expect("a small table");
        let head = self.ring.send(memory, &[Buffer::readable(table, bytes)]);
        self.ring.write_descriptor(memory, head, Descriptor::new(table, bytes, INDIRECT, 0));
        self.slots += 1;
        self.waiting.push((head, buffers));
    }

    /// A data buffer anywhere outside of the vring.
    fn buffer(&self, script: &mut Script<'_>) -> Buffer {
        let offset = u64::from(script.u8());
        let at = match script.u8() % 8 {
            0..=2 => DATA + offset * 512,
            3 => MORE_DATA + offset * 101,
            4 => DATA_END - 512 + offset,
            5 => MORE_DATA_END - 512 + offset * 2,
            6 => u64::MAX - 600 + offset,
            _ => DATA_END + offset,
        };
        let len = script.pick([
            512,
            1024,
            4096,
            20,
            19,
            0,
            513,
            511,
            1,
            0x1_0000,
            0x1_0200,
            0x2_0000,
            1 << 23,
            1 << 24,
            u32::MAX,
            16,
        ]);
        Buffer::readable(at, len)
    }

    /// A list of segments to discard or zero.
    fn ranges(&self, script: &mut Script<'_>) -> Buffer {
        let mut list = Vec::new();
        for _ in 0..=script.u8() % 3 {
            let sector = match script.u8() {
                255 => u64::MAX,
                small => u64::from(small) + 80,
            };
            let sectors = script.pick([1u32, 8, 0, 64, 320, 16 << 11, (16 << 11) + 1, u32::MAX]);
            let flags = script.pick([0u32, 0, 1, 0, 2, u32::MAX]);
            list.extend(sector.to_le_bytes());
            list.extend(sectors.to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        let at = DATA + u64::from(script.u8()) * 64;
        self.put(at, &list);
        let cut = script.pick([0, 0, 0, 1, 16]);
        Buffer::readable(at, u32::try_from(list.len() - cut).expect("short"))
    }

    fn fill(&self, script: &mut Script<'_>) {
        let at = script.pick([DATA, MORE_DATA]) + u64::from(script.u16() % 0x7000);
        let (seed, words) = (script.u8(), script.pick([64, 128, 1024]));
        let data: Vec<u8> = (0..words).flat_map(|at| pattern(at, seed)).collect();
        self.put(at, &data);
    }

    fn descriptor(&self, script: &mut Script<'_>) -> Descriptor {
        let addr = match script.u8() % 4 {
            0 => HEADERS + u64::from(script.u8()),
            1 => TABLES + u64::from(script.u8()) * 16,
            2 => RING + u64::from(script.u16() % 0x1000),
            _ => self.buffer(script).addr,
        };
        let len = script.pick([16, 512, 1, 32, 160, 513, 0, u32::MAX]);
        let flags = u16::from(script.u8() % 8);
        Descriptor::new(addr, len, flags, u16::from(script.u8() % 70))
    }

    /// Moves parts of the vring to any address, in memory or not; or writes to the vring.
    fn ring_elsewhere(&mut self, script: &mut Script<'_>) {
        self.wild = true;
        let near = [RING, TABLES, DATA, DATA_END - 64, MORE_DATA_END - 64, 0, u64::MAX - 63];
        let at = GuestAddress(script.pick(near) + u64::from(script.u8() % 64));
        let _ = match script.u8() % 5 {
            0 => self.disk.queue().try_set_desc_table_address(at),
            1 => self.disk.queue().try_set_avail_ring_address(at),
            2 => self.disk.queue().try_set_used_ring_address(at),
            3 => {
                self.disk.queue().set_ready(false);
                Ok(())
            }
            _ => {
                let at = RING + u64::from(script.u16() % 0x1000);
                self.put(at, &script.u16().to_le_bytes());
                Ok(())
            }
        };
    }

    /// Serves all pending chains, with a pause in between if `pauses`.
    fn kick(&mut self, pauses: bool) {
        if self.wild {
            return self.kick_unknown_ring(pauses);
        }
        let chains: Vec<_> = self.waiting.iter().map(|(_, chain)| chain.clone()).collect();
        let outcome = self.model.carry_out(&chains, self.image());
        assert!(
            !pauses || (self.disk.serve_once() && self.disk.pause()),
            "a valid vring is rejected"
        );
        assert!(self.disk.serve(), "a valid vring is rejected");
        for (number, (head, chain)) in std::mem::take(&mut self.waiting).iter().enumerate() {
            let used = self.ring.take_used(self.disk.memory()).expect("a returned chain");
            assert_eq!(used.head, u32::from(*head), "chains are returned out of order");
            if let Some(written) = outcome.written.get(number) {
                assert_eq!(used.written_bytes, *written, "{chain:x?}");
            }
        }
        assert!(
            self.ring.take_used(self.disk.memory()).is_none(),
            "more chains are returned than were sent"
        );
        self.slots = 0;
        if outcome.written.len() == chains.len() {
            self.compare_memory(outcome.memory);
            self.compare_disk();
        }
        self.sync_model();
    }

    /// Serves a vring of unknown contents. It is served or rejected, and the driver restarts.
    fn kick_unknown_ring(&mut self, pauses: bool) {
        if pauses {
            self.disk.serve_once();
            self.disk.pause();
        }
        let _ = self.disk.serve();
        self.start_ring();
        self.sync_model();
    }

    fn compare_memory(&self, mut expected: Image) {
        let now = self.image();
        let ring = (RING, GuestRing::bytes(self.ring.size()));
        for (at, len) in expected.unknown.iter().chain([&ring]) {
            let (from, to) = (index(*at), index(at + len));
            expected.bytes[from..to].copy_from_slice(&now.bytes[from..to]);
        }
        same(&now.bytes, &expected.bytes, "memory differs from the model");
    }

    fn compare_disk(&mut self) {
        let now = self.contents();
        for (from, to) in std::mem::take(&mut self.model.unknown) {
            let (from, to) = (index(from * SECTOR), index(to * SECTOR));
            self.model.disk[from..to].copy_from_slice(&now[from..to]);
        }
        same(&now, &self.model.disk, "the disk differs from the model");
    }

    /// Updates the model to the disk's contents. A read-only disk must be unchanged.
    fn sync_model(&mut self) {
        let now = self.contents();
        assert!(!self.model.read_only || now == self.model.disk, "a read-only disk is written");
        self.model.disk = now;
        self.model.unknown.clear();
    }

    fn contents(&self) -> Vec<u8> {
        let len = self.file.metadata().expect("a file").len();
        assert_eq!(len, SECTORS * SECTOR, "the disk has another size");
        let mut now = vec![0; index(len)];
        self.file.read_exact_at(&mut now, 0).expect("all of it");
        now
    }

    fn image(&self) -> Image {
        Image::of(|at, bytes| {
            self.disk.memory().read_slice(bytes, GuestAddress(at)).expect("memory");
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.disk.memory().write_slice(bytes, GuestAddress(at));
    }

    /// Restarts the driver. Pending chains are dropped.
    fn restart_driver(&mut self, choice: u8) {
        let mut features = self.disk.features();
        for (bit, feature) in (0..).zip([FLUSH, EVENT_IDX]) {
            if choice >> bit & 1 == 1 {
                features &= !feature;
            }
        }
        self.features = features;
        self.start_ring();
    }

    fn start_ring(&mut self) {
        // First, since a running request may write to the vring.
        self.disk.start(self.features, Queue::new(1).expect("a size"));
        // Its file is written until then.
        self.disk.until_idle();
        self.ring.reset(self.disk.memory());
        let mut queue = self.ring.queue();
        queue.set_event_idx(self.features & EVENT_IDX != 0);
        *self.disk.queue() = queue;
        self.waiting.clear();
        self.slots = 0;
        self.wild = false;
    }

    /// After any script, a valid driver is served.
    fn serves_a_valid_driver(&mut self) {
        self.ring = GuestRing::new(RING, 16);
        self.restart_driver(0);
        let data: Vec<u8> = (0..128).flat_map(|at| pattern(at, 0x55)).collect();
        self.put(DATA, &data);
        let (ok, refused) = (0, 1);
        let written = if self.model.read_only { refused } else { ok };
        assert_eq!(self.honest(1, 7, Buffer::readable(DATA, 1024)), written);
        assert_eq!(self.honest(4, 0, Buffer::readable(DATA, 0)), ok);
        assert_eq!(self.honest(0, 7, Buffer::writable(MORE_DATA, 1024)), ok);
        if !self.model.read_only {
            let mut back = vec![0; data.len()];
            self.disk.memory().read_slice(&mut back, GuestAddress(MORE_DATA)).expect("memory");
            assert!(back == data, "the data read differ from the data written");
        }
    }

    fn honest(&mut self, kind: u32, sector: u64, data: Buffer) -> u8 {
        self.put(HEADERS, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.put(STATUSES, &[UNTOUCHED]);
        let header = Buffer::readable(HEADERS, 16);
        self.send(vec![header, data, Buffer::writable(STATUSES, 1)], false);
        self.kick(false);
        self.disk.memory().read_obj(GuestAddress(STATUSES)).expect("memory")
    }
}

/// One comparison: byte by byte, it would dominate the fuzzer's edge counters and time.
fn same(now: &[u8], expected: &[u8], what: &str) {
    if now != expected {
        let at = now.iter().zip(expected).position(|(now, then)| now != then);
        panic!("{what}, from {at:x?}");
    }
}

/// Bytes that differ in every sector.
fn pattern(at: u64, seed: u8) -> [u8; 8] {
    (at * 0x9e37_79b9 + u64::from(seed)).to_le_bytes()
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small number")
}
