//! The hold: blocks that the guest keeps free for the host.
//!
//! Requests create and release a hold, and the guest may need its memory at any time, also
//! while it is being created. So its state is separate from the requests' state, behind a lock
//! that is never held across a wait.
//!
//! Blocks that the host was told are free stay unused until the host has returned the answer
//! that revokes them (or the device is gone). Each transition out of `Taking` and `Held` has
//! such an answer, and [`Hold::emptied`] follows it.

use balloon_abi::request::{ANSWER_VALUES, AnswerHeader, Outcome};

use crate::inbox::Stop;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// There is no hold.
    Empty,
    /// Blocks are being allocated, then named.
    Taking,
    /// The host has accepted all blocks.
    Held,
    /// The host cancelled the request; the answer is in flight.
    Ending,
    /// The guest needs the memory; the `HoldLost` answer is in flight.
    Losing,
}

/// The state of the one hold that a device may have.
#[derive(Debug)]
pub struct Hold {
    pub(crate) phase: Phase,
    pub(crate) id: u32,
    started_ns: u64,
    /// Balloon pages in the hold.
    pub(crate) pages: u64,
}

impl Hold {
    /// Creates the state without a hold.
    pub const fn new() -> Self {
        Self { phase: Phase::Empty, id: 0, started_ns: 0, pages: 0 }
    }

    /// Balloon pages in the hold, in any phase.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Balloon pages that [`lose`](Self::lose) would free.
    pub const fn losable_pages(&self) -> u64 {
        match self.phase {
            Phase::Taking | Phase::Held => self.pages,
            Phase::Empty | Phase::Ending | Phase::Losing => 0,
        }
    }

    /// Gives the hold up because the guest needs the memory. Returns the answer to send, or
    /// `None` if there is no hold or it is already ending.
    pub fn lose(&mut self, now_ns: u64) -> Option<AnswerHeader> {
        if !matches!(self.phase, Phase::Taking | Phase::Held) {
            return None;
        }
        self.phase = Phase::Losing;
        let mut values = [0; ANSWER_VALUES];
        values[0] = self.pages;
        let elapsed_ns = now_ns.saturating_sub(self.started_ns);
        Some(AnswerHeader { id: self.id, outcome: Outcome::HoldLost, elapsed_ns, values })
    }

    /// Returns true while the answer of [`lose`](Self::lose) is in flight.
    pub const fn is_losing(&self) -> bool {
        matches!(self.phase, Phase::Losing)
    }

    /// Records that all blocks were freed. Returns their balloon pages.
    pub fn emptied(&mut self) -> u64 {
        let pages = self.pages;
        *self = Self::new();
        pages
    }

    pub(crate) fn begin(&mut self, id: u32, started_ns: u64) -> bool {
        let free = self.phase == Phase::Empty;
        if free {
            *self = Self { phase: Phase::Taking, id, started_ns, pages: 0 };
        }
        free
    }

    pub(crate) fn taking(&self) -> Result<(), Stop> {
        if self.phase == Phase::Taking { Ok(()) } else { Err(Stop::Lost) }
    }

    /// Changes from `Taking` to `phase`, unless the hold was lost meanwhile.
    pub(crate) fn pass_to(&mut self, phase: Phase) {
        if self.phase == Phase::Taking {
            self.phase = phase;
        }
    }
}

impl Default for Hold {
    fn default() -> Self {
        Self::new()
    }
}
