//! A guest comes to a stop, for a while or for good: how long is waited for what.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_host::Ending;

use super::{EventFdInterrupts, Machine, Slot};
use crate::console::output::Lost;
use crate::error::Error;
use crate::mmio::Transport;

/// How long the guest's processors and devices may take to come to a stop, while it stands still for
/// that already. Less than the other side of a migration waits for a sign of life then.
pub(crate) const PAUSE_TIME: Duration = Duration::from_secs(4);

/// How long it may take to have the registers of a device that goes on as it was. Who has them is
/// done with them within microseconds, or is stuck himself. After that they go on by themselves.
const UNDO_TIME: Duration = Duration::from_millis(100);

/// Between two looks whether a device has come to a stop.
const PAUSE_LOOK: Duration = Duration::from_micros(100);

/// How long a process whose guest has ended waits for whoever reads its console.
const READER_TIME: Duration = Duration::from_secs(10);

/// The same where somebody waits for the end of the process.
const ASKED_TIME: Duration = Duration::from_secs(2);

/// The guest prints nothing more: what it has printed is to reach its reader.
pub(super) fn end_console(machine: &Machine, ending: &Ending) {
    let usual = if ending.was_asked() { ASKED_TIME } else { READER_TIME };
    let limit = ending.patience("whoever reads the console", usual);
    let Lost { dropped, left } = machine.bus.ports.finish_output(limit);
    if dropped > 0 || left > 0 {
        tracing::warn!(
            dropped,
            left,
            "host: nobody read the console in time; bytes of it are lost"
        );
    }
    ending.patience("the control socket, and the threads of the guest", Duration::MAX);
}

impl Slot {
    /// The device's registers, if they can be had in time.
    fn transport_until(
        &self,
        until: Instant,
    ) -> Option<MutexGuard<'_, Transport<EventFdInterrupts>>> {
        loop {
            match self.transport.try_lock() {
                Ok(transport) => return Some(self.had(Ok(transport))),
                Err(TryLockError::Poisoned(poisoned)) => return Some(self.had(Err(poisoned))),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
                Err(TryLockError::WouldBlock) => thread::sleep(PAUSE_LOOK),
            }
        }
    }

    /// Has the device come to a stop; false where it does not in time. Nobody waits for it with its
    /// registers locked meanwhile.
    fn pause(&self, until: Instant) -> bool {
        loop {
            if self.transport_until(until).is_some_and(|mut transport| transport.pause()) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(PAUSE_LOOK);
        }
    }

    /// Has the device go on that was to come to a stop; false where that is left to whoever has its
    /// registers next. No device stands still while the guest runs.
    fn goes_on(&self, until: Instant) -> bool {
        if let Some(mut transport) = self.transport_until(until) {
            transport.resume();
            return true;
        }
        self.is_to_go_on.store(true, Ordering::Release);
        false
    }
}

impl Machine {
    /// The guest stands still, and its devices with it, when this returns.
    ///
    /// # Errors
    /// A processor or a disk does not come to a stop in time. All go on then as before.
    pub fn pause(&self) -> Result<(), Error> {
        let until = Instant::now() + PAUSE_TIME;
        self.processors.pause(PAUSE_TIME)?;
        let stuck = self.bus.slots.iter().position(|slot| !slot.pause(until));
        let Some(stuck) = stuck else { return Ok(()) };
        self.balloon.stay();
        // Those behind it were not told to stop.
        let told = self.bus.slots.iter().take(stuck + 1);
        let until = Instant::now() + UNDO_TIME;
        if told.filter(|slot| !slot.goes_on(until)).count() > 0 {
            // Nobody else may ask for their registers for long.
            self.wake_loop();
        }
        self.processors.resume();
        let ms = PAUSE_TIME.as_millis();
        let disk = stuck.checked_sub(1).and_then(|number| self.disks.get(number));
        let what = match disk {
            Some(disk) => format!("{} did not finish a request in {ms} ms", disk.path().display()),
            None => format!("the balloon was not done with what the guest sent it in {ms} ms"),
        };
        Err(Error::Stuck { what })
    }

    /// The guest is over: nothing of it runs any more, if it can be had so.
    pub(super) fn come_to_an_end(&self, ending: &Ending) {
        // Nobody serves its devices from here on: a migration that comes to nothing now, or only
        // looks at the processors, does not let it run on.
        self.processors.halt();
        let limit = ending.patience("the guest's processors", PAUSE_TIME);
        if let Err(error) = self.processors.pause(limit) {
            tracing::error!(%error, "the guest ends all the same");
        }
        for (disk, slot) in self.disks.iter().zip(self.bus.slots.iter().skip(1)) {
            let transport = slot.transport_until(Instant::now());
            let requests = transport.map(|transport| transport.unfinished());
            if requests != Some(0) {
                let disk = disk.path().display();
                tracing::warn!(%disk, requests, "what the guest had asked of it is not done");
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
    use crate::machine::event_file;
    use crate::memory::Ram;

    /// A disk in its window, which nobody has started.
    fn slot() -> (Slot, tempfile::NamedTempFile) {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(4096).unwrap();
        let options = DiskOptions { path: path.path().into(), read_only: false };
        let memory = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let file = DiskFile::open(&options).unwrap();
        let disk = Block::new(&Arc::new(file), 0, memory.clone()).unwrap();
        let signals = EventFdInterrupts { interrupt: event_file().unwrap(), kicks: Vec::new() };
        let transport = Transport::new(Box::new(disk), signals, memory).unwrap();
        let (transport, is_to_go_on) = (Mutex::new(transport), AtomicBool::new(false));
        (Slot { start: 0, transport, kicks: Vec::new(), is_to_go_on }, path)
    }

    /// A device whose registers somebody else has for long goes on all the same, after a pause that
    /// came to nothing.
    #[test]
    fn a_device_that_was_stopped_goes_on_when_its_registers_can_be_had() {
        let (slot, _path) = slot();
        let soon = || Instant::now() + PAUSE_LOOK;
        assert!(slot.pause(soon()));
        let (has, had) = mpsc::channel();
        let (gives_back, given_back) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let slot = &slot;
            scope.spawn(move || {
                let transport = slot.transport();
                has.send(()).unwrap();
                given_back.recv().unwrap();
                assert!(transport.is_paused());
            });
            had.recv().unwrap();
            assert!(!slot.goes_on(soon()));
            gives_back.send(()).unwrap();
        });
        assert!(!slot.transport().is_paused());
        // Once: it stops when it is told to the next time.
        assert!(slot.pause(soon()));
        assert!(slot.transport().is_paused() && slot.goes_on(soon()));
        assert!(!slot.transport().is_paused());
    }
}
