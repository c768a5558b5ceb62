//! The request queue: chains that wait for a request, and chains with an answer.

use balloon_abi::limits::MAX_MESSAGE_BYTES;
use page_set::PageSet;
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestMemory};

use crate::drain::{Drained, Handled, drain};
use crate::fault::{Fault, Faults};
use crate::layout::MemoryLayout;
use crate::message::Message;
use crate::pending::{NotPending, PendingChain, PendingChains};
use crate::request::GuestRequests;

/// Length of a request in the used ring.
const WRITTEN: u32 = 16;
const _: () = assert!(WRITTEN as usize == balloon_abi::request::REQUEST_BYTES);

/// The parts of the device that the request queue uses.
pub(crate) struct RequestQueue<'a> {
    pub(crate) requests: &'a mut GuestRequests,
    pub(crate) waiting: &'a mut PendingChains,
    pub(crate) message: &'a mut Message,
    pub(crate) faults: &'a mut Faults,
    pub(crate) layout: &'a MemoryLayout,
    /// Pages in the balloon.
    pub(crate) balloon: &'a PageSet,
}

impl RequestQueue<'_> {
    /// Takes all chains from the queue, then sends as many requests as waiting chains
    /// allow.
    pub(crate) fn process<M: GuestMemory>(
        &mut self,
        memory: &M,
        queue: &mut impl QueueT,
    ) -> Result<Drained, Error> {
        let limit = usize::from(queue.size());
        let mut drained = drain(queue, memory, |chain| {
            let head = chain.head_index();
            let outcome = self.message.read(chain, memory, MAX_MESSAGE_BYTES);
            if outcome == Err(Fault::EmptyMessage) {
                let written_bytes = self.wait(head, limit);
                return Handled { read_bytes: 0, written_bytes };
            }
            let outcome = outcome.and_then(|()| {
                self.requests.answer(self.message.bytes(), self.layout, self.balloon)
            });
            let status = outcome.unwrap_or_else(|fault| {
                self.faults.count(fault);
                fault.status()
            });
            let written_bytes = Some(self.message.answer(memory, status));
            Handled { read_bytes: self.message.bytes().len(), written_bytes }
        })?;
        drained.notify |= self.send(memory, queue)?;
        Ok(drained)
    }

    /// Keeps a chain without readable bytes. Returns length 0 for the used ring if the
    /// chain cannot be kept.
    fn wait(&mut self, head: u16, limit: usize) -> Option<u32> {
        let kept = match self.message.request_at() {
            None => Err(Fault::EmptyMessage),
            buffer => {
                self.waiting.keep(PendingChain { head, buffer }, limit).map_err(|not| match not {
                    NotPending::Repeated => Fault::RepeatedChain,
                    NotPending::TooMany => Fault::TooManyWaiting,
                })
            }
        };
        kept.err().map(|fault| {
            self.faults.count(fault);
            0
        })
    }

    /// Writes requests into waiting chains. Returns true if the driver must be notified.
    fn send<M: GuestMemory>(&mut self, memory: &M, queue: &mut impl QueueT) -> Result<bool, Error> {
        let mut any = false;
        while let Some(request) = self.requests.to_send() {
            let Some(chain) = self.waiting.take() else { break };
            let written = chain
                .buffer
                .is_some_and(|buffer| memory.write_slice(&request.to_bytes(), buffer).is_ok());
            if written {
                self.requests.sent();
            } else {
                self.faults.count(Fault::BadDescriptor);
            }
            queue.add_used(memory, chain.head, if written { WRITTEN } else { 0 })?;
            any = true;
        }
        Ok(any && queue.needs_notification(memory)?)
    }
}
