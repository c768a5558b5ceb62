//! One message: the readable bytes of a descriptor chain, copied once.

use balloon_abi::MessageStatus;
use balloon_abi::request::REQUEST_BYTES;
use balloon_abi::status::STATUS_BYTES;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::fault::Fault;

/// What a written status counts as in the used ring.
const WRITTEN: u32 = 4;
const _: () = assert!(WRITTEN as usize == STATUS_BYTES);

/// Descriptors that a message may have. The specification allows as many as the
/// ring has entries, and Linux sets up rings of 256 for a balloon; an indirect
/// table could hold 65535, each of which costs the device a look.
pub(crate) const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of a message and where its answer goes.
#[derive(Debug, Default)]
pub(crate) struct Message {
    /// The readable bytes; the buffer is kept from message to message.
    bytes: Vec<u8>,
    /// First writable descriptor with room for a status.
    answer: Option<GuestAddress>,
    /// First writable descriptor with room for a request.
    request_room: Option<GuestAddress>,
}

impl Message {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where a request may be written.
    pub(crate) const fn request_room(&self) -> Option<GuestAddress> {
        self.request_room
    }

    /// Copies the readable part of `chain`, at most `limit` bytes. Where it
    /// fails the place for an answer is still known.
    ///
    /// Memory that turns out to be gone while it is read fails from then on, so it is
    /// asked for once more at the end: what was read last may be anything.
    ///
    /// A chain that breaks off (a loop, a next descriptor or a table that is not
    /// there, too many descriptors) ends with one that says another follows.
    pub(crate) fn read<M: GuestMemory>(
        &mut self,
        chain: DescriptorChain<&M>,
        memory: &M,
        limit: usize,
    ) -> Result<(), Fault> {
        self.bytes.clear();
        self.answer = None;
        self.request_room = None;
        let mut outcome = Ok(());
        let mut broken_off = false;
        let mut last = None;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            broken_off = descriptor.has_next();
            let len = descriptor.len() as usize;
            if descriptor.is_write_only() {
                if self.answer.is_none() && len >= STATUS_BYTES {
                    self.answer = Some(descriptor.addr());
                }
                if self.request_room.is_none() && len >= REQUEST_BYTES {
                    self.request_room = Some(descriptor.addr());
                }
            } else if outcome.is_ok() {
                outcome = self.append(memory, descriptor.addr(), len, limit);
                last = if len > 0 { Some(descriptor.addr()) } else { last };
            }
        }
        outcome?;
        let gone = last.is_some_and(|at| !memory.check_range(at, 1, Permissions::Read));
        if broken_off || gone {
            return Err(Fault::BadDescriptor);
        }
        if self.bytes.is_empty() { Err(Fault::EmptyMessage) } else { Ok(()) }
    }

    /// Writes the status where the driver left room for it; returns the bytes
    /// written. A driver that named an address outside of memory gets none.
    pub(crate) fn answer(&self, memory: &impl GuestMemory, status: MessageStatus) -> u32 {
        match self.answer {
            Some(at) if memory.write_slice(&status.to_bytes(), at).is_ok() => WRITTEN,
            _ => 0,
        }
    }

    fn append(
        &mut self,
        memory: &impl GuestMemory,
        from: GuestAddress,
        len: usize,
        limit: usize,
    ) -> Result<(), Fault> {
        let start = self.bytes.len();
        if len > limit - start {
            return Err(Fault::OversizedMessage);
        }
        self.bytes.resize(start + len, 0);
        memory.read_slice(&mut self.bytes[start..], from).map_err(|_| Fault::BadDescriptor)
    }
}
