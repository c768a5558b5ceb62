//! When the balloon gives pages back because the guest needs them.

/// The guest counts as short of memory below this part of what it has.
///
/// Reclaim runs whenever the page cache fills memory, which is no shortage;
/// Linux 5.8 took its own balloon's shrinker out because it could not tell the
/// two apart. `available` counts the cache as free, so it can.
const SHORTAGE_DIVISOR: u64 = 32;

/// Pages a shrinker may offer of a balloon of `held` pages when `available` of
/// `total` guest pages could still be had without swapping: what lifts the
/// guest out of the shortage, and nothing where there is none.
pub const fn shrinkable_pages(held: u64, available: u64, total: u64) -> u64 {
    let low = total / SHORTAGE_DIVISOR;
    let missing = low.saturating_sub(available);
    if missing < held { missing } else { held }
}

/// Balloon pages that a hold leaves free at least, where the guest has `total`
/// and its kernel keeps `reserved` to itself before it begins to reclaim. A hold
/// that left less would itself be the shortage that ends it.
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
        assert_eq!(shrinkable_pages(10, 1, 3200), 10, "not more than there is");
        assert_eq!(shrinkable_pages(0, 0, 0), 0);
    }

    #[test]
    fn a_hold_is_no_shortage() {
        let (total, reserved) = (1 << 20, 4096);
        let free = hold_floor_pages(total, reserved);
        assert_eq!(shrinkable_pages(total - free, free - reserved, total), 0);
    }
}
