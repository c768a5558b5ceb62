//! A buddy allocator by page number, as the scan sees it.

use std::collections::{BTreeMap, BTreeSet};

pub(crate) const MAX_ORDER: u32 = 5;

/// Free blocks by first page, with their orders.
#[derive(Default)]
pub(crate) struct Buddy {
    free: BTreeMap<u64, u32>,
}

impl Buddy {
    /// Creates an allocator with all of `zones` free, in the largest blocks.
    pub(crate) fn new(zones: &[(u64, u64)]) -> Self {
        let mut buddy = Self::default();
        for (start, end) in zones {
            for block in (*start..*end).step_by(1 << MAX_ORDER) {
                buddy.free.insert(block, MAX_ORDER);
            }
        }
        buddy
    }

    pub(crate) fn allocate(&mut self, order: u32) -> Option<u64> {
        let (block, found) = (order..=MAX_ORDER).find_map(|order| self.last_of(order))?;
        self.free.remove(&block);
        for lower in order..found {
            self.free.insert(block + (1 << lower), lower);
        }
        Some(block)
    }

    pub(crate) fn free(&mut self, mut block: u64, mut order: u32) {
        while order < MAX_ORDER && self.free.get(&(block ^ (1 << order))) == Some(&order) {
            self.free.remove(&(block ^ (1 << order)));
            block &= !(1 << order);
            order += 1;
        }
        assert!(self.free.insert(block, order).is_none(), "freed twice");
    }

    /// Returns the order of the free block that starts at `page`.
    pub(crate) fn order_at(&self, page: u64) -> Option<u32> {
        self.free.get(&page).copied()
    }

    pub(crate) fn has(&self, order: u32) -> bool {
        self.free.values().any(|free| *free == order)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.free.values().map(|order| 1 << order).sum()
    }

    /// Returns the pages in blocks of at least `order`.
    pub(crate) fn pages_from(&self, order: u32) -> BTreeSet<u64> {
        let large = self.free.iter().filter(|(_, free)| **free >= order);
        large.flat_map(|(block, order)| *block..block + (1 << order)).collect()
    }

    fn last_of(&self, order: u32) -> Option<(u64, u32)> {
        self.free.iter().rev().find(|(_, free)| **free == order).map(|(b, o)| (*b, *o))
    }
}
