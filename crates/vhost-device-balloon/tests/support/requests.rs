//! The driver's side of the request queue.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use balloon_abi::request::{ANSWER_HEADER_BYTES, REQUEST_BYTES};
use balloon_abi::{AnswerHeader, Outcome, Pfn, Request, record};
use control::{BalloonControl, ControlError, GuestAnswer, GuestErrorKind, GuestRequest};
use guest_ring::Buffer;
use vm_memory::{Bytes, GuestAddress};

use super::TEST_TIMEOUT;
use super::driver::{MESSAGE, REQUEST, Vm, is_readable};
use super::guest::{BASE, PAGE};

/// Buffers for requests: one slot for each descriptor.
const SLOTS: u64 = BASE + 0x38000;
const SLOT_BYTES: u64 = 64;
/// Buffer for the status of answers.
const STATUS: u64 = BASE + 0x3e000;

/// A chain that was returned on the request queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Returned {
    /// A waiting chain with a request in it.
    Request(Request),
    /// A waiting chain, unused.
    Empty,
    /// An answer, with its status.
    Status(u32),
}

impl Vm {
    /// Posts waiting chains.
    pub(crate) fn wait_for_requests(&mut self, count: usize) {
        for _ in 0..count {
            let slot = SLOTS + u64::from(self.next_slot()) * SLOT_BYTES;
            let buffers = [Buffer::writable(slot, REQUEST_BYTES as u32)];
            self.rings[REQUEST].send(&self.guest.memory, &buffers);
        }
        self.kick(REQUEST);
    }

    /// Descriptors are used round robin, and no test is more than one chain
    /// of two ahead, so a slot is free when it is used again.
    fn next_slot(&self) -> u16 {
        self.rings[REQUEST].next_slot() % 256
    }

    /// Returns the next chain that is returned within `time`.
    pub(crate) fn returned_within(&mut self, time: Duration) -> Option<Returned> {
        loop {
            if let Some(used) = self.rings[REQUEST].take_used(&self.guest.memory) {
                return Some(self.read_returned(used));
            }
            if !is_readable(&self.calls[REQUEST], time) {
                return None;
            }
            rustix::io::read(&self.calls[REQUEST], &mut [0; 8]).unwrap();
        }
    }

    pub(crate) fn returned(&mut self) -> Returned {
        self.returned_within(TEST_TIMEOUT).expect("a chain is returned")
    }

    fn read_returned(&self, used: guest_ring::Used) -> Returned {
        match used.written_bytes {
            0 => Returned::Empty,
            4 => {
                let raw: u32 = self.guest.memory.read_obj(GuestAddress(STATUS)).unwrap();
                Returned::Status(u32::from_le(raw))
            }
            16 => {
                let mut bytes = [0; REQUEST_BYTES];
                let at = SLOTS + u64::from(used.head) * SLOT_BYTES;
                self.guest.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
                Returned::Request(Request::from_bytes(&bytes).expect("a request of the protocol"))
            }
            other => panic!("{other} bytes in a chain of the request queue"),
        }
    }

    /// Returns the next request; any other chain is a failure.
    pub(crate) fn next_request(&mut self) -> Request {
        match self.returned() {
            Returned::Request(request) => request,
            other => panic!("{other:?} where a request should be"),
        }
    }

    /// Posts an answer of raw bytes and waits for its status.
    pub(crate) fn answer_raw(&mut self, bytes: &[u8]) -> u32 {
        self.guest.write(MESSAGE, bytes);
        let len = bytes.len() as u32;
        let buffers = [Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4)];
        self.rings[REQUEST].send(&self.guest.memory, &buffers);
        self.kick(REQUEST);
        match self.returned() {
            Returned::Status(status) => status,
            other => panic!("{other:?} where a status should be"),
        }
    }

    pub(crate) fn answer(
        &mut self,
        id: u32,
        outcome: Outcome,
        values: [u64; 4],
        records: &[u8],
    ) -> u32 {
        self.answer_raw(&answer_bytes(id, outcome, values, records))
    }
}

pub(crate) fn answer_bytes(id: u32, outcome: Outcome, values: [u64; 4], records: &[u8]) -> Vec<u8> {
    let header = AnswerHeader { id, outcome, elapsed_ns: 1_500_000, values };
    let mut bytes = Vec::with_capacity(ANSWER_HEADER_BYTES + records.len());
    bytes.extend(header.to_bytes());
    bytes.extend(records);
    bytes
}

/// Encodes one record: the bits of `words` from page `start` on, in blocks of `pages`.
pub(crate) fn blocks(start: u64, pages: u64, words: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; 8 * (words.len() + 1)];
    let shift = (pages * PAGE).ilog2();
    let len = record::encode(&mut bytes, Pfn(start), shift, words).unwrap().unwrap();
    bytes.truncate(len);
    bytes
}

/// An operator who waits for an answer.
pub(crate) type Operator = JoinHandle<Result<GuestAnswer, ControlError>>;

/// Submits a request and waits in a new thread, like the server.
pub(crate) fn ask(
    balloon: &Arc<dyn BalloonControl>,
    ask: GuestRequest,
    timeout: Duration,
) -> Operator {
    let balloon = Arc::clone(balloon);
    thread::spawn(move || {
        let id = balloon.submit(ask, timeout)?;
        balloon.wait_request(id, 2 * TEST_TIMEOUT).expect("a request ends before the timeout")
    })
}

/// Returns the reason and the text of a failed request.
pub(crate) fn why(outcome: Result<GuestAnswer, ControlError>) -> (GuestErrorKind, String) {
    match outcome {
        Err(ControlError::Guest { why, what, .. }) => (why, what),
        other => panic!("not a failure of the guest: {other:?}"),
    }
}
