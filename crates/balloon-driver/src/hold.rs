//! Blocks that the guest keeps free for the host.
//!
//! A hold is taken and released by requests, and lost to the guest's need at any
//! time, also in the middle of being taken. So its state is apart from the
//! requests', behind a lock that is never held while anybody waits.
//!
//! What the host was told is free stays untouched until the host has returned
//! the answer that takes it back (or the device is gone). Each way out of
//! `Taking` and `Held` has such an answer, and [`Hold::emptied`] comes after it.

use balloon_abi::Pfn;
use balloon_abi::request::{ANSWER_VALUES, AnswerHeader, Outcome};

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::inbox::Stop;
use crate::pressure::hold_floor_pages;
use crate::requests::End;
use crate::traits::{HeldBlocks, RequestKernel, RequestQueue};

/// Blocks taken or named under the hold's lock at a time: who needs the memory
/// back does not wait for more.
const BATCH: usize = 64;

/// Balloon pages taken under it at a time where that is one block or more (16
/// MiB): a kernel may zero what it hands out.
const BATCH_PAGES: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is no hold.
    Empty,
    /// Blocks are taken, then named.
    Taking,
    /// The host knows of all.
    Held,
    /// The host called it off; its answer is on the way.
    Ending,
    /// The guest needs the memory; the answer that says so is on the way.
    Losing,
}

/// The state of the one hold that a device may have.
#[derive(Debug)]
pub struct Hold {
    phase: Phase,
    id: u32,
    began_ns: u64,
    /// Balloon pages held.
    pages: u64,
}

impl Hold {
    /// No hold.
    pub const fn new() -> Self {
        Self { phase: Phase::Empty, id: 0, began_ns: 0, pages: 0 }
    }

    /// Balloon pages held now, whatever becomes of them.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Balloon pages that [`lose`](Self::lose) would bring.
    pub const fn losable_pages(&self) -> u64 {
        match self.phase {
            Phase::Taking | Phase::Held => self.pages,
            Phase::Empty | Phase::Ending | Phase::Losing => 0,
        }
    }

    /// The guest needs the memory: the answer to send, or `None` where there is
    /// nothing to lose, or nothing any more.
    pub fn lose(&mut self, now_ns: u64) -> Option<AnswerHeader> {
        if !matches!(self.phase, Phase::Taking | Phase::Held) {
            return None;
        }
        self.phase = Phase::Losing;
        let mut values = [0; ANSWER_VALUES];
        values[0] = self.pages;
        let elapsed_ns = now_ns.saturating_sub(self.began_ns);
        Some(AnswerHeader { id: self.id, outcome: Outcome::HoldLost, elapsed_ns, values })
    }

    /// True while the answer to [`lose`](Self::lose) is on its way.
    pub const fn is_losing(&self) -> bool {
        matches!(self.phase, Phase::Losing)
    }

    /// All blocks were freed. Returns how many balloon pages that were.
    pub fn emptied(&mut self) -> u64 {
        let pages = self.pages;
        *self = Self::new();
        pages
    }

    fn begin(&mut self, id: u32, began_ns: u64) -> bool {
        let free = self.phase == Phase::Empty;
        if free {
            *self = Self { phase: Phase::Taking, id, began_ns, pages: 0 };
        }
        free
    }

    fn taking(&self) -> Result<(), Stop> {
        if self.phase == Phase::Taking { Ok(()) } else { Err(Stop::Lost) }
    }

    /// From `Taking` to another phase, unless it is lost by now.
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

/// Takes free blocks, largest first, until `reserve_pages` are left, and names
/// them. The hold is still `Taking` then.
pub(crate) fn take(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    geometry: Geometry,
    (id, reserve_pages): (u32, u64),
) -> Result<[u64; ANSWER_VALUES], End> {
    let began_ns = queue.now_ns();
    if !kernel.with_hold(|hold, _| hold.begin(id, began_ns)) {
        return Err(End::Outcome(Outcome::Busy, 0));
    }
    answer.note_free(kernel.free_pages());
    let floor = hold_floor_pages(kernel.total_pages(), kernel.reserved_pages()).max(reserve_pages);
    for order in geometry.orders().rev() {
        while take_batch(kernel, queue, answer, geometry.block_pages(order), (order, floor))? {}
    }
    for order in geometry.orders().rev() {
        while name_batch(kernel, queue, answer, geometry, order)? {}
    }
    Ok(answer.finish_records(queue)?)
}

/// Takes some blocks; true when there may be more.
fn take_batch(
    kernel: &mut impl RequestKernel,
    queue: &mut impl RequestQueue,
    answer: &mut Answer,
    block_pages: u64,
    (order, floor): (u32, u64),
) -> Result<bool, Stop> {
    queue.stopped()?;
    let room = kernel.free_pages().saturating_sub(floor) / block_pages;
    let wanted = room.min(BATCH as u64).min((BATCH_PAGES / block_pages).max(1));
    if wanted == 0 {
        return Ok(false);
    }
    let began_ns = queue.now_ns();
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
    answer.note_lock(queue.now_ns().saturating_sub(began_ns));
    all
}

/// Names some of the blocks that are held; true when there may be more.
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

/// The host has returned the last answer and accepted it, or not (`stop`): the
/// hold stays, or ends.
pub(crate) fn conclude(kernel: &mut impl RequestKernel, stop: Option<Stop>) {
    kernel.with_hold(|hold, blocks| match stop {
        None => hold.pass_to(Phase::Held),
        // Its end is the business of whoever needs the memory, or leaves.
        Some(Stop::Lost | Stop::Gone) => {}
        Some(Stop::Cancelled | Stop::Refused) => {
            if matches!(hold.phase, Phase::Taking | Phase::Ending) {
                blocks.free_all();
                hold.emptied();
            }
        }
    });
}

/// From here on the host's *cancelled* is the answer that ends the hold.
pub(crate) fn call_off(kernel: &mut impl RequestKernel) {
    kernel.with_hold(|hold, _| hold.pass_to(Phase::Ending));
}

/// Gives the hold `id` back to the guest, because the host does not need it any
/// more.
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
