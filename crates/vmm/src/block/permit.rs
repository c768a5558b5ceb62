//! What a request that is under way may still do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the request that is under way may still do.
#[derive(Debug, Default)]
pub(crate) struct Permit {
    /// It is to end at the next of its pieces, whether it is done or not.
    interrupted: AtomicBool,
    /// Its driver has reset the device: it touches the guest's memory no more. Locked while it
    /// does, which is for one piece: whoever resets the device waits for no longer.
    revoked: Mutex<bool>,
}

impl Permit {
    /// True has the request end soon, as good as not begun.
    pub(crate) fn interrupt(&self, interrupted: bool) {
        self.interrupted.store(interrupted, Ordering::Relaxed);
    }

    /// Whether it is to end soon.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// The request is not touching the guest's memory when this returns, and does not any more.
    pub(crate) fn revoke(&self) {
        *self.lock() = true;
    }

    /// The next request may touch it.
    pub(crate) fn renew(&self) {
        *self.lock() = false;
    }

    /// Does something with the guest's memory; `None` where the request may not.
    pub(crate) fn touch<T>(&self, touch: impl FnOnce() -> T) -> Option<T> {
        let revoked = self.lock();
        (!*revoked).then(touch)
    }

    /// One word is changed under it.
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
