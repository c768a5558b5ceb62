//! A guest comes to a stop, for a while or for good: how long is waited for what.

use std::sync::{MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use balloon_host::Ending;

use super::{EventSignals, Machine, Slot};
use crate::console::output::Lost;
use crate::error::Error;
use crate::mmio::Transport;

/// How long the guest's processors and devices may take to come to a stop, while it stands still for
/// that already. Less than the other side of a migration waits for a sign of life then.
pub(crate) const PAUSE_TIME: Duration = Duration::from_secs(4);

/// How long it may take to have the registers of a device that goes on as it was. Who has them is
/// done with them within microseconds, or is stuck himself.
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
    /// The same, if it can be had in time.
    fn transport_until(&self, until: Instant) -> Option<MutexGuard<'_, Transport<EventSignals>>> {
        loop {
            match self.transport.try_lock() {
                Ok(transport) => return Some(transport),
                Err(TryLockError::Poisoned(_)) => return Some(self.transport()),
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
        for slot in &self.bus.slots {
            // Where it cannot be had, it was not paused.
            if let Some(mut transport) = slot.transport_until(Instant::now() + UNDO_TIME) {
                transport.resume();
            }
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
