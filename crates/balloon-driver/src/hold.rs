//! The hold: blocks that the guest keeps free for the host.
//!
//! Requests create and release a hold, and the guest may need its memory at any time, also
//! while it is being created. So its state is separate from the requests' state, behind a lock
//! that is never held across a wait.
//!
//! Blocks that the host was told are free stay unused until the host has returned the answer
//! that revokes them (or the device is gone). Each transition out of `Taking` and `Held` has
//! such an answer, and [`Hold::emptied`] follows it.

use balloon_abi::Pfn;
use balloon_abi::request::{ANSWER_VALUES, AnswerHeader, Outcome};

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::inbox::Stop;
use crate::pressure::hold_floor_pages;
use crate::requests::End;
use crate::traits::{HeldBlocks, RequestKernel, RequestQueue};

/// Most blocks that are allocated or named per critical section: a task that reclaims the
/// memory waits no longer than that.
const BATCH: usize = 64;

/// Most balloon pages that are allocated per critical section, but at least one block (16
/// MiB): the kernel may zero allocated pages.
const BATCH_PAGES: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is no hold.
    Empty,
    /// Blocks are being allocated, then named.
    Taking,
    /// The host has accepted all blocks.
    Held,
    /// The host cancelled the request; the answer is in flight.
    Ending,
    /// The guest needs the memory; the `HoldLost` answer is in flight.
    Losing,
}

/// The state of the one hold that a device may have.
#[derive(Debug)]
pub struct Hold {
    phase: Phase,
    id: u32,
    started_ns: u64,
    /// Balloon pages in the hold.
    pages: u64,
}

impl Hold {
    /// Creates the state without a hold.
    pub const fn new() -> Self {
        Self { phase: Phase::Empty, id: 0, started_ns: 0, pages: 0 }
    }

    /// Balloon pages in the hold, in any phase.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Balloon pages that [`lose`](Self::lose) would free.
    pub const fn losable_pages(&self) -> u64 {
        match self.phase {
            Phase::Taking | Phase::Held => self.pages,
            Phase::Empty | Phase::Ending | Phase::Losing => 0,
        }
    }

    /// Gives the hold up because the guest needs the memory. Returns the answer to send, or
    /// `None` if there is no hold or it is already ending.
    pub fn lose(&mut self, now_ns: u64) -> Option<AnswerHeader> {
        if !matches!(self.phase, Phase::Taking | Phase::Held) {
            return None;
        }
        self.phase = Phase::Losing;
        let mut values = [0; ANSWER_VALUES];
        values[0] = self.pages;
        let elapsed_ns = now_ns.saturating_sub(self.started_ns);
        Some(AnswerHeader { id: self.id, outcome: Outcome::HoldLost, elapsed_ns, values })
    }

    /// Returns true while the answer of [`lose`](Self::lose) is in flight.
    pub const fn is_losing(&self) -> bool {
        matches!(self.phase, Phase::Losing)
    }

    /// Records that all blocks were freed. Returns their balloon pages.
    pub fn emptied(&mut self) -> u64 {
        let pages = self.pages;
        *self = Self::new();
        pages
    }

    fn begin(&mut self, id: u32, started_ns: u64) -> bool {
        let free = self.phase == Phase::Empty;
        if free {
            *self = Self { phase: Phase::Taking, id, started_ns, pages: 0 };
        }
        free
    }

    fn taking(&self) -> Result<(), Stop> {
        if self.phase == Phase::Taking { Ok(()) } else { Err(Stop::Lost) }
    }

    /// Changes from `Taking` to `phase`, unless the hold was lost meanwhile.
    fn pass_to(&mut self, phase: Phase) {
        if self.phase == Phase::Taking {
            self.phase = phase;
        }
    }
}

impl Default for Hold {
    fn default() -> Self {
        Self::new()
    }
}

/// Allocates free blocks, largest first, until `reserve_pages` are left, and names them. The
/// hold is still `Taking` afterwards.
pub(crate) fn take(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    geometry: Geometry,
    (id, reserve_pages): (u32, u64),
) -> Result<[u64; ANSWER_VALUES], End> {
    let started_ns = queue.now_ns();
    if !kernel.with_hold(|hold, _| hold.begin(id, started_ns)) {
        return Err(End::Outcome(Outcome::Busy, 0));
    }
    answer.record_free(kernel.free_pages());
    let floor = hold_floor_pages(kernel.total_pages(), kernel.reserved_pages()).max(reserve_pages);
    for order in geometry.orders().rev() {
        while take_batch(kernel, queue, answer, geometry.block_pages(order), (order, floor))? {}
    }
    for order in geometry.orders().rev() {
        while name_batch(kernel, queue, answer, geometry, order)? {}
    }
    Ok(answer.finish_records(queue)?)
}

/// Allocates a batch of blocks. Returns true if there may be more.
fn take_batch(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    block_pages: u64,
    (order, floor): (u32, u64),
) -> Result<bool, Stop> {
    queue.stopped()?;
    let spare = kernel.free_pages().saturating_sub(floor) / block_pages;
    let wanted = spare.min(BATCH as u64).min((BATCH_PAGES / block_pages).max(1));
    if wanted == 0 {
        return Ok(false);
    }
    let started_ns = queue.now_ns();
    let all = kernel.with_hold(|hold, blocks| {
        hold.taking()?;
        for _ in 0..wanted {
            if !blocks.take(order) {
                return Ok(false);
            }
            hold.pages += block_pages;
        }
        Ok(true)
    });
    answer.record_lock(queue.now_ns().saturating_sub(started_ns));
    all
}

/// Names a batch of the held blocks. Returns true if there may be more.
fn name_batch(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    geometry: Geometry,
    order: u32,
) -> Result<bool, Stop> {
    queue.stopped()?;
    let mut named = [Pfn(0); BATCH];
    let count = kernel.with_hold(|hold, blocks| {
        hold.taking()?;
        let names = core::iter::from_fn(|| blocks.name(order));
        Ok(named.iter_mut().zip(names).map(|(slot, pfn)| *slot = pfn).count())
    })?;
    for pfn in named.iter().take(count) {
        answer.add(queue, *pfn, geometry.granule_shift(order))?;
    }
    Ok(count == BATCH)
}

/// Handles the end of the request: the hold is kept if the host accepted the last answer
/// (`stop` is `None`), else it ends.
pub(crate) fn conclude(kernel: &mut impl RequestKernel, stop: Option<Stop>) {
    kernel.with_hold(|hold, blocks| match stop {
        None => hold.pass_to(Phase::Held),
        // The caller of `lose`, or the removal of the device, frees the blocks.
        Some(Stop::Lost | Stop::Gone) => {}
        Some(Stop::Cancelled | Stop::Refused) => {
            if matches!(hold.phase, Phase::Taking | Phase::Ending) {
                blocks.free_all();
                hold.emptied();
            }
        }
    });
}

/// Starts the end of the hold after a cancel: the *cancelled* answer revokes its blocks.
pub(crate) fn start_ending(kernel: &mut impl RequestKernel) {
    kernel.with_hold(|hold, _| hold.pass_to(Phase::Ending));
}

/// Releases the hold `id` on the host's request.
pub(crate) fn release(
    kernel: &mut impl RequestKernel,
    id: u32,
) -> Result<[u64; ANSWER_VALUES], End> {
    kernel.with_hold(|hold, blocks| {
        if hold.phase != Phase::Held || hold.id != id {
            return Err(End::Outcome(Outcome::BadArgument, 0));
        }
        blocks.free_all();
        Ok([hold.emptied(), 0, 0, 0])
    })
}
