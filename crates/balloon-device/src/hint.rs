//! Free page hinting (virtio 1.3, section 5.5.6.5): the host requests hints, and the guest
//! names free pages and keeps them allocated until the host sends `DONE`.
//!
//! The guest may use a hinted page again at any time without notice (Linux does when
//! memory is low), so the device releases no memory because of a hint. See
//! docs/protocol.md.

use std::time::Instant;

use balloon_abi::{HintCommand, HintId};
use page_set::PageSet;

use crate::fault::Fault;
use crate::layout::MemoryLayout;

/// Progress of a request for hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HintPhase {
    /// No request, or `DONE` was sent.
    #[default]
    Idle,
    /// The guest has not answered yet.
    Requested,
    /// The guest names pages.
    Receiving,
    /// The guest has named all its free pages.
    Complete,
    /// The host stopped the request.
    Stopped,
    /// The driver was reset, so its hints are void.
    Lost,
}

/// Why hints cannot be requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// No driver runs, or it did not accept `FREE_PAGE_HINT`.
    #[error("guest: its driver does not support free page hints")]
    NotNegotiated,
}

/// The newest request for hints and its state.
#[derive(Debug)]
pub struct Hinting {
    /// The value in the configuration space.
    command: HintCommand,
    /// The newest command id; each is used once.
    id: Option<HintId>,
    /// The id that the driver sent last: its next pages belong to it.
    received_id: Option<HintId>,
    phase: HintPhase,
    started: Option<Instant>,
    pages: PageSet,
    ignored_messages: u64,
}

impl Default for Hinting {
    fn default() -> Self {
        Self {
            command: HintCommand::Stop,
            id: None,
            received_id: None,
            phase: HintPhase::Idle,
            started: None,
            pages: PageSet::new(),
            ignored_messages: 0,
        }
    }
}

impl Hinting {
    /// Progress of the newest request.
    pub const fn phase(&self) -> HintPhase {
        self.phase
    }

    /// Command id of the newest request.
    pub const fn id(&self) -> Option<HintId> {
        self.id
    }

    /// When the newest request started.
    pub const fn started(&self) -> Option<Instant> {
        self.started
    }

    /// Pages named so far. All are guest memory and were not in the balloon when the guest
    /// named them.
    pub const fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// Messages under a command id that is not current.
    pub const fn ignored_messages(&self) -> u64 {
        self.ignored_messages
    }

    /// The value for the configuration space.
    pub(crate) const fn command(&self) -> HintCommand {
        self.command
    }

    /// Starts a request under an unused id and forgets all earlier hints.
    pub(crate) fn start(&mut self, now: Instant) -> HintId {
        let id = self.id.map_or(HintId::FIRST, HintId::next);
        self.id = Some(id);
        self.command = HintCommand::Hint(id);
        self.phase = HintPhase::Requested;
        self.started = Some(now);
        self.pages = PageSet::new();
        id
    }

    /// Stops the request. The guest keeps the hinted pages allocated.
    pub(crate) fn stop(&mut self) {
        self.command = HintCommand::Stop;
        if matches!(self.phase, HintPhase::Requested | HintPhase::Receiving) {
            self.phase = HintPhase::Stopped;
        }
    }

    /// Ends the request. The guest may use the hinted pages, so they are forgotten.
    pub(crate) fn done(&mut self) {
        // After a reset the new driver has received no request.
        if !matches!(self.phase, HintPhase::Idle | HintPhase::Lost) {
            self.command = HintCommand::Done;
        }
        self.phase = HintPhase::Idle;
        self.pages = PageSet::new();
    }

    /// Handles the start or the end of a driver: the guest may use every page.
    pub(crate) fn reset(&mut self) {
        self.command = HintCommand::Stop;
        self.received_id = None;
        self.pages = PageSet::new();
        if self.phase != HintPhase::Idle {
            self.phase = HintPhase::Lost;
        }
    }

    /// Restores a driver from another device whose newest command id was `last`. The guest
    /// may use the pages that it hinted there.
    pub(crate) fn restore(&mut self, last: Option<HintId>) {
        self.reset();
        self.id = last;
        self.phase = HintPhase::Idle;
        if last.is_some() {
            self.command = HintCommand::Done;
        }
    }

    /// Forgets pages outside of `layout`, the new layout of guest memory.
    pub(crate) fn forget_outside(&mut self, layout: &MemoryLayout) {
        layout.cut(&mut self.pages);
    }

    /// Handles a command from the driver: the id of its next pages, or the end.
    pub(crate) fn receive_command(&mut self, number: u32) -> Result<(), Fault> {
        match HintCommand::from_u32(number) {
            HintCommand::Hint(id) if self.command == HintCommand::Hint(id) => {
                if self.phase != HintPhase::Requested {
                    return Err(Fault::StrayCommand);
                }
                self.received_id = Some(id);
                self.phase = HintPhase::Receiving;
            }
            HintCommand::Hint(id) => {
                self.received_id = None;
                if !self.was_issued(id) {
                    return Err(Fault::StrayCommand);
                }
                // It started before it received the newer id.
                self.ignored_messages += 1;
            }
            HintCommand::Stop => {
                // The end of an older request changes nothing.
                if self.accepts() {
                    self.phase = HintPhase::Complete;
                    self.command = HintCommand::Stop;
                }
                self.received_id = None;
            }
            HintCommand::Done => return Err(Fault::StrayCommand),
        }
        Ok(())
    }

    /// Handles pages from the driver.
    pub(crate) fn receive_pages(&mut self, pages: &PageSet, held: &PageSet) -> Result<(), Fault> {
        if !self.accepts() {
            self.ignored_messages += 1;
            return Ok(());
        }
        if pages.intersects(held) {
            return Err(Fault::FreeInBalloon);
        }
        self.pages.union_with(pages);
        Ok(())
    }

    /// Returns true if the driver's next pages belong to the current request.
    fn accepts(&self) -> bool {
        let current = self.received_id.is_some_and(|id| self.command == HintCommand::Hint(id));
        current && self.phase == HintPhase::Receiving
    }

    fn was_issued(&self, id: HintId) -> bool {
        let issued = |newest: HintId| (HintId::FIRST.get()..=newest.get()).contains(&id.get());
        self.id.is_some_and(issued)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use page_set::PageRange;
    use proptest::prelude::*;

    fn set(start: u64, pages: u64) -> PageSet {
        PageRange::new(start, pages).unwrap().into()
    }

    fn name(hinting: &mut Hinting, start: u64) {
        hinting.receive_pages(&set(start, 1), &PageSet::new()).unwrap();
    }

    #[test]
    fn a_request_starts_with_its_id_and_ends_with_stop() {
        let mut hinting = Hinting::default();
        assert_eq!(hinting.command().to_u32(), 0);
        name(&mut hinting, 1);
        let id = hinting.start(Instant::now()).get();
        assert_eq!((id, hinting.command().to_u32()), (0x8000_0000, id));
        name(&mut hinting, 2);
        hinting.receive_command(id).unwrap();
        name(&mut hinting, 3);
        assert_eq!(
            hinting.receive_command(id),
            Err(Fault::StrayCommand),
            "the id may be sent once"
        );
        name(&mut hinting, 4);
        hinting.receive_command(0).unwrap();
        assert_eq!(hinting.phase(), HintPhase::Complete);
        name(&mut hinting, 5);
        assert_eq!(*hinting.pages(), set(3, 2));
        assert_eq!(hinting.ignored_messages(), 3);
        assert_eq!(hinting.command().to_u32(), 0);
        hinting.done();
        assert_eq!((hinting.command().to_u32(), hinting.phase()), (1, HintPhase::Idle));
        assert!(hinting.pages().is_empty());
    }

    #[test]
    fn pages_under_an_old_id_are_ignored() {
        let mut hinting = Hinting::default();
        let old = hinting.start(Instant::now()).get();
        hinting.receive_command(old).unwrap();
        name(&mut hinting, 1);
        let new = hinting.start(Instant::now()).get();
        assert_ne!(old, new);
        name(&mut hinting, 2);
        // The end of the old request does not end the new one.
        hinting.receive_command(0).unwrap();
        hinting.receive_command(old).unwrap();
        name(&mut hinting, 3);
        assert_eq!((hinting.phase(), hinting.pages().len()), (HintPhase::Requested, 0));
        hinting.receive_command(new).unwrap();
        name(&mut hinting, 4);
        hinting.receive_command(old).unwrap();
        name(&mut hinting, 5);
        assert_eq!(*hinting.pages(), set(4, 1));
        hinting.stop();
        assert_eq!(hinting.phase(), HintPhase::Stopped);
        hinting.receive_command(new).unwrap();
        name(&mut hinting, 6);
        assert_eq!(*hinting.pages(), set(4, 1), "earlier pages still count");
    }

    #[test]
    fn an_id_that_was_never_issued_is_the_guests_fault() {
        let mut hinting = Hinting::default();
        for number in [1, 2, 0x8000_0000, u32::MAX] {
            assert_eq!(hinting.receive_command(number), Err(Fault::StrayCommand), "{number:#x}");
        }
        hinting.start(Instant::now());
        assert_eq!(hinting.receive_command(0x8000_0001), Err(Fault::StrayCommand));
        assert_eq!(hinting.phase(), HintPhase::Requested);
    }

    #[test]
    fn a_page_in_the_balloon_is_not_free() {
        let mut hinting = Hinting::default();
        let id = hinting.start(Instant::now()).get();
        hinting.receive_command(id).unwrap();
        assert_eq!(hinting.receive_pages(&set(1, 9), &set(9, 9)), Err(Fault::FreeInBalloon));
        assert!(hinting.pages().is_empty());
    }

    #[test]
    fn a_reset_discards_the_hints() {
        let mut hinting = Hinting::default();
        hinting.reset();
        assert_eq!(hinting.phase(), HintPhase::Idle);
        let id = hinting.start(Instant::now()).get();
        hinting.receive_command(id).unwrap();
        name(&mut hinting, 1);
        hinting.reset();
        assert_eq!((hinting.phase(), hinting.pages().len()), (HintPhase::Lost, 0));
        hinting.done();
        assert_eq!((hinting.command(), hinting.phase()), (HintCommand::Stop, HintPhase::Idle));
        hinting.receive_command(id).unwrap();
        name(&mut hinting, 1);
        assert!(hinting.pages().is_empty());
        assert_ne!(hinting.start(Instant::now()).get(), id);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Start,
        Stop,
        Done,
        Reset,
        Command(u32),
        Pages(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let number = prop_oneof![0..3u32, 0x8000_0000..0x8000_0004u32];
        prop_oneof![
            Just(Op::Start),
            Just(Op::Stop),
            Just(Op::Done),
            Just(Op::Reset),
            number.prop_map(Op::Command),
            (0..64u64).prop_map(Op::Pages),
        ]
    }

    proptest! {
        /// A page is in the set only if the driver named it between the current id and its
        /// next command, since the current request.
        #[test]
        fn the_set_holds_the_pages_named_under_the_current_id(
            ops in proptest::collection::vec(op(), 0..60)
        ) {
            let (mut hinting, mut model) = (Hinting::default(), PageSet::new());
            let (mut current, mut begun, mut shown) = (None, false, 0);
            for op in ops {
                match op {
                    Op::Start => {
                        let id = hinting.start(Instant::now()).get();
                        prop_assert!(current.is_none_or(|old| id > old));
                        (current, begun, shown) = (Some(id), false, id);
                        model.clear();
                    }
                    Op::Stop => (shown, begun) = { hinting.stop(); (0, false) },
                    Op::Done => {
                        if !matches!(hinting.phase(), HintPhase::Idle | HintPhase::Lost) {
                            shown = 1;
                        }
                        hinting.done();
                        begun = false;
                        model.clear();
                    }
                    Op::Reset => {
                        hinting.reset();
                        (shown, begun) = (0, false);
                        model.clear();
                    }
                    Op::Command(number) => {
                        let first = number == shown && number > 1
                            && hinting.phase() == HintPhase::Requested;
                        let repeated = number == shown && number > 1 && !first;
                        let _ = hinting.receive_command(number);
                        match number {
                            0 if begun => (shown, begun) = (0, false),
                            1 => {}
                            _ if repeated => {}
                            _ => begun = first,
                        }
                    }
                    Op::Pages(page) => {
                        hinting.receive_pages(&set(page, 1), &PageSet::new()).unwrap();
                        if begun {
                            model.union_with(&set(page, 1));
                        }
                    }
                }
                prop_assert_eq!(hinting.pages(), &model);
                prop_assert_eq!(hinting.command().to_u32(), shown);
            }
        }
    }
}
