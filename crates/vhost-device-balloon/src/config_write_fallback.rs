//! Fallback for front ends that do not forward the driver's config writes.
//!
//! QEMU's generic vhost-user device without `set_config` (such as in 8.2) drops the guest's
//! writes to the configuration space. Without `actual` the back end uses the number of pages
//! that it counts in the balloon.

use std::time::{Duration, Instant};

/// Time after a message within which a driver writes `actual`. Linux writes it at least after
/// every few messages.
const CONFIG_WRITE_TIMEOUT: Duration = Duration::from_secs(1);

/// Detects that a front end does not forward config writes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ConfigWriteFallback {
    write_received: bool,
    since: Option<Instant>,
}

impl ConfigWriteFallback {
    /// Records a config write: the front end forwards them, so the fallback is off.
    pub(crate) const fn config_written(&mut self) {
        self.write_received = true;
        self.since = None;
    }

    /// Records a message that changed the balloon.
    pub(crate) const fn message_served(&mut self, now: Instant) {
        if !self.write_received {
            self.since = Some(now);
        }
    }

    /// Returns the time until the timeout, if one runs.
    pub(crate) fn left(&self, now: Instant) -> Option<Duration> {
        Some(CONFIG_WRITE_TIMEOUT.saturating_sub(now.saturating_duration_since(self.since?)))
    }

    /// Returns the time of the last message, once for each timeout.
    pub(crate) fn take_expired(&mut self, now: Instant) -> Option<Instant> {
        let expired = self.left(now) == Some(Duration::ZERO);
        self.since.take_if(|_| expired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_without_a_config_write_expires_once() {
        let (mut fallback, start) = (ConfigWriteFallback::default(), Instant::now());
        assert_eq!(fallback.take_expired(start), None);
        fallback.message_served(start);
        fallback.message_served(start + CONFIG_WRITE_TIMEOUT / 2);
        assert_eq!(fallback.take_expired(start + CONFIG_WRITE_TIMEOUT), None);
        assert_eq!(
            fallback.take_expired(start + CONFIG_WRITE_TIMEOUT * 2),
            Some(start + CONFIG_WRITE_TIMEOUT / 2)
        );
        assert_eq!(fallback.take_expired(start + CONFIG_WRITE_TIMEOUT * 3), None);
        fallback.message_served(start);
        fallback.config_written();
        fallback.message_served(start);
        assert_eq!(fallback.left(start), None);
    }
}
