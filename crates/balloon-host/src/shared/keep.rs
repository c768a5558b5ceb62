//! What outlives a driver's connection, and this process.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use balloon_abi::{Features, Field};
use balloon_device::{BalloonState, StateError};

use super::{DeviceGuard, Shared, State};
use crate::saved::{Saved, StateFile, StateWriter, Told};

/// Poison of a driver whose word for it is lost: any but 0 forbids to give its
/// free pages back as zeros.
const UNKNOWN_POISON: u32 = u32::MAX;

impl Shared {
    /// Keeps in the file at `path` what has to be known after a restart, and begins
    /// with what it says.
    ///
    /// # Errors
    /// The file can be neither read nor made, or the host has no thread left.
    pub fn keep_in(&self, path: &Path) -> io::Result<()> {
        let writer = StateWriter::start(StateFile::open(path)?)?;
        let mut state = self.state();
        state.saved = writer.saved();
        state.writer = Some(Arc::new(writer));
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
        let _ = self.save(&state);
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
        let _ = self.save(state);
    }

    /// The driver may have said how many pages it holds. Waits until that is written, for about a
    /// second at most, and not again before a disk that is late has written something.
    pub fn keep_actual(&self) {
        let mut state = self.state();
        state.saved.actual = state.device.config().actual;
        let kept = self.save(&state);
        drop(state);
        self.wait_before_answer(kept);
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
        let _ = self.save(state);
        self.changed();
    }

    /// The front end may have said what the driver fills free pages with: alone, or
    /// with all else.
    pub fn keep_poison(&self, offset: u32, data: &[u8]) {
        let at = (Field::PoisonVal.offset() as u64).checked_sub(u64::from(offset));
        let at = at.and_then(|at| usize::try_from(at).ok());
        let Some(poison) = at.and_then(|at| data.get(at..)?.first_chunk()) else { return };
        let mut state = self.state();
        state.saved.poison_val = Some(u32::from_le_bytes(*poison));
        let kept = self.save(&state);
        drop(state);
        self.wait_before_answer(kept);
    }

    /// A front end that has an answer relies on it that a back end which is started again knows what
    /// it wrote.
    fn wait_before_answer(&self, kept: Option<KeptWrite>) {
        let written = kept.is_none_or(|kept| kept.writer.wait_unless_late(kept.told));
        if !written && self.may_log() {
            tracing::error!("host: the state file cannot be written in time");
        }
    }

    /// Waits until what is to be kept is written, for about a second at most: before something
    /// ends. Not to be called where a guest is served meanwhile.
    pub fn finish_keeping(&self) {
        let writer = self.state().writer.clone();
        if writer.is_some_and(|writer| !writer.wait_for_all()) && self.may_log() {
            tracing::error!("host: the state file cannot be written in time");
        }
    }

    /// Has what is to be kept written, where it is kept: not here, where a disk that does not
    /// answer would keep the device's lock.
    pub(super) fn save(&self, state: &State) -> Option<KeptWrite> {
        let writer = state.writer.as_ref()?;
        let told = writer.save(state.saved);
        Some(KeptWrite { writer: Arc::clone(writer), told })
    }
}

/// Something that is being written.
pub(super) struct KeptWrite {
    writer: Arc<StateWriter>,
    told: Told,
}

impl KeptWrite {
    /// Waits until it is, for a while; to be called without a lock.
    pub(super) fn wait(&self) {
        if !self.writer.wait(self.told) {
            tracing::error!(
                "host: the state file cannot be written in time; a back end that is started again \
                 will not know the target"
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
