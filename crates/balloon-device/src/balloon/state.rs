//! What has to be known of a device where its guest goes on: after a live migration.

use std::time::Instant;

use balloon_abi::{Features, HintCommand};
use page_set::PageSet;

use super::BalloonDevice;
use crate::reclaim::Reclaim;

/// A device between two hosts. Requests, hints that were under way and chains that were kept are
/// not in it: they were ended and given back when the guest was [suspended](Balloon::suspend).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonState {
    /// What the driver accepted.
    pub negotiated: Features,
    /// Pages that the guest is asked to give.
    pub target: u32,
    /// Pages that the driver says it gave.
    pub actual: u32,
    /// What the driver says it fills free pages with.
    pub poison_val: u32,
    /// Pages that it gave and did not take back.
    pub held: PageSet,
    /// It gave pages before the device began to watch, nobody knows which.
    pub inherited: bool,
    /// Number of the newest request for hints, 0 if there was none: a driver takes no number twice.
    pub last_hint: u32,
    /// Number of the newest request.
    pub last_request: u32,
    /// Number of the request that made the guest hold free pages, 0 if it holds none. Which pages
    /// those are is not told; that they can be given back is.
    pub hold: u32,
}

/// A state that the device cannot take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Features that this device does not offer.
    #[error("its driver has features that are not offered here: {0:#x}")]
    Features(u64),
    /// Pages that the guest does not have.
    #[error("{pages} pages in the balloon are no memory of the guest")]
    Pages {
        /// How many.
        pages: u64,
    },
    /// More pages are asked of the guest than it has.
    #[error("a target of {target} pages, of which the guest has {memory_pages}")]
    Target {
        /// The target.
        target: u32,
        /// Pages of the guest.
        memory_pages: u64,
    },
    /// A number that no request for hints has.
    #[error("hints under number {0:#x}")]
    Hint(u32),
}

impl<R: Reclaim> BalloonDevice<R> {
    /// What the device has to know where its guest goes on.
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

    /// Goes on with a guest of another device, whose memory is at the
    /// [layout](Self::set_layout) already. The caller then tells the driver that the
    /// configuration changed: it is asked to take back what it hinted.
    ///
    /// Where the driver tells before it uses a page, the pages in the balloon are released once
    /// more: memory that was moved may have come with them.
    ///
    /// # Errors
    /// The state is no state of this device with this guest; nothing has changed then.
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
            self.hinting.moved(hint);
            self.show_hint_command();
        }
        self.requests.moved(state.last_request, state.hold);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use page_set::PageRange;

    use super::*;
    use crate::{HintPhase, HoldState, MemoryLayout};

    /// Notes what is released.
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
    fn a_device_goes_on_where_another_was() {
        let mut device = device();
        device.restore(state(), Instant::now()).unwrap();
        assert_eq!(device.state(), state());
        assert_eq!(device.reclaim().0, state().held);
        let config = device.config();
        assert_eq!((config.num_pages, config.actual, config.poison_val), (40, 30, 0xaa));
        // What it hinted is its own again, and no number comes twice.
        assert_eq!(config.free_page_hint_cmd_id, HintCommand::Done.to_u32());
        assert_eq!(device.hinting().phase(), HintPhase::Idle);
        assert_eq!(device.start_hinting(Instant::now()).unwrap().get(), 0x8000_0008);
        // A hold can be given back once the driver's queue runs.
        assert_eq!(device.requests().hold().unwrap().state, HoldState::Paused);
        assert!(device.requests().is_stopped());
    }

    #[test]
    fn nothing_is_released_that_a_driver_may_use_without_a_word() {
        let mut device = device();
        let negotiated = Features::VERSION_1;
        let state = BalloonState { negotiated, ..state() };
        device.restore(state, Instant::now()).unwrap();
        assert!(device.reclaim().0.is_empty());
        assert_eq!((device.held().len(), device.config().poison_val), (30, 0));
    }

    #[test]
    fn states_that_cannot_be_change_nothing() {
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
