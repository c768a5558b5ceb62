//! Requests to the guest for free page hints.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use balloon_abi::BALLOON_PAGE_BYTES;
use balloon_device::HintPhase;
use control::ControlError;
use control::api::{FreePageHints, HintOutcome, MAX_LISTED_RUNS, PageRun};
use page_set::{PageRange, PageSet};

use super::stats::whole_ms;
use super::{Shared, State};

impl Shared {
    /// Requests hints. One request at a time: the guest may use the hinted pages again only
    /// after [`finish_hints`](Self::finish_hints).
    pub(crate) fn begin_hints(&self) -> Result<u32, ControlError> {
        let mut state = self.state();
        let phase = state.device.hinting().phase();
        if !matches!(phase, HintPhase::Idle | HintPhase::Lost) {
            return Err(ControlError::Refused {
                what: "another request for the guest's free pages is running".into(),
                hint: "wait until the other request ends".into(),
            });
        }
        let started = state.device.start_hinting(Instant::now());
        let id = started.map_err(|error| ControlError::Refused {
            what: error.to_string(),
            hint: "use a guest driver with free-page-hint; see the features in the status".into(),
        })?;
        self.announce(state)?;
        Ok(id.get())
    }

    /// Waits until the guest has named all its free pages, for at most `timeout`.
    pub(super) fn await_hints(&self, id: u32, timeout: Duration) -> FreePageHints {
        let (mut hints, pages) = self.await_named(id, timeout);
        if hints.outcome == HintOutcome::Complete {
            // Without the lock: a guest may have named millions of runs.
            hints.list = pages.ranges().take(MAX_LISTED_RUNS).map(run).collect();
            hints.runs = pages.ranges().count() as u64;
        }
        hints
    }

    /// Like [`await_hints`](Self::await_hints), but returns the pages instead of the list.
    fn await_named(&self, id: u32, timeout: Duration) -> (FreePageHints, PageSet) {
        let end = Instant::now().checked_add(timeout);
        let mut state = self.state();
        loop {
            let hints = state.hints(id);
            let now = Instant::now();
            if hints.outcome != HintOutcome::InProgress || end.is_some_and(|end| now >= end) {
                let hinting = state.device.hinting();
                let newest = hinting.id().is_some_and(|newest| newest.get() == id);
                let pages = if newest { hinting.pages().clone() } else { PageSet::default() };
                return (hints, pages);
            }
            let left = end.map_or(Duration::MAX, |end| end - now);
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for request `id`, for at most `wait`, and returns the pages named by then. A
    /// partial result is valid. `None` if the request was replaced or lost.
    pub fn hinted_within(&self, id: u32, wait: Duration) -> Option<PageSet> {
        let (hints, pages) = self.await_named(id, wait);
        match hints.outcome {
            HintOutcome::Complete => {}
            HintOutcome::InProgress => tracing::info!(?wait, "the guest is still hinting"),
            HintOutcome::Replaced | HintOutcome::Lost => return None,
        }
        Some(pages)
    }

    /// Lets the guest use its hinted pages, even if it has not finished.
    pub(super) fn finish_hints(&self, id: u32) -> Result<(), ControlError> {
        let mut state = self.state();
        if state.device.hinting().id().is_none_or(|newest| newest.get() != id) {
            return Ok(());
        }
        let started = state.device.hinting().started();
        if state.device.hinting().phase() == HintPhase::Complete {
            state.note_hints(id, started.map_or(Duration::ZERO, |started| started.elapsed()));
        }
        state.device.hinting_done();
        self.changed();
        self.announce(state)
    }
}

impl State {
    fn hints(&self, id: u32) -> FreePageHints {
        let hinting = self.device.hinting();
        let newest = hinting.id().is_some_and(|newest| newest.get() == id);
        let outcome = match hinting.phase() {
            _ if !newest => HintOutcome::Replaced,
            HintPhase::Requested | HintPhase::Receiving => HintOutcome::InProgress,
            HintPhase::Complete => HintOutcome::Complete,
            HintPhase::Lost => HintOutcome::Lost,
            HintPhase::Idle | HintPhase::Stopped => HintOutcome::Replaced,
        };
        let mut hints = FreePageHints {
            id,
            outcome,
            elapsed_ms: hinting.started().map_or(0, |at| whole_ms(at.elapsed())),
            ..FreePageHints::default()
        };
        if newest {
            hints.pages = hinting.pages().len();
            hints.bytes = hints.pages * BALLOON_PAGE_BYTES;
        }
        hints
    }
}

fn run(range: PageRange) -> PageRun {
    PageRun { start: range.start(), pages: range.pages() }
}
