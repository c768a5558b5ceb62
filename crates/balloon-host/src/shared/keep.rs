//! State that outlives a front end's connection and this process.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use balloon_abi::{Features, Field};
use balloon_device::{BalloonState, StateError};

use super::{DeviceGuard, Shared, State};
use crate::saved::{SaveTicket, Saved, StateFile, StateWriter};

/// Assumed poison of a driver whose `poison_val` is lost. Any value but 0 forbids that
/// its free pages read as zeros.
const UNKNOWN_POISON: u32 = u32::MAX;

impl Shared {
    /// Loads the state file at `path`, and saves state to it from now on.
    ///
    /// # Errors
    /// The file can be neither read nor created, or the host has no thread left.
    pub fn open_state_file(&self, path: &Path) -> io::Result<()> {
        let writer = StateWriter::start(StateFile::open(path)?)?;
        let mut state = self.state();
        state.saved = writer.saved();
        state.writer = Some(Arc::new(writer));
        let target = state.saved.target;
        if target != 0 {
            state.device.set_target(target, Instant::now());
            // A normal change: it ends when the guest has connected and reached the target.
            state.generation += 1;
        }
        Ok(())
    }

    /// Handles the start or the resumption of a driver.
    pub fn reset(&self, negotiated: Features) {
        let mut state = self.state();
        state.device.reset(negotiated);
        // QEMU sends the driver's config write before the accepted features.
        if let (true, Some(poison)) =
            (negotiated.contains(Features::PAGE_POISON), state.saved.poison_val)
        {
            let at = u32::try_from(Field::PoisonVal.offset()).unwrap_or(u32::MAX);
            let _ = state.device.write_config(at, &poison.to_le_bytes(), Instant::now());
        }
    }

    /// Returns the state of a paused guest's balloon for a migration. Refuses new targets, which
    /// the state would not include, until [`stay`](Self::stay).
    pub fn leave(&self) -> BalloonState {
        let mut state = self.state();
        state.leaving = true;
        state.device.state()
    }

    /// Accepts targets again: the guest continues on this host.
    pub fn stay(&self) {
        self.state().leaving = false;
    }

    /// Restores the state of a guest from another host.
    ///
    /// # Errors
    /// The state does not fit this balloon. Nothing has changed.
    pub fn restore(&self, saved: BalloonState) -> Result<(), StateError> {
        let mut state = self.state();
        let (target, actual) = (saved.target, saved.actual);
        state.device.restore(saved, Instant::now())?;
        state.saved.target = target;
        state.saved.actual = actual;
        if target != 0 {
            // Like a target set here, the change ends when the guest has reached it.
            state.generation += 1;
        }
        let _ = self.save(&state);
        drop(state);
        self.changed();
        Ok(())
    }

    /// Handles the first queue of a driver. `used` is true if the driver used the queue before:
    /// it resumes rather than starts.
    pub fn driver_started(&self, device: &mut DeviceGuard<'_>, used: bool) {
        let state = &mut *device.0;
        if used {
            let Saved { actual, poison_val, .. } = state.saved;
            let poisons = state.device.negotiated().contains(Features::PAGE_POISON);
            let poison = if poisons { poison_val.unwrap_or(UNKNOWN_POISON) } else { 0 };
            state.device.resume(actual, poison, Instant::now());
            tracing::debug!(actual, "the driver resumes");
        } else {
            state.saved.actual = state.device.config().actual;
        }
        let _ = self.save(state);
    }

    /// Saves the driver's `actual`. Waits for the write for at most a second, and not again
    /// until a late disk has written something.
    pub fn save_actual(&self) {
        let mut state = self.state();
        state.saved.actual = state.device.config().actual;
        let save = self.save(&state);
        drop(state);
        self.wait_before_reply(save);
    }

    /// Sets `actual` to the number of pages in the balloon, for a front end that does not
    /// forward the driver's writes. Does nothing if the balloon may hold pages that were
    /// inflated before the device started.
    pub fn assume_actual(&self, since: Instant) {
        let state = &mut *self.state();
        let held = u32::try_from(state.device.held().len()).unwrap_or(u32::MAX);
        if state.device.inherits() || state.device.config().actual == held {
            return;
        }
        let at = u32::try_from(Field::Actual.offset()).unwrap_or(u32::MAX);
        let _ = state.device.write_config(at, &held.to_le_bytes(), since);
        state.saved.actual = held;
        let _ = self.save(state);
        self.changed();
    }

    /// Saves `poison_val` if a config write of the front end includes it, and waits as
    /// [`save_actual`](Self::save_actual) does.
    pub fn save_poison(&self, offset: u32, data: &[u8]) {
        let at = (Field::PoisonVal.offset() as u64).checked_sub(u64::from(offset));
        let at = at.and_then(|at| usize::try_from(at).ok());
        let Some(poison) = at.and_then(|at| data.get(at..)?.first_chunk()) else { return };
        let mut state = self.state();
        state.saved.poison_val = Some(u32::from_le_bytes(*poison));
        let save = self.save(&state);
        drop(state);
        self.wait_before_reply(save);
    }

    /// A front end that has a reply relies on it that a restarted back end knows what it wrote.
    fn wait_before_reply(&self, save: Option<PendingSave>) {
        let written = save.is_none_or(|save| save.writer.wait_unless_late(save.ticket));
        if !written && self.may_log() {
            tracing::error!("host: writing the state file timed out");
        }
    }

    /// Waits until the state file is written, for about a second at most, before a shutdown.
    /// Must not be called in a thread that serves a guest.
    pub fn finish_saving(&self) {
        let writer = self.state().writer.clone();
        if writer.is_some_and(|writer| !writer.wait_for_all()) && self.may_log() {
            tracing::error!("host: writing the state file timed out");
        }
    }

    /// Queues a write of the state file, if there is one. The writer's thread does it: the
    /// caller has the device's lock, and a dead disk must not block that.
    pub(super) fn save(&self, state: &State) -> Option<PendingSave> {
        let writer = state.writer.as_ref()?;
        let ticket = writer.save(state.saved);
        Some(PendingSave { writer: Arc::clone(writer), ticket })
    }
}

/// A queued write of the state file.
pub(super) struct PendingSave {
    writer: Arc<StateWriter>,
    ticket: SaveTicket,
}

impl PendingSave {
    /// Waits until the state is written, for a limited time. Must be called without a lock.
    pub(super) fn wait(&self) {
        if !self.writer.wait(self.ticket) {
            tracing::error!(
                "host: writing the state file timed out; a back end that is restarted now uses an \
                 old target"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use control::api::{PartialHuge, ReleaseMode};
    use control::{BalloonControl as _, ControlError};

    use super::*;
    use crate::HostReclaim;

    #[test]
    fn a_target_migrates_with_the_guest_or_is_refused() {
        let reclaim = HostReclaim::new(ReleaseMode::Immediate, PartialHuge::Split).unwrap();
        let shared = Shared::new("vm1".into(), reclaim).unwrap();
        shared.set_target(5).unwrap();
        assert_eq!(shared.leave().target, 5);
        let refused = shared.set_target(7).unwrap_err();
        assert!(matches!(refused, ControlError::Refused { .. }), "{refused}");
        assert_eq!(shared.device().config().num_pages, 5);
        shared.stay();
        shared.set_target(7).unwrap();
        assert_eq!(shared.device().config().num_pages, 7);
    }
}
