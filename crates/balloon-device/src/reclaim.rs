//! The interface to the code that manages the host's memory.

use page_set::PageSet;

/// Releases host memory behind guest pages.
pub trait Reclaim {
    /// Releases the memory of `pages`, now or later. The guest does not use them before
    /// [`retain`](Self::retain).
    fn release(&mut self, pages: &PageSet);

    /// Like [`release`](Self::release), but the guest may use the pages as soon as this
    /// returns: memory that is not released by then is never released.
    fn release_now(&mut self, pages: &PageSet);

    /// Releases the memory of `pages`, which are free in the guest, now or not at all. The
    /// guest uses none of them until this returns, and may use any of them then. None of
    /// them was passed to [`release`](Self::release).
    fn release_free(&mut self, pages: &PageSet);

    /// Cancels the release of `pages`: when this returns, no release of any of them is in
    /// progress or pending. They may still be in the balloon.
    fn cancel(&mut self, pages: &PageSet);

    /// Like [`cancel`](Self::cancel), for pages that leave the balloon. Also makes sure that
    /// the host has memory when the guest uses them.
    fn retain(&mut self, pages: &PageSet);

    /// Flushes releases that are delayed to be batched with later pages. Called when the
    /// guest reaches its target.
    fn flush(&mut self);
}
