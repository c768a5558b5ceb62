//! The seam between the API and whatever runs a balloon.

use std::time::Duration;

use crate::api::{
    BalloonStatus, Caches, CancelledRequest, FreePageHints, ReleaseMode, ReleaseStatus,
    StatsStatus, Status,
};
use crate::error::ControlError;
use crate::free_map::FreePagesMap;

/// What the guest's kernel may be asked for. The server has checked the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAsk {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Name free blocks.
    Snapshot {
        /// A power of two in [`BLOCK_BYTES`](crate::api::BLOCK_BYTES).
        min_block_bytes: u64,
    },
    /// Keep free blocks, and name them.
    Hold {
        /// What the guest keeps for itself; whole balloon pages.
        reserve_bytes: u64,
    },
    /// Give a hold back.
    ReleaseHold,
}

/// What the guest answered.
#[derive(Clone, Debug, Default)]
pub struct GuestAnswer {
    /// Id of the request.
    pub id: u32,
    /// From the request until its answer, seen from the host.
    pub elapsed_ms: f64,
    /// Time the guest says it took.
    pub guest_ms: f64,
    /// By request, in balloon pages: dropped caches have page cache before and
    /// after, slab before and after; a released hold has its pages first.
    pub values: [u64; 4],
    /// Of a snapshot or a hold.
    pub free: Option<FreePagesMap>,
}

/// A balloon that can be asked and told. The server calls it from several
/// threads at a time, never from a thread that must not block.
pub trait BalloonControl: Send + Sync {
    /// The guest's name.
    fn name(&self) -> String;

    /// Everything known now. May measure, and so may take some milliseconds, or as long as the
    /// file system of guest memory likes.
    fn status(&self) -> Status;

    /// How memory is released: nothing is measured for it.
    fn release(&self) -> ReleaseStatus;

    /// The newest statistics of the guest: nothing is measured for them.
    fn stats(&self) -> StatsStatus;

    /// Sets what the balloon shall hold and returns the generation of that
    /// change at once, without waiting for the guest. A target equal to the
    /// present one is no new change and returns the present generation.
    ///
    /// The server has compared `pages` with [`BalloonStatus::max_bytes`] before.
    ///
    /// # Errors
    /// [`ControlError::Refused`] when the target cannot be taken in the present
    /// state, [`ControlError::Failed`] when the host is at fault.
    fn set_target(&self, pages: u32) -> Result<u64, ControlError>;

    /// Sets when pages are released, from the next message of the guest on.
    ///
    /// # Errors
    /// As for [`Balloon::set_target`].
    fn set_release_mode(&self, mode: ReleaseMode) -> Result<(), ControlError>;

    /// Sets how often the guest is asked for statistics, from now on; `None` is
    /// never. The server has compared it with the limits before.
    ///
    /// # Errors
    /// As for [`Balloon::set_target`].
    fn set_stats_interval(&self, interval: Option<Duration>) -> Result<(), ControlError>;

    /// Asks the guest what it does not use, and returns the number of that request
    /// at once. Whoever starts calls [`Balloon::end_hints`], whatever comes of it:
    /// the guest keeps what it names to itself until then.
    ///
    /// # Errors
    /// [`ControlError::Refused`] without a driver that can, or while another
    /// request runs; [`ControlError::Failed`] when the host is at fault.
    fn start_hints(&self) -> Result<u32, ControlError>;

    /// Blocks until the guest has answered request `id` or `timeout` has passed. The
    /// pages are listed once it has.
    fn wait_hints(&self, id: u32, timeout: Duration) -> FreePageHints;

    /// Ends request `id`: the guest uses what it named again. What it had named in
    /// full are the newest [`Balloon::free_pages`] then.
    ///
    /// # Errors
    /// [`ControlError::Failed`] when the host is at fault.
    fn end_hints(&self, id: u32) -> Result<(), ControlError>;

    /// Asks the guest for something and returns the request's id at once. It ends
    /// within `timeout`, whatever the guest does.
    ///
    /// # Errors
    /// [`ControlError::Guest`] when the guest cannot be asked now.
    fn submit(&self, ask: GuestAsk, timeout: Duration) -> Result<u32, ControlError>;

    /// Blocks until request `id` has ended or `timeout` has passed; `None` in the
    /// latter case. An outcome is told once.
    fn wait_request(&self, id: u32, timeout: Duration)
    -> Option<Result<GuestAnswer, ControlError>>;

    /// Stops a request, or the one that the guest works on, without waiting for
    /// the guest.
    ///
    /// # Errors
    /// [`ControlError::Guest`] when there is none.
    fn cancel_request(&self, id: Option<u32>) -> Result<CancelledRequest, ControlError>;

    /// The newest free pages that the guest has named in full.
    fn free_pages(&self) -> Option<FreePagesMap>;

    /// Blocks until change `generation` is over (see [`BalloonStatus::is_over`])
    /// or `timeout` has passed, then returns the state. A `timeout` of zero
    /// returns the state at once, and cheaply: nothing is measured for it. A
    /// `generation` that does not exist yet is waited for.
    fn wait_change(&self, generation: u64, timeout: Duration) -> BalloonStatus;
}
