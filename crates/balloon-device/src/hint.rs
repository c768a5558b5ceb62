//! Free page hinting (virtio 1.3, section 5.5.6.5): the host asks, the guest
//! names what it does not use, and keeps it until it is told that it is done.
//!
//! Hints are a snapshot. The guest may take a page back at any time without a
//! word (Linux does when it runs short of memory), so nothing is released because
//! of a hint. See docs/protocol.md.

use std::time::Instant;

use balloon_abi::{HintCommand, HintId};
use page_set::PageSet;

use crate::fault::Fault;
use crate::layout::MemoryLayout;

/// How far a request for hints has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HintPhase {
    /// Nothing was asked, or what was asked is done.
    #[default]
    Idle,
    /// The guest was asked and has not begun.
    Asked,
    /// The guest names pages.
    Receiving,
    /// The guest has named all that it could.
    Complete,
    /// The host did not want more.
    Stopped,
    /// The driver went away; nothing that it named counts any more.
    Lost,
}

/// Why hints cannot be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// No driver is there, or it did not accept `FREE_PAGE_HINT`.
    #[error("guest: its driver gives no free page hints")]
    NotNegotiated,
}

/// The newest request for hints and what came of it.
#[derive(Debug)]
pub struct Hinting {
    /// What the configuration space shows.
    command: HintCommand,
    /// The newest number; each is used once.
    id: Option<HintId>,
    /// What the driver said last that its pages belong to.
    under: Option<HintId>,
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
            under: None,
            phase: HintPhase::Idle,
            started: None,
            pages: PageSet::new(),
            ignored_messages: 0,
        }
    }
}

impl Hinting {
    /// How far it has come.
    pub const fn phase(&self) -> HintPhase {
        self.phase
    }

    /// Number of the newest request.
    pub const fn id(&self) -> Option<HintId> {
        self.id
    }

    /// When the guest was asked.
    pub const fn started(&self) -> Option<Instant> {
        self.started
    }

    /// What it named so far. All of it is guest memory and was not in the balloon
    /// when it was named.
    pub const fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// Messages that came under a number that is not asked for (any more).
    pub const fn ignored_messages(&self) -> u64 {
        self.ignored_messages
    }

    /// What the configuration space shows.
    pub(crate) const fn command(&self) -> HintCommand {
        self.command
    }

    /// Asks anew, under a number that was never used. What came before is gone.
    pub(crate) fn start(&mut self, now: Instant) -> HintId {
        let id = self.id.map_or(HintId::FIRST, HintId::next);
        self.id = Some(id);
        self.command = HintCommand::Hint(id);
        self.phase = HintPhase::Asked;
        self.started = Some(now);
        self.pages = PageSet::new();
        id
    }

    /// No more hints are wanted; the guest keeps what it named.
    pub(crate) fn stop(&mut self) {
        self.command = HintCommand::Stop;
        if matches!(self.phase, HintPhase::Asked | HintPhase::Receiving) {
            self.phase = HintPhase::Stopped;
        }
    }

    /// The guest may use all that it named. Nobody may count on it any more, so it
    /// is forgotten.
    pub(crate) fn done(&mut self) {
        // A driver that came since was asked for nothing.
        if !matches!(self.phase, HintPhase::Idle | HintPhase::Lost) {
            self.command = HintCommand::Done;
        }
        self.phase = HintPhase::Idle;
        self.pages = PageSet::new();
    }

    /// A driver starts or has gone: it uses what it wants.
    pub(crate) fn reset(&mut self) {
        self.command = HintCommand::Stop;
        self.under = None;
        self.pages = PageSet::new();
        if self.phase != HintPhase::Idle {
            self.phase = HintPhase::Lost;
        }
    }

    /// The driver comes from another device, whose newest number was `last`. Whatever
    /// it named there it may use again.
    pub(crate) fn moved(&mut self, last: Option<HintId>) {
        self.reset();
        self.id = last;
        self.phase = HintPhase::Idle;
        if last.is_some() {
            self.command = HintCommand::Done;
        }
    }

    /// Guest memory is now at `layout`: what is gone is not free.
    pub(crate) fn forget_outside(&mut self, layout: &MemoryLayout) {
        layout.cut(&mut self.pages);
    }

    /// The driver says what its next pages belong to, or that there are no more.
    pub(crate) fn said(&mut self, number: u32) -> Result<(), Fault> {
        match HintCommand::from_u32(number) {
            HintCommand::Hint(id) if self.command == HintCommand::Hint(id) => {
                if self.phase != HintPhase::Asked {
                    return Err(Fault::StrayCommand);
                }
                self.under = Some(id);
                self.phase = HintPhase::Receiving;
            }
            HintCommand::Hint(id) => {
                self.under = None;
                if !self.was_given(id) {
                    return Err(Fault::StrayCommand);
                }
                // It began before it heard of the newer number.
                self.ignored_messages += 1;
            }
            HintCommand::Stop => {
                // One for an older number changes nothing.
                if self.accepts() {
                    self.phase = HintPhase::Complete;
                    self.command = HintCommand::Stop;
                }
                self.under = None;
            }
            HintCommand::Done => return Err(Fault::StrayCommand),
        }
        Ok(())
    }

    /// The driver names pages.
    pub(crate) fn named(&mut self, pages: &PageSet, held: &PageSet) -> Result<(), Fault> {
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

    /// Whether pages that come now belong to what is asked.
    fn accepts(&self) -> bool {
        let current = self.under.is_some_and(|id| self.command == HintCommand::Hint(id));
        current && self.phase == HintPhase::Receiving
    }

    fn was_given(&self, id: HintId) -> bool {
        let given = |newest: HintId| (HintId::FIRST.get()..=newest.get()).contains(&id.get());
        self.id.is_some_and(given)
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
        hinting.named(&set(start, 1), &PageSet::new()).unwrap();
    }

    #[test]
    fn a_round_begins_with_its_number_and_ends_with_stop() {
        let mut hinting = Hinting::default();
        assert_eq!(hinting.command().to_u32(), 0);
        name(&mut hinting, 1);
        let id = hinting.start(Instant::now()).get();
        assert_eq!((id, hinting.command().to_u32()), (0x8000_0000, id));
        name(&mut hinting, 2);
        hinting.said(id).unwrap();
        name(&mut hinting, 3);
        assert_eq!(hinting.said(id), Err(Fault::StrayCommand), "once is enough");
        name(&mut hinting, 4);
        hinting.said(0).unwrap();
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
    fn nothing_is_taken_under_an_old_number() {
        let mut hinting = Hinting::default();
        let old = hinting.start(Instant::now()).get();
        hinting.said(old).unwrap();
        name(&mut hinting, 1);
        let new = hinting.start(Instant::now()).get();
        assert_ne!(old, new);
        name(&mut hinting, 2);
        // The end of the old round is not that of the new one.
        hinting.said(0).unwrap();
        hinting.said(old).unwrap();
        name(&mut hinting, 3);
        assert_eq!((hinting.phase(), hinting.pages().len()), (HintPhase::Asked, 0));
        hinting.said(new).unwrap();
        name(&mut hinting, 4);
        hinting.said(old).unwrap();
        name(&mut hinting, 5);
        assert_eq!(*hinting.pages(), set(4, 1));
        hinting.stop();
        assert_eq!(hinting.phase(), HintPhase::Stopped);
        hinting.said(new).unwrap();
        name(&mut hinting, 6);
        assert_eq!(*hinting.pages(), set(4, 1), "what came in time still counts");
    }

    #[test]
    fn numbers_that_were_never_given_are_the_guests_fault() {
        let mut hinting = Hinting::default();
        for number in [1, 2, 0x8000_0000, u32::MAX] {
            assert_eq!(hinting.said(number), Err(Fault::StrayCommand), "{number:#x}");
        }
        hinting.start(Instant::now());
        assert_eq!(hinting.said(0x8000_0001), Err(Fault::StrayCommand));
        assert_eq!(hinting.phase(), HintPhase::Asked);
    }

    #[test]
    fn a_page_in_the_balloon_is_not_free() {
        let mut hinting = Hinting::default();
        let id = hinting.start(Instant::now()).get();
        hinting.said(id).unwrap();
        assert_eq!(hinting.named(&set(1, 9), &set(9, 9)), Err(Fault::FreeInBalloon));
        assert!(hinting.pages().is_empty());
    }

    #[test]
    fn a_driver_that_goes_takes_its_hints_along() {
        let mut hinting = Hinting::default();
        hinting.reset();
        assert_eq!(hinting.phase(), HintPhase::Idle);
        let id = hinting.start(Instant::now()).get();
        hinting.said(id).unwrap();
        name(&mut hinting, 1);
        hinting.reset();
        assert_eq!((hinting.phase(), hinting.pages().len()), (HintPhase::Lost, 0));
        hinting.done();
        assert_eq!((hinting.command(), hinting.phase()), (HintCommand::Stop, HintPhase::Idle));
        hinting.said(id).unwrap();
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
        Said(u32),
        Named(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let number = prop_oneof![0..3u32, 0x8000_0000..0x8000_0004u32];
        prop_oneof![
            Just(Op::Start),
            Just(Op::Stop),
            Just(Op::Done),
            Just(Op::Reset),
            number.prop_map(Op::Said),
            (0..64u64).prop_map(Op::Named),
        ]
    }

    proptest! {
        /// A page is in the set only where it was named between the present number
        /// and whatever the driver said next, since the present request.
        #[test]
        fn the_set_is_what_was_named_under_the_present_number(
            ops in proptest::collection::vec(op(), 0..60)
        ) {
            let (mut hinting, mut model) = (Hinting::default(), PageSet::new());
            let (mut asked, mut begun, mut shown) = (None, false, 0);
            for op in ops {
                match op {
                    Op::Start => {
                        let id = hinting.start(Instant::now()).get();
                        prop_assert!(asked.is_none_or(|old| id > old));
                        (asked, begun, shown) = (Some(id), false, id);
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
                    Op::Said(number) => {
                        let first = number == shown && number > 1
                            && hinting.phase() == HintPhase::Asked;
                        let repeated = number == shown && number > 1 && !first;
                        let _ = hinting.said(number);
                        match number {
                            0 if begun => (shown, begun) = (0, false),
                            1 => {}
                            _ if repeated => {}
                            _ => begun = first,
                        }
                    }
                    Op::Named(page) => {
                        hinting.named(&set(page, 1), &PageSet::new()).unwrap();
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
