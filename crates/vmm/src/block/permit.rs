//! Limits what a request in progress may still do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shared by the I/O thread and the device: what the request in progress may still do.
#[derive(Debug, Default)]
pub(crate) struct Permit {
    /// The request must end before its next piece.
    interrupted: AtomicBool,
    /// The driver has reset the device: the request must not access the guest's memory. Locked
    /// during each access, so a reset waits for one piece at most.
    revoked: Mutex<bool>,
}

impl Permit {
    /// If true, the request ends before its next piece, and will be executed again.
    pub(crate) fn interrupt(&self, interrupted: bool) {
        self.interrupted.store(interrupted, Ordering::Relaxed);
    }

    /// Whether the request must end before its next piece.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Stops the request's access to the guest's memory. No access is in progress on return.
    pub(crate) fn revoke(&self) {
        *self.lock() = true;
    }

    /// Allows the next request to access the guest's memory.
    pub(crate) fn renew(&self) {
        *self.lock() = false;
    }

    /// Calls `touch`, which accesses the guest's memory; `None` if the permit is revoked.
    pub(crate) fn touch<T>(&self, touch: impl FnOnce() -> T) -> Option<T> {
        let revoked = self.lock();
        (!*revoked).then(touch)
    }

    /// Ignores poisoning: the lock protects a single flag.
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
