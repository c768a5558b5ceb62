//! Observers of discards: anything that has old contents of the guest's pages.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use page_set::PageSet;

/// Is notified of every discard of a guest's pages, in any thread and through any clone of its
/// [`MemoryMap`](crate::MemoryMap).
///
/// The discarding thread makes both calls. The guest may wait for it, so they must be short.
pub trait ObserveDiscards: Send + Sync {
    /// `pages` are about to be discarded. The discard begins after this returns.
    fn before(&self, pages: &PageSet) {
        let _ = pages;
    }

    /// `pages` were discarded, except those that the host refused.
    fn after(&self, pages: &PageSet) {
        let _ = pages;
    }
}

/// The observers of one guest.
#[derive(Default)]
pub(crate) struct Observers(RwLock<Vec<Arc<dyn ObserveDiscards>>>);

impl Observers {
    pub(crate) fn add(&self, observer: Arc<dyn ObserveDiscards>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(observer);
    }

    /// Runs `discard`, and notifies all observers before and after it.
    pub(crate) fn notify<T>(&self, pages: &PageSet, discard: impl FnOnce() -> T) -> T {
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
