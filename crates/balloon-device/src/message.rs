//! One message: the device-readable bytes of a descriptor chain, copied once.

use balloon_abi::MessageStatus;
use balloon_abi::request::REQUEST_BYTES;
use balloon_abi::status::STATUS_BYTES;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::fault::Fault;

/// Length of a status in the used ring.
const WRITTEN: u32 = 4;
const _: () = assert!(WRITTEN as usize == STATUS_BYTES);

/// Most descriptors in a message. The specification allows as many as the vring has
/// entries, and Linux sets up vrings of 256 for a balloon. An indirect table could hold
/// 65535, and the device must walk each.
pub(crate) const MAX_DESCRIPTORS: usize = 1024;

/// The bytes of a message and the place of its answer.
#[derive(Debug, Default)]
pub(crate) struct Message {
    /// The readable bytes; the buffer is reused.
    bytes: Vec<u8>,
    /// First writable descriptor that fits a status.
    answer: Option<GuestAddress>,
    /// First writable descriptor that fits a request.
    request_at: Option<GuestAddress>,
}

impl Message {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Address at which a request may be written.
    pub(crate) const fn request_at(&self) -> Option<GuestAddress> {
        self.request_at
    }

    /// Copies the readable part of `chain`, at most `limit` bytes. Records the place for an
    /// answer even if it fails.
    ///
    /// If memory disappears during a read, every later access fails, but this read may have
    /// returned anything. So this checks the last address again at the end.
    ///
    /// The last descriptor of a truncated chain (a loop, a missing next descriptor or
    /// table, too many descriptors) has the `NEXT` flag.
    pub(crate) fn read<M: GuestMemory>(
        &mut self,
        chain: DescriptorChain<&M>,
        memory: &M,
        limit: usize,
    ) -> Result<(), Fault> {
        self.bytes.clear();
        self.answer = None;
        self.request_at = None;
        let mut outcome = Ok(());
        let mut truncated = false;
        let mut last = None;
        for descriptor in chain.take(MAX_DESCRIPTORS) {
            truncated = descriptor.has_next();
            let len = descriptor.len() as usize;
            if descriptor.is_write_only() {
                if self.answer.is_none() && len >= STATUS_BYTES {
                    self.answer = Some(descriptor.addr());
                }
                if self.request_at.is_none() && len >= REQUEST_BYTES {
                    self.request_at = Some(descriptor.addr());
                }
            } else if outcome.is_ok() {
                outcome = self.append(memory, descriptor.addr(), len, limit);
                last = if len > 0 { Some(descriptor.addr()) } else { last };
            }
        }
        outcome?;
        let gone = last.is_some_and(|at| !memory.check_range(at, 1, Permissions::Read));
        if truncated || gone {
            return Err(Fault::BadDescriptor);
        }
        if self.bytes.is_empty() { Err(Fault::EmptyMessage) } else { Ok(()) }
    }

    /// Writes the status to the driver's buffer, if it provided one inside of guest
    /// memory. Returns the bytes written.
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
