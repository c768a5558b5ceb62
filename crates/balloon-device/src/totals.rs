//! Counts of ended requests by outcome.

use std::collections::BTreeMap;

use crate::request_failure::RequestResult;

/// The commands, without their arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RequestKind {
    /// Drop clean caches.
    DropCaches,
    /// Report free blocks.
    ReportFree,
    /// Hold free blocks.
    HoldFree,
    /// Release the hold.
    ReleaseHold,
}

impl RequestKind {
    /// The name in the control API and the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DropCaches => "drop-caches",
            Self::ReportFree => "report-free",
            Self::HoldFree => "hold-free",
            Self::ReleaseHold => "release-hold",
        }
    }
}

/// Ended requests by command and outcome (`done`, or
/// [`RequestFailure::name`](crate::RequestFailure::name)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestTotals(BTreeMap<(RequestKind, &'static str), u64>);

impl RequestTotals {
    /// Iterates over all nonzero counts, in a fixed order.
    pub fn iter(&self) -> impl Iterator<Item = (RequestKind, &'static str, u64)> + '_ {
        self.0.iter().map(|((kind, outcome), count)| (*kind, *outcome, *count))
    }

    pub(crate) fn count(&mut self, kind: RequestKind, outcome: &RequestResult) {
        let name = outcome.as_ref().map_or_else(|failure| failure.name(), |_| "done");
        let count = self.0.entry((kind, name)).or_default();
        *count = count.saturating_add(1);
    }
}
