//! The request queue: an operator, a driver and time, in the order of a script.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use balloon_abi::request::{ANSWER_HEADER_BYTES, REQUEST_BYTES};
use balloon_abi::{AnswerHeader, Caches, Features, Outcome, Request, Vq};
use balloon_device::{
    BalloonDevice, DeviceRequest, MAX_CHAINS_PER_DRAIN, MAX_QUEUED_REQUESTS, MemoryLayout,
};
use guest_ring::{Buffer, GuestRing, Used};
use page_set::PageSet;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::checked::{Checked, check};
use crate::script::Script;

/// Guest memory: two adjacent regions, a gap, one more.
const REGIONS: [(u64, u64); 3] =
    [(0x10_0000, 0x30_0000), (0x40_0000, 0x40_0000), (0xa0_0000, 0x50_0000)];
const END_PAGE: u64 = 0xf00;
const RING: u64 = 0x10_0000;
const RING_SIZE: u16 = 16;
const INFLATE_RING: u64 = 0x10_4000;
/// A request buffer for each descriptor.
const SLOTS: u64 = 0x10_8000;
const MESSAGE: u64 = 0x11_0000;
const STATUS: u64 = 0x10_f000;
/// Maximum steps of a script. A longer one finds nothing that two shorter ones do not.
const MAX_STEPS: usize = 200;

const FEATURES: Features = Features::VERSION_1
    .union(Features::MUST_TELL_HOST)
    .union(Features::PAGE_BITMAP)
    .union(Features::REQUEST_VQ);

/// The request queue of a device with concurrent requests.
///
/// # Panics
/// An invariant does not hold.
pub fn request_queue(data: &[u8]) {
    let mut script = Script::new(data);
    let mut world = World::new();
    for _ in 0..MAX_STEPS {
        if script.is_over() {
            break;
        }
        world.step(&mut script);
        world.holds();
    }
    world.serves_a_valid_driver();
}

struct World {
    memory: GuestMemoryMmap,
    balloon: BalloonDevice<Checked>,
    ring: GuestRing,
    queue: Queue,
    start: Instant,
    seconds: u64,
    open: BTreeSet<u32>,
    /// The last id that the driver received or invented.
    last: u32,
    /// Whether the script wrote to the vring directly, so the device's entries there may be lost.
    spoiled: bool,
}

impl World {
    fn new() -> Self {
        let ranges = REGIONS.map(|(start, bytes)| {
            (GuestAddress(start), usize::try_from(bytes).expect("a few MiB"))
        });
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("anonymous memory");
        let mut balloon = BalloonDevice::new(Checked::default());
        let layout = MemoryLayout::new(REGIONS).expect("well-formed");
        balloon.reclaim_mut().set_layout(layout.clone());
        balloon.set_layout(layout);
        balloon.reset(FEATURES);
        let ring = GuestRing::new(RING, RING_SIZE);
        let queue = ring.queue();
        let start = Instant::now();
        Self {
            memory,
            balloon,
            ring,
            queue,
            start,
            seconds: 0,
            open: BTreeSet::new(),
            last: 1,
            spoiled: false,
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.u8() % 16 {
            0 | 1 => self.submit(script),
            2 | 3 => self.wait(),
            4..=7 => self.answer(script),
            8 => self.serve(),
            9 => {
                self.seconds += u64::from(script.u8() % 8);
                let now = self.now(0);
                self.balloon.requests_mut().expire(now);
            }
            10 => {
                let (id, deadline) = (u32::from(script.u8()), self.now(1));
                let open = self.balloon.requests().is_open(id);
                assert_eq!(self.balloon.requests_mut().cancel(id, deadline), open);
            }
            11 => self.stop(script.u8()),
            12 => self.inflate(script),
            13 => self.ring.publish(&self.memory, u16::from(script.u8() % 20)),
            14 => {
                let addr = script.pick([SLOTS, MESSAGE, u64::MAX - 8, 0, 0x80_0000 - 8]);
                let len = script.pick([16, 15, 4, 48, 0, 65536, u32::MAX]);
                let (flags, next) = (u16::from(script.u8() % 8), u16::from(script.u8() % 20));
                let descriptor = Descriptor::new(addr, len, flags, next);
                self.ring.write_descriptor(&self.memory, next % RING_SIZE, descriptor);
            }
            // Writes any two bytes of the vring.
            _ => {
                let at = RING + u64::from(script.u16() % 0x400);
                let _ = self.memory.write_obj(script.u16(), GuestAddress(at));
                self.spoiled = true;
            }
        }
    }

    fn now(&self, more: u64) -> Instant {
        self.start + Duration::from_secs(self.seconds + more)
    }

    fn submit(&mut self, script: &mut Script<'_>) {
        let ask = script.pick([
            DeviceRequest::ReportFree { min_granule_shift: 12 },
            DeviceRequest::HoldFree { reserve_pages: 5 },
            DeviceRequest::DropCaches(Caches::ALL),
            DeviceRequest::ReleaseHold,
        ]);
        let deadline = self.now(u64::from(script.u8() % 32));
        if let Ok(id) = self.balloon.requests_mut().submit(ask, deadline) {
            assert!(id != 0 && self.open.insert(id), "a new id");
            if script.flag() {
                self.serve();
            }
        }
    }

    /// Sends a chain for a request.
    fn wait(&mut self) {
        let at = SLOTS + u64::from(self.ring.next_slot()) * 16;
        let room = u32::try_from(REQUEST_BYTES).expect("short");
        self.ring.send(&self.memory, &[Buffer::writable(at, room)]);
        self.serve();
    }

    /// Sends an answer, mostly to the running request and mostly well-formed.
    fn answer(&mut self, script: &mut Script<'_>) {
        let running = self.balloon.requests().running().map(|(id, _)| id);
        let id = match script.u8() % 8 {
            0 => u32::from(script.u8()),
            1 => self.last,
            _ => running.unwrap_or(self.last),
        };
        let outcome = script.pick([
            Outcome::Done,
            Outcome::More,
            Outcome::Done,
            Outcome::More,
            Outcome::Cancelled,
            Outcome::Failed,
            Outcome::HoldLost,
            Outcome::BadArgument,
            Outcome::Busy,
            Outcome::UnknownCommand,
        ]);
        let values = [script.u8().into(), u64::MAX, script.u8().into(), 0];
        let header = AnswerHeader { id, outcome, elapsed_ns: u64::MAX, values };
        let mut message = header.to_bytes().to_vec();
        for _ in 0..script.u8() % 4 {
            message.extend(script.record(END_PAGE));
        }
        if script.u8() % 8 == 7 {
            let at = usize::from(script.u8()) % ANSWER_HEADER_BYTES;
            message[at] = script.u8();
            message.truncate(usize::from(script.u8()));
        }
        self.memory.write_slice(&message, GuestAddress(MESSAGE)).expect("memory");
        let len = u32::try_from(message.len()).expect("short");
        let answer = [Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4)];
        self.ring.send(&self.memory, &answer);
        self.serve();
    }

    fn serve(&mut self) {
        let used = self.queue.next_used();
        let served = self.balloon.process_queue(Vq::Request, &self.memory, &mut self.queue);
        let returned = usize::from(self.queue.next_used().wrapping_sub(used));
        // Returned chains are those of this drain and pending ones of before.
        assert!(returned <= MAX_CHAINS_PER_DRAIN + usize::from(RING_SIZE));
        match served {
            Ok(drained) => assert!(returned > 0 || !drained.notify),
            Err(_) => self.start_ring(),
        }
        while let Some(Used { head, written_bytes }) = self.ring.take_used(&self.memory) {
            let mut bytes = [0; REQUEST_BYTES];
            let at = GuestAddress(SLOTS + u64::from(head % 16) * 16);
            if written_bytes == 16
                && self.memory.read_slice(&mut bytes, at).is_ok()
                && let Ok(Request { id, .. }) = Request::from_bytes(&bytes)
            {
                self.last = id;
            }
            assert!([0, 4, 16].contains(&written_bytes) || self.spoiled);
            if self.ring.avail_idx() == 0 {
                break;
            }
        }
    }

    fn stop(&mut self, how: u8) {
        match how % 4 {
            0 => {
                let _ = self.balloon.return_unused(Vq::Request, &self.memory, &mut self.queue);
                self.balloon.suspend();
            }
            1 => self.balloon.forget_pending(Vq::Request),
            2 => {
                let (keep, _) = REGIONS.split_at(usize::from(how / 4 % 4));
                let layout = MemoryLayout::new(keep.iter().copied()).expect("well-formed");
                self.balloon.set_layout(layout.clone());
                self.balloon.reclaim_mut().set_layout(layout);
            }
            _ => {
                self.balloon.reset(FEATURES);
                self.start_ring();
            }
        }
    }

    fn start_ring(&mut self) {
        self.balloon.forget_pending(Vq::Request);
        self.ring.reset(&self.memory);
        self.queue = self.ring.queue();
        self.spoiled = false;
    }

    /// Inflates pages, on a separate vring.
    fn inflate(&mut self, script: &mut Script<'_>) {
        let mut ring = GuestRing::new(INFLATE_RING, 4);
        ring.reset(&self.memory);
        let message = script.record(END_PAGE);
        self.memory.write_slice(&message, GuestAddress(MESSAGE)).expect("memory");
        let len = u32::try_from(message.len()).expect("short");
        ring.send(&self.memory, &[Buffer::readable(MESSAGE, len)]);
        let served = self.balloon.process_queue(Vq::Inflate, &self.memory, &mut ring.queue());
        assert!(served.is_ok());
    }

    /// Invariants: every ended request has one outcome, all others are open, and pages reported
    /// free exist.
    fn holds(&mut self) {
        let Self { balloon, open, .. } = self;
        let requests = balloon.requests_mut();
        open.retain(|id| {
            let ended = requests.take_outcome(*id).is_some();
            assert_ne!(ended, requests.is_open(*id));
            !ended
        });
        assert!(open.len() <= MAX_QUEUED_REQUESTS + 1);
        assert_eq!(requests.next_deadline().is_some(), !open.is_empty());
        if let Some(newest) = self.balloon.requests().newest() {
            let exist: PageSet = self.balloon.layout().ranges().iter().copied().collect();
            let mut outside = PageSet::clone(&newest.pages);
            outside.subtract(&exist);
            assert!(outside.is_empty(), "{outside:?}");
        }
        check(&self.balloon);
    }

    /// After any script, a valid driver receives a request, and its answer arrives.
    fn serves_a_valid_driver(&mut self) {
        let layout = MemoryLayout::new(REGIONS).expect("well-formed");
        self.balloon.reclaim_mut().set_layout(layout.clone());
        self.balloon.set_layout(layout);
        self.balloon.reset(FEATURES);
        self.start_ring();
        self.holds();
        assert!(self.open.is_empty());
        let faults = self.balloon.faults().total();
        let deadline = self.now(1);
        let asked =
            self.balloon.requests_mut().submit(DeviceRequest::DropCaches(Caches::ALL), deadline);
        let id = asked.expect("a driver that has just started");
        self.wait();
        assert_eq!(self.last, id);
        let header =
            AnswerHeader { id, outcome: Outcome::Done, elapsed_ns: 1, values: [4, 3, 2, 1] };
        self.memory.write_slice(&header.to_bytes(), GuestAddress(MESSAGE)).expect("memory");
        self.ring.send(&self.memory, &[Buffer::readable(MESSAGE, 48)]);
        self.serve();
        let outcome = self.balloon.requests_mut().take_outcome(id);
        assert_eq!(outcome.map(|ended| ended.map(|answer| answer.values)), Some(Ok([4, 3, 2, 1])));
        assert_eq!(self.balloon.faults().total(), faults);
    }
}
