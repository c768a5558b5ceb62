//! Guest memory statistics (virtio 1.3, section 5.5.6.3): the device keeps the
//! driver's one buffer and returns it to request new values.
//!
//! A second buffer is returned unread, so a guest cannot send values faster than the
//! device requests them.

use std::time::Instant;

use balloon_abi::stats::{self, Stat};

use crate::fault::Fault;
use crate::pending::{PendingChain, PendingChains};

/// Buffers that the device keeps.
const BUFFERS: usize = 1;

/// The newest statistics of the guest.
#[derive(Debug, Default)]
pub struct Stats {
    /// At most [`stats::MAX_STATS`], one of each tag, lowest first.
    values: Vec<Stat>,
    received: Option<Instant>,
    /// The driver that sent the values was reset or replaced.
    from_former_driver: bool,
    buffers: u64,
    pub(crate) pending: PendingChains,
    /// The driver's first buffer may be uninitialised, so its content is ignored.
    skip_first: bool,
}

impl Stats {
    /// The values, lowest tag first, with unknown tags.
    pub fn values(&self) -> &[Stat] {
        &self.values
    }

    /// When the values were received; `None` before the first.
    pub const fn received(&self) -> Option<Instant> {
        self.received
    }

    /// Returns true if the driver that sent the values was reset or replaced.
    pub const fn is_from_former_driver(&self) -> bool {
        self.from_former_driver
    }

    /// Buffers taken so far.
    pub const fn buffers(&self) -> u64 {
        self.buffers
    }

    /// Handles the start or the end of a driver. A legacy driver's first buffer is
    /// uninitialised (section 5.5.6.3.3).
    pub(crate) fn reset(&mut self, legacy: bool) {
        self.pending.forget();
        self.from_former_driver = true;
        self.skip_first = legacy;
    }

    /// Keeps the chain at `head` and stores the values in its `buffer`. Returns whether the
    /// chain was kept (if not, the caller returns it) and the guest's fault, if any.
    pub(crate) fn take(
        &mut self,
        head: u16,
        buffer: Result<&[u8], Fault>,
        now: Instant,
    ) -> (bool, Option<Fault>) {
        if self.pending.keep(PendingChain { head, buffer: None }, BUFFERS).is_err() {
            return (false, Some(Fault::ExtraStats));
        }
        // Keep it in any case: to return it requests the next one.
        self.buffers += 1;
        let skip = std::mem::take(&mut self.skip_first);
        match buffer {
            Ok(bytes) if !skip => self.set(bytes, now),
            // A driver without values may send an empty first buffer.
            Ok(_) | Err(Fault::EmptyMessage) => {}
            Err(fault) => return (true, Some(fault)),
        }
        (true, None)
    }

    /// Stores the values. The last entry of a tag wins.
    fn set(&mut self, bytes: &[u8], now: Instant) {
        self.values.clear();
        for stat in stats::decode(bytes) {
            match self.values.binary_search_by_key(&stat.tag, |known| known.tag) {
                Ok(at) => self.values[at] = stat,
                Err(at) => self.values.insert(at, stat),
            }
        }
        self.received = Some(now);
        self.from_former_driver = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use balloon_abi::StatTag;
    use proptest::prelude::*;

    fn stat(tag: u16, value: u64) -> Stat {
        Stat { tag: StatTag(tag), value }
    }

    fn bytes(stats: &[Stat]) -> Vec<u8> {
        stats.iter().flat_map(|stat| stat.to_bytes()).collect()
    }

    fn take(stats: &mut Stats, head: u16, values: &[Stat]) -> (bool, Option<Fault>) {
        stats.take(head, Ok(&bytes(values)), Instant::now())
    }

    #[test]
    fn values_are_sorted_by_tag_and_unknown_tags_are_kept() {
        let mut stats = Stats::default();
        assert_eq!(stats.received(), None);
        let values = [stat(0xffff, 7), stat(4, 1), stat(0, 2), stat(4, 3)];
        assert_eq!(take(&mut stats, 5, &values), (true, None));
        assert_eq!(stats.values(), [stat(0, 2), stat(4, 3), stat(0xffff, 7)]);
        assert!(stats.received().is_some());
    }

    #[test]
    fn a_second_buffer_is_returned_unread() {
        let mut stats = Stats::default();
        take(&mut stats, 0, &[stat(4, 1)]);
        for head in [0, 1] {
            assert_eq!(take(&mut stats, head, &[stat(4, 9)]), (false, Some(Fault::ExtraStats)));
        }
        assert_eq!(stats.values(), [stat(4, 1)]);
        assert_eq!(stats.pending.take().map(|chain| chain.head), Some(0));
        assert_eq!(take(&mut stats, 1, &[stat(4, 2)]), (true, None));
        assert_eq!((stats.values(), stats.buffers()), (&[stat(4, 2)][..], 2));
    }

    #[test]
    fn an_unreadable_buffer_is_kept_and_changes_no_value() {
        let mut stats = Stats::default();
        take(&mut stats, 0, &[stat(4, 1)]);
        for (fault, outcome) in [
            (Fault::EmptyMessage, None),
            (Fault::OversizedMessage, Some(Fault::OversizedMessage)),
            (Fault::BadDescriptor, Some(Fault::BadDescriptor)),
        ] {
            stats.pending.forget();
            assert_eq!(stats.take(0, Err(fault), Instant::now()), (true, outcome));
            assert_eq!(stats.values(), [stat(4, 1)]);
        }
    }

    #[test]
    fn values_of_a_former_driver_are_marked() {
        let mut stats = Stats::default();
        take(&mut stats, 0, &[stat(4, 1)]);
        assert!(!stats.is_from_former_driver());
        stats.reset(true);
        assert!(stats.is_from_former_driver());
        // The first buffer of a legacy driver is ignored.
        assert_eq!(take(&mut stats, 0, &[stat(4, 2)]), (true, None));
        assert_eq!(stats.values(), [stat(4, 1)]);
        stats.pending.forget();
        take(&mut stats, 0, &[stat(4, 3)]);
        assert_eq!(stats.values(), [stat(4, 3)]);
        assert!(!stats.is_from_former_driver());
    }

    proptest! {
        #[test]
        fn any_bytes_make_a_sorted_list_of_last_values(
            bytes in proptest::collection::vec(any::<u8>(), 0..=stats::MAX_STATS_BYTES)
        ) {
            let mut stats = Stats::default();
            prop_assert_eq!(stats.take(0, Ok(&bytes), Instant::now()), (true, None));
            let mut model = std::collections::BTreeMap::new();
            for entry in bytes.chunks_exact(10) {
                let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
                model.insert(number(&entry[..2]), number(&entry[2..]));
            }
            let values = stats.values().iter().map(|stat| (u64::from(stat.tag.0), stat.value));
            prop_assert!(values.eq(model));
            prop_assert!(stats.values().len() <= stats::MAX_STATS);
        }
    }
}
