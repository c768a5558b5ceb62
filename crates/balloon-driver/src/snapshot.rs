//! Names the blocks that the guest's free lists hold, while the guest goes on.
//!
//! One pass for each order, from the largest down, over page numbers and not over
//! the lists: a walk by number can let go of the zone's lock at any page and go
//! on from there, a walk along a list cannot. A pass looks at every page where a
//! block of its order can begin, and passes over free blocks of a higher order
//! whole, so that it costs as much as there is used memory and free blocks.

use balloon_abi::Pfn;
use balloon_abi::request::ANSWER_VALUES;

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::requests::End;
use crate::traits::{RequestKernel, RequestQueue, Slice};

/// Blocks that one slice names at most.
pub(crate) const MAX_FOUND: usize = 256;

/// Pages that one slice looks at: at first, and within what bounds.
const FIRST_VISITS: u32 = 64;
const MIN_VISITS: u32 = 16;
const MAX_VISITS: u32 = 256;

/// How long a slice may hold the zone's lock before the next one is halved: a
/// third of the 50 us that no slice shall exceed, since a slice can meet colder
/// memory than the one before.
const LONG_SLICE_NS: u64 = 16_000;

/// How often guest memory may be named in answers to one request (see
/// `docs/protocol.md`).
const MAX_TIMES_NAMED: u64 = 2;

/// Walks all zones for blocks of at least `2^min_granule_shift` bytes.
pub(crate) fn walk(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    found: &mut [Pfn; MAX_FOUND],
    (geometry, min_granule_shift): (Geometry, u32),
) -> Result<[u64; ANSWER_VALUES], End> {
    answer.note_free(kernel.free_pages());
    let mut budget = kernel.total_pages() * MAX_TIMES_NAMED;
    let mut visits = FIRST_VISITS;
    for order in geometry.orders().rev() {
        if geometry.granule_shift(order) < min_granule_shift {
            break;
        }
        if kernel.has_free(order) {
            let mut pass = Pass { kernel, queue, answer, found, geometry, order };
            pass.walk(&mut budget, &mut visits)?;
        }
    }
    Ok(answer.finish_records(queue)?)
}

/// One walk over all zones.
struct Pass<'a, K, Q> {
    kernel: &'a mut K,
    queue: &'a mut Q,
    answer: &'a mut Answer,
    found: &'a mut [Pfn; MAX_FOUND],
    geometry: Geometry,
    order: u32,
}

impl<K: RequestKernel, Q: RequestQueue> Pass<'_, K, Q> {
    fn walk(&mut self, budget: &mut u64, visits: &mut u32) -> Result<(), End> {
        // What an earlier pass named may have been used and freed in pieces.
        self.answer.send(self.queue)?;
        let mut number = 0;
        while let Some(zone) = self.kernel.zone(number) {
            let mut from = zone.start;
            while from < zone.end {
                self.queue.stopped()?;
                let slice = self.kernel.scan(number, from, self.order, *visits, self.found);
                self.name(&slice, budget)?;
                self.answer.note_lock(slice.lock_ns);
                *visits = next_visits(*visits, slice.lock_ns);
                // A kernel that does not get on would keep us here for ever.
                from = Pfn(slice.next.0.max(from.0 + 1));
            }
            number += 1;
        }
        Ok(())
    }

    fn name(&mut self, slice: &Slice, budget: &mut u64) -> Result<(), End> {
        let (pages, shift) =
            (self.geometry.block_pages(self.order), self.geometry.granule_shift(self.order));
        for pfn in self.found.iter().take(slice.found) {
            if *budget < pages {
                return Ok(());
            }
            *budget -= pages;
            self.answer.add(self.queue, *pfn, shift)?;
        }
        Ok(())
    }
}

/// How many pages the next slice shall look at.
const fn next_visits(visits: u32, lock_ns: u64) -> u32 {
    let next = if lock_ns > LONG_SLICE_NS {
        visits / 2
    } else if lock_ns < LONG_SLICE_NS / 4 {
        visits * 2
    } else {
        visits
    };
    if next < MIN_VISITS {
        MIN_VISITS
    } else if next > MAX_VISITS {
        MAX_VISITS
    } else {
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_as_long_as_the_lock_may_be_held() {
        assert_eq!(next_visits(64, LONG_SLICE_NS + 1), 32);
        assert_eq!(next_visits(64, LONG_SLICE_NS), 64);
        assert_eq!(next_visits(64, 100), 128);
        assert_eq!(next_visits(MIN_VISITS, u64::MAX), MIN_VISITS);
        assert_eq!(next_visits(MAX_VISITS, 0), MAX_VISITS);
    }
}
