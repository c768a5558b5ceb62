//! Queues that another back end may have served, when they run here first.

use balloon_abi::Vq;
use balloon_host::Shared;
use host_memory::BackedMemory;
use virtio_queue::QueueT;

use crate::vring::Vring;

/// Looks where a queue stands that another back end may have served. False where
/// it cannot be served.
pub(crate) fn find(
    shared: &Shared,
    vring: &mut Vring,
    index: usize,
    memory: &BackedMemory,
    driver_known: &mut bool,
) -> bool {
    let mut device = shared.device();
    let Some(vq) = device.queues().vq(index) else { return false };
    let found = match vring.queue.find(memory) {
        Ok(found) => found,
        Err(source) => {
            drop(device);
            vring.stop();
            if shared.may_log() {
                tracing::warn!(%source, ?vq, "queue stopped: its ring cannot be read");
            }
            return false;
        }
    };
    vring.found = true;
    let goes_on = found.used && !*driver_known;
    if !*driver_known {
        shared.driver_started(&mut device, found.used);
        *driver_known = true;
    }
    drop(device);
    // Chains of this queue come back in another order than they came, so without
    // notes nobody knows which are still the device's.
    if goes_on && vq == Vq::Request && !vring.queue.has_notes() {
        vring.stop();
        if shared.may_log() {
            tracing::warn!("requests to the guest have to wait until its driver is loaded anew");
        }
        return false;
    }
    let mut returned = false;
    for head in found.kept {
        returned |= vring.queue.add_used(memory, head, 0).is_ok();
    }
    if returned {
        vring.notify_guest();
    }
    true
}
