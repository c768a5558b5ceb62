//! A driver that was there before the device: its back end was started anew.

use std::time::Instant;

use super::Balloon;
use crate::reclaim::Reclaim;

impl<R: Reclaim> Balloon<R> {
    /// The driver did not start, it goes on: its queues stand where another
    /// device left them. `actual` and `poison_val` are what it said to that one.
    ///
    /// Which pages it gave is not known, and none of them is released: what is
    /// held, and so what may be released, is filled by inflate messages alone.
    /// The device only believes that there are so many, and takes it for no fault
    /// that as many come back which it does not hold.
    pub fn resume(&mut self, actual: u32, poison_val: u32, now: Instant) {
        self.config.actual = actual;
        self.config.poison_val = poison_val;
        self.inherited_pages = u64::from(actual).saturating_sub(self.held.len());
        if let Some(change) = &mut self.change {
            change.actual_is(actual, now);
        }
    }

    /// Pages that the guest gave before the device began to watch, at most.
    pub const fn inherited_pages(&self) -> u64 {
        self.inherited_pages
    }
}
