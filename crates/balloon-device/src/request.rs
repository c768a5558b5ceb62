//! The operator's requests to the guest, and their outcomes.
//!
//! Requests wait in a bounded queue. The device sends one at a time, and the next one when
//! it has ended. Each id ends exactly once, in the order in which they were sent. The
//! caller sets deadlines and passes the time to [`GuestRequests::expire`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use balloon_abi::{AnswerHeader, Caches, Command, Features, MessageStatus, Outcome, Request};
use page_set::PageSet;

use crate::answer::{Answer, Blocks, FreeKind, FreePages, decode_blocks};
use crate::fault::Fault;
use crate::layout::MemoryLayout;
use crate::request_failure::{MAX_QUEUED_REQUESTS, RequestFailure, RequestResult, SubmitError};
use crate::totals::{RequestKind, RequestTotals};

/// Most outcomes that are kept until a caller takes them: one for each request that can
/// wait at once, and as many again for slow callers. An outcome can contain a set of
/// pages, which has at most one bit for each page of the guest.
pub const MAX_OUTCOMES: usize = 2 * (MAX_QUEUED_REQUESTS + 1);

/// Most ids of ended requests that are kept, to distinguish a late answer from an answer
/// to no request. A driver holds at most nine requests.
const MAX_ENDED: usize = 32;

/// Most cancels that wait until the driver provides a buffer: one for each request that
/// the driver may hold.
const MAX_CANCELS: usize = balloon_abi::request::MAX_WAITING_REQUESTS + 1;

/// A command to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRequest {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Report free blocks of at least `2^min_granule_shift` bytes.
    ReportFree {
        /// log2 of the smallest block in bytes, 12 to 30.
        min_granule_shift: u32,
    },
    /// Allocate free blocks, report them, and keep them.
    HoldFree {
        /// Balloon pages that the guest leaves free for its own use.
        reserve_pages: u64,
    },
    /// Release the hold.
    ReleaseHold,
}

impl DeviceRequest {
    /// The command without its argument.
    pub const fn kind(self) -> RequestKind {
        match self {
            Self::DropCaches(_) => RequestKind::DropCaches,
            Self::ReportFree { .. } => RequestKind::ReportFree,
            Self::HoldFree { .. } => RequestKind::HoldFree,
            Self::ReleaseHold => RequestKind::ReleaseHold,
        }
    }

    const fn free_kind(self) -> Option<FreeKind> {
        match self {
            Self::ReportFree { .. } => Some(FreeKind::Snapshot),
            Self::HoldFree { .. } => Some(FreeKind::Hold),
            Self::DropCaches(_) | Self::ReleaseHold => None,
        }
    }
}

/// State of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// The guest keeps it until it reports a loss.
    Kept,
    /// The guest's queues are stopped. A paused guest still keeps the hold.
    Paused,
    /// The release was sent and is not confirmed yet.
    Releasing,
}

/// Free pages that the guest keeps for the host.
#[derive(Clone, Debug)]
pub struct Hold {
    /// The held pages.
    pub pages: Arc<FreePages>,
    /// Its state.
    pub state: HoldState,
}

/// The requests of one device.
#[derive(Debug, Default)]
pub struct GuestRequests {
    usable: bool,
    /// The driver's queues are stopped.
    stopped: bool,
    last_id: u32,
    queued: VecDeque<WaitingRequest>,
    running: Option<Running>,
    /// Ids of requests to cancel.
    cancels: VecDeque<u32>,
    ended: VecDeque<Ended>,
    outcomes: VecDeque<(u32, RequestResult)>,
    newest: Option<Arc<FreePages>>,
    hold: Option<Hold>,
    totals: RequestTotals,
    late_answers: u64,
}

/// A request that has not ended.
#[derive(Clone, Copy, Debug)]
struct WaitingRequest {
    id: u32,
    ask: DeviceRequest,
    deadline: Instant,
}

/// The request that the guest works on.
#[derive(Debug)]
struct Running {
    request: WaitingRequest,
    cancelled: bool,
    pages: PageSet,
    blocks: Blocks,
    /// Sum of pages in all answers so far; an answer counts as at least one.
    named_pages: u64,
    /// Pages inflated since the request was sent. The guest may still report them as
    /// free: it may have read them before.
    inflated: PageSet,
}

#[derive(Clone, Copy, Debug)]
struct Ended {
    id: u32,
    /// Its last answer was received, so another one is a fault.
    answered: bool,
}

impl GuestRequests {
    /// Appends a request to the queue, with `deadline` for its answer, and returns its id.
    /// The caller must serve the request queue afterwards.
    ///
    /// # Errors
    /// See [`SubmitError`]. Nothing has changed.
    pub fn submit(&mut self, ask: DeviceRequest, deadline: Instant) -> Result<u32, SubmitError> {
        if !self.usable {
            return Err(SubmitError::NoQueue);
        }
        if self.stopped {
            return Err(SubmitError::Stopped);
        }
        if self.queued.len() >= MAX_QUEUED_REQUESTS {
            return Err(SubmitError::TooMany);
        }
        let kept = self.hold.as_ref().is_some_and(|hold| hold.state != HoldState::Releasing);
        match ask {
            DeviceRequest::ReleaseHold if self.hold.is_none() => return Err(SubmitError::NoHold),
            DeviceRequest::HoldFree { .. } if kept => return Err(SubmitError::HeldAlready),
            _ => {}
        }
        let id = self.new_id();
        self.queued.push_back(WaitingRequest { id, ask, deadline });
        Ok(id)
    }

    /// Cancels a request. For a request that was sent, `deadline` limits the wait for the
    /// guest's confirmation, if it is earlier than the request's own. Returns false if the
    /// request has ended.
    pub fn cancel(&mut self, id: u32, deadline: Instant) -> bool {
        if let Some(running) = self.running.as_mut().filter(|running| running.request.id == id) {
            if !running.cancelled {
                running.cancelled = true;
                running.request.deadline = running.request.deadline.min(deadline);
                self.send_cancel(id);
            }
            return true;
        }
        let Some(at) = self.queued.iter().position(|request| request.id == id) else {
            return false;
        };
        if let Some(request) = self.queued.remove(at) {
            self.end(request, Err(RequestFailure::Cancelled), true);
        }
        true
    }

    /// Ends requests whose deadline has passed. Returns true if there were any: the device
    /// may then have a request or a cancel to send.
    pub fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        if let Some(running) = self.running.take_if(|running| running.request.deadline <= now) {
            any = true;
            let request = running.request;
            let failure = if running.cancelled {
                RequestFailure::Cancelled
            } else {
                self.send_cancel(request.id);
                RequestFailure::TimedOut { sent: true }
            };
            self.end(request, Err(failure), false);
        }
        while let Some(at) = self.queued.iter().position(|request| request.deadline <= now) {
            let Some(request) = self.queued.remove(at) else { break };
            any = true;
            self.end(request, Err(RequestFailure::TimedOut { sent: false }), true);
        }
        any
    }

    /// Returns the earliest deadline, for the next call of [`expire`](Self::expire).
    pub fn next_deadline(&self) -> Option<Instant> {
        let running = self.running.iter().map(|running| running.request.deadline);
        running.chain(self.queued.iter().map(|request| request.deadline)).min()
    }

    /// Returns true while the request waits or runs.
    pub fn is_open(&self, id: u32) -> bool {
        self.running_id() == Some(id) || self.queued.iter().any(|request| request.id == id)
    }

    /// Takes the outcome of a request. Only the last [`MAX_OUTCOMES`] are kept.
    pub fn take_outcome(&mut self, id: u32) -> Option<RequestResult> {
        let at = self.outcomes.iter().position(|(ended, _)| *ended == id)?;
        self.outcomes.remove(at).map(|(_, outcome)| outcome)
    }

    /// The request that the guest works on.
    pub fn running(&self) -> Option<(u32, DeviceRequest)> {
        self.running.as_ref().map(|running| (running.request.id, running.request.ask))
    }

    /// The request that the guest works on, else the one that will be sent next.
    pub fn current(&self) -> Option<(u32, DeviceRequest)> {
        self.running().or_else(|| self.queued.front().map(|request| (request.id, request.ask)))
    }

    /// Returns true while the driver's queues are stopped.
    pub const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Requests that wait to be sent.
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    /// The newest complete set of free pages.
    pub const fn newest(&self) -> Option<&Arc<FreePages>> {
        self.newest.as_ref()
    }

    /// Pages that the guest has named for `id` so far, if that is a running free-page report.
    /// Each page was free at some moment after the request was sent.
    pub fn named_so_far(&self, id: u32) -> Option<&PageSet> {
        let running = self.running.as_ref().filter(|running| running.request.id == id)?;
        (running.request.ask.free_kind() == Some(FreeKind::Snapshot)).then_some(&running.pages)
    }

    /// The guest's hold.
    pub const fn hold(&self) -> Option<&Hold> {
        self.hold.as_ref()
    }

    /// Ended requests by outcome.
    pub const fn totals(&self) -> &RequestTotals {
        &self.totals
    }

    /// Answers that arrived after their request had ended (a slow guest).
    pub const fn late_answers(&self) -> u64 {
        self.late_answers
    }

    /// Ends all open requests. A request that was sent may still get a late answer.
    pub fn end_all(&mut self, failure: RequestFailure) {
        if let Some(running) = self.running.take() {
            self.end(running.request, Err(failure), false);
        }
        while let Some(request) = self.queued.pop_front() {
            self.end(request, Err(failure), true);
        }
        self.cancels.clear();
    }

    /// Handles the start of a driver: ends all requests and forgets all results.
    pub(crate) fn reset(&mut self, negotiated: Features) {
        self.end_all(RequestFailure::DriverReset);
        self.usable = negotiated.contains(Features::REQUEST_VQ);
        self.stopped = false;
        self.ended.clear();
        self.hold = None;
        self.newest = None;
    }

    /// Handles the stop of the driver's queues: the driver is unloaded, or the guest paused.
    pub(crate) fn suspend(&mut self) {
        self.end_all(RequestFailure::QueuesStopped);
        self.stopped = true;
        if let Some(hold) = self.hold.as_mut().filter(|hold| hold.state == HoldState::Kept) {
            hold.state = HoldState::Paused;
        }
    }

    /// Handles the restart of the driver's queues.
    pub(crate) fn resume(&mut self) {
        self.stopped = false;
        if let Some(hold) = self.hold.as_mut().filter(|hold| hold.state == HoldState::Paused) {
            hold.state = HoldState::Kept;
        }
    }

    /// Stores free pages from free page hinting as the newest.
    pub(crate) fn hinted(&mut self, pages: FreePages) {
        self.newest = Some(Arc::new(pages));
    }

    /// Id of the newest request.
    pub(crate) const fn last_id(&self) -> u32 {
        self.last_id
    }

    /// Restores a driver from another device, with its queues stopped. `last` is the id of
    /// that device's newest request, and `hold` the id of its hold or 0.
    pub(crate) fn restore(&mut self, last: u32, hold: u32) {
        self.last_id = last;
        self.stopped = true;
        let pages = FreePages {
            id: hold,
            kind: FreeKind::Hold,
            pages: Arc::default(),
            blocks: Blocks::default(),
            guest_free_pages: 0,
            lock_ns: 0,
            elapsed_ns: 0,
        };
        let hold = (hold != 0).then(|| Hold { pages: Arc::new(pages), state: HoldState::Paused });
        self.hold = hold.filter(|_| self.usable);
    }

    /// Forgets the newest free pages, when the memory layout has changed to `layout`, and of a
    /// request that the guest still answers the pages that no longer exist.
    pub(crate) fn forget_pages(&mut self, layout: &MemoryLayout) {
        self.newest = None;
        if let Some(running) = &mut self.running {
            layout.cut(&mut running.pages);
        }
    }

    /// Records pages that were inflated.
    pub(crate) fn inflated(&mut self, pages: &PageSet) {
        if let Some(running) = &mut self.running
            && running.request.ask.free_kind() == Some(FreeKind::Snapshot)
        {
            running.inflated.union_with(pages);
        }
    }

    /// The next request to send when the driver provides a buffer.
    pub(crate) fn to_send(&self) -> Option<Request> {
        if let Some(&id) = self.cancels.front() {
            return Some(Request { id, command: Command::Cancel });
        }
        if self.running.is_some() {
            return None;
        }
        let request = self.queued.front()?;
        let command = match request.ask {
            DeviceRequest::DropCaches(caches) => Command::DropCaches(caches),
            DeviceRequest::ReportFree { min_granule_shift } => {
                Command::ReportFree { min_granule_shift }
            }
            DeviceRequest::HoldFree { reserve_pages } => Command::HoldFree { reserve_pages },
            // If the hold is already lost, the driver answers that it has none.
            DeviceRequest::ReleaseHold => {
                Command::ReleaseHold { hold: self.hold.as_ref().map_or(0, |hold| hold.pages.id) }
            }
        };
        Some(Request { id: request.id, command })
    }

    /// Records that the request of [`to_send`](Self::to_send) was sent.
    pub(crate) fn sent(&mut self) {
        if self.cancels.pop_front().is_some() {
            return;
        }
        let Some(request) = self.queued.pop_front() else { return };
        if request.ask == DeviceRequest::ReleaseHold
            && let Some(hold) = &mut self.hold
        {
            hold.state = HoldState::Releasing;
        }
        self.running = Some(Running {
            request,
            cancelled: false,
            pages: PageSet::new(),
            blocks: Blocks::default(),
            named_pages: 0,
            inflated: PageSet::new(),
        });
    }

    /// Handles a driver's answer; `balloon` are the pages in the balloon.
    pub(crate) fn answer(
        &mut self,
        message: &[u8],
        layout: &MemoryLayout,
        balloon: &PageSet,
    ) -> Result<MessageStatus, Fault> {
        let (id, _) = message.split_first_chunk().ok_or(Fault::MalformedAnswer)?;
        let id = u32::from_le_bytes(*id);
        let split = AnswerHeader::split(message).ok_or(Fault::MalformedAnswer);
        let Some(mut running) = self.running.take_if(|running| running.request.id == id) else {
            return self.stray(id, split?.0);
        };
        match split.and_then(|(header, records)| {
            running.take(header, records, layout, balloon)?;
            running.verdict(header)
        }) {
            Ok(None) => self.running = Some(running),
            Ok(Some(Ok(header))) => self.done(running, header),
            Ok(Some(Err(failure))) => self.failed(running.request, failure),
            Err(fault) => {
                self.end(running.request, Err(RequestFailure::Fault(fault)), false);
                return Err(fault);
            }
        }
        Ok(MessageStatus::Accepted)
    }

    /// Handles an answer to a request that is not running.
    fn stray(&mut self, id: u32, header: AnswerHeader) -> Result<MessageStatus, Fault> {
        let held = self.hold.as_ref().is_some_and(|hold| hold.pages.id == id);
        if held && header.outcome == Outcome::HoldLost {
            self.hold = None;
            return Ok(MessageStatus::Accepted);
        }
        let ended = self.ended.iter_mut().find(|ended| ended.id == id);
        let ended = ended.ok_or(Fault::UnknownRequest)?;
        if ended.answered {
            return Err(Fault::AnsweredTwice);
        }
        ended.answered = header.outcome != Outcome::More;
        self.late_answers = self.late_answers.saturating_add(1);
        Ok(MessageStatus::Unwanted)
    }

    fn done(&mut self, running: Running, header: AnswerHeader) {
        let request = running.request;
        let values = header.values;
        let answer = match request.ask.free_kind() {
            None => Answer { elapsed_ns: header.elapsed_ns, values, free: None },
            Some(kind) => {
                let pages = Arc::new(FreePages {
                    id: request.id,
                    kind,
                    pages: Arc::new(running.pages),
                    blocks: running.blocks,
                    guest_free_pages: values[1],
                    lock_ns: values[2],
                    elapsed_ns: header.elapsed_ns,
                });
                if kind == FreeKind::Hold {
                    self.hold = Some(Hold { pages: Arc::clone(&pages), state: HoldState::Kept });
                }
                self.newest = Some(Arc::clone(&pages));
                Answer { elapsed_ns: header.elapsed_ns, values, free: Some(pages) }
            }
        };
        if request.ask == DeviceRequest::ReleaseHold {
            self.hold = None;
        }
        self.end(request, Ok(answer), true);
    }

    fn failed(&mut self, request: WaitingRequest, failure: RequestFailure) {
        let unknown =
            request.ask == DeviceRequest::ReleaseHold && failure == RequestFailure::BadArgument;
        // If the hold is gone here too, it was lost while the release was in flight.
        // Otherwise the driver has no hold although it reported no loss, so drop ours.
        let lost = unknown && self.hold.take().is_none();
        let failure = if lost { RequestFailure::HoldLost } else { failure };
        self.end(request, Err(failure), true);
    }

    fn end(&mut self, request: WaitingRequest, outcome: RequestResult, answered: bool) {
        if answered {
            self.cancels.retain(|id| *id != request.id);
        }
        self.totals.count(request.ask.kind(), &outcome);
        push_bounded(&mut self.ended, Ended { id: request.id, answered }, MAX_ENDED);
        push_bounded(&mut self.outcomes, (request.id, outcome), MAX_OUTCOMES);
    }

    fn send_cancel(&mut self, id: u32) {
        push_bounded(&mut self.cancels, id, MAX_CANCELS);
    }

    /// Returns an id that is not 0 and that no request or hold uses for which the driver
    /// may still send an answer.
    fn new_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            let id = self.last_id;
            let held = self.hold.as_ref().is_some_and(|hold| hold.pages.id == id);
            let known = self.is_open(id) || self.ended.iter().any(|ended| ended.id == id);
            if id != 0 && !held && !known {
                return id;
            }
        }
    }

    fn running_id(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.request.id)
    }
}

impl Running {
    /// Checks the records of an answer and adds them to those of earlier answers.
    fn take(
        &mut self,
        header: AnswerHeader,
        records: &[u8],
        layout: &MemoryLayout,
        balloon: &PageSet,
    ) -> Result<(), Fault> {
        let Some(kind) = self.request.ask.free_kind() else {
            let whole = header.outcome != Outcome::More && records.is_empty();
            return if whole { Ok(()) } else { Err(Fault::MalformedAnswer) };
        };
        let (mut pages, blocks) = decode_blocks(records, layout)?;
        self.named_pages = self.named_pages.saturating_add(pages.len().max(1));
        if self.named_pages > layout.pages().saturating_mul(2).max(1) {
            return Err(Fault::TooManyPages);
        }
        if kind == FreeKind::Snapshot {
            pages.subtract(&self.inflated);
        }
        if pages.intersects(balloon) {
            return Err(Fault::FreeInBalloon);
        }
        self.pages.union_with(&pages);
        self.blocks.add(&blocks);
        Ok(())
    }

    /// Returns the result of the request, or `None` if more answers follow.
    fn verdict(
        &self,
        header: AnswerHeader,
    ) -> Result<Option<Result<AnswerHeader, RequestFailure>>, Fault> {
        let failure = match header.outcome {
            Outcome::More => return Ok(None),
            Outcome::Done => return Ok(Some(Ok(header))),
            Outcome::Cancelled => RequestFailure::Cancelled,
            Outcome::UnknownCommand => RequestFailure::UnknownCommand,
            Outcome::BadArgument => RequestFailure::BadArgument,
            Outcome::Failed => RequestFailure::Refused { errno: header.values[0] },
            Outcome::Busy => RequestFailure::Busy,
            Outcome::HoldLost if matches!(self.request.ask, DeviceRequest::HoldFree { .. }) => {
                RequestFailure::HoldLost
            }
            Outcome::HoldLost => return Err(Fault::MalformedAnswer),
        };
        Ok(Some(Err(failure)))
    }
}

/// Appends an item; drops the oldest one at the limit.
fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, limit: usize) {
    if queue.len() >= limit {
        queue.pop_front();
    }
    queue.push_back(item);
}
