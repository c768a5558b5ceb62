//! The driver's traits for requests, implemented with the C shim's functions.

use core::ffi::{c_int, c_void};
use core::slice;

use balloon_abi::{Caches, Pfn};
use balloon_driver::{
    CachePages, Errno, HeldBlocks, Hold, ReceivedRequest, RequestKernel, RequestQueue, Slice, Stop,
    Zone,
};

use crate::kernel::{Shim, pfn};

unsafe extern "C" {
    fn aerostat_shim_begin_next(shim: *mut Shim, request: *mut c_void) -> bool;
    fn aerostat_shim_stopped(shim: *mut Shim) -> c_int;
    fn aerostat_shim_answer_buffer(
        shim: *mut Shim,
        last: bool,
        buffer: *mut *mut u8,
        bytes: *mut usize,
    ) -> c_int;
    fn aerostat_shim_post_answer(shim: *mut Shim, id: u32, bytes: usize) -> c_int;
    fn aerostat_shim_finish_answers(shim: *mut Shim) -> c_int;
    safe fn aerostat_shim_now_ns() -> u64;
    safe fn aerostat_shim_page_cache() -> u64;
    safe fn aerostat_shim_slab() -> u64;
    safe fn aerostat_shim_drop_caches(caches: u32) -> c_int;
    safe fn aerostat_shim_free_pages() -> u64;
    safe fn aerostat_shim_total_pages() -> u64;
    safe fn aerostat_shim_reserved_pages() -> u64;
    fn aerostat_shim_zone(number: u32, start: *mut u64, end: *mut u64) -> bool;
    safe fn aerostat_shim_has_free(order: u32) -> bool;
    fn aerostat_shim_scan(
        zone: u32,
        from: u64,
        order: u32,
        visits: u32,
        found: *mut Pfn,
        count: *mut usize,
        lock_ns: *mut u64,
    ) -> u64;
    fn aerostat_shim_hold_lock(shim: *mut Shim) -> *mut c_void;
    fn aerostat_shim_hold_unlock(shim: *mut Shim);
    fn aerostat_shim_hold_take(shim: *mut Shim, order: u32) -> bool;
    fn aerostat_shim_hold_name(shim: *mut Shim, order: u32) -> u64;
    fn aerostat_shim_hold_free(shim: *mut Shim);
}

const CANCELLED: c_int = 1;
const REFUSED: c_int = 2;
const LOST: c_int = 3;
const GONE: c_int = 4;

/// The kernel, through the shim.
pub(crate) struct Kernel {
    shim: *mut Shim,
}

/// The request queue, through the shim.
pub(crate) struct KernelQueue {
    shim: *mut Shim,
}

/// The hold's lists, through the shim, while its mutex is held.
pub(crate) struct KernelBlocks {
    shim: *mut Shim,
}

/// Returns both traits of a device, for use during one call.
///
/// # Safety
///
/// `shim` must point to a device's `struct aerostat` that has requests, and stay
/// valid while its work item uses the results.
pub(crate) unsafe fn request_traits(shim: *mut Shim) -> (Kernel, KernelQueue) {
    (Kernel { shim }, KernelQueue { shim })
}

/// Returns the shim's number of a reason to stop.
pub(crate) const fn stop_number(stop: Stop) -> c_int {
    match stop {
        Stop::Cancelled => CANCELLED,
        Stop::Refused => REFUSED,
        Stop::Lost => LOST,
        Stop::Gone => GONE,
    }
}

fn unless_stopped(number: c_int) -> Result<(), Stop> {
    match number {
        0 => Ok(()),
        CANCELLED => Err(Stop::Cancelled),
        REFUSED => Err(Stop::Refused),
        LOST => Err(Stop::Lost),
        _ => Err(Stop::Gone),
    }
}

impl RequestQueue for KernelQueue {
    fn begin_next(&mut self) -> Option<ReceivedRequest> {
        let mut request: Option<ReceivedRequest> = None;
        // SAFETY: `shim` is valid per the contract of `request_traits`. The shim passes the
        // live local on to `aerostat_inbox_begin_next` and keeps no copy.
        unsafe { aerostat_shim_begin_next(self.shim, (&raw mut request).cast()) };
        request
    }

    fn stopped(&mut self) -> Result<(), Stop> {
        // SAFETY: `shim` is valid per the contract of `request_traits`.
        unless_stopped(unsafe { aerostat_shim_stopped(self.shim) })
    }

    fn buffer(&mut self, last: bool) -> Result<&mut [u8], Stop> {
        let (mut buffer, mut bytes) = (core::ptr::null_mut(), 0);
        // SAFETY: `shim` is valid per the contract of `request_traits`; the other pointers
        // are to live locals.
        let stop = unsafe {
            aerostat_shim_answer_buffer(self.shim, last, &raw mut buffer, &raw mut bytes)
        };
        unless_stopped(stop)?;
        // SAFETY: the shim returned a buffer of `bytes` initialised bytes that is not
        // on the queue. It returns no other buffer before `post`, which borrows `self`
        // again and so ends this borrow.
        Ok(unsafe { slice::from_raw_parts_mut(buffer, bytes) })
    }

    fn post(&mut self, id: u32, len: usize) -> Result<(), Stop> {
        // SAFETY: `shim` is valid per the contract of `request_traits`, which checks `len`
        // against the buffer that it returned.
        unless_stopped(unsafe { aerostat_shim_post_answer(self.shim, id, len) })
    }

    fn finish(&mut self) -> Result<(), Stop> {
        // SAFETY: `shim` is valid per the contract of `request_traits`.
        unless_stopped(unsafe { aerostat_shim_finish_answers(self.shim) })
    }

    fn now_ns(&mut self) -> u64 {
        aerostat_shim_now_ns()
    }
}

impl RequestKernel for Kernel {
    type Blocks = KernelBlocks;

    fn cache_pages(&mut self) -> CachePages {
        CachePages { page_cache: aerostat_shim_page_cache(), slab: aerostat_shim_slab() }
    }

    fn drop_caches(&mut self, cache: Caches) -> Result<(), Errno> {
        match aerostat_shim_drop_caches(cache.bits() as u32) {
            0 => Ok(()),
            error => Err(Errno(error.unsigned_abs())),
        }
    }

    fn free_pages(&mut self) -> u64 {
        aerostat_shim_free_pages()
    }

    fn total_pages(&mut self) -> u64 {
        aerostat_shim_total_pages()
    }

    fn reserved_pages(&mut self) -> u64 {
        aerostat_shim_reserved_pages()
    }

    fn zone(&mut self, number: u32) -> Option<Zone> {
        let (mut start, mut end) = (0, 0);
        // SAFETY: both pointers are to live locals.
        let is_one = unsafe { aerostat_shim_zone(number, &raw mut start, &raw mut end) };
        is_one.then_some(Zone { start: Pfn(start), end: Pfn(end) })
    }

    fn has_free(&mut self, order: u32) -> bool {
        aerostat_shim_has_free(order)
    }

    fn scan(&mut self, zone: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice {
        let (mut count, mut lock_ns) = (found.len(), 0);
        // SAFETY: the shim writes at most `count` numbers of 64 bits to `found`,
        // and a `Pfn` is one; the other pointers are to live locals.
        let next = unsafe {
            aerostat_shim_scan(
                zone,
                from.0,
                order,
                visits,
                found.as_mut_ptr(),
                &raw mut count,
                &raw mut lock_ns,
            )
        };
        Slice { next: Pfn(next), found: count.min(found.len()), lock_ns }
    }

    fn with_hold<R>(&mut self, act: impl FnOnce(&mut Hold, &mut KernelBlocks) -> R) -> R {
        // SAFETY: `shim` is valid per the contract of `request_traits`, and returns the
        // hold from `aerostat_hold_init`. Until the unlock no other code accesses the
        // hold or its lists. A panic in `act` does not unwind; it stops the kernel.
        let hold = unsafe { &mut *aerostat_shim_hold_lock(self.shim).cast::<Hold>() };
        let result = act(hold, &mut KernelBlocks { shim: self.shim });
        // SAFETY: locked above, and the borrows of both ended with `act`.
        unsafe { aerostat_shim_hold_unlock(self.shim) };
        result
    }
}

impl HeldBlocks for KernelBlocks {
    fn take(&mut self, order: u32) -> bool {
        // SAFETY: made by `with_hold`, with a valid `shim` and its mutex held. The
        // shim itself refuses orders that it has no list for.
        unsafe { aerostat_shim_hold_take(self.shim, order) }
    }

    fn name(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: as in `take`.
        pfn(unsafe { aerostat_shim_hold_name(self.shim, order) })
    }

    fn free_all(&mut self) {
        // SAFETY: made by `with_hold`, with a valid `shim` and its mutex held.
        unsafe { aerostat_shim_hold_free(self.shim) }
    }
}
