//! Timing of one change of the balloon, measured on the host.
//!
//! The stages are those of the 2016 measurement. From an unmodified guest the host
//! sees only config reads, messages and config writes. So *allocate* is the time from a
//! config read to the next message: the guest allocates its blocks, and the notification
//! reaches the host. *Send* is the wall time minus the other three stages.

use std::time::{Duration, Instant};

/// The four stages of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// Guest: allocates blocks (inflate) or collects them (deflate).
    pub allocate: Duration,
    /// Transport of messages, in both directions.
    pub send: Duration,
    /// Host: translates messages to host address ranges.
    pub translate: Duration,
    /// Host: releases memory.
    pub release: Duration,
}

/// One change of the target and its timing.
#[derive(Clone, Debug)]
pub struct Change {
    from_pages: u32,
    to_pages: u32,
    started: Instant,
    read_at: Option<Instant>,
    reached_at: Option<Instant>,
    allocate: Duration,
    messages: u64,
    drains: u64,
}

impl Change {
    /// Starts a change from `from_pages` to the target `to_pages`.
    pub const fn new(from_pages: u32, to_pages: u32, now: Instant) -> Self {
        Self {
            from_pages,
            to_pages,
            started: now,
            read_at: None,
            reached_at: None,
            allocate: Duration::ZERO,
            messages: 0,
            drains: 0,
        }
    }

    /// Records that the guest read the target, when its balloon was `actual` pages. If that
    /// is the target already, the guest does nothing and writes nothing.
    pub const fn config_read(&mut self, actual: u32, now: Instant) {
        self.read_at = Some(now);
        if actual == self.to_pages {
            self.actual_is(actual, now);
        }
    }

    /// Records a notification of a queue.
    pub fn notified(&mut self, now: Instant) {
        if let Some(read_at) = self.read_at.take() {
            self.allocate += now.duration_since(read_at);
        }
    }

    /// Records the messages that were served on one notification.
    pub const fn served(&mut self, messages: usize) {
        self.messages += messages as u64;
        self.drains += 1;
    }

    /// Records the size of the balloon: the guest's write to `actual`, or 0 on a reset.
    pub const fn actual_is(&mut self, actual: u32, now: Instant) {
        if actual == self.to_pages {
            if self.reached_at.is_none() {
                self.reached_at = Some(now);
            }
        } else {
            self.reached_at = None;
        }
    }

    /// Balloon pages at the start.
    pub const fn from_pages(&self) -> u32 {
        self.from_pages
    }

    /// The target in balloon pages.
    pub const fn to_pages(&self) -> u32 {
        self.to_pages
    }

    /// Messages served so far.
    pub const fn messages(&self) -> u64 {
        self.messages
    }

    /// Notifications on which messages were served.
    pub const fn notifications(&self) -> u64 {
        self.drains
    }

    /// When the guest first reported that it reached the target.
    pub const fn reached_at(&self) -> Option<Instant> {
        self.reached_at
    }

    /// When the target was set.
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// Time since the start.
    pub fn wall(&self, end: Instant) -> Duration {
        end.saturating_duration_since(self.started)
    }

    /// Returns the stages up to `end`, given the host's own work since the start.
    pub fn stages(&self, end: Instant, translate: Duration, release: Duration) -> Stages {
        let send = self
            .wall(end)
            .saturating_sub(self.allocate)
            .saturating_sub(translate)
            .saturating_sub(release);
        Stages { allocate: self.allocate, send, translate, release }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_stages_add_up_to_the_wall_time() {
        let start = Instant::now();
        let mut change = Change::new(0, 8, start);
        change.config_read(0, start + ms(1));
        change.notified(start + ms(11));
        change.served(3);
        // No config read before it: the guest allocated no blocks.
        change.notified(start + ms(20));
        change.served(1);
        change.actual_is(8, start + ms(30));
        assert_eq!(change.reached_at(), Some(start + ms(30)));
        assert_eq!((change.messages(), change.notifications()), (4, 2));
        let stages = change.stages(start + ms(30), ms(2), ms(5));
        let expected = Stages { allocate: ms(10), send: ms(13), translate: ms(2), release: ms(5) };
        assert_eq!(stages, expected);
    }

    #[test]
    fn send_is_zero_if_work_exceeds_wall_time() {
        // Background work overlaps with the guest's.
        let start = Instant::now();
        let change = Change::new(0, 8, start);
        let stages = change.stages(start + ms(3), ms(2), ms(5));
        assert_eq!(stages.send, Duration::ZERO);
        assert_eq!(change.wall(start - ms(1)), Duration::ZERO);
    }

    #[test]
    fn only_the_first_time_at_the_target_counts_until_the_guest_leaves_it() {
        let start = Instant::now();
        let mut change = Change::new(4, 8, start);
        change.actual_is(7, start + ms(1));
        assert_eq!(change.reached_at(), None);
        change.actual_is(8, start + ms(2));
        change.actual_is(8, start + ms(3));
        assert_eq!(change.reached_at(), Some(start + ms(2)));
        change.actual_is(0, start + ms(4));
        assert_eq!(change.reached_at(), None);
    }

    #[test]
    fn a_guest_at_the_target_reaches_it_on_the_config_read() {
        let start = Instant::now();
        let mut change = Change::new(4, 4, start);
        change.config_read(3, start + ms(1));
        assert_eq!(change.reached_at(), None);
        change.config_read(4, start + ms(2));
        change.config_read(4, start + ms(3));
        assert_eq!(change.reached_at(), Some(start + ms(2)));
    }
}
