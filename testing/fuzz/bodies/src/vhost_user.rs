//! The vhost-user loop: a front end that sends anything and disconnects anywhere.
//!
//! All messages of a front end and its disconnect are in the socket before the loop starts. So one
//! thread suffices, and an input is deterministic.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use control::api::{PartialHuge, ReleaseMode};
use guest_ring::{Buffer, GuestRing};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_device_balloon::{Backend, End};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::script::Script;

/// The file behind guest memory is larger than the shared region. The bytes around the region must
/// not change.
const GUARD: usize = 0x4000;
const GUARD_BYTES: u64 = GUARD as u64;
const GUEST: usize = 0x10_0000;
const GUEST_BYTES: u64 = GUEST as u64;
const GUEST_AT: u64 = 0x1000_0000;
/// The front end's mapping address of guest memory.
const USER_AT: u64 = 0x7f00_0000_0000;
/// Vrings of the two queues, and the messages.
const RINGS: [u64; 2] = [GUEST_AT, GUEST_AT + 0x1000];
const RING_SIZE: u16 = 16;
const MESSAGES: u64 = GUEST_AT + 0x4000;
const MESSAGES_END: u64 = GUEST_AT + 0x8000;
/// A page that a valid guest inflates.
const HONEST_PAGE: u64 = (GUEST_AT + GUEST_BYTES) / 4096 - 1;

/// Maximum steps of a script, and bytes that they may send: less than a socket buffer, so that
/// sending never blocks.
const MAX_STEPS: usize = 64;
const MAX_SENT_BYTES: usize = 0x8000;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PAGE_BITMAP: u64 = 1 << 60;
/// `CONFIG` and `BACKEND_REQ`.
const CONFIG_AND_CHANNEL: u64 = 1 << 9 | 1 << 5;

/// Request numbers of the vhost-user protocol.
mod request {
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_OWNER: u32 = 3;
    pub(super) const RESET_OWNER: u32 = 4;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(super) const GET_CONFIG: u32 = 24;
    pub(super) const SET_CONFIG: u32 = 25;
}

/// Sessions of a hostile front end, then one of a valid front end.
///
/// # Panics
/// An invariant does not hold.
pub fn vhost_user(data: &[u8]) {
    let mut script = Script::new(data);
    let release =
        script.pick([ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage]);
    let partial = script.pick([PartialHuge::Wait, PartialHuge::Split]);
    let backend = Backend::new("fuzz", release, partial).expect("the host has resources");
    let hangs_up = script.flag();
    let _ = backend.balloon().set_target(u32::from(script.u16()));

    let mut front_end = FrontEnd::new();
    for _ in 0..MAX_STEPS {
        if script.is_over() || front_end.sent > MAX_SENT_BYTES {
            break;
        }
        front_end.step(&mut script);
    }
    front_end.serve(&backend, hangs_up);
    let _ = backend.balloon().status();

    honest(&backend, release);
}

/// After any script, a valid front end is served.
fn honest(backend: &Backend, release: ReleaseMode) {
    let mut front_end = FrontEnd::new();
    let page = GuestAddress(HONEST_PAGE * 4096);
    front_end.memory.write_obj(7u64, page).expect("memory");
    front_end.add_message(0, &(HONEST_PAGE | 12 << 52).to_le_bytes());
    front_end.set_up(PAGE_BITMAP | VERSION_1 | PROTOCOL_FEATURES | 1);
    let outcome = front_end.serve(backend, false);
    assert!(matches!(outcome, Some(End::HungUp)), "a valid front end is not served");
    // In the background the page may be released or not. Nothing else may change it.
    let left: u64 = front_end.memory.read_obj(page).expect("memory");
    assert!(left == 0 || (left == 7 && release == ReleaseMode::Background), "{left}");
}

struct FrontEnd {
    socket: UnixStream,
    peer: UnixStream,
    sent: usize,
    file: File,
    memory: GuestMemoryMmap,
    rings: [GuestRing; 2],
    messages: u64,
    /// Kept open, so that the back end's ends are not disconnected.
    fds: Vec<OwnedFd>,
    /// Whether the back end has mapped exactly the guest's part of the file.
    offer_is_true: bool,
}

impl FrontEnd {
    fn new() -> Self {
        let (socket, peer) = UnixStream::pair().expect("a socket pair");
        socket.set_nonblocking(true).expect("a socket");
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(GUEST_BYTES + 2 * GUARD_BYTES).expect("memory");
        for at in guards() {
            file.write_all_at(&[0x5a; GUARD], at).expect("memory");
        }
        let offset = FileOffset::new(file.try_clone().expect("a descriptor"), GUARD_BYTES);
        let range = (GuestAddress(GUEST_AT), GUEST, Some(offset));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("memory");
        let rings = RINGS.map(|at| GuestRing::new(at, RING_SIZE));
        Self {
            socket,
            peer,
            sent: 0,
            file,
            memory,
            rings,
            messages: MESSAGES,
            fds: Vec::new(),
            offer_is_true: true,
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.u8() % 14 {
            0 => self.set_up(features(script)),
            1 => {
                let features = features(script);
                self.send(request::SET_FEATURES, &[features], &[]);
            }
            2 => self.mem_table(script),
            3..=5 => self.vring(script),
            6 => {
                let message = script.string();
                self.add_message(usize::from(script.u8() % 2), message);
            }
            7 => {
                let record = script.record(HONEST_PAGE + 2);
                // Mostly in guest memory: above `GUEST_AT`.
                let word = u64::from_le_bytes(record[..8].try_into().expect("a header"));
                let mut message = word.wrapping_add(GUEST_AT / 4096).to_le_bytes().to_vec();
                message.extend(&record[8..]);
                self.add_message(usize::from(script.u8() % 2), &message);
            }
            8 => self.config(script),
            9 => {
                let (mine, theirs) = UnixStream::pair().expect("a socket pair");
                if script.flag() {
                    self.fds.push(mine.into());
                }
                self.send(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
            }
            10 => self.send(request::RESET_OWNER, &[], &[]),
            11 => self.any_message(script),
            12 => {
                // After this, a file may arrive with another table than intended.
                self.offer_is_true = false;
                let bytes = script.string();
                self.raw(bytes);
            }
            _ => {
                let index = usize::from(script.u8() % 2);
                self.rings[index].publish(&self.memory, u16::from(script.u8()));
            }
        }
    }

    /// Sends all setup messages of a valid front end.
    fn set_up(&mut self, features: u64) {
        self.send(request::SET_OWNER, &[], &[]);
        self.send(request::SET_FEATURES, &[features], &[]);
        self.send(request::SET_PROTOCOL_FEATURES, &[CONFIG_AND_CHANNEL], &[]);
        self.send_table([GUEST_AT, GUEST_BYTES, USER_AT, GUARD_BYTES], 1, 1);
        for index in 0..2 {
            for what in 0..6 {
                self.vring_message(what, index, 0);
            }
        }
    }

    fn send_table(&mut self, region: [u64; 4], count: usize, fds: usize) {
        let mut payload = vec![count as u64];
        (0..count).for_each(|_| payload.extend(region));
        let file = self.file.try_clone().expect("a descriptor");
        self.send(request::SET_MEM_TABLE, &payload, &vec![file.as_fd(); fds]);
    }

    /// Sends a memory table with at most one wrong field.
    fn mem_table(&mut self, script: &mut Script<'_>) {
        let mut region = [GUEST_AT, GUEST_BYTES, USER_AT, GUARD_BYTES];
        let (field, by) = (usize::from(script.u8() % 8), script.u64_up_to(1 << 16));
        let wrong = script.pick([by << 12, by, by.wrapping_neg(), u64::MAX - by]);
        if let Some(field) = region.get_mut(field) {
            *field = field.wrapping_add(wrong);
            self.offer_is_true &= wrong == 0;
        }
        let (count, fds) =
            script.pick([(1, 1), (1, 1), (1, 1), (2, 2), (1, 0), (0, 0), (1, 2), (9, 1)]);
        self.send_table(region, count, fds);
    }

    fn vring(&mut self, script: &mut Script<'_>) {
        let what = script.u8() % 7;
        let index = script.pick([0, 1, 2, 5, 6, 255, u32::MAX]);
        self.vring_message(what, index, script.u64_up_to(1));
    }

    /// Sends one message about queue `index`. `wrong` is zero for a valid one.
    fn vring_message(&mut self, what: u8, index: u32, wrong: u64) {
        let low = |value: u64| u64::from(index) | value << 32;
        let ring = &self.rings[index as usize % 2];
        let user = |guest: u64| USER_AT.wrapping_add(guest - GUEST_AT).wrapping_add(wrong);
        let places = [user(ring.table()), user(ring.used()), user(ring.avail())];
        let size = u64::from(RING_SIZE);
        match what {
            0 => self.send(request::SET_VRING_NUM, &[low(size.wrapping_add(wrong))], &[]),
            1 => self.send(request::SET_VRING_BASE, &[low(wrong)], &[]),
            2 => {
                let payload = [low(0), places[0], places[1], places[2], 0];
                self.send(request::SET_VRING_ADDR, &payload, &[]);
            }
            3 | 4 => {
                let kick = what == 3;
                let code = if kick { request::SET_VRING_KICK } else { request::SET_VRING_CALL };
                let fd = eventfd(u32::from(kick), EventfdFlags::CLOEXEC).expect("an eventfd");
                self.send(code, &[u64::from(index) | wrong], &[fd.as_fd()]);
                self.fds.push(fd);
            }
            5 => self.send(request::SET_VRING_ENABLE, &[low(1 ^ wrong)], &[]),
            _ => self.send(request::GET_VRING_BASE, &[low(0)], &[]),
        }
    }

    fn config(&mut self, script: &mut Script<'_>) {
        let (offset, size) =
            (script.pick([0, 4, 8, 12, 16, 255, 256, u64::MAX]), script.u64_up_to(300));
        let data = script.string();
        let code = script.pick([request::GET_CONFIG, request::SET_CONFIG]);
        let mut payload: Vec<u8> =
            [offset, size, 0].map(u64::to_le_bytes).map(|b| [b[0], b[1], b[2], b[3]]).concat();
        payload.extend(data);
        self.message(code, 1, payload.len(), &payload, &[]);
    }

    /// Sends any request with any file descriptors.
    fn any_message(&mut self, script: &mut Script<'_>) {
        let code = u32::from(script.u8()) % 48;
        let flags = script.pick([1, 1, 1, 9, 5, 0, 2, 3, u32::MAX]);
        let payload = script.string();
        let size = script.pick([payload.len(), payload.len(), 0, 1, 4096, 4097, 0xffff_ffff]);
        self.offer_is_true &= size == payload.len();
        let (read, write) = std::io::pipe().expect("a pipe");
        let event = eventfd(1, EventfdFlags::CLOEXEC).expect("an eventfd");
        let mut fds = Vec::new();
        for _ in 0..script.pick([0, 1, 0, 1, 2, 8, 33, 60]) {
            let kinds =
                [event.as_fd(), read.as_fd(), self.file.as_fd(), self.peer.as_fd(), write.as_fd()];
            // A file sent this way may be mapped completely.
            let kind = usize::from(script.u8()) % kinds.len();
            self.offer_is_true &= kind != 2;
            fds.push(kinds[kind].try_clone_to_owned().expect("a descriptor"));
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.message(code, flags, size, payload, &fds);
    }

    /// Adds a message to the device in guest memory, in a chain with a status.
    fn add_message(&mut self, index: usize, bytes: &[u8]) {
        if self.messages + bytes.len() as u64 > MESSAGES_END {
            self.messages = MESSAGES;
        }
        let at = self.messages;
        self.messages += bytes.len() as u64;
        self.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
        let len = u32::try_from(bytes.len()).expect("short");
        let chain = [Buffer::readable(at, len), Buffer::writable(MESSAGES_END, 4)];
        self.rings[index].send(&self.memory, &chain);
    }

    fn send(&mut self, code: u32, payload: &[u64], fds: &[BorrowedFd<'_>]) {
        let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.message(code, 1, payload.len(), &payload, fds);
    }

    fn message(
        &mut self,
        code: u32,
        flags: u32,
        size: usize,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let header = [code, flags, size].map(u32::to_ne_bytes).concat();
        let mut space = vec![MaybeUninit::uninit(); 4096];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        // A full socket counts as a disconnect.
        let _ = sendmsg(&self.socket, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL);
        self.raw(payload);
        self.sent += header.len();
    }

    fn raw(&mut self, bytes: &[u8]) {
        let _ = (&self.socket).write_all(bytes);
        self.sent += bytes.len();
    }

    /// Serves all messages. Returns `None` if the session ended through the front end's fault.
    fn serve(&mut self, backend: &Backend, hangs_up: bool) -> Option<End> {
        let how = if hangs_up { Shutdown::Both } else { Shutdown::Write };
        self.socket.shutdown(how).expect("a socket");
        let (stop, _never) = UnixStream::pair().expect("a socket pair");
        let outcome = backend.serve(&self.peer, &stop).ok();
        if self.offer_is_true {
            for at in guards() {
                let mut guard = [0; GUARD];
                self.file.read_exact_at(&mut guard, at).expect("memory");
                assert!(
                    guard.iter().all(|byte| *byte == 0x5a),
                    "memory outside of the shared region changed"
                );
            }
        }
        outcome
    }
}

fn guards() -> [u64; 2] {
    [0, GUARD_BYTES + GUEST_BYTES]
}

fn features(script: &mut Script<'_>) -> u64 {
    let base = VERSION_1 | PROTOCOL_FEATURES;
    // Bits 0 to 5 are the specification's.
    let all = base | PAGE_BITMAP | 1 << 29 | 1 << 28 | 0b11_1111;
    script.pick([base | PAGE_BITMAP | 1, base | 1, base, all, VERSION_1 | 1, 0, u64::MAX])
}
