//! The driver's two seams, made of the functions that the C glue provides.

use core::ffi::c_int;
use core::slice;

use balloon_abi::{Features, Pfn, QueueLayout, Vq};
use balloon_driver::{Gone, Memory, Queues};

/// `struct aerostat` of the glue; only ever passed back to it.
#[repr(C)]
pub struct Glue {
    _opaque: [u8; 0],
}

/// What the glue answers where there is no block.
const NO_PFN: u64 = u64::MAX;

unsafe extern "C" {
    fn aerostat_glue_allocate(glue: *mut Glue, order: u32) -> u64;
    fn aerostat_glue_withdraw(glue: *mut Glue, order: u32) -> u64;
    fn aerostat_glue_free_withdrawn(glue: *mut Glue);
    fn aerostat_glue_buffer(glue: *mut Glue, vq: u32, bytes: *mut usize) -> *mut u8;
    fn aerostat_glue_post(glue: *mut Glue, vq: u32, bytes: usize) -> c_int;
    fn aerostat_glue_tell_host(glue: *mut Glue, vq: u32) -> c_int;
    fn aerostat_glue_num_pages(glue: *mut Glue) -> u32;
    fn aerostat_glue_set_actual(glue: *mut Glue, pages: u32);
}

/// The kernel's allocator, behind the glue.
pub(crate) struct KernelMemory {
    glue: *mut Glue,
}

/// The device's queues and configuration space, behind the glue.
pub(crate) struct KernelQueues {
    glue: *mut Glue,
    layout: QueueLayout,
}

/// Both seams of one device for the length of one call.
///
/// # Safety
///
/// `glue` must point to the device's `struct aerostat`, with its balloon mutex
/// held by the caller, and stay valid as long as the results are used.
pub(crate) unsafe fn seams(glue: *mut Glue, negotiated: Features) -> (KernelMemory, KernelQueues) {
    (KernelMemory { glue }, KernelQueues { glue, layout: QueueLayout::new(negotiated) })
}

impl Memory for KernelMemory {
    fn allocate(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: `seams` was promised a valid, locked `glue`. The glue itself
        // refuses orders that it has no list for.
        pfn(unsafe { aerostat_glue_allocate(self.glue, order) })
    }

    fn withdraw(&mut self, order: u32) -> Option<Pfn> {
        // SAFETY: as in `allocate`.
        pfn(unsafe { aerostat_glue_withdraw(self.glue, order) })
    }

    fn free_withdrawn(&mut self) {
        // SAFETY: `seams` was promised a valid, locked `glue`.
        unsafe { aerostat_glue_free_withdrawn(self.glue) }
    }
}

impl Queues for KernelQueues {
    fn buffer(&mut self, vq: Vq) -> Result<&mut [u8], Gone> {
        let vq = self.number(vq)?;
        let mut bytes = 0;
        // SAFETY: `seams` was promised a valid, locked `glue`; `bytes` is a
        // live local.
        let buffer = unsafe { aerostat_glue_buffer(self.glue, vq, &raw mut bytes) };
        if buffer.is_null() {
            return Err(Gone);
        }
        // SAFETY: the glue returns a buffer of `bytes` initialised bytes that
        // the device does not hold. It hands out no second one before `post`,
        // which borrows `self` again and so ends this borrow.
        Ok(unsafe { slice::from_raw_parts_mut(buffer, bytes) })
    }

    fn post(&mut self, vq: Vq, len: usize) -> Result<(), Gone> {
        let vq = self.number(vq)?;
        // SAFETY: `seams` was promised a valid, locked `glue`, which checks
        // `len` against the buffer it handed out.
        answered(unsafe { aerostat_glue_post(self.glue, vq, len) })
    }

    fn tell_host(&mut self, vq: Vq) -> Result<(), Gone> {
        let vq = self.number(vq)?;
        // SAFETY: `seams` was promised a valid, locked `glue`.
        answered(unsafe { aerostat_glue_tell_host(self.glue, vq) })
    }

    fn num_pages(&mut self) -> u32 {
        // SAFETY: `seams` was promised a valid, locked `glue`.
        unsafe { aerostat_glue_num_pages(self.glue) }
    }

    fn set_actual(&mut self, pages: u32) {
        // SAFETY: `seams` was promised a valid, locked `glue`.
        unsafe { aerostat_glue_set_actual(self.glue, pages) }
    }
}

impl KernelQueues {
    fn number(&self, vq: Vq) -> Result<u32, Gone> {
        self.layout.index(vq).and_then(|index| u32::try_from(index).ok()).ok_or(Gone)
    }
}

pub(crate) fn pfn(raw: u64) -> Option<Pfn> {
    (raw != NO_PFN).then_some(Pfn(raw))
}

fn answered(error: c_int) -> Result<(), Gone> {
    if error == 0 { Ok(()) } else { Err(Gone) }
}
