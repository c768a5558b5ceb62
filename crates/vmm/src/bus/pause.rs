//! Pausing one device, and resuming it after a pause that was aborted.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use super::{EventFdInterrupts, Slot};
use crate::mmio::Transport;

/// Polls whether a device has paused this often.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

impl Slot {
    /// Locks the transport; `None` if that fails until `until`.
    pub(crate) fn try_transport(
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
    pub(crate) fn pause(&self, until: Instant) -> bool {
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
    pub(crate) fn resume(&self, until: Instant) -> bool {
        if let Some(mut transport) = self.try_transport(until) {
            transport.resume();
            return true;
        }
        self.resume_pending.store(true, Ordering::Release);
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Mutex, mpsc};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::block::{Block, DiskFile, DiskOptions};
    use crate::bus::new_eventfd;
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
