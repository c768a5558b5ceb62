//! Pausing and stopping a guest, and how long each step may take.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_host::Ending;

use super::{EventFdInterrupts, Machine, Slot};
use crate::console::output::LostOutput;
use crate::error::Error;
use crate::mmio::Transport;

/// How long vCPUs and devices may take to pause. It is part of the downtime, and shorter than the
/// time for which the peer of a migration waits for a keepalive during it.
pub(crate) const PAUSE_TIMEOUT: Duration = Duration::from_secs(4);

/// How long an aborted pause waits for the lock of a device that it resumes. The thread that holds
/// the lock releases it within microseconds, or is stuck itself. After this time the device is
/// marked `resume_pending`.
const RESUME_DEVICE_TIMEOUT: Duration = Duration::from_millis(100);

/// Polls whether a device has paused this often.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

/// How long a process whose guest has ended waits for the console's reader.
const CONSOLE_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The same if the process was asked to stop.
const CONSOLE_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits until the console's reader has received all output of a guest that has ended.
pub(super) fn end_console(machine: &Machine, ending: &Ending) {
    let usual = if ending.was_asked() { CONSOLE_STOP_TIMEOUT } else { CONSOLE_DRAIN_TIMEOUT };
    let limit = ending.patience("the console's reader", usual);
    let LostOutput { dropped, left } = machine.bus.ports.finish_output(limit);
    if dropped > 0 || left > 0 {
        tracing::warn!(dropped, left, "host: the console was not read in time; output is lost");
    }
    ending.patience("the control socket, and the threads of the guest", Duration::MAX);
}

impl Slot {
    /// Locks the transport; `None` if that fails until `until`.
    fn try_transport(
        &self,
        until: Instant,
    ) -> Option<MutexGuard<'_, Transport<EventFdInterrupts>>> {
        loop {
            match self.transport.try_lock() {
                Ok(transport) => return Some(self.locked(Ok(transport))),
                Err(TryLockError::Poisoned(poisoned)) => return Some(self.locked(Err(poisoned))),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
                Err(TryLockError::WouldBlock) => thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// Pauses the device; false if that fails until `until`. The transport is not locked between
    /// two attempts.
    fn pause(&self, until: Instant) -> bool {
        loop {
            if self.try_transport(until).is_some_and(|mut transport| transport.pause()) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Resumes the device after an aborted pause; false if its lock is taken: then the next thread
    /// that locks it resumes it. So no device stays paused while the guest runs.
    fn resume(&self, until: Instant) -> bool {
        if let Some(mut transport) = self.try_transport(until) {
            transport.resume();
            return true;
        }
        self.resume_pending.store(true, Ordering::Release);
        false
    }
}

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
        let limit = ending.patience("the guest's vCPUs", PAUSE_TIMEOUT);
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Mutex, mpsc};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::block::{Block, DiskFile, DiskOptions};
    use crate::machine::new_eventfd;
    use crate::memory::Ram;

    /// A disk that no driver has started.
    fn slot() -> (Slot, tempfile::NamedTempFile) {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(4096).unwrap();
        let options = DiskOptions { path: path.path().into(), read_only: false };
        let memory = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let file = DiskFile::open(&options).unwrap();
        let disk = Block::new(&Arc::new(file), 0, memory.clone()).unwrap();
        let signals =
            EventFdInterrupts { interrupt: new_eventfd().unwrap(), notify_fds: Vec::new() };
        let transport = Transport::new(Box::new(disk), signals, memory).unwrap();
        let (transport, resume_pending) = (Mutex::new(transport), AtomicBool::new(false));
        (Slot { start: 0, transport, notify_fds: Vec::new(), resume_pending }, path)
    }

    /// After an aborted pause a device resumes even if another thread holds its lock for long.
    #[test]
    fn a_device_whose_lock_is_held_resumes_at_the_next_lock() {
        let (slot, _path) = slot();
        let soon = || Instant::now() + POLL_INTERVAL;
        assert!(slot.pause(soon()));
        let (send_locked, locked) = mpsc::channel();
        let (send_release, release) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let slot = &slot;
            scope.spawn(move || {
                let transport = slot.transport();
                send_locked.send(()).unwrap();
                release.recv().unwrap();
                assert!(transport.is_paused());
            });
            locked.recv().unwrap();
            assert!(!slot.resume(soon()));
            send_release.send(()).unwrap();
        });
        assert!(!slot.transport().is_paused());
        // Only once: the next pause works.
        assert!(slot.pause(soon()));
        assert!(slot.transport().is_paused() && slot.resume(soon()));
        assert!(!slot.transport().is_paused());
    }
}
