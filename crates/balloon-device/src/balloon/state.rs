//! The device state that migrates with the guest.

use std::time::Instant;

use balloon_abi::{Features, HintCommand};
use page_set::PageSet;

use super::BalloonDevice;
use crate::reclaim::Reclaim;

/// Migrated state of a device. It has no requests, hints in progress or pending chains:
/// [`suspend`](BalloonDevice::suspend) ends the requests, and pending chains are returned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonState {
    /// Features that the driver accepted.
    pub negotiated: Features,
    /// Target of the balloon (`num_pages`), in balloon pages.
    pub target: u32,
    /// The driver's last write to `actual`, in balloon pages.
    pub actual: u32,
    /// The driver's last write to `poison_val`.
    pub poison_val: u32,
    /// Pages in the balloon.
    pub held: PageSet,
    /// The balloon may hold more pages, inflated before the device started.
    pub inherited: bool,
    /// Command id of the newest request for hints, 0 if there was none. A driver ignores an id
    /// that it has seen.
    pub last_hint: u32,
    /// Id of the newest request.
    pub last_request: u32,
    /// Id of the request that created the hold, 0 without a hold. Its pages are not part of
    /// the state; the id is enough to release it.
    pub hold: u32,
}

/// Why a state cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Features that this device does not offer.
    #[error("the driver accepted features that are not offered here: {0:#x}")]
    Features(u64),
    /// The balloon has pages that are not guest memory.
    #[error("{pages} pages in the balloon are outside of guest memory")]
    Pages {
        /// Number of such pages.
        pages: u64,
    },
    /// The target exceeds guest memory.
    #[error("the target is {target} pages, and the guest has only {memory_pages}")]
    Target {
        /// The target.
        target: u32,
        /// Pages of the guest.
        memory_pages: u64,
    },
    /// The command id of the hints is invalid.
    #[error("{0:#x} is no command id of free page hints")]
    Hint(u32),
}

impl<R: Reclaim> BalloonDevice<R> {
    /// Returns the state to migrate.
    pub fn state(&self) -> BalloonState {
        BalloonState {
            negotiated: self.negotiated,
            target: self.config.num_pages,
            actual: self.config.actual,
            poison_val: self.config.poison_val,
            held: self.held.clone(),
            inherited: self.inherited,
            last_hint: self.hinting.id().map_or(0, balloon_abi::HintId::get),
            last_request: self.requests.last_id(),
            hold: self.requests.hold().map_or(0, |hold| hold.pages.id),
        }
    }

    /// Restores a migrated state. The caller has set the [layout](Self::set_layout), and then
    /// sends the driver a configuration change notification: the new command id lets the guest
    /// free the pages that it hinted to the other device.
    ///
    /// With `MUST_TELL_HOST`, releases the pages in the balloon again: migration may have
    /// allocated memory for them.
    ///
    /// # Errors
    /// The state does not fit this device or guest. Nothing has changed.
    pub fn restore(&mut self, state: BalloonState, now: Instant) -> Result<(), StateError> {
        let excess = state.negotiated.without(self.offered);
        if excess != Features::NONE {
            return Err(StateError::Features(excess.0));
        }
        let memory_pages = self.layout.pages();
        if u64::from(state.target) > memory_pages {
            return Err(StateError::Target { target: state.target, memory_pages });
        }
        let mut inside = state.held.clone();
        let outside = self.layout.cut(&mut inside);
        if !outside.is_empty() {
            return Err(StateError::Pages { pages: outside.len() });
        }
        let hint = match HintCommand::from_u32(state.last_hint) {
            HintCommand::Stop => None,
            HintCommand::Hint(id) => Some(id),
            HintCommand::Done => return Err(StateError::Hint(state.last_hint)),
        };
        self.reset(state.negotiated);
        self.config.actual = state.actual;
        self.set_target(state.target, now);
        if state.negotiated.contains(Features::PAGE_POISON) {
            self.config.poison_val = state.poison_val;
        }
        self.inherited = state.inherited;
        self.held = state.held;
        if state.negotiated.contains(Features::MUST_TELL_HOST) {
            self.reclaim.release(&self.held);
            self.reclaim.flush();
        }
        if state.negotiated.contains(Features::FREE_PAGE_HINT) {
            self.hinting.restore(hint);
            self.publish_hint_command();
        }
        self.requests.restore(state.last_request, state.hold);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use page_set::PageRange;

    use super::*;
    use crate::{HintPhase, HoldState, MemoryLayout};

    /// Records released pages.
    #[derive(Debug, Default)]
    struct Released(PageSet);

    impl Reclaim for Released {
        fn release(&mut self, pages: &PageSet) {
            self.0.union_with(pages);
        }
        fn release_now(&mut self, pages: &PageSet) {
            self.0.union_with(pages);
        }
        fn release_free(&mut self, _: &PageSet) {}
        fn cancel(&mut self, pages: &PageSet) {
            self.0.subtract(pages);
        }
        fn retain(&mut self, pages: &PageSet) {
            self.0.subtract(pages);
        }
        fn flush(&mut self) {}
    }

    fn device() -> BalloonDevice<Released> {
        let mut device = BalloonDevice::new(Released::default());
        device.set_layout(MemoryLayout::new([(0, 1 << 20)]).unwrap());
        device
    }

    fn state() -> BalloonState {
        BalloonState {
            negotiated: Features::VERSION_1
                | Features::MUST_TELL_HOST
                | Features::FREE_PAGE_HINT
                | Features::PAGE_POISON
                | Features::REQUEST_VQ,
            target: 40,
            actual: 30,
            poison_val: 0xaa,
            held: PageRange::new(10, 30).unwrap().into(),
            inherited: false,
            last_hint: 0x8000_0007,
            last_request: 12,
            hold: 11,
        }
    }

    #[test]
    fn a_restored_device_has_the_saved_state() {
        let mut device = device();
        device.restore(state(), Instant::now()).unwrap();
        assert_eq!(device.state(), state());
        assert_eq!(device.reclaim().0, state().held);
        let config = device.config();
        assert_eq!((config.num_pages, config.actual, config.poison_val), (40, 30, 0xaa));
        // The guest may free the hinted pages, and no command id is reused.
        assert_eq!(config.free_page_hint_cmd_id, HintCommand::Done.to_u32());
        assert_eq!(device.hinting().phase(), HintPhase::Idle);
        assert_eq!(device.start_hinting(Instant::now()).unwrap().get(), 0x8000_0008);
        // The hold can be released once the driver's queue runs.
        assert_eq!(device.requests().hold().unwrap().state, HoldState::Paused);
        assert!(device.requests().is_stopped());
    }

    #[test]
    fn restore_releases_nothing_without_must_tell_host() {
        let mut device = device();
        let negotiated = Features::VERSION_1;
        let state = BalloonState { negotiated, ..state() };
        device.restore(state, Instant::now()).unwrap();
        assert!(device.reclaim().0.is_empty());
        assert_eq!((device.held().len(), device.config().poison_val), (30, 0));
    }

    #[test]
    fn an_invalid_state_changes_nothing() {
        let mut device = device();
        let before = device.state();
        for (state, error) in [
            (
                BalloonState { negotiated: Features(1 << 40), ..state() },
                StateError::Features(1 << 40),
            ),
            (
                BalloonState { held: PageRange::new(250, 10).unwrap().into(), ..state() },
                StateError::Pages { pages: 4 },
            ),
            (
                BalloonState { target: 257, ..state() },
                StateError::Target { target: 257, memory_pages: 256 },
            ),
            (BalloonState { last_hint: 1, ..state() }, StateError::Hint(1)),
        ] {
            assert_eq!(device.restore(state, Instant::now()), Err(error));
            assert_eq!(device.state(), before);
        }
    }
}
