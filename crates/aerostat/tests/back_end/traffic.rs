//! A guest that inflates and deflates at random with several messages in flight, and tracks what
//! the back end must guarantee.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use balloon_abi::Features;
use guest_ring::Buffer;
use vm_memory::{Bytes, GuestAddress};

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{DEFLATE, INFLATE, MESSAGE, REQUEST, Vm, Vmm};
use crate::support::front_end::{FrontEnd, OFFERED_PROTOCOL, PROTOCOL_FEATURES, eventfd, request};
use crate::support::guest::{BASE, Guest, USER_BASE, data_pages};

/// Size of a message slot, and number of slots.
const SLOT_BYTES: u64 = 1024;
const SLOTS: u64 = 48;
/// Addresses of statuses and requests.
const STATUSES: u64 = BASE + 0x3f000;
const REQUESTS: u64 = BASE + 0x3d000;

/// A message in flight.
struct Message {
    slot: u64,
    pages: BTreeSet<u64>,
}

/// The state of a correct driver.
pub(crate) struct Traffic {
    pub(crate) vm: Vm,
    features: Features,
    /// Pages whose inflate message was returned and whose deflate message was not sent.
    pub(crate) balloon: BTreeSet<u64>,
    in_flight: [BTreeMap<u32, Message>; 2],
    /// Pending chains on the request queue.
    waiting: BTreeSet<u32>,
    inflight: Option<(Vec<u8>, File)>,
    random: Random,
    /// The last size that the back end certainly received, and all sizes reported since.
    pub(crate) reported: BTreeSet<u32>,
    pub(crate) messages: u64,
}

impl Traffic {
    /// Boots a guest behind `front`, with inflight tracking if `tracks`.
    pub(crate) fn boot(front: FrontEnd, features: Features, tracks: bool, seed: u64) -> Self {
        let mut traffic = Self {
            vm: Vm::new(Vmm::Qemu, front, Guest::new()),
            features,
            balloon: BTreeSet::new(),
            in_flight: [BTreeMap::new(), BTreeMap::new()],
            waiting: BTreeSet::new(),
            inflight: None,
            random: Random(seed | 1),
            reported: BTreeSet::from([0]),
            messages: 0,
        };
        traffic.vm.features = features;
        traffic.vm.reset_rings();
        traffic.negotiate();
        if tracks {
            traffic.ask_for_inflight();
        }
        traffic.start();
        traffic
    }

    /// Reconnects to a restarted back end.
    pub(crate) fn reconnect(&mut self, front: FrontEnd) {
        self.vm.front = front;
        self.negotiate();
        self.start();
        self.vm.front.barrier();
    }

    fn negotiate(&mut self) {
        let front = &self.vm.front;
        front.send(request::SET_OWNER, &[], &[]);
        assert_ne!(front.request_u64(request::GET_FEATURES) & PROTOCOL_FEATURES, 0);
        assert_eq!(front.request_u64(request::GET_PROTOCOL_FEATURES), OFFERED_PROTOCOL);
        front.send_u64(request::SET_PROTOCOL_FEATURES, OFFERED_PROTOCOL);
        self.vm.send_channel();
    }

    fn ask_for_inflight(&mut self) {
        let asked =
            [[0u64; 2].map(u64::to_ne_bytes).concat(), [3u16, 256].map(u16::to_ne_bytes).concat()];
        let (answer, fd) = self.vm.front.request_file(request::GET_INFLIGHT_FD, &asked.concat());
        self.inflight = Some((answer, File::from(fd)));
    }

    /// Starts the virtqueues at their used indices, as a front end does after its back end exited.
    fn start(&mut self) {
        let vm = &mut self.vm;
        vm.front.send_u64(request::SET_FEATURES, self.features.0 | PROTOCOL_FEATURES);
        vm.send_memory(USER_BASE, 1);
        if let Some((description, file)) = &self.inflight {
            vm.front.send(request::SET_INFLIGHT_FD, description, &[file.as_fd()]);
        }
        let queues = self.queues();
        let vm = &mut self.vm;
        for index in 0..queues {
            let at = GuestAddress(vm.rings[index].used_idx_addr());
            let used: u16 = vm.guest.memory.read_obj(at).unwrap();
            vm.send_ring(index, USER_BASE, u32::from(u16::from_le(used)));
            vm.kicks[index] = eventfd();
            vm.calls[index] = eventfd();
            vm.front.send_fd(request::SET_VRING_KICK, index as u64, &vm.kicks[index]);
            vm.front.send_fd(request::SET_VRING_CALL, index as u64, &vm.calls[index]);
        }
        for index in 0..queues {
            vm.front.send_state(request::SET_VRING_ENABLE, index as u32, 1);
        }
    }

    fn queues(&self) -> usize {
        if self.features.contains(Features::REQUEST_VQ) { 3 } else { 2 }
    }

    /// Does one random driver operation. The back end may be dead.
    pub(crate) fn step(&mut self) {
        match self.random.below(8) {
            0..=2 => self.inflate_some(),
            3..=4 => self.deflate_some(),
            5 => self.report_size(),
            6 if self.queues() > REQUEST => self.wait_for_requests(),
            _ => {}
        }
        self.collect();
    }

    fn inflate_some(&mut self) {
        let busy = |page: &u64| {
            self.balloon.contains(page)
                || self.in_flight.iter().any(|queue| queue.values().any(|m| m.pages.contains(page)))
        };
        let free: BTreeSet<u64> = data_pages().filter(|page| !busy(page)).collect();
        let pages = self.random.some_of(&free);
        self.send(INFLATE, pages);
    }

    fn deflate_some(&mut self) {
        let pages = self.random.some_of(&self.balloon);
        self.balloon.retain(|page| !pages.contains(page));
        self.send(DEFLATE, pages);
    }

    pub(crate) fn send(&mut self, queue: usize, pages: BTreeSet<u64>) {
        let used = |slot: &u64| self.in_flight.iter().any(|q| q.values().any(|m| m.slot == *slot));
        let slot = (0..SLOTS).find(|slot| !used(slot));
        let Some(slot) = slot.filter(|_| !pages.is_empty()) else {
            self.balloon.extend(if queue == DEFLATE { pages } else { BTreeSet::new() });
            return;
        };
        let bytes = self.vm.name_pages(&pages);
        let (at, status) = (MESSAGE + slot * SLOT_BYTES, STATUSES + slot * 4);
        self.vm.guest.write(at, &bytes);
        let mut buffers = vec![Buffer::readable(at, bytes.len() as u32)];
        if self.features.contains(Features::PAGE_BITMAP) {
            self.vm.guest.write(status, &[0xff; 4]);
            buffers.push(Buffer::writable(status, 4));
        }
        let head = self.vm.rings[queue].send(&self.vm.guest.memory, &buffers);
        let before = self.in_flight[queue].insert(u32::from(head), Message { slot, pages });
        assert!(before.is_none(), "the ring is too small for this test");
        self.messages += 1;
        self.vm.kick(queue);
    }

    fn wait_for_requests(&mut self) {
        if self.waiting.len() < 3 {
            let at = REQUESTS + 64 * (self.messages % 64);
            let buffers = [Buffer::writable(at, 16)];
            let head = self.vm.rings[REQUEST].send(&self.vm.guest.memory, &buffers);
            assert!(self.waiting.insert(u32::from(head)), "the ring is too small for this test");
            self.vm.kick(REQUEST);
        }
    }

    /// Reports the balloon size, and sometimes waits until the back end has received it.
    fn report_size(&mut self) {
        let actual = self.balloon.len() as u32;
        let data = [[4u32, 4, 0].map(u32::to_ne_bytes).concat(), actual.to_le_bytes().to_vec()];
        if self.vm.front.try_send(request::SET_CONFIG, &data.concat(), &[]) {
            self.reported.insert(actual);
            if self.random.below(2) == 0
                && self.vm.front.try_send(request::GET_FEATURES, &[], &[])
                && self.vm.front.try_reply(request::GET_FEATURES).is_ok()
            {
                self.reported = BTreeSet::from([actual]);
            }
        }
    }

    /// Takes returned buffers and checks that each was in flight exactly once.
    pub(crate) fn collect(&mut self) {
        for queue in [INFLATE, DEFLATE] {
            while let Some(used) = self.vm.rings[queue].take_used(&self.vm.guest.memory) {
                let message = self.in_flight[queue].remove(&used.head);
                let message = message.expect("a message was returned twice, or was never sent");
                if self.features.contains(Features::PAGE_BITMAP) {
                    let at = GuestAddress(STATUSES + message.slot * 4);
                    let status: u32 = self.vm.guest.memory.read_obj(at).unwrap();
                    assert_eq!((status, used.written_bytes), (0, 4));
                }
                if queue == INFLATE {
                    self.balloon.extend(message.pages);
                } else {
                    // The guest owns the pages again and uses them immediately.
                    self.vm.guest.write_patterns(message.pages);
                }
            }
        }
        if self.queues() > REQUEST {
            while let Some(used) = self.vm.rings[REQUEST].take_used(&self.vm.guest.memory) {
                assert!(self.waiting.remove(&used.head), "a pending chain was returned twice");
                assert_eq!(used.written_bytes, 0, "no request was made");
            }
        }
    }

    /// Waits until all messages in flight are returned.
    pub(crate) fn wait_returned(&mut self) {
        let end = Instant::now() + TEST_TIMEOUT;
        while self.in_flight.iter().any(|queue| !queue.is_empty()) {
            self.collect();
            let lost = self.in_flight.iter().map(BTreeMap::len).sum::<usize>();
            assert!(Instant::now() < end, "{lost} messages were lost");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Stops the virtqueues and checks that every pending chain is returned.
    pub(crate) fn stop(&mut self) {
        for index in (0..self.queues() as u32).rev() {
            self.vm.front.send_state(request::SET_VRING_ENABLE, index, 0);
        }
        self.vm.front.barrier();
        self.collect();
        assert!(self.waiting.is_empty(), "pending chains were lost: {:?}", self.waiting);
    }

    /// Checks that no page owned by the guest lost its contents.
    pub(crate) fn verify(&self) {
        let unowned: BTreeSet<u64> = self
            .in_flight
            .iter()
            .flat_map(|queue| queue.values().flat_map(|message| &message.pages))
            .chain(&self.balloon)
            .copied()
            .collect();
        for page in data_pages().filter(|page| !unowned.contains(page)) {
            assert!(self.vm.guest.has_pattern(page), "page {page:#x} lost its contents");
        }
    }
}

/// xorshift64: the same sequence in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Returns a run of `from` and some single elements.
    fn some_of(&mut self, from: &BTreeSet<u64>) -> BTreeSet<u64> {
        let skip = self.below(from.len() as u64 + 1) as usize;
        let run = from.iter().skip(skip).take(self.below(60) as usize);
        let mut some: BTreeSet<u64> = run.copied().collect();
        some.extend(from.iter().filter(|_| self.next().is_multiple_of(64)));
        some
    }
}
