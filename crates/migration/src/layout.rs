//! The regions of a guest's memory.

use page_set::PageRange;

/// Limit of the regions: KVM has some 32 thousand slots, but no machine needs more than a few, and
/// a peer can cause this process to allocate a file or a mapping for each.
pub const MAX_REGIONS: usize = 64;

/// The regions of a guest's memory in pages of 4 KiB, by address, none empty, none overlapping, at
/// most [`MAX_REGIONS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLayout {
    regions: Vec<PageRange>,
}

/// Invalid regions: the fault of the side that described them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region, or too many.
    #[error("{count} memory regions; 1 to {MAX_REGIONS} are possible")]
    Count {
        /// The number of regions.
        count: usize,
    },
    /// A region is empty, or begins before the end of the one before it.
    #[error("the memory region of pages {0:?} is empty, or overlaps the one before it")]
    Order(PageRange),
}

impl GuestLayout {
    /// Checks the regions.
    ///
    /// # Errors
    /// They violate the invariants of the type.
    pub fn new(regions: Vec<PageRange>) -> Result<Self, LayoutError> {
        if !(1..=MAX_REGIONS).contains(&regions.len()) {
            return Err(LayoutError::Count { count: regions.len() });
        }
        let mut end = 0;
        for &region in &regions {
            if region.is_empty() || region.start() < end {
                return Err(LayoutError::Order(region));
            }
            end = region.end();
        }
        Ok(Self { regions })
    }

    /// The regions, by address.
    #[must_use]
    pub fn regions(&self) -> &[PageRange] {
        &self.regions
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        // Cannot overflow: they do not overlap, and page numbers end at 2^52.
        self.regions.iter().map(|region| region.pages()).sum()
    }

    /// True if one region contains all of `pages`.
    #[must_use]
    pub fn holds(&self, pages: PageRange) -> bool {
        self.regions.iter().any(|region| pages.is_within(*region))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    #[test]
    fn regions_are_ordered_and_disjoint() {
        let layout = GuestLayout::new(vec![range(0, 8), range(8, 1), range(100, 4)]).unwrap();
        assert_eq!(layout.pages(), 13);
        assert!(layout.holds(range(101, 3)));
        assert!(!layout.holds(range(101, 4)));
        assert!(!layout.holds(range(9, 1)));
        let order = |regions| GuestLayout::new(regions).unwrap_err();
        assert_eq!(order(vec![range(0, 8), range(7, 1)]), LayoutError::Order(range(7, 1)));
        assert_eq!(order(vec![range(0, 0)]), LayoutError::Order(range(0, 0)));
        assert_eq!(order(vec![]), LayoutError::Count { count: 0 });
        let many = (0..65).map(|at| range(at * 2, 1)).collect();
        assert_eq!(order(many), LayoutError::Count { count: 65 });
    }
}
