//! A guest and its driver behind a front end: sets up the device like real VMMs, and
//! sends messages in both formats.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};

use balloon_abi::{Features, Pfn, QueueLayout, record};
use guest_ring::{Buffer, GuestRing};
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};

use super::TEST_TIMEOUT;
use super::front_end::{
    FrontEnd, OFFERED_PROTOCOL, PROTOCOL_FEATURES, eventfd, longs, request, words,
};
use super::guest::{BASE, BYTES, FIRST_PAGE, Guest, PAGE, USER_BASE};

pub(crate) const INFLATE: usize = 0;
pub(crate) const DEFLATE: usize = 1;
/// If no other feature with a queue is negotiated.
pub(crate) const REQUEST: usize = 2;

pub(crate) const RING_SIZE: u16 = 256;
/// Each vring has its own pages: the last one 8, the others 16.
const RINGS: [u64; 3] = [BASE, BASE + 0x10000, BASE + 0x30000];
/// Messages, of up to 64 KiB.
pub(crate) const MESSAGE: u64 = BASE + 0x20000;
/// The device's status.
const STATUS: u64 = BASE + 0x3f000;

pub(crate) const CLASSIC: Features = Features::VERSION_1.union(Features::MUST_TELL_HOST);
pub(crate) const BITMAP: Features = CLASSIC.union(Features::PAGE_BITMAP);
/// A driver that answers requests.
pub(crate) const WITH_REQUESTS: Features = BITMAP.union(Features::REQUEST_VQ);
/// A driver without `MUST_TELL_HOST`.
pub(crate) const NO_TELL_HOST: Features = Features::VERSION_1;

/// The VMM whose message order is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    Uml,
    Qemu,
}

/// A guest with a running driver.
pub(crate) struct Vm {
    pub(crate) vmm: Vmm,
    pub(crate) guest: Guest,
    pub(crate) front: FrontEnd,
    pub(crate) features: Features,
    pub(crate) rings: [GuestRing; 3],
    pub(crate) kicks: [OwnedFd; 3],
    pub(crate) calls: [OwnedFd; 3],
    pub(crate) channel: Option<UnixStream>,
}

impl Vm {
    /// Creates a guest behind a front end that has sent no message.
    pub(crate) fn new(vmm: Vmm, front: FrontEnd, guest: Guest) -> Self {
        Self {
            vmm,
            guest,
            front,
            features: Features::NONE,
            rings: RINGS.map(|at| GuestRing::new(at, RING_SIZE)),
            kicks: std::array::from_fn(|_| eventfd()),
            calls: std::array::from_fn(|_| eventfd()),
            channel: None,
        }
    }

    /// Boots a guest until its driver runs.
    pub(crate) fn boot(vmm: Vmm, front: FrontEnd, features: Features) -> Self {
        let mut vm = Self::new(vmm, front, Guest::new());
        vm.attach();
        vm.probe(features);
        vm
    }

    /// Attaches the front end to the device, before any driver.
    pub(crate) fn attach(&mut self) {
        match self.vmm {
            Vmm::Uml => self.attach_uml(),
            Vmm::Qemu => self.attach_qemu(),
        }
    }

    /// Starts a driver.
    pub(crate) fn probe(&mut self, features: Features) {
        match self.vmm {
            Vmm::Uml => self.probe_uml(features, true),
            Vmm::Qemu => self.start_qemu(features, [0; 2]),
        }
    }

    /// Like `vhost_user_init` of virtio_uml.c.
    fn attach_uml(&mut self) {
        self.front.send(request::SET_OWNER, &[], &[]);
        assert_ne!(self.front.request_u64(request::GET_FEATURES) & PROTOCOL_FEATURES, 0);
        let protocol = self.front.request_u64(request::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol, OFFERED_PROTOCOL);
        self.front.send_u64(request::SET_PROTOCOL_FEATURES, protocol);
        self.send_channel();
    }

    /// Like `vu_finalize_features` and `vu_find_vqs`, with bit 30 in the features
    /// or, in a second negotiation, without it.
    pub(crate) fn probe_uml(&mut self, features: Features, enable: bool) {
        let protocol = if enable { PROTOCOL_FEATURES } else { 0 };
        self.front.send_u64(request::SET_FEATURES, features.0 | protocol);
        self.features = features;
        self.send_memory(BASE, 2);
        self.reset_rings();
        for index in 0..self.queue_count() {
            // A socket pair, since an eventfd has no SIGIO.
            let (read, write) = UnixStream::pair().unwrap();
            self.front.send_fd(request::SET_VRING_CALL, index as u64, write);
            self.calls[index] = read.into();
            self.kicks[index] = eventfd();
            self.send_ring(index, BASE, 0);
        }
        for index in 0..self.queue_count() {
            self.front.send_fd(request::SET_VRING_KICK, index as u64, &self.kicks[index]);
            if enable {
                self.front.send_state(request::SET_VRING_ENABLE, index as u32, 1);
            }
        }
    }

    /// Like `vu_del_vqs`: disables the queues in reverse, then waits for a reply.
    pub(crate) fn remove_uml(&self, enable: bool) {
        if enable {
            for index in (0..self.queue_count()).rev() {
                self.front.send_state(request::SET_VRING_ENABLE, index as u32, 0);
            }
        }
        self.front.barrier();
    }

    /// Like `vhost_user_backend_init` and `vhost_dev_init` of QEMU: sends call files long
    /// before the features.
    fn attach_qemu(&mut self) {
        let features = self.front.request_u64(request::GET_FEATURES);
        assert_ne!(features & PROTOCOL_FEATURES, 0);
        let protocol = self.front.request_u64(request::GET_PROTOCOL_FEATURES);
        self.front.send_u64(request::SET_PROTOCOL_FEATURES, protocol & OFFERED_PROTOCOL);
        assert!(self.front.request_u64(request::GET_QUEUE_NUM) >= 2);
        self.send_channel();
        self.front.send(request::SET_OWNER, &[], &[]);
        assert_eq!(self.front.request_u64(request::GET_FEATURES), features);
        for index in 0..RINGS.len() {
            self.calls[index] = eventfd();
            self.front.send_fd(request::SET_VRING_CALL, index as u64, &self.calls[index]);
            self.front.send_fd(request::SET_VRING_ERR, index as u64, eventfd());
        }
        assert_eq!(self.front.read_config(16).len(), 16);
    }

    /// Like `vhost_dev_start`.
    pub(crate) fn start_qemu(&mut self, features: Features, bases: [u32; 2]) {
        self.front.send_u64(request::SET_FEATURES, features.0 | PROTOCOL_FEATURES);
        self.features = features;
        self.send_memory(USER_BASE, 1);
        if bases == [0; 2] {
            self.reset_rings();
        }
        for index in 0..self.queue_count() {
            let base = bases.get(index).copied().unwrap_or_else(|| self.request_base(bases));
            self.send_ring(index, USER_BASE, base);
            self.kicks[index] = eventfd();
            self.front.send_fd(request::SET_VRING_KICK, index as u64, &self.kicks[index]);
        }
        for index in 0..self.queue_count() {
            self.front.send_state(request::SET_VRING_ENABLE, index as u32, 1);
        }
    }

    /// Like `vhost_dev_stop`; returns the vrings' bases.
    pub(crate) fn stop_qemu(&self) -> [u32; 2] {
        for index in 0..self.queue_count() {
            self.front.send_state(request::SET_VRING_ENABLE, index as u32, 0);
        }
        if self.queue_count() > REQUEST {
            self.stop_ring(REQUEST as u32);
        }
        [0, 1].map(|index| self.stop_ring(index))
    }

    /// Queues that a driver with these features sets up.
    fn queue_count(&self) -> usize {
        QueueLayout::new(self.features).queues().count()
    }

    /// The base of the request queue, if the others have `bases`.
    fn request_base(&self, bases: [u32; 2]) -> u32 {
        if bases == [0; 2] { 0 } else { u32::from(self.rings[REQUEST].avail_idx()) }
    }

    pub(crate) fn stop_ring(&self, index: u32) -> u32 {
        self.front.send_state(request::GET_VRING_BASE, index, 0);
        let answer = self.front.reply(request::GET_VRING_BASE);
        let (words, _) = answer.as_chunks::<4>();
        assert_eq!(u32::from_ne_bytes(words[0]), index);
        u32::from_ne_bytes(words[1])
    }

    pub(crate) fn send_channel(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.front.send(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        self.channel = Some(ours);
    }

    /// Sends the memory table, with space for `room` regions and one in it.
    pub(crate) fn send_memory(&self, user_base: u64, room: usize) {
        let region = [BASE, BYTES, user_base, self.guest.file_offset];
        let mut payload = mem_table(&[region]);
        payload.resize(8 + 32 * room, 0);
        self.front.send(request::SET_MEM_TABLE, &payload, &[self.guest.file.as_fd()]);
    }

    pub(crate) fn send_ring(&self, index: usize, user_base: u64, base: u32) {
        let queue = index as u32;
        self.front.send_state(request::SET_VRING_NUM, queue, u32::from(RING_SIZE));
        self.front.send_state(request::SET_VRING_BASE, queue, base);
        let ring = &self.rings[index];
        let user = |address: u64| address - BASE + user_base;
        let places = [user(ring.table()), user(ring.used()), user(ring.avail())];
        self.front.send(request::SET_VRING_ADDR, &vring_addr(queue, places), &[]);
    }

    pub(crate) fn reset_rings(&mut self) {
        for at in RINGS {
            self.guest.zero(at, GuestRing::bytes(RING_SIZE));
        }
        self.rings = RINGS.map(|at| GuestRing::new(at, RING_SIZE));
    }

    /// Puts a message on a queue without a kick.
    pub(crate) fn post(&mut self, queue: usize, bytes: &[u8]) -> u16 {
        self.guest.write(MESSAGE, bytes);
        let mut buffers = vec![Buffer::readable(MESSAGE, bytes.len() as u32)];
        if self.features.contains(Features::PAGE_BITMAP) {
            self.guest.write(STATUS, &[0xff; 4]);
            buffers.push(Buffer::writable(STATUS, 4));
        }
        let Self { rings, guest, .. } = self;
        if self.features.contains(Features::RING_EVENT_IDX) {
            // Request a notification of the next returned chain.
            let ring = &rings[queue];
            let at = ring.avail() + 4 + u64::from(ring.size()) * 2;
            let seen = ring.avail_idx();
            guest.memory.write_obj(seen.to_le(), GuestAddress(at)).unwrap();
            fence(Ordering::SeqCst);
        }
        rings[queue].send(&guest.memory, &buffers)
    }

    pub(crate) fn kick(&self, queue: usize) {
        rustix::io::write(&self.kicks[queue], &1u64.to_ne_bytes()).unwrap();
    }

    /// Waits until the device returns the next chain of a queue.
    pub(crate) fn wait_used(&mut self, queue: usize) -> u32 {
        loop {
            if let Some(used) = self.rings[queue].take_used(&self.guest.memory) {
                return used.head;
            }
            assert!(is_readable(&self.calls[queue], TEST_TIMEOUT), "a message was not returned");
            rustix::io::read(&self.calls[queue], &mut [0; 8]).unwrap();
        }
    }

    /// Sends a message and waits until it is returned. Returns the device's status if the
    /// format has one.
    pub(crate) fn transact(&mut self, queue: usize, bytes: &[u8]) -> Option<u32> {
        let head = self.post(queue, bytes);
        self.kick(queue);
        assert_eq!(self.wait_used(queue), u32::from(head));
        self.features.contains(Features::PAGE_BITMAP).then(|| {
            let raw: u32 = self.guest.memory.read_obj(GuestAddress(STATUS)).unwrap();
            u32::from_le(raw)
        })
    }

    /// Returns a message with these pages in the negotiated format.
    pub(crate) fn name_pages(&self, pages: &BTreeSet<u64>) -> Vec<u8> {
        if self.features.contains(Features::PAGE_BITMAP) {
            records(pages)
        } else {
            pages.iter().flat_map(|page| (*page as u32).to_le_bytes()).collect()
        }
    }

    pub(crate) fn inflate(&mut self, pages: &BTreeSet<u64>) {
        let message = self.name_pages(pages);
        assert_eq!(self.transact(INFLATE, &message).unwrap_or(0), 0);
    }

    pub(crate) fn deflate(&mut self, pages: &BTreeSet<u64>) {
        let message = self.name_pages(pages);
        assert_eq!(self.transact(DEFLATE, &message).unwrap_or(0), 0);
    }
}

pub(crate) fn is_readable(fd: impl AsFd, timeout: std::time::Duration) -> bool {
    let fd: BorrowedFd<'_> = fd.as_fd();
    let timeout = timeout.try_into().unwrap();
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Regions as (guest address, bytes, user address, file offset).
pub(crate) fn mem_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = words(&[u32::try_from(regions.len()).unwrap(), 0]);
    for region in regions {
        payload.extend(longs(region));
    }
    payload
}

/// Descriptor table, used ring, available ring; no log.
pub(crate) fn vring_addr(queue: u32, [table, used, avail]: [u64; 3]) -> Vec<u8> {
    [words(&[queue, 0]), longs(&[table, used, avail, u64::MAX])].concat()
}

/// Encodes pages as page-bitmap records of 4 KiB blocks.
fn records(pages: &BTreeSet<u64>) -> Vec<u8> {
    let mut bitmap = [0u64; super::guest::PAGES as usize / 64];
    for page in pages {
        let bit = page - FIRST_PAGE;
        bitmap[bit as usize / 64] |= 1 << (bit % 64);
    }
    let mut bytes = vec![0; 8 * (bitmap.len() + 1)];
    let len = record::encode(&mut bytes, Pfn(FIRST_PAGE), PAGE.ilog2(), &bitmap).unwrap().unwrap();
    bytes.truncate(len);
    bytes
}
