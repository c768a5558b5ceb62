//! Free-page report: names the blocks on the guest's free lists while the guest runs.
//!
//! Scans all page numbers once for each order, from the largest down. It does not walk the
//! lists: a scan by page number can drop the zone's lock at any page and continue there, a list
//! walk cannot. A pass visits every page at which a block of its order can start, and skips
//! free blocks of a higher order. So its cost is proportional to used memory plus free blocks.

use balloon_abi::Pfn;
use balloon_abi::request::ANSWER_VALUES;

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::end::End;
use crate::traits::{RequestKernel, RequestQueue, Slice};

/// Most blocks that one slice names.
pub(crate) const MAX_FOUND: usize = 256;

/// Pages that one slice visits: initially, and the limits.
const FIRST_VISITS: u32 = 64;
const MIN_VISITS: u32 = 16;
const MAX_VISITS: u32 = 256;

/// Lock time of a slice above which the next slice is halved. A third of the limit of 50 us,
/// since the next slice may hit colder memory.
const LONG_SLICE_NS: u64 = 16_000;

/// Limit of named pages in the answers to a request, as a multiple of guest memory (see
/// `docs/protocol.md`).
const MAX_TIMES_NAMED: u64 = 2;

/// Scans all zones for blocks of at least `2^min_granule_shift` bytes.
pub(crate) fn walk(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    found: &mut [Pfn; MAX_FOUND],
    (geometry, min_granule_shift): (Geometry, u32),
) -> Result<[u64; ANSWER_VALUES], End> {
    answer.record_free(kernel.free_pages());
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

/// One pass over all zones.
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
        // A block of an earlier pass may have been allocated, split and freed since.
        self.answer.send(self.queue)?;
        let mut number = 0;
        while let Some(zone) = self.kernel.zone(number) {
            let mut from = zone.start;
            while from < zone.end {
                self.queue.stopped()?;
                let slice = self.kernel.scan(number, from, self.order, *visits, self.found);
                self.name(&slice, budget)?;
                self.answer.record_lock(slice.lock_ns);
                *visits = next_visits(*visits, slice.lock_ns);
                // Guarantee progress, or this would loop infinitely.
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

/// Returns the number of pages that the next slice visits.
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
    fn the_slice_length_adapts_to_the_lock_time() {
        assert_eq!(next_visits(64, LONG_SLICE_NS + 1), 32);
        assert_eq!(next_visits(64, LONG_SLICE_NS), 64);
        assert_eq!(next_visits(64, 100), 128);
        assert_eq!(next_visits(MIN_VISITS, u64::MAX), MIN_VISITS);
        assert_eq!(next_visits(MAX_VISITS, 0), MAX_VISITS);
    }
}
