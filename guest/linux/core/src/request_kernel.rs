//! The seams for requests, made of the functions that the C glue provides.

use core::ffi::{c_int, c_void};
use core::slice;

use balloon_abi::{Caches, Pfn};
use balloon_driver::{
    Asked, CachePages, Errno, HeldBlocks, Hold, RequestKernel, RequestQueue, Slice, Stop, Zone,
};

use crate::kernel::{Glue, pfn};

unsafe extern "C" {
    fn aerostat_glue_begin_next(glue: *mut Glue, asked: *mut c_void) -> bool;
    fn aerostat_glue_stopped(glue: *mut Glue) -> c_int;
    fn aerostat_glue_answer_buffer(
        glue: *mut Glue,
        last: bool,
        buffer: *mut *mut u8,
        bytes: *mut usize,
    ) -> c_int;
    fn aerostat_glue_post_answer(glue: *mut Glue, id: u32, bytes: usize) -> c_int;
    fn aerostat_glue_finish_answers(glue: *mut Glue) -> c_int;
    safe fn aerostat_glue_now_ns() -> u64;
    safe fn aerostat_glue_page_cache() -> u64;
    safe fn aerostat_glue_slab() -> u64;
    safe fn aerostat_glue_drop_caches(caches: u32) -> c_int;
    safe fn aerostat_glue_free_pages() -> u64;
    safe fn aerostat_glue_total_pages() -> u64;
    safe fn aerostat_glue_reserved_pages() -> u64;
    fn aerostat_glue_zone(number: u32, start: *mut u64, end: *mut u64) -> bool;
    safe fn aerostat_glue_has_free(order: u32) -> bool;
    fn aerostat_glue_scan(
        zone: u32,
        from: u64,
        order: u32,
        visits: u32,
        found: *mut Pfn,
        count: *mut usize,
        lock_ns: *mut u64,
    ) -> u64;
    fn aerostat_glue_hold_lock(glue: *mut Glue) -> *mut c_void;
    fn aerostat_glue_hold_unlock(glue: *mut Glue);
    fn aerostat_glue_hold_take(glue: *mut Glue, order: u32) -> bool;
    fn aerostat_glue_hold_name(glue: *mut Glue, order: u32) -> u64;
    fn aerostat_glue_hold_free(glue: *mut Glue);
}

const CANCELLED: c_int = 1;
const REFUSED: c_int = 2;
const LOST: c_int = 3;
const GONE: c_int = 4;

/// The kernel, behind the glue.
pub(crate) struct Kernel {
    glue: *mut Glue,
}

/// The request queue, behind the glue.
pub(crate) struct KernelQueue {
    glue: *mut Glue,
}

/// The hold's lists, behind the glue, as long as its mutex is held.
pub(crate) struct KernelBlocks {
    glue: *mut Glue,
}

/// Both seams of one device for the length of one call.
///
/// # Safety
///
/// `glue` must point to a device's `struct aerostat` that has requests, and stay
/// valid as long as the results are used, by its one work item.
pub(crate) unsafe fn request_seams(glue: *mut Glue) -> (Kernel, KernelQueue) {
    (Kernel { glue }, KernelQueue { glue })
}

/// How the glue knows a reason to stop.
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
    fn begin_next(&mut self) -> Option<Asked> {
        let mut asked: Option<Asked> = None;
        // SAFETY: `request_seams` was promised a valid `glue`. The glue passes the
        // live local on to `aerostat_inbox_begin_next` and keeps no copy.
        unsafe { aerostat_glue_begin_next(self.glue, (&raw mut asked).cast()) };
        asked
    }

    fn stopped(&mut self) -> Result<(), Stop> {
        // SAFETY: `request_seams` was promised a valid `glue`.
        unless_stopped(unsafe { aerostat_glue_stopped(self.glue) })
    }

    fn buffer(&mut self, last: bool) -> Result<&mut [u8], Stop> {
        let (mut buffer, mut bytes) = (core::ptr::null_mut(), 0);
        // SAFETY: `request_seams` was promised a valid `glue`; the other pointers
        // are to live locals.
        let stop = unsafe {
            aerostat_glue_answer_buffer(self.glue, last, &raw mut buffer, &raw mut bytes)
        };
        unless_stopped(stop)?;
        // SAFETY: the glue answered with a buffer of `bytes` initialised bytes that
        // the device does not hold. It hands out no second one before `post`, which
        // borrows `self` again and so ends this borrow.
        Ok(unsafe { slice::from_raw_parts_mut(buffer, bytes) })
    }

    fn post(&mut self, id: u32, len: usize) -> Result<(), Stop> {
        // SAFETY: `request_seams` was promised a valid `glue`, which checks `len`
        // against the buffer it handed out.
        unless_stopped(unsafe { aerostat_glue_post_answer(self.glue, id, len) })
    }

    fn finish(&mut self) -> Result<(), Stop> {
        // SAFETY: `request_seams` was promised a valid `glue`.
        unless_stopped(unsafe { aerostat_glue_finish_answers(self.glue) })
    }

    fn now_ns(&mut self) -> u64 {
        aerostat_glue_now_ns()
    }
}

impl RequestKernel for Kernel {
    type Blocks = KernelBlocks;

    fn cache_pages(&mut self) -> CachePages {
        CachePages { page_cache: aerostat_glue_page_cache(), slab: aerostat_glue_slab() }
    }

    fn drop_caches(&mut self, cache: Caches) -> Result<(), Errno> {
        match aerostat_glue_drop_caches(cache.bits() as u32) {
            0 => Ok(()),
            error => Err(Errno(error.unsigned_abs())),
        }
    }

    fn free_pages(&mut self) -> u64 {
        aerostat_glue_free_pages()
    }

    fn total_pages(&mut self) -> u64 {
        aerostat_glue_total_pages()
    }

    fn reserved_pages(&mut self) -> u64 {
        aerostat_glue_reserved_pages()
    }

    fn zone(&mut self, number: u32) -> Option<Zone> {
        let (mut start, mut end) = (0, 0);
        // SAFETY: both pointers are to live locals.
        let is_one = unsafe { aerostat_glue_zone(number, &raw mut start, &raw mut end) };
        is_one.then_some(Zone { start: Pfn(start), end: Pfn(end) })
    }

    fn has_free(&mut self, order: u32) -> bool {
        aerostat_glue_has_free(order)
    }

    fn scan(&mut self, zone: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice {
        let (mut count, mut lock_ns) = (found.len(), 0);
        // SAFETY: the glue writes at most `count` numbers of 64 bits to `found`,
        // and a `Pfn` is one; the other pointers are to live locals.
        let next = unsafe {
            aerostat_glue_scan(
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
        // SAFETY: `request_seams` was promised a valid `glue`, which answers with
        // what `aerostat_hold_init` made. From here to the unlock nobody else
        // touches the hold or its lists; a panic in `act` does not unwind, it stops
        // the kernel.
        let hold = unsafe { &mut *aerostat_glue_hold_lock(self.glue).cast::<Hold>() };
        let result = act(hold, &mut KernelBlocks { glue: self.glue });
        // SAFETY: locked above, and the borrows of both ended with `act`.
        unsafe { aerostat_glue_hold_unlock(self.glue) };
        result
    }
}

impl HeldBlocks for KernelBlocks {
    fn take(&mut self, order: u32) -> bool {
        // SAFETY: made by `with_hold`, with a valid `glue` and its mutex held. The
        // glue itself refuses orders that it has no list for.
        unsafe { aerostat_glue_hold_take(self.glue, order) }
    }

    fn name(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: as in `take`.
        pfn(unsafe { aerostat_glue_hold_name(self.glue, order) })
    }

    fn free_all(&mut self) {
        // SAFETY: made by `with_hold`, with a valid `glue` and its mutex held.
        unsafe { aerostat_glue_hold_free(self.glue) }
    }
}
