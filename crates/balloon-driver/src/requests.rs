//! Executes the host's requests, one after the other.

use balloon_abi::Pfn;
use balloon_abi::request::{ANSWER_VALUES, Caches, Command, Outcome};

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::end::End;
use crate::hold_request as hold;
use crate::inbox::{ReceivedRequest, Stop};
use crate::snapshot::{self, MAX_FOUND};
use crate::traits::{CachePages, RequestKernel, RequestQueue};

/// State for executing requests.
pub struct RequestHandler {
    geometry: Geometry,
    answer: Answer,
    found: [Pfn; MAX_FOUND],
}

impl RequestHandler {
    /// Creates the state. Does not use orders that a record cannot name.
    pub const fn new(geometry: Geometry) -> Self {
        let geometry = geometry.within_limits();
        Self { geometry, answer: Answer::new(), found: [Pfn(0); MAX_FOUND] }
    }

    /// Executes all waiting requests, or until the device is gone. Returns the number of
    /// requests.
    pub fn run(&mut self, kernel: &mut impl RequestKernel, queue: &mut impl RequestQueue) -> u64 {
        let mut requests = 0;
        while let Some(request) = queue.begin_next() {
            requests += 1;
            if self.execute(request, kernel, queue) == Err(Stop::Gone) {
                break;
            }
        }
        requests
    }

    /// Executes and answers a request, and waits until the host has returned the answers.
    fn execute(
        &mut self,
        request: ReceivedRequest,
        kernel: &mut impl RequestKernel,
        queue: &mut impl RequestQueue,
    ) -> Result<(), Stop> {
        self.answer.begin(request.id, queue.now_ns());
        let result = match request.command {
            Ok(command) => queue
                .stopped()
                .map_err(End::Stop)
                .and_then(|()| self.run_command(request.id, command, kernel, queue)),
            Err(outcome) => Err(End::Outcome(outcome, 0)),
        };
        let is_hold = matches!(request.command, Ok(Command::HoldFree { .. }));
        let (outcome, values, stop) = match result {
            Ok(values) => (Outcome::Done, values, None),
            Err(End::Stop(Stop::Cancelled)) => {
                (Outcome::Cancelled, [0; ANSWER_VALUES], Some(Stop::Cancelled))
            }
            Err(End::Outcome(outcome, value)) => {
                self.answer.end(queue, outcome, [value, 0, 0, 0])?;
                return queue.finish();
            }
            Err(End::Stop(stop)) => {
                if is_hold {
                    hold::conclude(kernel, Some(stop));
                }
                return Err(stop);
            }
        };
        if is_hold && stop.is_some() {
            hold::start_ending(kernel);
        }
        let ended = self.answer.end(queue, outcome, values).and_then(|()| queue.finish());
        if is_hold {
            hold::conclude(kernel, ended.err().or(stop));
        }
        ended
    }

    fn run_command(
        &mut self,
        id: u32,
        command: Command,
        kernel: &mut impl RequestKernel,
        queue: &mut impl RequestQueue,
    ) -> Result<[u64; ANSWER_VALUES], End> {
        let Self { geometry, answer, found } = self;
        match command {
            Command::DropCaches(caches) => drop_caches(caches, kernel, queue),
            Command::ReportFree { min_granule_shift } => {
                snapshot::walk(kernel, queue, answer, found, (*geometry, min_granule_shift))
            }
            Command::HoldFree { reserve_pages } => {
                hold::take(kernel, queue, answer, *geometry, (id, reserve_pages))
            }
            Command::ReleaseHold { hold } => hold::release(kernel, hold),
            // Unreachable: the inbox handles a cancel immediately.
            Command::Cancel => Err(End::Outcome(Outcome::BadArgument, 0)),
        }
    }
}

/// Drops one cache after the other. A cancel cannot stop the kernel within one.
fn drop_caches(
    caches: Caches,
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
) -> Result<[u64; ANSWER_VALUES], End> {
    let CachePages { page_cache, slab } = kernel.cache_pages();
    // Page cache first: dropping inodes would drop their pages too, without a check for a
    // cancel.
    for part in [Caches::PAGE_CACHE, Caches::SLAB] {
        if caches.contains(part) {
            queue.stopped()?;
            let dropped = kernel.drop_caches(part);
            dropped.map_err(|error| End::Outcome(Outcome::Failed, error.0.into()))?;
        }
    }
    let after = kernel.cache_pages();
    Ok([page_cache, after.page_cache, slab, after.slab])
}
