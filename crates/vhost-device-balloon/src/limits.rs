//! What a guest may cost, by the host and not by what its front end says.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How much larger than the host's memory a guest's may be, unless the operator says else.
///
/// What the process keeps of a guest grows with the guest's memory: at worst some 70 MiB for
/// each TiB, where one page of every 2 MiB is in its balloon. A front end's word for that
/// size is worth nothing, since a sparse file of any size costs it nothing. No guest of use
/// is larger than a few times its host, and at four times it is 0.03 % of the host's memory.
pub(crate) const HOST_MEMORIES: u64 = 4;

/// Bytes that one guest may have where the operator says nothing.
pub(crate) fn default_memory_bytes() -> u64 {
    let host = rustix::system::sysinfo();
    let unit = u64::from(host.mem_unit.max(1));
    host.totalram.saturating_mul(unit).saturating_mul(HOST_MEMORIES)
}

/// What the front ends of one guest may do, which may change between two of them.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Guest memory has to be sealed against shrinking.
    sealed_only: AtomicBool,
    memory_bytes: AtomicU64,
    /// Nanoseconds for which the next message is looked for without sleeping.
    busy_poll: AtomicU64,
}

/// The same for one front end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
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

    pub(crate) fn want_sealed(&self, sealed_only: bool) {
        self.sealed_only.store(sealed_only, Ordering::Relaxed);
    }

    pub(crate) fn take_memory(&self, bytes: u64) {
        self.memory_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn poll_busily(&self, limit: Duration) {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.busy_poll.store(nanos, Ordering::Relaxed);
    }

    pub(crate) fn terms(&self) -> Terms {
        Terms {
            sealed_only: self.sealed_only.load(Ordering::Relaxed),
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
            busy_poll: Duration::from_nanos(self.busy_poll.load(Ordering::Relaxed)),
        }
    }
}
