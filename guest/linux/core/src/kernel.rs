//! The driver's traits for the balloon, implemented with the C shim's functions.

use core::ffi::c_int;
use core::slice;

use balloon_abi::{Features, Pfn, QueueLayout, Vq};
use balloon_driver::{Gone, PageAllocator, Queues};

/// `struct aerostat` of the shim; only ever passed back to it.
#[repr(C)]
pub struct Shim {
    _opaque: [u8; 0],
}

/// The shim's result if there is no block.
const NO_PFN: u64 = u64::MAX;

unsafe extern "C" {
    fn aerostat_shim_allocate(shim: *mut Shim, order: u32) -> u64;
    fn aerostat_shim_withdraw(shim: *mut Shim, order: u32) -> u64;
    fn aerostat_shim_free_withdrawn(shim: *mut Shim);
    fn aerostat_shim_buffer(shim: *mut Shim, vq: u32, bytes: *mut usize) -> *mut u8;
    fn aerostat_shim_post(shim: *mut Shim, vq: u32, bytes: usize) -> c_int;
    fn aerostat_shim_tell_host(shim: *mut Shim, vq: u32) -> c_int;
    fn aerostat_shim_num_pages(shim: *mut Shim) -> u32;
    fn aerostat_shim_set_actual(shim: *mut Shim, pages: u32);
}

/// The kernel's allocator, through the shim.
pub(crate) struct KernelMemory {
    shim: *mut Shim,
}

/// The device's queues and configuration space, through the shim.
pub(crate) struct KernelQueues {
    shim: *mut Shim,
    layout: QueueLayout,
}

/// Returns both traits of a device, for use during one call.
///
/// # Safety
///
/// `shim` must point to the device's `struct aerostat`, with its balloon mutex
/// held by the caller, and stay valid while the results are used.
pub(crate) unsafe fn traits(shim: *mut Shim, negotiated: Features) -> (KernelMemory, KernelQueues) {
    (KernelMemory { shim }, KernelQueues { shim, layout: QueueLayout::new(negotiated) })
}

impl PageAllocator for KernelMemory {
    fn allocate(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: `shim` is valid and locked per the contract of `traits`. The shim itself
        // refuses orders that it has no list for.
        pfn(unsafe { aerostat_shim_allocate(self.shim, order) })
    }

    fn withdraw(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: as in `allocate`.
        pfn(unsafe { aerostat_shim_withdraw(self.shim, order) })
    }

    fn free_withdrawn(&mut self) {
        // SAFETY: `shim` is valid and locked per the contract of `traits`.
        unsafe { aerostat_shim_free_withdrawn(self.shim) }
    }
}

impl Queues for KernelQueues {
    fn buffer(&mut self, vq: Vq) -> Result<&mut [u8], Gone> {
        let vq = self.index(vq)?;
        let mut bytes = 0;
        // SAFETY: `shim` is valid and locked per the contract of `traits`; `bytes` is a
        // live local.
        let buffer = unsafe { aerostat_shim_buffer(self.shim, vq, &raw mut bytes) };
        if buffer.is_null() {
            return Err(Gone);
        }
        // SAFETY: the shim returns a buffer of `bytes` initialised bytes that is
        // not on the queue. It returns no other buffer before `post`, which borrows
        // `self` again and so ends this borrow.
        Ok(unsafe { slice::from_raw_parts_mut(buffer, bytes) })
    }

    fn post(&mut self, vq: Vq, len: usize) -> Result<(), Gone> {
        let vq = self.index(vq)?;
        // SAFETY: `shim` is valid and locked per the contract of `traits`, which checks
        // `len` against the buffer that it returned.
        result(unsafe { aerostat_shim_post(self.shim, vq, len) })
    }

    fn tell_host(&mut self, vq: Vq) -> Result<(), Gone> {
        let vq = self.index(vq)?;
        // SAFETY: `shim` is valid and locked per the contract of `traits`.
        result(unsafe { aerostat_shim_tell_host(self.shim, vq) })
    }

    fn num_pages(&mut self) -> u32 {
        // SAFETY: `shim` is valid and locked per the contract of `traits`.
        unsafe { aerostat_shim_num_pages(self.shim) }
    }

    fn set_actual(&mut self, pages: u32) {
        // SAFETY: `shim` is valid and locked per the contract of `traits`.
        unsafe { aerostat_shim_set_actual(self.shim, pages) }
    }
}

impl KernelQueues {
    fn index(&self, vq: Vq) -> Result<u32, Gone> {
        self.layout.index(vq).and_then(|index| u32::try_from(index).ok()).ok_or(Gone)
    }
}

pub(crate) fn pfn(raw: u64) -> Option<Pfn> {
    (raw != NO_PFN).then_some(Pfn(raw))
}

fn result(error: c_int) -> Result<(), Gone> {
    if error == 0 { Ok(()) } else { Err(Gone) }
}
