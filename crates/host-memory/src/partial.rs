//! Host pages of which the guest gave up only a part.

use page_set::{PAGE_BYTES, PageRange, PageSet};

use crate::{HostPages, MemoryMap, Piece};

/// What to do with parts of a transparent huge page. Parts of hugetlbfs pages always
/// wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PartialHuge {
    /// Release them, which splits the huge page. The default: Linux releases every page
    /// at some 0.1 ms for each huge page split (measured on 6.18 with
    /// `examples/floor.rs`), whereas waiting may release nothing.
    #[default]
    Split,
    /// Keep them, counted as waiting, until the guest gives up the rest.
    Wait,
}

impl MemoryMap {
    /// Removes from `pages` those whose host page must be released whole and is not
    /// completely in `pages`; returns them.
    pub(crate) fn take_partial(&self, pages: &mut PageSet, partial_huge: PartialHuge) -> PageSet {
        let whole = |host_pages| match host_pages {
            HostPages::Small => 1,
            HostPages::Transparent if partial_huge == PartialHuge::Split => 1,
            HostPages::Transparent | HostPages::Hugetlb { .. } => host_pages.largest_pages(),
        };
        let mut partial = PageSet::new();
        if self.regions().iter().all(|region| whole(region.host_pages()) == 1) {
            return partial;
        }
        for piece in pages.ranges().flat_map(|range| self.translate(range)).flatten() {
            let (head, tail) = ragged_edges(&piece, whole(piece.region.host_pages()));
            partial.extend([head, tail]);
        }
        pages.subtract(&partial);
        partial
    }
}

/// The pages of `piece` before its first and after its last whole host page.
fn ragged_edges(piece: &Piece<'_>, host_page_pages: u64) -> (PageRange, PageRange) {
    // Alignment is that of the file or the address space, not of the guest.
    let first = piece.start_bytes() / PAGE_BYTES;
    let into = first % host_page_pages;
    let head = if into == 0 { 0 } else { host_page_pages - into };
    let tail = (first + piece.pages.pages()) % host_page_pages;
    let (low, rest) = piece.pages.split_at(piece.pages.start() + head.min(piece.pages.pages()));
    let keep = rest.pages().saturating_sub(tail);
    (low, rest.split_at(rest.start() + keep).1)
}
