//! When requests to the guest were submitted, and how long they took.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use balloon_device::{MAX_OUTCOMES, RequestKind};

/// Most submission times that are kept: one for each request that can have an outcome, and one
/// for a request that is being submitted.
pub(crate) const MAX_TIMES: usize = MAX_OUTCOMES + 1;

/// Times of requests, which the device does not record.
#[derive(Debug, Default)]
pub(crate) struct RequestTimes {
    pub(crate) submitted: VecDeque<(u32, SubmittedRequest)>,
    /// Id, duration and arrival of the newest free pages.
    pub(crate) newest: Option<(u32, Duration, Instant)>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SubmittedRequest {
    pub(crate) at: Instant,
    pub(crate) timeout: Duration,
    pub(crate) kind: RequestKind,
}

impl RequestTimes {
    pub(crate) fn of(&self, id: u32) -> Option<SubmittedRequest> {
        self.submitted.iter().find(|(submitted, _)| *submitted == id).map(|(_, at)| *at)
    }
}
