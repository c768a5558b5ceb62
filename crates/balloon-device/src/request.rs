//! What the operator asks of the guest, and what becomes of it.
//!
//! Requests wait in a bounded queue; one at a time is sent, and the next one
//! when it has ended. Each id ends exactly once, in the order in which they were
//! sent. There is no clock here: deadlines are the caller's, and
//! [`Requests::expire`] is told the time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use balloon_abi::{AnswerHeader, Caches, Command, Features, MessageStatus, Outcome, Request};
use page_set::PageSet;

use crate::answer::{Answer, Blocks, FreeKind, FreePages, decode_blocks};
use crate::fault::Fault;
use crate::layout::MemoryLayout;
use crate::request_failure::{RequestFailure, RequestResult, SubmitError};
use crate::totals::{RequestKind, RequestTotals};

/// Requests that wait to be sent, the running one not counted. An operator with
/// more of them does not wait for answers.
pub const MAX_QUEUED_REQUESTS: usize = 8;

/// Outcomes that are kept for whoever asked: of all that can wait at once, and
/// as many again for those who are slow to fetch theirs. One can hold a set of
/// pages, which has at most one bit for each page of the guest.
pub const MAX_OUTCOMES: usize = 2 * (MAX_QUEUED_REQUESTS + 1);

/// Ids of ended requests that are remembered, to tell a late answer from one to
/// a question that was never asked. A driver holds nine requests at most.
const MAX_ENDED: usize = 32;

/// Requests to stop that are kept until the driver has room for them: one for
/// each request that the driver may hold.
const MAX_CANCELS: usize = balloon_abi::request::MAX_WAITING_REQUESTS + 1;

/// What may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Name free blocks of at least `2^min_granule_shift` bytes.
    ReportFree {
        /// log2 of the smallest block in bytes, 12 to 30.
        min_granule_shift: u32,
    },
    /// Allocate free blocks, name them, and keep them.
    HoldFree {
        /// Balloon pages that the guest keeps free for itself.
        reserve_pages: u64,
    },
    /// Give the hold back.
    ReleaseHold,
}

impl Ask {
    /// The word that the control API and the metrics use.
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

/// Whether the guest can be relied on to keep a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    /// The guest keeps it until it says otherwise.
    Kept,
    /// The guest's queues stand still. A guest that is only paused keeps it.
    Paused,
    /// The guest was told to give it back and has not said that it did.
    Releasing,
}

/// Free pages that the guest keeps for the host.
#[derive(Clone, Debug)]
pub struct Hold {
    /// What it consists of.
    pub pages: Arc<FreePages>,
    /// How far it can be relied on.
    pub state: HoldState,
}

/// All requests of one device.
#[derive(Debug, Default)]
pub struct GuestRequests {
    usable: bool,
    /// The driver's queues stand still.
    stopped: bool,
    last_id: u32,
    queued: VecDeque<WaitingRequest>,
    running: Option<Running>,
    /// Ids to send a cancel for.
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
    ask: Ask,
    deadline: Instant,
}

/// The request that the guest works on.
#[derive(Debug)]
struct Running {
    asked: WaitingRequest,
    cancelled: bool,
    pages: PageSet,
    blocks: Blocks,
    /// Pages in all answers so far; each counts for one at least.
    named_pages: u64,
    /// Pages that went into the balloon since the request was sent: to name
    /// them as free is no lie then, only late.
    inflated: PageSet,
}

#[derive(Clone, Copy, Debug)]
struct Ended {
    id: u32,
    /// It has had its last answer, so the next one is one too many.
    answered: bool,
}

impl GuestRequests {
    /// Puts a request at the end of the queue, to be answered before `deadline`.
    /// The caller then has the device serve the request queue.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing has changed then.
    pub fn submit(&mut self, ask: Ask, deadline: Instant) -> Result<u32, SubmitError> {
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
            Ask::ReleaseHold if self.hold.is_none() => return Err(SubmitError::NoHold),
            Ask::HoldFree { .. } if kept => return Err(SubmitError::HeldAlready),
            _ => {}
        }
        let id = self.new_id();
        self.queued.push_back(WaitingRequest { id, ask, deadline });
        Ok(id)
    }

    /// Stops a request. One that was sent has until `deadline`, if that is
    /// earlier than its own, to say that it stopped. False where it has ended.
    pub fn cancel(&mut self, id: u32, deadline: Instant) -> bool {
        if let Some(running) = self.running.as_mut().filter(|running| running.asked.id == id) {
            if !running.cancelled {
                running.cancelled = true;
                running.asked.deadline = running.asked.deadline.min(deadline);
                self.send_cancel(id);
            }
            return true;
        }
        let Some(at) = self.queued.iter().position(|asked| asked.id == id) else { return false };
        if let Some(asked) = self.queued.remove(at) {
            self.end(asked, Err(RequestFailure::Cancelled), true);
        }
        true
    }

    /// Ends what ran out of time. True where something did: the device then has
    /// the next request, or a cancel, to send.
    pub fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        if let Some(running) = self.running.take_if(|running| running.asked.deadline <= now) {
            any = true;
            let asked = running.asked;
            let failure = if running.cancelled {
                RequestFailure::Cancelled
            } else {
                self.send_cancel(asked.id);
                RequestFailure::TimedOut { sent: true }
            };
            self.end(asked, Err(failure), false);
        }
        while let Some(at) = self.queued.iter().position(|asked| asked.deadline <= now) {
            let Some(asked) = self.queued.remove(at) else { break };
            any = true;
            self.end(asked, Err(RequestFailure::TimedOut { sent: false }), true);
        }
        any
    }

    /// When [`expire`](Self::expire) has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let running = self.running.iter().map(|running| running.asked.deadline);
        running.chain(self.queued.iter().map(|asked| asked.deadline)).min()
    }

    /// True while the request waits or runs.
    pub fn is_open(&self, id: u32) -> bool {
        self.running_id() == Some(id) || self.queued.iter().any(|asked| asked.id == id)
    }

    /// How a request ended; told once, and only of the last [`MAX_OUTCOMES`].
    pub fn take_outcome(&mut self, id: u32) -> Option<RequestResult> {
        let at = self.outcomes.iter().position(|(ended, _)| *ended == id)?;
        self.outcomes.remove(at).map(|(_, outcome)| outcome)
    }

    /// The request that the guest works on.
    pub fn running(&self) -> Option<(u32, Ask)> {
        self.running.as_ref().map(|running| (running.asked.id, running.asked.ask))
    }

    /// The request that the guest works on, else the one that will be sent next.
    pub fn current(&self) -> Option<(u32, Ask)> {
        self.running().or_else(|| self.queued.front().map(|asked| (asked.id, asked.ask)))
    }

    /// True while the driver's queues stand still.
    pub const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Requests that wait to be sent.
    pub fn queued(&self) -> usize {
        self.queued.len()
    }

    /// The newest free pages that the guest has named in full.
    pub const fn newest(&self) -> Option<&Arc<FreePages>> {
        self.newest.as_ref()
    }

    /// What the guest has named of `id` so far, where that is a snapshot under way. Each
    /// page was free at some moment after the request was sent, whatever is still to come.
    pub fn named_so_far(&self, id: u32) -> Option<&PageSet> {
        let running = self.running.as_ref().filter(|running| running.asked.id == id)?;
        (running.asked.ask.free_kind() == Some(FreeKind::Snapshot)).then_some(&running.pages)
    }

    /// What the guest holds.
    pub const fn hold(&self) -> Option<&Hold> {
        self.hold.as_ref()
    }

    /// Requests so far, by how they ended.
    pub const fn totals(&self) -> &RequestTotals {
        &self.totals
    }

    /// Answers to requests that had ended without: of a guest that is slow.
    pub const fn late_answers(&self) -> u64 {
        self.late_answers
    }

    /// Ends all that has not ended. What was sent may still be answered, late.
    pub fn end_all(&mut self, failure: RequestFailure) {
        if let Some(running) = self.running.take() {
            self.end(running.asked, Err(failure), false);
        }
        while let Some(asked) = self.queued.pop_front() {
            self.end(asked, Err(failure), true);
        }
        self.cancels.clear();
    }

    /// A driver starts, which knows nothing of what was asked before.
    pub(crate) fn reset(&mut self, negotiated: Features) {
        self.end_all(RequestFailure::DriverReset);
        self.usable = negotiated.contains(Features::REQUEST_VQ);
        self.stopped = false;
        self.ended.clear();
        self.hold = None;
        self.newest = None;
    }

    /// True while the driver's queues do not run.
    pub const fn are_stopped(&self) -> bool {
        self.stopped
    }

    /// The driver's queues stop: it is unloaded, or the guest only paused.
    pub(crate) fn suspend(&mut self) {
        self.end_all(RequestFailure::QueuesStopped);
        self.stopped = true;
        if let Some(hold) = self.hold.as_mut().filter(|hold| hold.state == HoldState::Kept) {
            hold.state = HoldState::Paused;
        }
    }

    /// The driver's queues go on where they stopped.
    pub(crate) fn resume(&mut self) {
        self.stopped = false;
        if let Some(hold) = self.hold.as_mut().filter(|hold| hold.state == HoldState::Paused) {
            hold.state = HoldState::Kept;
        }
    }

    /// The newest free pages came another way.
    pub(crate) fn hinted(&mut self, pages: FreePages) {
        self.newest = Some(Arc::new(pages));
    }

    /// Number of the newest request.
    pub(crate) const fn last_id(&self) -> u32 {
        self.last_id
    }

    /// The driver comes from another device, with its queues stopped: that one's newest
    /// request was `last`, and what made the guest hold pages was `hold`, or 0.
    pub(crate) fn moved(&mut self, last: u32, hold: u32) {
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

    /// Memory is elsewhere now: what was said of it is not true any more.
    pub(crate) fn forget_pages(&mut self) {
        self.newest = None;
    }

    /// Pages went into the balloon.
    pub(crate) fn inflated(&mut self, pages: &PageSet) {
        if let Some(running) = &mut self.running
            && running.asked.ask.free_kind() == Some(FreeKind::Snapshot)
        {
            running.inflated.union_with(pages);
        }
    }

    /// What to send, if the driver has room for it.
    pub(crate) fn to_send(&self) -> Option<Request> {
        if let Some(&id) = self.cancels.front() {
            return Some(Request { id, command: Command::Cancel });
        }
        if self.running.is_some() {
            return None;
        }
        let asked = self.queued.front()?;
        let command = match asked.ask {
            Ask::DropCaches(caches) => Command::DropCaches(caches),
            Ask::ReportFree { min_granule_shift } => Command::ReportFree { min_granule_shift },
            Ask::HoldFree { reserve_pages } => Command::HoldFree { reserve_pages },
            // A hold that is lost already: the driver answers that it has none.
            Ask::ReleaseHold => {
                Command::ReleaseHold { hold: self.hold.as_ref().map_or(0, |hold| hold.pages.id) }
            }
        };
        Some(Request { id: asked.id, command })
    }

    /// What [`to_send`](Self::to_send) said is on its way.
    pub(crate) fn sent(&mut self) {
        if self.cancels.pop_front().is_some() {
            return;
        }
        let Some(asked) = self.queued.pop_front() else { return };
        if asked.ask == Ask::ReleaseHold
            && let Some(hold) = &mut self.hold
        {
            hold.state = HoldState::Releasing;
        }
        self.running = Some(Running {
            asked,
            cancelled: false,
            pages: PageSet::new(),
            blocks: Blocks::default(),
            named_pages: 0,
            inflated: PageSet::new(),
        });
    }

    /// Takes a driver's answer; `balloon` are the pages that the guest gave away.
    pub(crate) fn answer(
        &mut self,
        message: &[u8],
        layout: &MemoryLayout,
        balloon: &PageSet,
    ) -> Result<MessageStatus, Fault> {
        let (id, _) = message.split_first_chunk().ok_or(Fault::MalformedAnswer)?;
        let id = u32::from_le_bytes(*id);
        let split = AnswerHeader::split(message).ok_or(Fault::MalformedAnswer);
        let Some(mut running) = self.running.take_if(|running| running.asked.id == id) else {
            return self.stray(id, split?.0);
        };
        match split.and_then(|(header, records)| {
            running.take(header, records, layout, balloon)?;
            running.verdict(header)
        }) {
            Ok(None) => self.running = Some(running),
            Ok(Some(Ok(header))) => self.done(running, header),
            Ok(Some(Err(failure))) => self.failed(running.asked, failure),
            Err(fault) => {
                self.end(running.asked, Err(RequestFailure::Fault(fault)), false);
                return Err(fault);
            }
        }
        Ok(MessageStatus::Accepted)
    }

    /// An answer to what does not run.
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
        let asked = running.asked;
        let values = header.values;
        let answer = match asked.ask.free_kind() {
            None => Answer { elapsed_ns: header.elapsed_ns, values, free: None },
            Some(kind) => {
                let pages = Arc::new(FreePages {
                    id: asked.id,
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
        if asked.ask == Ask::ReleaseHold {
            self.hold = None;
        }
        self.end(asked, Ok(answer), true);
    }

    fn failed(&mut self, asked: WaitingRequest, failure: RequestFailure) {
        let unknown = asked.ask == Ask::ReleaseHold && failure == RequestFailure::BadArgument;
        // It was lost while the release was on its way. A driver that knows of
        // no hold although none was lost has none either.
        let lost = unknown && self.hold.take().is_none();
        let failure = if lost { RequestFailure::HoldLost } else { failure };
        self.end(asked, Err(failure), true);
    }

    fn end(&mut self, asked: WaitingRequest, outcome: RequestResult, answered: bool) {
        if answered {
            self.cancels.retain(|id| *id != asked.id);
        }
        self.totals.count(asked.ask.kind(), &outcome);
        push_bounded(&mut self.ended, Ended { id: asked.id, answered }, MAX_ENDED);
        push_bounded(&mut self.outcomes, (asked.id, outcome), MAX_OUTCOMES);
    }

    fn send_cancel(&mut self, id: u32) {
        push_bounded(&mut self.cancels, id, MAX_CANCELS);
    }

    /// Not 0, and of no request or hold that the driver may still speak of.
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
        self.running.as_ref().map(|running| running.asked.id)
    }
}

impl Running {
    /// Checks the records of an answer and adds them to what came before.
    fn take(
        &mut self,
        header: AnswerHeader,
        records: &[u8],
        layout: &MemoryLayout,
        balloon: &PageSet,
    ) -> Result<(), Fault> {
        let Some(kind) = self.asked.ask.free_kind() else {
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

    /// `None` where more is to come.
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
            Outcome::HoldLost if matches!(self.asked.ask, Ask::HoldFree { .. }) => {
                RequestFailure::HoldLost
            }
            Outcome::HoldLost => return Err(Fault::MalformedAnswer),
        };
        Ok(Some(Err(failure)))
    }
}

/// Adds to the end; the oldest makes room.
fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, limit: usize) {
    if queue.len() >= limit {
        queue.pop_front();
    }
    queue.push_back(item);
}
