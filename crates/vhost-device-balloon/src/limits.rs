//! Limits on the resources of one guest. They do not depend on the front end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Default limit of guest memory, as a multiple of the host's memory.
///
/// The process's bookkeeping grows with the guest's memory: at most 70 MiB per TiB, if one page
/// of every 2 MiB is in the balloon. The front end's memory size is untrusted: a sparse file of
/// any size costs it nothing. A useful guest is at most a few times larger than its host, and
/// four times the host's memory costs 0.03 % of it.
pub(crate) const HOST_MEMORY_FACTOR: u64 = 4;

/// Returns the default limit of guest memory, in bytes.
pub(crate) fn default_memory_bytes() -> u64 {
    let host = rustix::system::sysinfo();
    let unit = u64::from(host.mem_unit.max(1));
    host.totalram.saturating_mul(unit).saturating_mul(HOST_MEMORY_FACTOR)
}

/// Limits of one guest's front ends. Changes apply from the next front end on.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Guest memory must be sealed against shrinking.
    sealed_only: AtomicBool,
    memory_bytes: AtomicU64,
    /// Busy polling after each message, in nanoseconds.
    busy_poll: AtomicU64,
}

/// The limits of one session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionLimits {
    pub(crate) sealed_only: bool,
    pub(crate) memory_bytes: u64,
    pub(crate) busy_poll: Duration,
}

impl Limits {
    pub(crate) fn new() -> Self {
        Self {
            sealed_only: false.into(),
            memory_bytes: default_memory_bytes().into(),
            busy_poll: 0.into(),
        }
    }

    pub(crate) fn require_sealed(&self, sealed_only: bool) {
        self.sealed_only.store(sealed_only, Ordering::Relaxed);
    }

    pub(crate) fn set_max_memory(&self, bytes: u64) {
        self.memory_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_busy_poll(&self, limit: Duration) {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.busy_poll.store(nanos, Ordering::Relaxed);
    }

    pub(crate) fn for_session(&self) -> SessionLimits {
        SessionLimits {
            sealed_only: self.sealed_only.load(Ordering::Relaxed),
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
            busy_poll: Duration::from_nanos(self.busy_poll.load(Ordering::Relaxed)),
        }
    }
}
