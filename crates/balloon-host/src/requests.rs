//! The control API's requests to the guest, with their times.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use balloon_abi::{Caches, Features};
use balloon_device::{
    Answer, DeviceRequest, FreeKind, FreePages, HoldState, RequestKind, RequestResult,
};
use control::api::{self, BALLOON_PAGE_BYTES, BlockCount, CancelledRequest, RequestStatus};
use control::{ControlError, FreePagesMap, GuestAnswer, GuestErrorKind, GuestRequest};
use page_set::PageSet;

use crate::request_text::{failed, refused};
use crate::request_times::{MAX_TIMES, SubmittedRequest};
use crate::shared::{Shared, State, ms};

/// Time for the guest to confirm a cancel. After it the request ends without a confirmation.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

impl Shared {
    /// Returns the time until the next deadline of a request.
    pub fn until_deadline(&self) -> Option<Duration> {
        let deadline = self.state().device.requests().next_deadline()?;
        // Plus a millisecond: poll's timeout is rounded down to milliseconds.
        Some(deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Ends requests whose deadline has passed. Returns true if there were any.
    pub fn expire_requests(&self) -> bool {
        let any = self.state().device.requests_mut().expire(Instant::now());
        if any {
            self.changed();
        }
        any
    }

    pub(crate) fn submit_request(
        &self,
        ask: GuestRequest,
        timeout: Duration,
    ) -> Result<u32, ControlError> {
        let ask = device_request(ask);
        let now = Instant::now();
        let mut state = self.state();
        let submitted = state.device.requests_mut().submit(ask, now + timeout);
        let id = submitted.map_err(|error| refused(ask.kind(), error, state.connected))?;
        if state.times.submitted.len() == MAX_TIMES {
            state.times.submitted.pop_front();
        }
        state
            .times
            .submitted
            .push_back((id, SubmittedRequest { at: now, timeout, kind: ask.kind() }));
        drop(state);
        self.wake_up()?;
        Ok(id)
    }

    pub(crate) fn wait_for_request(
        &self,
        id: u32,
        timeout: Duration,
    ) -> Option<Result<GuestAnswer, ControlError>> {
        let end = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            if let Some(outcome) = state.take_outcome(id) {
                return Some(outcome);
            }
            if !state.device.requests().is_open(id) {
                return Some(Err(ControlError::Failed {
                    what: format!("the outcome of request {id} is no longer available"),
                    hint: "repeat the request; only the last few outcomes are kept".into(),
                }));
            }
            let now = Instant::now();
            if now >= end {
                return None;
            }
            let woken = self.changed.wait_timeout(state, end - now);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Requests a free-page report of blocks of at least `min_block_bytes` bytes, a power of two.
    /// After `wait` it returns the pages named so far; the guest names the largest blocks first.
    /// `None` if the request was not sent by then.
    ///
    /// # Errors
    /// The request cannot be made, or it failed.
    pub fn free_snapshot(
        &self,
        min_block_bytes: u64,
        wait: Duration,
    ) -> Result<Option<PageSet>, ControlError> {
        // The deadline is later than the wait, so that a partial result is still available.
        let id =
            self.submit_request(GuestRequest::Snapshot { min_block_bytes }, wait + CANCEL_TIMEOUT)?;
        self.named_within(id, wait)
    }

    fn named_within(&self, id: u32, wait: Duration) -> Result<Option<PageSet>, ControlError> {
        let pages = |answer: GuestAnswer| answer.free.map(|map| (*map.free).clone());
        if let Some(outcome) = self.wait_for_request(id, wait) {
            return outcome.map(pages);
        }
        let mut state = self.state();
        // It may have ended meanwhile.
        if let Some(outcome) = state.take_outcome(id) {
            return outcome.map(pages);
        }
        let requests = state.device.requests_mut();
        let named = requests.named_so_far(id).cloned();
        requests.cancel(id, Instant::now() + CANCEL_TIMEOUT);
        drop(state);
        self.wake_up()?;
        let pages = named.as_ref().map(PageSet::len);
        tracing::info!(
            ?wait,
            pages,
            "the free-page report is incomplete; the pages so far are used"
        );
        Ok(named)
    }

    pub(crate) fn cancel_one(&self, id: Option<u32>) -> Result<CancelledRequest, ControlError> {
        let mut state = self.state();
        let requests = state.device.requests_mut();
        let id = id.or_else(|| requests.current().map(|(id, _)| id));
        let cancelled = id.filter(|id| requests.cancel(*id, Instant::now() + CANCEL_TIMEOUT));
        let id = cancelled.ok_or_else(|| ControlError::Guest {
            why: GuestErrorKind::NotPossible,
            what: "there is no request to cancel".into(),
            hint: "see the guest's requests with `aerostat status NAME`".into(),
        })?;
        let command = state.times.of(id).map_or("", |submitted| submitted.kind.name()).to_owned();
        drop(state);
        self.changed();
        self.wake_up()?;
        Ok(CancelledRequest { id, command })
    }
}

impl State {
    pub(crate) fn requests(&self) -> RequestStatus {
        let requests = self.device.requests();
        let mut ended = BTreeMap::<String, BTreeMap<String, u64>>::new();
        for (kind, outcome, count) in requests.totals().iter() {
            let outcomes = ended.entry(kind.name().into()).or_default();
            outcomes.insert(outcome.replace('-', "_"), count);
        }
        RequestStatus {
            possible: self.device.negotiated().contains(Features::REQUEST_VQ)
                && !requests.is_stopped(),
            running: requests.running().map(|(_, ask)| ask.kind().name().into()),
            waiting: requests.queued() as u64,
            hold: requests.hold().map(|hold| hold_state(hold.state)),
            late_answers: requests.late_answers(),
            ended,
        }
    }

    pub(crate) fn newest_free_pages(&self) -> Option<FreePagesMap> {
        self.device.requests().newest().map(|pages| self.free_pages_map(pages))
    }

    /// Records the time that the guest took to name pages by hints.
    pub(crate) fn note_hints(&mut self, id: u32, elapsed: Duration) {
        self.times.newest = Some((id, elapsed, Instant::now()));
    }

    fn take_outcome(&mut self, id: u32) -> Option<Result<GuestAnswer, ControlError>> {
        let outcome = self.device.requests_mut().take_outcome(id)?;
        let now = Instant::now();
        let submitted = self.times.of(id);
        let elapsed =
            submitted.map_or(Duration::ZERO, |submitted| now.duration_since(submitted.at));
        if let Ok(Answer { free: Some(pages), .. }) = &outcome {
            self.times.newest = Some((pages.id, elapsed, now));
        }
        Some(self.guest_answer(id, submitted, elapsed, outcome))
    }

    fn guest_answer(
        &self,
        id: u32,
        submitted: Option<SubmittedRequest>,
        elapsed: Duration,
        outcome: RequestResult,
    ) -> Result<GuestAnswer, ControlError> {
        match outcome {
            Ok(answer) => Ok(GuestAnswer {
                id,
                elapsed_ms: ms(elapsed),
                guest_ms: ms(Duration::from_nanos(answer.elapsed_ns)),
                values: answer.values,
                free: answer.free.map(|pages| self.free_pages_map(&pages)),
            }),
            Err(failure) => {
                let kind = submitted.map_or(RequestKind::DropCaches, |submitted| submitted.kind);
                let timeout = submitted.map_or(elapsed, |submitted| submitted.timeout);
                Err(failed(kind, failure, timeout))
            }
        }
    }

    fn free_pages_map(&self, pages: &Arc<FreePages>) -> FreePagesMap {
        let bytes = |pages: u64| pages.saturating_mul(BALLOON_PAGE_BYTES);
        let requests = self.device.requests();
        let hold = requests.hold().filter(|hold| hold.pages.id == pages.id);
        let times = self.times.newest.filter(|(id, ..)| *id == pages.id);
        let guest_ms = ms(Duration::from_nanos(pages.elapsed_ns));
        let blocks = pages.blocks.iter();
        let blocks = blocks.map(|(block_bytes, count)| BlockCount { block_bytes, count });
        let age = times.map_or(Duration::ZERO, |(.., at)| at.elapsed());
        let summary = api::FreePages {
            id: pages.id,
            kind: match pages.kind {
                FreeKind::Snapshot => api::FreeKind::Snapshot,
                FreeKind::Hold => api::FreeKind::Hold,
                FreeKind::Hint => api::FreeKind::Hint,
            },
            hold: hold.map(|hold| hold_state(hold.state)),
            total_bytes: bytes(pages.pages.len()),
            guest_free_bytes: bytes(pages.guest_free_pages),
            memory_bytes: bytes(self.device.layout().pages()),
            balloon_bytes: bytes(self.device.held().len()),
            blocks: blocks.collect(),
            elapsed_ms: times.map_or(guest_ms, |(_, elapsed, _)| ms(elapsed)),
            guest_ms,
            lock_ns_max: pages.lock_ns,
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            map: api::CoarseMap::default(),
        };
        FreePagesMap {
            summary,
            regions: self.device.layout().ranges().to_vec(),
            free: Arc::clone(&pages.pages),
            balloon: self.device.held().clone(),
        }
    }
}

fn device_request(ask: GuestRequest) -> DeviceRequest {
    match ask {
        GuestRequest::DropCaches(what) => DeviceRequest::DropCaches(match what {
            api::Caches::PageCache => Caches::PAGE_CACHE,
            api::Caches::Slab => Caches::SLAB,
            api::Caches::All => Caches::ALL,
        }),
        GuestRequest::Snapshot { min_block_bytes } => {
            DeviceRequest::ReportFree { min_granule_shift: min_block_bytes.trailing_zeros() }
        }
        GuestRequest::Hold { reserve_bytes } => {
            DeviceRequest::HoldFree { reserve_pages: reserve_bytes / BALLOON_PAGE_BYTES }
        }
        GuestRequest::ReleaseHold => DeviceRequest::ReleaseHold,
    }
}

const fn hold_state(state: HoldState) -> api::HoldState {
    match state {
        HoldState::Kept => api::HoldState::Kept,
        HoldState::Paused => api::HoldState::Paused,
        HoldState::Releasing => api::HoldState::Releasing,
    }
}

#[cfg(test)]
mod tests {
    use balloon_abi::{AnswerHeader, MessageStatus, Outcome, Pfn, Request, Vq, record};
    use balloon_device::MemoryLayout;
    use control::api::{PartialHuge, ReleaseMode};
    use guest_ring::{Buffer, GuestRing};
    use page_set::PageRange;
    use virtio_queue::Queue;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::HostReclaim;

    const MEMORY_BYTES: usize = 4 << 20;
    const BLOCKS: u64 = 2;
    const OUTSIDE_BLOCK: u64 = 2;
    const RING: u64 = 0x1000;
    const REQUEST: u64 = 0x2000;
    const MESSAGE: u64 = 0x3000;
    const STATUS: u64 = 0x4000;

    /// A driver whose answers the test controls.
    struct Guest {
        shared: Shared,
        memory: GuestMemoryMmap,
        ring: GuestRing,
        queue: Queue,
    }

    impl Guest {
        fn new() -> Self {
            Self::with(Features::VERSION_1 | Features::PAGE_BITMAP | Features::REQUEST_VQ)
        }

        fn with(negotiated: Features) -> Self {
            let ranges = [(GuestAddress(0), MEMORY_BYTES)];
            let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
            let reclaim = HostReclaim::new(ReleaseMode::Immediate, PartialHuge::Split).unwrap();
            let shared = Shared::new("vm1".into(), reclaim).unwrap();
            shared.device().set_layout(MemoryLayout::of(&memory).unwrap());
            shared.reset(negotiated);
            let ring = GuestRing::new(RING, 16);
            Self { shared, memory, queue: ring.queue(), ring }
        }

        fn ask(&self) -> u32 {
            let ask = GuestRequest::Snapshot { min_block_bytes: BALLOON_PAGE_BYTES };
            self.shared.submit_request(ask, Duration::from_secs(60)).unwrap()
        }

        fn serve(&mut self) {
            let mut device = self.shared.device();
            device.process_queue(Vq::Request, &self.memory, &mut self.queue).unwrap();
        }

        fn take(&mut self) -> Request {
            let mut request = [0; balloon_abi::request::REQUEST_BYTES];
            let bytes = u32::try_from(request.len()).unwrap();
            self.ring.send(&self.memory, &[Buffer::writable(REQUEST, bytes)]);
            self.serve();
            self.memory.read_slice(&mut request, GuestAddress(REQUEST)).unwrap();
            Request::from_bytes(&request).unwrap()
        }

        /// Returns a buffer with a command of a driver that hints.
        fn command(memory: &GuestMemoryMmap, command: u32) -> Buffer {
            memory.write_obj(command, GuestAddress(MESSAGE)).unwrap();
            Buffer::readable(MESSAGE, 4)
        }

        fn hint(&mut self, buffers: &[Buffer]) {
            self.ring.send(&self.memory, buffers);
            let mut device = self.shared.device();
            device.process_queue(Vq::FreePage, &self.memory, &mut self.queue).unwrap();
        }

        /// Names a block of 2 MiB and expects the device to accept it.
        fn name(&mut self, id: u32, outcome: Outcome, block: u64) {
            self.answer(id, outcome, block);
            let status: u32 = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
            assert_eq!(status, MessageStatus::Accepted as u32);
        }

        fn answer(&mut self, id: u32, outcome: Outcome, block: u64) {
            let header = AnswerHeader { id, outcome, elapsed_ns: 5, values: [0; 4] };
            let mut message = [0; 256];
            let (head, records) = message.split_at_mut(header.to_bytes().len());
            head.copy_from_slice(&header.to_bytes());
            let named = record::encode(records, Pfn(block * 512), 21, &[]).unwrap().unwrap();
            let len = header.to_bytes().len() + named;
            self.memory.write_slice(&message[..len], GuestAddress(MESSAGE)).unwrap();
            let bytes = u32::try_from(len).unwrap();
            let buffers = [Buffer::readable(MESSAGE, bytes), Buffer::writable(STATUS, 4)];
            self.ring.send(&self.memory, &buffers);
            self.serve();
        }
    }

    enum Violation {
        OutsideMemory,
        TooManyPages,
    }

    fn block(number: u64) -> PageSet {
        PageSet::from(PageRange::new(number * 512, 512).unwrap())
    }

    #[test]
    fn a_partial_report_of_a_slow_guest_is_used() {
        let mut guest = Guest::new();
        let id = guest.ask();
        assert_eq!(guest.take().id, id);
        guest.name(id, Outcome::More, 1);
        let named = guest.shared.named_within(id, Duration::ZERO).unwrap();
        assert_eq!(named, Some(block(1)));
        let sent = guest.take();
        assert_eq!(sent, Request { id, command: balloon_abi::Command::Cancel });
    }

    #[test]
    fn a_report_in_time_is_complete() {
        let mut guest = Guest::new();
        let id = guest.ask();
        guest.take();
        guest.name(id, Outcome::More, 1);
        guest.name(id, Outcome::Done, 0);
        let named = guest.shared.named_within(id, Duration::ZERO).unwrap().unwrap();
        assert_eq!(named, PageSet::from(PageRange::new(0, 1024).unwrap()));
    }

    #[test]
    fn a_report_of_a_silent_guest_is_empty_and_cancelled() {
        let mut guest = Guest::new();
        let id = guest.ask();
        guest.take();
        let named = guest.shared.named_within(id, Duration::ZERO).unwrap();
        assert_eq!(named, Some(PageSet::new()));
        // Answers before the driver receives the cancel are too late for the caller.
        guest.answer(id, Outcome::More, 1);
        guest.take();
        assert_eq!(guest.shared.device().requests().named_so_far(id), Some(&block(1)));
        guest.name(id, Outcome::Cancelled, 1);
        assert_eq!(guest.shared.device().requests().named_so_far(id), None);
    }

    #[test]
    fn a_protocol_violation_discards_the_report() {
        for violation in [Violation::OutsideMemory, Violation::TooManyPages] {
            let mut guest = Guest::new();
            let id = guest.ask();
            guest.take();
            guest.name(id, Outcome::More, 1);
            match violation {
                Violation::OutsideMemory => guest.answer(id, Outcome::More, OUTSIDE_BLOCK),
                Violation::TooManyPages => {
                    (0..2 * BLOCKS).for_each(|_| guest.answer(id, Outcome::More, 1))
                }
            }
            let error = guest.shared.named_within(id, Duration::ZERO).unwrap_err();
            assert!(error.to_string().contains("violates the protocol"), "{error}");
        }
    }

    #[test]
    fn partial_hints_are_used() {
        let mut guest = Guest::with(Features::VERSION_1 | Features::FREE_PAGE_HINT);
        let id = guest.shared.begin_hints().unwrap();
        assert_eq!(guest.shared.hinted_within(id, Duration::ZERO), Some(PageSet::new()));
        guest.hint(&[Guest::command(&guest.memory, id)]);
        guest.hint(&[Buffer::writable(1 << 21, 1 << 21)]);
        assert_eq!(guest.shared.hinted_within(id, Duration::ZERO), Some(block(1)));
        assert_eq!(guest.shared.hinted_within(id + 1, Duration::ZERO), None, "another request");
        guest.shared.reset(Features::VERSION_1 | Features::FREE_PAGE_HINT);
        assert_eq!(guest.shared.hinted_within(id, Duration::ZERO), None, "another driver");
    }

    #[test]
    fn an_unsent_request_has_no_report() {
        let guest = Guest::new();
        let id = guest.ask();
        assert_eq!(guest.shared.named_within(id, Duration::ZERO).unwrap(), None);
    }
}
