//! Pausing and stopping a guest, and how long each step may take.

use std::time::{Duration, Instant};

use balloon_host::Ending;

use super::Machine;
use crate::error::Error;

/// How long vCPUs and devices may take to pause. It is part of the downtime, and shorter than the
/// time for which the peer of a migration waits for a keepalive during it.
pub(crate) const PAUSE_TIMEOUT: Duration = Duration::from_secs(4);

/// How long an aborted pause waits for the lock of a device that it resumes. The thread that holds
/// the lock releases it within microseconds, or is stuck itself. After this time the device is
/// marked `resume_pending`.
const RESUME_DEVICE_TIMEOUT: Duration = Duration::from_millis(100);

impl Machine {
    /// Pauses the vCPUs, then the devices.
    ///
    /// # Errors
    /// A vCPU or a device does not pause in time. All vCPUs and devices are resumed then.
    pub fn pause(&self) -> Result<(), Error> {
        let until = Instant::now() + PAUSE_TIMEOUT;
        self.vcpus.pause(PAUSE_TIMEOUT)?;
        let stuck = self.bus.slots.iter().position(|slot| !slot.pause(until));
        let Some(stuck) = stuck else { return Ok(()) };
        self.balloon.stay();
        // The slots behind it were not asked to pause.
        let paused = self.bus.slots.iter().take(stuck + 1);
        let until = Instant::now() + RESUME_DEVICE_TIMEOUT;
        if paused.filter(|slot| !slot.resume(until)).count() > 0 {
            // No other thread may lock them for a long time, so the loop does.
            self.wake_loop();
        }
        self.vcpus.resume();
        let ms = PAUSE_TIMEOUT.as_millis();
        let disk = stuck.checked_sub(1).and_then(|number| self.disks.get(number));
        let what = match disk {
            Some(disk) => format!("{} did not finish a request in {ms} ms", disk.path().display()),
            None => format!("the balloon did not finish the guest's requests in {ms} ms"),
        };
        Err(Error::Stuck { what })
    }

    /// Stops the vCPUs of a guest that ends, and logs disk requests that are lost.
    pub(super) fn stop(&self, ending: &Ending) {
        // The devices are not served from here on: a migration that fails now, or only reads the
        // vCPUs' state, must not resume the guest.
        self.vcpus.halt();
        let limit = ending.limit_wait("the guest's vCPUs", PAUSE_TIMEOUT);
        if let Err(error) = self.vcpus.pause(limit) {
            tracing::error!(%error, "a vCPU did not stop; the guest ends anyway");
        }
        for (disk, slot) in self.disks.iter().zip(self.bus.slots.iter().skip(1)) {
            let transport = slot.try_transport(Instant::now());
            let requests = transport.map(|transport| transport.unfinished());
            if requests != Some(0) {
                let disk = disk.path().display();
                tracing::warn!(%disk, requests, "requests of the guest to this disk are lost");
            }
        }
    }
}
