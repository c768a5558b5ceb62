//! Page poison: the pattern with which the guest fills free pages (virtio 1.3, section
//! 5.5.6.6).
//!
//! Poison does not affect inflated pages: the guest's allocator checks it when the driver
//! allocates a page and writes it when the driver frees the page. A *reported* page stays
//! free. If its memory is released it reads as zeros, and a guest with any other poison
//! treats that as a write after free.

use balloon_abi::{ConfigSpace, Features};

/// Returns true if a free page of the guest may read as zeros.
///
/// Linux writes 0 with `init_on_free` and 0xaaaaaaaa with `page_poison`. Without
/// either it does not accept the feature.
pub(crate) const fn may_read_as_zeros(negotiated: Features, config: &ConfigSpace) -> bool {
    !negotiated.contains(Features::PAGE_POISON) || config.poison_val == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_negotiated_nonzero_poison_forbids_zeros() {
        let config = |poison_val| ConfigSpace { poison_val, ..ConfigSpace::default() };
        assert!(may_read_as_zeros(Features::PAGE_POISON, &config(0)));
        assert!(!may_read_as_zeros(Features::PAGE_POISON, &config(0xaaaa_aaaa)));
        assert!(!may_read_as_zeros(Features(u64::MAX), &config(1)));
        assert!(may_read_as_zeros(Features::REPORTING, &config(1)), "poison_val is ignored");
    }
}
