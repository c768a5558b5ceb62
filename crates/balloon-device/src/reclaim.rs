//! What the device needs of whoever owns the host's memory.

use page_set::PageSet;

/// Releases host memory behind guest pages.
pub trait Reclaim {
    /// The guest does not use `pages` until [`retain`](Self::retain) says so;
    /// their memory may be released now or later.
    fn release(&mut self, pages: &PageSet);

    /// As [`release`](Self::release), for a guest that may use the pages as soon
    /// as this returns: what was not released then never is.
    fn release_now(&mut self, pages: &PageSet);

    /// `pages` are free in the guest, which uses none of them until this returns and
    /// may use any of them then: their memory is released now or not at all. None
    /// of them was given by [`release`](Self::release).
    fn release_free(&mut self, pages: &PageSet);

    /// None of `pages` is released from now on: when this returns, no release of any of
    /// them is under way or still to come. They may be in the balloon as before.
    fn cancel(&mut self, pages: &PageSet);

    /// `pages`, all of them out of the balloon, go back to the guest. As
    /// [`cancel`](Self::cancel); and the host sees to it that there is memory when they are used.
    fn retain(&mut self, pages: &PageSet);

    /// The guest has reached its target: what waits to be released together
    /// with later pages need not wait longer.
    fn flush(&mut self);
}
