//! Counters of a reclaimer.

use std::time::Instant;

use crate::{DiscardFailure, DiscardReport};

/// Counters of a reclaimer since its creation; the first three are gauges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReclaimerCounters {
    /// Given pages that are not yet released.
    pub pending_pages: u64,
    /// Pages being released right now.
    pub in_flight_pages: u64,
    /// Pages that wait for the rest of their huge page.
    pub waiting_pages: u64,
    /// Pages that the guest gave up.
    pub given_pages: u64,
    /// Pages taken back before they were released.
    pub retained_pages: u64,
    /// Times that taking pages back had to wait for a batch in flight.
    pub retain_waits: u64,
    /// Pages released.
    pub discarded_pages: u64,
    /// Pages that the host refused to release; they are not retried.
    pub failed_pages: u64,
    /// Pages outside guest memory; the caller should have checked.
    pub outside_pages: u64,
    /// Pages released again after a huge page had come back around them. The other counters
    /// do not include them.
    pub swept_pages: u64,
    /// Batches released.
    pub batches: u64,
    /// System calls to release.
    pub calls: u64,
    /// Ranges that the host refused.
    pub errors: u64,
    /// Times that `madvise` on huge pages failed: the host may lose memory that the guest gave up
    /// there, or the guest a huge page of memory that it took back.
    pub huge_failures: u64,
    /// When the last batch was finished.
    pub last_batch_at: Option<Instant>,
    /// Batches lost to a panic.
    pub panics: u64,
    /// The last range that the host refused.
    pub last_failure: Option<DiscardFailure>,
    /// Free pages released, which were never given; not in `discarded_pages`.
    pub free_pages: u64,
    /// Free pages not released because they are parts of huge pages.
    pub free_partial_pages: u64,
    /// System calls to release free pages; not in `calls`.
    pub free_calls: u64,
    /// Time spent releasing free pages, in nanoseconds.
    pub free_ns: u64,
    /// Time spent translating pages to regions, in nanoseconds.
    pub translate_ns: u64,
    /// Time spent releasing, in nanoseconds.
    pub release_ns: u64,
}

impl ReclaimerCounters {
    pub(crate) fn count(&mut self, report: &DiscardReport) {
        self.discarded_pages += report.pages;
        self.calls += report.calls;
        self.count_failures(report);
        self.translate_ns = saturating_add(self.translate_ns, report.translate.as_nanos());
        self.release_ns = saturating_add(self.release_ns, report.release.as_nanos());
    }

    pub(crate) fn count_free(&mut self, report: &DiscardReport, partial_pages: u64) {
        self.free_pages += report.pages;
        self.free_partial_pages += partial_pages;
        self.free_calls += report.calls;
        self.count_failures(report);
        self.free_ns = saturating_add(self.free_ns, report.release.as_nanos());
    }

    fn count_failures(&mut self, report: &DiscardReport) {
        self.failed_pages += report.failed_pages;
        self.outside_pages += report.outside_pages;
        self.errors += report.failure_count;
        self.last_failure = report.failures.last().copied().or(self.last_failure);
    }
}

fn saturating_add(sum: u64, ns: u128) -> u64 {
    sum.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
}
