//! The trait through which the server controls a balloon.

use std::time::Duration;

use crate::api::{
    BalloonStatus, Caches, CancelledRequest, FreePageHints, ReleaseMode, ReleaseStatus,
    StatsStatus, Status,
};
use crate::error::ControlError;
use crate::free_map::FreePagesMap;

/// A request to the guest's kernel. The server has validated the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Report free blocks.
    Snapshot {
        /// A power of two in [`BLOCK_BYTES`](crate::api::BLOCK_BYTES).
        min_block_bytes: u64,
    },
    /// Hold free blocks, and report them.
    Hold {
        /// Memory that the guest keeps for its own use; whole balloon pages.
        reserve_bytes: u64,
    },
    /// Release the hold.
    ReleaseHold,
}

/// The guest's response.
#[derive(Clone, Debug, Default)]
pub struct GuestAnswer {
    /// ID of the request.
    pub id: u32,
    /// From request to response, measured on the host.
    pub elapsed_ms: f64,
    /// Duration according to the guest.
    pub guest_ms: f64,
    /// In balloon pages. For dropped caches: page cache before and after, slab before and after.
    /// For a released hold: the pages released, in the first value.
    pub values: [u64; 4],
    /// For a snapshot or a hold.
    pub free: Option<FreePagesMap>,
}

/// Control interface of a balloon. The server calls it from several threads concurrently, never
/// from a thread that must not block.
pub trait BalloonControl: Send + Sync {
    /// The guest's name.
    fn name(&self) -> String;

    /// Returns the full status. May measure resident memory, which takes milliseconds or blocks on
    /// the file system of guest memory.
    fn status(&self) -> Status;

    /// Returns the release status without measuring memory.
    fn release(&self) -> ReleaseStatus;

    /// Returns the newest guest statistics without measuring memory.
    fn stats(&self) -> StatsStatus;

    /// Sets the target and returns the generation of that change immediately, without waiting for
    /// the guest. A target equal to the current one is not a new change and returns the current
    /// generation.
    ///
    /// The server has compared `pages` with [`BalloonStatus::max_bytes`] before.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if the target cannot be accepted in the current state,
    /// [`ControlError::Failed`] if the host is at fault.
    fn set_target(&self, pages: u32) -> Result<u64, ControlError>;

    /// Sets when pages are released, starting with the guest's next message.
    ///
    /// # Errors
    /// As for [`BalloonControl::set_target`].
    fn set_release_mode(&self, mode: ReleaseMode) -> Result<(), ControlError>;

    /// Sets the polling interval of guest statistics; `None` stops polling. The server has checked
    /// the limits before.
    ///
    /// # Errors
    /// As for [`BalloonControl::set_target`].
    fn set_stats_interval(&self, interval: Option<Duration>) -> Result<(), ControlError>;

    /// Requests free page hints and returns the ID of the request immediately. The caller must call
    /// [`BalloonControl::end_hints`] in every case: the guest withholds the hinted pages until
    /// then.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if the driver does not support hints or another request is
    /// running; [`ControlError::Failed`] if the host is at fault.
    fn start_hints(&self) -> Result<u32, ControlError>;

    /// Blocks until the guest has completed request `id` or `timeout` has passed. The pages are
    /// listed only in the former case.
    fn wait_hints(&self, id: u32, timeout: Duration) -> FreePageHints;

    /// Ends request `id`: the guest may use the hinted pages again. If the hints were complete,
    /// they are the newest [`BalloonControl::free_pages`] from then on.
    ///
    /// # Errors
    /// [`ControlError::Failed`] if the host is at fault.
    fn end_hints(&self, id: u32) -> Result<(), ControlError>;

    /// Sends a request to the guest and returns its ID immediately. The request ends within
    /// `timeout` even if the guest does not respond.
    ///
    /// # Errors
    /// [`ControlError::Guest`] if the guest cannot take the request now.
    fn submit(&self, ask: GuestRequest, timeout: Duration) -> Result<u32, ControlError>;

    /// Blocks until request `id` has ended or `timeout` has passed; `None` in the latter case. Each
    /// outcome is returned once.
    fn wait_request(&self, id: u32, timeout: Duration)
    -> Option<Result<GuestAnswer, ControlError>>;

    /// Cancels request `id`, or the one that the guest is processing, without waiting for the
    /// guest.
    ///
    /// # Errors
    /// [`ControlError::Guest`] if there is none.
    fn cancel_request(&self, id: Option<u32>) -> Result<CancelledRequest, ControlError>;

    /// Returns the newest complete report of free pages.
    fn free_pages(&self) -> Option<FreePagesMap>;

    /// Blocks until change `generation` is over (see [`BalloonStatus::is_over`]) or `timeout` has
    /// passed, then returns the state. With a `timeout` of zero it returns at once and measures
    /// nothing. It waits also for a `generation` that does not exist yet.
    fn wait_change(&self, generation: u64, timeout: Duration) -> BalloonStatus;
}
