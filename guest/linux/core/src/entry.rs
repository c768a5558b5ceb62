//! Entry points for the C shim.

use core::ffi::{CStr, c_char, c_int};

use balloon_abi::{Features, MessageStatus};
use balloon_driver::{BalloonDriver, Geometry, Progress, shrinkable_pages};

use crate::kernel::{Shim, traits};

/// Delay before a starved balloon tries to allocate again. Long enough not to compete with
/// the guest for pages, and short enough for an operator who waits.
const STARVED_RETRY_MS: c_int = 1000;

/// Result of [`aerostat_run`] and [`aerostat_empty`]: the device is gone.
const GONE: c_int = -1;

/// The state of a balloon, in memory that the shim owns.
pub struct Core {
    negotiated: Features,
    balloon: BalloonDriver,
}

/// Returns the bytes of a [`Core`]. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_core_bytes() -> usize {
    size_of::<Core>()
}

/// Returns true if messages are page-bitmap records, to which the host returns a status.
/// Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_has_page_bitmap(negotiated: u64) -> bool {
    Features(negotiated).contains(Features::PAGE_BITMAP)
}

/// Initializes `core` as an empty balloon.
///
/// # Safety
///
/// `core` must point to [`aerostat_core_bytes`] writable bytes, aligned to 8,
/// that nothing else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_init(
    core: *mut Core,
    negotiated: u64,
    page_shift: u32,
    max_order: u32,
) {
    let negotiated = Features(negotiated);
    let balloon = BalloonDriver::new(negotiated, Geometry { page_shift, max_order });
    // SAFETY: `core` is writable per this function's contract. The old value needs
    // no drop: a `Core` owns nothing.
    unsafe { core.write(Core { negotiated, balloon }) }
}

/// Inflates or deflates to the host's target. Returns the milliseconds after which to call
/// again, 0 for no retry, or -1 if the device is gone.
///
/// # Safety
///
/// `core` must be a balloon from [`aerostat_init`] and `shim` its device, with the
/// balloon mutex held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_run(core: *mut Core, shim: *mut Shim) -> c_int {
    // SAFETY: valid and exclusive per this function's contract.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    match core.balloon.run(&mut memory, &mut queues) {
        Ok(Progress::AtTarget | Progress::Yielded) => 0,
        Ok(Progress::Starved) => STARVED_RETRY_MS,
        Err(_) => GONE,
    }
}

/// Deflates at least `wanted` balloon pages, or the driver's minimum, because the guest is
/// out of memory. Returns the balloon pages freed.
///
/// # Safety
///
/// As for [`aerostat_run`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_yield(core: *mut Core, shim: *mut Shim, wanted: u64) -> u64 {
    // SAFETY: valid and exclusive per this function's contract.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    core.balloon.yield_pages(wanted, &mut memory, &mut queues).unwrap_or(0)
}

/// Empties the balloon. Returns 0, or -1 if the device is gone.
///
/// # Safety
///
/// As for [`aerostat_run`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_empty(core: *mut Core, shim: *mut Shim) -> c_int {
    // SAFETY: valid and exclusive per this function's contract.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut memory, mut queues) = unsafe { traits(shim, core.negotiated) };
    match core.balloon.empty(&mut memory, &mut queues) {
        Ok(()) => 0,
        Err(_) => GONE,
    }
}

/// Returns the pages that the shrinker may offer; all counts in the same unit. Accesses no
/// state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_shrinkable(held: u64, available: u64, total: u64) -> u64 {
    shrinkable_pages(held, available, total)
}

/// Returns why the host refused a message, as a C string for the log, or null if it
/// accepted the message. `status` is in native byte order. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_refusal(status: u32) -> *const c_char {
    let why = refusal(MessageStatus::from_bytes(status.to_le_bytes()));
    why.map_or(core::ptr::null(), CStr::as_ptr)
}

/// Returns the log text of a status; `None` for `Accepted`.
pub(crate) const fn refusal(status: Option<MessageStatus>) -> Option<&'static CStr> {
    match status {
        Some(MessageStatus::Accepted) => None,
        Some(MessageStatus::Malformed) => Some(c"malformed"),
        Some(MessageStatus::OutsideMemory) => Some(c"outside of guest memory"),
        Some(MessageStatus::RepeatedPage) => Some(c"repeated page"),
        Some(MessageStatus::Unwanted) => Some(c"no such request"),
        None => Some(c"unknown status"),
    }
}
