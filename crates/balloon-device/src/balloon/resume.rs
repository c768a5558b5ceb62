//! Resuming a driver that started under another device, after a back-end restart.

use std::time::Instant;

use super::BalloonDevice;
use crate::reclaim::Reclaim;

impl<R: Reclaim> BalloonDevice<R> {
    /// Continues with a driver whose queues another device served before. `actual` and
    /// `poison_val` are the driver's writes to that device.
    ///
    /// The device does not know which pages are in the balloon and releases none of them:
    /// only inflate messages add pages to [`held`](Self::held). Until a driver starts, a
    /// deflate of pages that are not in `held` is no fault. (`actual` does not bound their
    /// number: a driver updates it after it inflates.)
    pub fn resume(&mut self, actual: u32, poison_val: u32, now: Instant) {
        self.config.actual = actual;
        self.config.poison_val = poison_val;
        self.inherited = true;
        if let Some(change) = &mut self.change {
            change.actual_is(actual, now);
        }
    }

    /// Returns true if the balloon may hold pages that were inflated under another device.
    pub const fn inherits(&self) -> bool {
        self.inherited
    }
}
