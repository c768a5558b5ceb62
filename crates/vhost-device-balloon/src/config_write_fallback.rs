//! Front ends that keep what the driver writes to themselves.
//!
//! QEMU's generic device before it had a `set_config` (8.2 is one) drops the guest's
//! writes to the configuration space. Then nobody says how many pages the guest
//! holds, and the device's own count of them is the next best answer.

use std::time::{Duration, Instant};

/// Time after a message within which a driver writes its size. Linux does so after
/// every few messages at the latest.
const SILENCE: Duration = Duration::from_secs(1);

/// Whether a front end passes on writes, and when to believe that it does not.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Silence {
    heard: bool,
    since: Option<Instant>,
}

impl Silence {
    /// The front end passed on a write: it will do so again.
    pub(crate) const fn broken(&mut self) {
        self.heard = true;
        self.since = None;
    }

    /// A message changed what the guest holds.
    pub(crate) const fn changed(&mut self, now: Instant) {
        if !self.heard {
            self.since = Some(now);
        }
    }

    /// Time until it is over, where there is one.
    pub(crate) fn left(&self, now: Instant) -> Option<Duration> {
        Some(SILENCE.saturating_sub(now.saturating_duration_since(self.since?)))
    }

    /// When the last message came, once for each change that nobody told of in time.
    pub(crate) fn over_since(&mut self, now: Instant) -> Option<Instant> {
        let over = self.left(now) == Some(Duration::ZERO);
        self.since.take_if(|_| over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_nobody_told_of_is_told_of_once() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        assert_eq!(silence.over_since(start), None);
        silence.changed(start);
        silence.changed(start + SILENCE / 2);
        assert_eq!(silence.over_since(start + SILENCE), None);
        assert_eq!(silence.over_since(start + SILENCE * 2), Some(start + SILENCE / 2));
        assert_eq!(silence.over_since(start + SILENCE * 3), None);
        silence.changed(start);
        silence.broken();
        silence.changed(start);
        assert_eq!(silence.left(start), None);
    }
}
