//! What the C shim calls.

use core::ffi::{CStr, c_char, c_int};

use balloon_abi::{Features, MessageStatus};
use balloon_driver::{BalloonDriver, Geometry, Progress, shrinkable_pages};

use crate::kernel::{Shim, traits};

/// How long a balloon that found no memory waits before it asks the kernel
/// again. Long enough not to fight the guest for pages that it needs, short
/// enough for an operator who watches.
const STARVED_RETRY_MS: c_int = 1000;

/// Answer of [`aerostat_run`] and [`aerostat_empty`]: the device is gone.
const GONE: c_int = -1;

/// The state of one balloon, in memory that the shim owns.
pub struct Core {
    negotiated: Features,
    balloon: BalloonDriver,
}

/// Bytes of a [`Core`]. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_core_bytes() -> usize {
    size_of::<Core>()
}

/// Whether messages are page-bitmap records, which the host answers.
/// Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_has_page_bitmap(negotiated: u64) -> bool {
    Features(negotiated).contains(Features::PAGE_BITMAP)
}

/// Makes `core` an empty balloon.
///
/// # Safety
///
/// `core` must point to [`aerostat_core_bytes`] writable bytes, aligned to 8,
/// that nothing else uses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_init(
    core: *mut Core,
    negotiated: u64,
    page_shift: u32,
    max_order: u32,
) {
    let negotiated = Features(negotiated);
    let balloon = BalloonDriver::new(negotiated, Geometry { page_shift, max_order });
    // SAFETY: the caller vouches for `core`. What was there needs no drop: a
    // `Core` owns nothing.
    unsafe { core.write(Core { negotiated, balloon }) }
}

/// Goes towards the host's target. Returns the milliseconds after which to call
/// again, 0 where there is no need to, or -1 where the device is gone.
///
/// # Safety
///
/// `core` must be a balloon from [`aerostat_init`] and `shim` its device, both
/// under the held balloon mutex.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_run(core: *mut Core, shim: *mut Shim) -> c_int {
    // SAFETY: valid and exclusive by the caller's word.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    match core.balloon.run(&mut memory, &mut queues) {
        Ok(Progress::Settled | Progress::Yielded) => 0,
        Ok(Progress::Starved) => STARVED_RETRY_MS,
        Err(_) => GONE,
    }
}

/// Gives back at least `wanted` balloon pages, or the driver's own minimum,
/// because the guest is out of memory. Returns the balloon pages freed.
///
/// # Safety
///
/// As for [`aerostat_run`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_yield(core: *mut Core, shim: *mut Shim, wanted: u64) -> u64 {
    // SAFETY: valid and exclusive by the caller's word.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    core.balloon.yield_pages(wanted, &mut memory, &mut queues).unwrap_or(0)
}

/// Gives everything back. Returns 0, or -1 where the device is gone.
///
/// # Safety
///
/// As for [`aerostat_run`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_empty(core: *mut Core, shim: *mut Shim) -> c_int {
    // SAFETY: valid and exclusive by the caller's word.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    match core.balloon.empty(&mut memory, &mut queues) {
        Ok(()) => 0,
        Err(_) => GONE,
    }
}

/// Pages that the shrinker may offer; all counts in the same unit. Touches no
/// state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_shrinkable(held: u64, available: u64, total: u64) -> u64 {
    shrinkable_pages(held, available, total)
}

/// Why the host refused a message, as a C string for the log, or null where it
/// accepted it. `status` is in the CPU's byte order. Touches no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_refusal(status: u32) -> *const c_char {
    let why = refusal(MessageStatus::from_bytes(status.to_le_bytes()));
    why.map_or(core::ptr::null(), CStr::as_ptr)
}

/// What a status means for the log; `None` where it is good.
pub(crate) const fn refusal(status: Option<MessageStatus>) -> Option<&'static CStr> {
    match status {
        Some(MessageStatus::Accepted) => None,
        Some(MessageStatus::Malformed) => Some(c"malformed"),
        Some(MessageStatus::OutsideMemory) => Some(c"outside of guest memory"),
        Some(MessageStatus::RepeatedPage) => Some(c"a page twice"),
        Some(MessageStatus::Unwanted) => Some(c"nobody asked for it"),
        None => Some(c"no known answer"),
    }
}
