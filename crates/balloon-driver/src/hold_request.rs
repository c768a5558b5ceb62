//! Executes the requests that create and release the hold.

use balloon_abi::Pfn;
use balloon_abi::request::{ANSWER_VALUES, Outcome};

use crate::answer::Answer;
use crate::balloon::Geometry;
use crate::end::End;
use crate::hold::Phase;
use crate::inbox::Stop;
use crate::pressure::hold_floor_pages;
use crate::traits::{HeldBlocks, RequestKernel, RequestQueue};

/// Most blocks that are allocated or named per critical section: a task that reclaims the
/// memory waits no longer than that.
const BATCH: usize = 64;

/// Most balloon pages that are allocated per critical section, but at least one block (16
/// MiB): the kernel may zero allocated pages.
const BATCH_PAGES: u64 = 4096;

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
