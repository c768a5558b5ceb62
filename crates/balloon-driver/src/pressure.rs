//! When the balloon deflates because of memory pressure.

/// The guest is short of memory if less than this fraction of it is available.
///
/// Reclaim also runs when the page cache fills memory, which is no shortage. Linux 5.8 removed
/// its own balloon's shrinker because it could not distinguish the two. `available` counts the
/// cache as available, so it distinguishes them.
const SHORTAGE_DIVISOR: u64 = 32;

/// Returns the pages that a shrinker may reclaim from a balloon of `held` pages, when
/// `available` of `total` guest pages are available without swapping: enough to end the
/// shortage, and 0 without a shortage.
pub const fn shrinkable_pages(held: u64, available: u64, total: u64) -> u64 {
    let low = total / SHORTAGE_DIVISOR;
    let missing = low.saturating_sub(available);
    if missing < held { missing } else { held }
}

/// Returns the minimum of balloon pages that a hold leaves free, if the guest has `total` pages
/// and its kernel starts to reclaim below `reserved` free pages. A hold that left less would
/// itself cause the shortage that ends it.
pub const fn hold_floor_pages(total: u64, reserved: u64) -> u64 {
    (total / SHORTAGE_DIVISOR).saturating_add(reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_page_cache_is_no_shortage() {
        assert_eq!(shrinkable_pages(1000, 33, 1000), 0);
        assert_eq!(shrinkable_pages(1000, 1, 3200), 99);
        assert_eq!(shrinkable_pages(10, 1, 3200), 10, "not more than the balloon");
        assert_eq!(shrinkable_pages(0, 0, 0), 0);
    }

    #[test]
    fn a_hold_is_no_shortage() {
        let (total, reserved) = (1 << 20, 4096);
        let free = hold_floor_pages(total, reserved);
        assert_eq!(shrinkable_pages(total - free, free - reserved, total), 0);
    }
}
