//! A [`Reclaim`] that checks its calls.

use balloon_device::{BalloonDevice, MemoryLayout, Reclaim};
use page_set::PageSet;

/// Tracks the pages that a host may release at any time.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// Guest memory.
    layout: MemoryLayout,
    may_release: PageSet,
}

impl Checked {
    pub(crate) fn set_layout(&mut self, layout: MemoryLayout) {
        self.layout = layout;
    }

    fn check(&self, pages: &PageSet) {
        for range in pages.ranges() {
            assert!(self.layout.covers(range), "release of {range:?}, outside of guest memory");
        }
    }
}

impl Reclaim for Checked {
    fn release(&mut self, pages: &PageSet) {
        self.check(pages);
        self.may_release.union_with(pages);
    }

    fn release_now(&mut self, pages: &PageSet) {
        self.check(pages);
    }

    fn release_free(&mut self, pages: &PageSet) {
        self.check(pages);
        assert!(!self.may_release.intersects(pages), "{pages:?} are both ballooned and reported");
    }

    fn cancel(&mut self, pages: &PageSet) {
        self.may_release.subtract(pages);
    }

    fn retain(&mut self, pages: &PageSet) {
        self.may_release.subtract(pages);
    }

    fn flush(&mut self) {}
}

/// Invariants between any two steps.
pub(crate) fn check(balloon: &BalloonDevice<Checked>) {
    for range in balloon.held().ranges() {
        assert!(balloon.layout().covers(range), "ballooned {range:?} is outside of guest memory");
    }
    let mut outside = balloon.reclaim().may_release.clone();
    outside.subtract(balloon.held());
    assert!(outside.is_empty(), "{outside:?} may be released but is not in the balloon");
}
