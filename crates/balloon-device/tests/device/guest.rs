//! A guest of a few regions with two queues, and a device that serves them.

use std::time::Instant;

use balloon_abi::{Features, Field, MessageStatus, Pfn, Vq, record};
use balloon_device::{BalloonDevice, Fault, MemoryLayout, QueueError, Reclaim};
use guest_ring::{Buffer, GuestRing};
use page_set::{PageRange, PageSet};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory: two adjacent regions, a gap of 2 MiB, and a third. It does not start at
/// 0, and the last one ends in the middle of a 2 MiB block.
pub(crate) const REGIONS: [(u64, u64); 3] =
    [(MIB, 3 * MIB), (4 * MIB, 4 * MIB), (10 * MIB, 5 * MIB)];
pub(crate) const MIB: u64 = 1 << 20;
/// First page of guest memory, and the first page after its end.
pub(crate) const FIRST_PAGE: u64 = 0x100;
pub(crate) const END_PAGE: u64 = 0xf00;
/// Pages in the gap.
pub(crate) const GAP: std::ops::Range<u64> = 0x800..0xa00;
/// An address outside of guest memory.
pub(crate) const NOWHERE: u64 = 9 * MIB;

pub(crate) const RING_SIZE: u16 = 16;
const INFLATE_RING: u64 = MIB;
const DEFLATE_RING: u64 = MIB + 0x1000;
const OTHER_RING: u64 = MIB + 0x2000;
/// Where messages are written; 128 KiB.
pub(crate) const MESSAGE: u64 = MIB + 0x10000;
/// Where the device answers.
pub(crate) const STATUS: u64 = MIB + 0x8000;
/// Value of the status word before the device writes it.
pub(crate) const NO_STATUS: u32 = 0xdead_beef;

pub(crate) const BITMAP: Features =
    Features::VERSION_1.union(Features::MUST_TELL_HOST).union(Features::PAGE_BITMAP);
pub(crate) const CLASSIC: Features = Features::VERSION_1.union(Features::MUST_TELL_HOST);

/// A call of the device, and the number of deflate messages that the driver could see
/// as returned at that time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Release(PageSet),
    ReleaseNow(PageSet),
    ReleaseFree(PageSet),
    Cancel { pages: PageSet, returned: u16 },
    Retain { pages: PageSet, returned: u16 },
    Flush,
}

pub(crate) struct Recorder {
    memory: GuestMemoryMmap,
    deflate_used: GuestAddress,
    pub(crate) events: Vec<Event>,
}

impl Recorder {
    fn returned(&self) -> u16 {
        self.memory.read_obj(self.deflate_used).map(u16::from_le).unwrap()
    }
}

impl Reclaim for Recorder {
    fn release(&mut self, pages: &PageSet) {
        self.events.push(Event::Release(pages.clone()));
    }

    fn release_now(&mut self, pages: &PageSet) {
        self.events.push(Event::ReleaseNow(pages.clone()));
    }

    fn release_free(&mut self, pages: &PageSet) {
        self.events.push(Event::ReleaseFree(pages.clone()));
    }

    fn cancel(&mut self, pages: &PageSet) {
        let returned = self.returned();
        self.events.push(Event::Cancel { pages: pages.clone(), returned });
    }

    fn retain(&mut self, pages: &PageSet) {
        let returned = self.returned();
        self.events.push(Event::Retain { pages: pages.clone(), returned });
    }

    fn flush(&mut self) {
        self.events.push(Event::Flush);
    }
}

pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) balloon: BalloonDevice<Recorder>,
    pub(crate) inflate: Side,
    pub(crate) deflate: Side,
    /// Any other queue under test.
    pub(crate) other: Side,
}

/// One queue from both sides.
pub(crate) struct Side {
    pub(crate) ring: GuestRing,
    pub(crate) queue: Queue,
}

impl Side {
    pub(crate) fn new(at: u64) -> Self {
        let ring = GuestRing::new(at, RING_SIZE);
        Self { queue: ring.queue(), ring }
    }

    /// Sets the queue up again, as the driver.
    pub(crate) fn set_up(&mut self, memory: &GuestMemoryMmap) {
        self.ring.reset(memory);
        self.queue = self.ring.queue();
    }
}

impl Guest {
    pub(crate) fn new(negotiated: Features) -> Self {
        let ranges = REGIONS.map(|(start, bytes)| (GuestAddress(start), bytes as usize));
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let inflate = Side::new(INFLATE_RING);
        let deflate = Side::new(DEFLATE_RING);
        let deflate_used = GuestAddress(deflate.ring.used_idx_addr());
        let recorder = Recorder { memory: memory.clone(), deflate_used, events: Vec::new() };
        let mut balloon = BalloonDevice::new(recorder);
        balloon.set_layout(MemoryLayout::of(&memory).unwrap());
        balloon.reset(negotiated);
        balloon.reclaim_mut().events.clear();
        Self { memory, balloon, inflate, deflate, other: Side::new(OTHER_RING) }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn side(&mut self, vq: Vq) -> &mut Side {
        match vq {
            Vq::Inflate => &mut self.inflate,
            Vq::Deflate => &mut self.deflate,
            _ => &mut self.other,
        }
    }

    /// Serves the queue, as the device.
    pub(crate) fn kick(&mut self, vq: Vq) -> Result<balloon_device::Drained, QueueError> {
        let side = match vq {
            Vq::Inflate => &mut self.inflate,
            Vq::Deflate => &mut self.deflate,
            _ => &mut self.other,
        };
        self.balloon.process_queue(vq, &self.memory, &mut side.queue)
    }

    /// Sends one chain and expects it back. Returns the length in the used ring.
    pub(crate) fn send_chain(&mut self, vq: Vq, buffers: &[Buffer]) -> u32 {
        let memory = self.memory.clone();
        let head = self.side(vq).ring.send(&memory, buffers);
        self.kick_for(vq, head)
    }

    /// Serves the queue and expects exactly the chain at `head` back.
    pub(crate) fn kick_for(&mut self, vq: Vq, head: u16) -> u32 {
        let drained = self.kick(vq).expect("a valid vring");
        assert_eq!((drained.chains, drained.more), (1, false));
        let memory = self.memory.clone();
        let used = self.side(vq).ring.take_used(&memory).expect("the chain is returned");
        assert_eq!(used.head, u32::from(head));
        assert_eq!(self.side(vq).ring.take_used(&memory), None, "it is returned once");
        used.written_bytes
    }

    /// Sends `message` with a status buffer. Returns the status word afterwards.
    pub(crate) fn send(&mut self, vq: Vq, message: &[u8]) -> u32 {
        self.write(MESSAGE, message);
        self.write(STATUS, &NO_STATUS.to_le_bytes());
        let len = u32::try_from(message.len()).unwrap();
        let buffers = [Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4)];
        let written = self.send_chain(vq, &buffers);
        let status = self.status();
        assert_eq!(written, if status == NO_STATUS { 0 } else { 4 });
        status
    }

    pub(crate) fn status(&self) -> u32 {
        u32::from_le(self.memory.read_obj(GuestAddress(STATUS)).unwrap())
    }

    /// Sends `message` and expects it to be refused with only `fault`, without any effect.
    /// Then expects a valid message to work.
    pub(crate) fn refuses(&mut self, vq: Vq, message: &[u8], fault: Fault, status: MessageStatus) {
        self.expects_fault(fault, |guest| {
            assert_eq!(guest.send(vq, message), status as u32);
        });
    }

    /// Runs `bad` and expects exactly one more `fault`, no other, and no page released. Then
    /// expects a valid message to work.
    pub(crate) fn expects_fault(&mut self, fault: Fault, bad: impl FnOnce(&mut Self)) {
        let (held, faults) = (self.balloon.held().clone(), *self.balloon.faults());
        self.balloon.reclaim_mut().events.clear();
        bad(self);
        let mut expected = faults;
        expected.count(fault);
        assert_eq!(*self.balloon.faults(), expected, "expected one {fault:?}");
        assert_eq!(*self.balloon.held(), held);
        for event in &self.balloon.reclaim().events {
            assert!(matches!(event, Event::Cancel { .. } | Event::Retain { .. }), "{event:?}");
        }
        self.still_works();
    }

    /// Inflates and deflates a page with valid messages.
    pub(crate) fn still_works(&mut self) {
        let faults = *self.balloon.faults();
        let (held, page) = (self.balloon.held().clone(), END_PAGE - 1);
        assert!(!held.contains(page), "no test uses this page");
        let message = self.message([(page, 1)]);
        self.balloon.reclaim_mut().events.clear();
        self.accepts(Vq::Inflate, &message);
        assert!(self.balloon.held().contains(page));
        self.accepts(Vq::Deflate, &message);
        assert_eq!(*self.balloon.held(), held);
        assert_eq!(*self.balloon.faults(), faults);
        let pages = set([(page, 1)]);
        let [Event::Release(released), Event::Retain { pages: retained, .. }] =
            &self.balloon.reclaim().events[..]
        else {
            panic!("{:?}", self.balloon.reclaim().events)
        };
        assert_eq!((released, retained), (&pages, &pages));
    }

    pub(crate) fn accepts(&mut self, vq: Vq, message: &[u8]) {
        let expected = if self.uses_bitmap() { 0 } else { NO_STATUS };
        assert_eq!(self.send(vq, message), expected);
    }

    pub(crate) fn uses_bitmap(&self) -> bool {
        self.balloon.negotiated().contains(Features::PAGE_BITMAP)
    }

    /// Returns a valid message in the negotiated format.
    pub(crate) fn message<const N: usize>(&self, runs: [(u64, u64); N]) -> Vec<u8> {
        let pages = runs.into_iter().flat_map(|(start, pages)| start..start + pages);
        if self.uses_bitmap() {
            pages.flat_map(|page| record_bytes(page, 12, &[])).collect()
        } else {
            pfns(pages)
        }
    }

    pub(crate) fn held(&self) -> Vec<(u64, u64)> {
        self.balloon.held().ranges().map(|range| (range.start(), range.pages())).collect()
    }

    /// Writes the size of the balloon to `actual`, as the driver.
    pub(crate) fn write_actual(&mut self, pages: u32) {
        let offset = u32::try_from(Field::Actual.offset()).unwrap();
        self.balloon.write_config(offset, &pages.to_le_bytes(), Instant::now()).unwrap();
    }
}

pub(crate) fn set(runs: impl IntoIterator<Item = (u64, u64)>) -> PageSet {
    runs.into_iter().map(|(start, pages)| PageRange::new(start, pages).unwrap()).collect()
}

/// Returns the page numbers as a classic message, 32 bits each.
pub(crate) fn pfns(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    pages.into_iter().flat_map(|page| u32::try_from(page).unwrap().to_le_bytes()).collect()
}

/// Returns a valid record.
pub(crate) fn record_bytes(start: u64, granule_shift: u32, words: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; 8 * (words.len() + 1)];
    record::encode(&mut bytes, Pfn(start), granule_shift, words).unwrap().unwrap();
    bytes
}

/// Returns a record's header with any values, unchecked.
pub(crate) fn raw_header(start: u64, granule_shift: u64, words: u64) -> Vec<u8> {
    (start | granule_shift << 52 | words << 58).to_le_bytes().to_vec()
}
