//! A driver that was there before the device: its back end was started anew.

use std::time::Instant;

use super::BalloonDevice;
use crate::reclaim::Reclaim;

impl<R: Reclaim> BalloonDevice<R> {
    /// The driver did not start, it goes on: its queues stand where another
    /// device left them. `actual` and `poison_val` are what it said to that one.
    ///
    /// Which pages it gave is not known, and none of them is released: what is
    /// held, and so what may be released, is filled by inflate messages alone. Until
    /// a driver starts anew it is no fault that pages come back which the device does
    /// not hold. (How many there can be is not known either: a driver says what it
    /// holds after it gave.)
    pub fn resume(&mut self, actual: u32, poison_val: u32, now: Instant) {
        self.config.actual = actual;
        self.config.poison_val = poison_val;
        self.inherited = true;
        if let Some(change) = &mut self.change {
            change.actual_is(actual, now);
        }
    }

    /// True where the driver holds pages that the device did not see it give.
    pub const fn inherits(&self) -> bool {
        self.inherited
    }
}
