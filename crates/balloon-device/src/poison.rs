//! What the guest fills free pages with (virtio 1.3, section 5.5.6.6).
//!
//! For a page that is inflated it does not matter: the driver took it from its
//! allocator, which looked at the poison then, and whatever frees it again writes
//! the poison. A page that is *reported* stays free: where its memory is released
//! it reads as zeros, and a guest that poisons with anything else takes that for
//! memory that somebody wrote to.

use balloon_abi::{ConfigSpace, Features};

/// True where a free page of the guest may turn into zeros.
///
/// Linux with `init_on_free` says 0, with `page_poison` 0xaaaaaaaa; one that does
/// neither does not accept the feature.
pub(crate) const fn allows_zeros(negotiated: Features, config: &ConfigSpace) -> bool {
    !negotiated.contains(Features::PAGE_POISON) || config.poison_val == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_poison_other_than_zero_that_was_negotiated_forbids_zeros() {
        let config = |poison_val| ConfigSpace { poison_val, ..ConfigSpace::default() };
        assert!(allows_zeros(Features::PAGE_POISON, &config(0)));
        assert!(!allows_zeros(Features::PAGE_POISON, &config(0xaaaa_aaaa)));
        assert!(!allows_zeros(Features(u64::MAX), &config(1)));
        assert!(allows_zeros(Features::REPORTING, &config(1)), "the field means nothing");
    }
}
