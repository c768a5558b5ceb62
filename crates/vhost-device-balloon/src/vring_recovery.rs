//! Recovery of vrings that another back end may have served.

use balloon_abi::Vq;
use balloon_host::Shared;
use host_memory::BackedMemory;
use virtio_queue::QueueT;

use crate::vring::Vring;

/// Recovers the position of a vring that another back end may have served. Returns false if the
/// vring cannot be served.
pub(crate) fn recover(
    shared: &Shared,
    vring: &mut Vring,
    index: usize,
    memory: &BackedMemory,
    driver_known: &mut bool,
) -> bool {
    let mut device = shared.device();
    let Some(vq) = device.queues().vq(index) else { return false };
    let recovered = match vring.queue.recover(memory) {
        Ok(recovered) => recovered,
        Err(source) => {
            drop(device);
            vring.stop();
            if shared.may_log() {
                tracing::warn!(%source, ?vq, "queue stopped: its vring cannot be read");
            }
            return false;
        }
    };
    vring.recovered = true;
    let resumes = recovered.used && !*driver_known;
    if !*driver_known {
        shared.driver_started(&mut device, recovered.used);
        *driver_known = true;
    }
    drop(device);
    // The device returns chains of this queue out of order, so without an inflight region it
    // cannot tell which are pending.
    if resumes && vq == Vq::Request && !vring.queue.has_region() {
        vring.stop();
        if shared.may_log() {
            tracing::warn!("requests to the guest must wait until its driver is reloaded");
        }
        return false;
    }
    let mut returned = false;
    for head in recovered.pending {
        returned |= vring.queue.add_used(memory, head, 0).is_ok();
    }
    if returned {
        vring.notify_guest();
    }
    true
}
