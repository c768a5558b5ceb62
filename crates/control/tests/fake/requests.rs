//! Requests to the fake guest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use control::api::{
    BALLOON_PAGE_BYTES, BlockCount, CancelledRequest, FreeKind, FreePages, HoldState,
};
use control::{ControlError, FreePagesMap, GuestAnswer, GuestErrorKind, GuestRequest};
use page_set::{PageRange, PageSet};

use super::GUEST_BYTES;

/// First page of the fake guest: its memory does not begin at 0.
const FIRST_PAGE: u64 = 0x100;

#[derive(Default)]
pub(crate) struct Requests {
    last_id: u32,
    /// Open requests with their timeouts.
    pub(crate) open: BTreeMap<u32, (GuestRequest, Duration)>,
    pub(crate) ended: BTreeMap<u32, Result<GuestAnswer, ControlError>>,
    pub(crate) newest: Option<FreePagesMap>,
    /// Error for the next request.
    pub(crate) refuse: Option<(GuestErrorKind, &'static str)>,
}

impl Requests {
    pub(super) fn submit(
        &mut self,
        ask: GuestRequest,
        timeout: Duration,
        obeys: bool,
    ) -> Result<u32, ControlError> {
        if let Some((why, what)) = self.refuse.take() {
            return Err(ControlError::Guest { why, what: what.into(), hint: "do better".into() });
        }
        self.last_id += 1;
        self.open.insert(self.last_id, (ask, timeout));
        if obeys {
            self.answer();
        }
        Ok(self.last_id)
    }

    /// Completes the oldest open request.
    pub(crate) fn answer(&mut self) {
        let (id, (ask, _)) = self.open.pop_first().expect("an open request");
        let mut answer =
            GuestAnswer { id, elapsed_ms: 12.5, guest_ms: 11.25, ..GuestAnswer::default() };
        match ask {
            GuestRequest::DropCaches(_) => answer.values = [1 << 18, 1 << 16, 1 << 10, 1 << 9],
            GuestRequest::Snapshot { .. } => answer.free = Some(free_pages(id, FreeKind::Snapshot)),
            GuestRequest::Hold { .. } => answer.free = Some(free_pages(id, FreeKind::Hold)),
            GuestRequest::ReleaseHold => answer.values[0] = 1 << 19,
        }
        if answer.free.is_some() {
            self.newest.clone_from(&answer.free);
        }
        self.ended.insert(id, Ok(answer));
    }

    /// Fails the oldest open request.
    pub(crate) fn fail(&mut self, why: GuestErrorKind, what: &str) {
        let (id, _) = self.open.pop_first().expect("an open request");
        let error = ControlError::Guest { why, what: what.into(), hint: "look there".into() };
        self.ended.insert(id, Err(error));
    }

    pub(super) fn cancel(&mut self, id: Option<u32>) -> Result<CancelledRequest, ControlError> {
        let id = id.or(self.open.keys().next().copied()).filter(|id| self.open.contains_key(id));
        let Some(id) = id else {
            return Err(ControlError::Guest {
                why: GuestErrorKind::NotPossible,
                what: "there is no request to stop".into(),
                hint: "look there".into(),
            });
        };
        self.open.remove(&id);
        self.ended.insert(
            id,
            Err(ControlError::Guest {
                why: GuestErrorKind::Stopped,
                what: "the request was stopped".into(),
                hint: "ask again".into(),
            }),
        );
        Ok(CancelledRequest { id, command: "drop-caches".into() })
    }
}

/// 4 GiB of memory: 1 GiB in use, 2 GiB free, half a GiB with every second 2 MiB block free,
/// half a GiB in the balloon.
pub(crate) fn free_pages(id: u32, kind: FreeKind) -> FreePagesMap {
    let range =
        |start: u64, pages: u64| PageRange::new(FIRST_PAGE + start, pages).expect("a small number");
    let mut free = PageSet::from_iter([range(1 << 18, 2 << 18)]);
    free.extend((0..128).map(|i| range((3 << 18) + i * 1024, 512)));
    let balloon = PageSet::from_iter([range((3 << 18) + (1 << 17), 1 << 17)]);
    let summary = FreePages {
        id,
        kind,
        hold: (kind == FreeKind::Hold).then_some(HoldState::Kept),
        total_bytes: free.len() * BALLOON_PAGE_BYTES,
        guest_free_bytes: free.len() * BALLOON_PAGE_BYTES + (8 << 20),
        memory_bytes: GUEST_BYTES,
        balloon_bytes: balloon.len() * BALLOON_PAGE_BYTES,
        blocks: vec![
            BlockCount { block_bytes: 4 << 20, count: 512 },
            BlockCount { block_bytes: 2 << 20, count: 128 },
        ],
        elapsed_ms: 12.5,
        guest_ms: 11.25,
        lock_ns_max: 8_000,
        ..FreePages::default()
    };
    FreePagesMap {
        summary,
        regions: vec![range(0, GUEST_BYTES / BALLOON_PAGE_BYTES)],
        free: Arc::new(free),
        balloon,
    }
}
