//! What outlives a driver's connection, and this process.

use std::io;
use std::path::Path;
use std::time::Instant;

use balloon_abi::{Features, Field};
use balloon_device::{BalloonState, StateError};

use super::{DeviceGuard, Shared, State};
use crate::saved::{Saved, StateFile};

/// Poison of a driver whose word for it is lost: any but 0 forbids to give its
/// free pages back as zeros.
const UNKNOWN_POISON: u32 = u32::MAX;

impl Shared {
    /// Keeps in the file at `path` what has to be known after a restart, and begins
    /// with what it says.
    ///
    /// # Errors
    /// The file can be neither read nor made.
    pub fn keep_in(&self, path: &Path) -> io::Result<()> {
        let file = StateFile::open(path)?;
        let mut state = self.state();
        state.saved = file.saved();
        state.file = Some(file);
        let target = state.saved.target;
        if target != 0 {
            state.device.set_target(target, Instant::now());
            // A change like any other: over when the guest is there and has reached it.
            state.generation += 1;
        }
        Ok(())
    }

    /// A driver starts, or goes on.
    pub fn reset(&self, negotiated: Features) {
        let mut state = self.state();
        state.device.reset(negotiated);
        // QEMU says what the driver wrote before it says which features it took.
        if let (true, Some(poison)) =
            (negotiated.contains(Features::PAGE_POISON), state.saved.poison_val)
        {
            let at = u32::try_from(Field::PoisonVal.offset()).unwrap_or(u32::MAX);
            let _ = state.device.write_config(at, &poison.to_le_bytes(), Instant::now());
        }
    }

    /// The state of the balloon of a guest that stands still and may go elsewhere. A target that is
    /// set later would not go with it, so none is taken until the guest [stays](Self::stay).
    pub fn leave(&self) -> BalloonState {
        let mut state = self.state();
        state.leaving = true;
        state.device.state()
    }

    /// The guest goes on here.
    pub fn stay(&self) {
        self.state().leaving = false;
    }

    /// Goes on with the guest of another host.
    ///
    /// # Errors
    /// The state is none of this balloon; nothing has changed then.
    pub fn restore(&self, saved: BalloonState) -> Result<(), StateError> {
        let mut state = self.state();
        let (target, actual) = (saved.target, saved.actual);
        state.device.restore(saved, Instant::now())?;
        state.saved.target = target;
        state.saved.actual = actual;
        if target != 0 {
            // As for whoever sets a target here: over when the guest has reached it.
            state.generation += 1;
        }
        self.save(&mut state);
        drop(state);
        self.changed();
        Ok(())
    }

    /// The first queue of a driver runs: it has used it before, or it starts.
    pub fn driver_found(&self, device: &mut DeviceGuard<'_>, used: bool) {
        let state = &mut *device.0;
        if used {
            let Saved { actual, poison_val, .. } = state.saved;
            let poisons = state.device.negotiated().contains(Features::PAGE_POISON);
            let poison = if poisons { poison_val.unwrap_or(UNKNOWN_POISON) } else { 0 };
            state.device.resume(actual, poison, Instant::now());
            tracing::debug!(actual, "the driver goes on where it was");
        } else {
            state.saved.actual = state.device.config().actual;
        }
        self.save(state);
    }

    /// The driver may have said how many pages it holds.
    pub fn keep_actual(&self) {
        let state = &mut *self.state();
        state.saved.actual = state.device.config().actual;
        self.save(state);
    }

    /// Nobody says how many pages the driver holds, so it is those that it gave. Of
    /// one that was there before the device, they are not all.
    pub fn assume_actual(&self, since: Instant) {
        let state = &mut *self.state();
        let held = u32::try_from(state.device.held().len()).unwrap_or(u32::MAX);
        if state.device.inherits() || state.device.config().actual == held {
            return;
        }
        let at = u32::try_from(Field::Actual.offset()).unwrap_or(u32::MAX);
        let _ = state.device.write_config(at, &held.to_le_bytes(), since);
        state.saved.actual = held;
        self.save(state);
        self.changed();
    }

    /// The front end may have said what the driver fills free pages with: alone, or
    /// with all else.
    pub fn keep_poison(&self, offset: u32, data: &[u8]) {
        let at = (Field::PoisonVal.offset() as u64).checked_sub(u64::from(offset));
        let at = at.and_then(|at| usize::try_from(at).ok());
        let Some(poison) = at.and_then(|at| data.get(at..)?.first_chunk()) else { return };
        let state = &mut *self.state();
        state.saved.poison_val = Some(u32::from_le_bytes(*poison));
        self.save(state);
    }

    /// Writes what is to be kept, where it is kept.
    pub(super) fn save(&self, state: &mut State) {
        let saved = state.saved;
        let Some(file) = &mut state.file else { return };
        if let Err(error) = file.save(saved) {
            tracing::error!(%error, "host: the state file cannot be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use control::api::{PartialHuge, ReleaseMode};
    use control::{Balloon as _, ControlError};

    use super::*;
    use crate::HostReclaim;

    #[test]
    fn a_target_goes_with_the_guest_or_is_refused() {
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
