//! Who has to hear of discards: whatever knows contents of the guest's pages from before.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use page_set::PageSet;

/// Hears of every discard of a guest's pages, whoever discards them and by whichever copy of its
/// [`MemoryMap`](crate::MemoryMap).
///
/// Both calls are made on the thread that discards, which may be one that the guest waits for: so
/// they must be short.
pub trait ObserveDiscards: Send + Sync {
    /// `pages` are about to be discarded. None of them is before this returns.
    fn before(&self, pages: &PageSet) {
        let _ = pages;
    }

    /// `pages` were discarded, but for those that the host did not take.
    fn after(&self, pages: &PageSet) {
        let _ = pages;
    }
}

/// Those who hear of the discards of one guest.
#[derive(Default)]
pub(crate) struct Observers(RwLock<Vec<Arc<dyn ObserveDiscards>>>);

impl Observers {
    pub(crate) fn add(&self, observer: Arc<dyn ObserveDiscards>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(observer);
    }

    /// Has everybody hear of a discard, before it and after it.
    pub(crate) fn told<T>(&self, pages: &PageSet, discard: impl FnOnce() -> T) -> T {
        let observers = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        observers.iter().for_each(|observer| observer.before(pages));
        let done = discard();
        observers.iter().for_each(|observer| observer.after(pages));
        done
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observers").finish_non_exhaustive()
    }
}
