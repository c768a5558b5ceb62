//! A bug in the driver is a bug in the kernel.

use core::panic::PanicInfo;

unsafe extern "C" {
    fn aerostat_shim_bug(file: *const u8, file_bytes: usize, line: u32);
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if let Some(at) = info.location() {
        let file = at.file();
        // SAFETY: the shim reads `file_bytes` bytes and then calls BUG().
        unsafe { aerostat_shim_bug(file.as_ptr(), file.len(), at.line()) }
    }
    // SAFETY: an undefined instruction traps and does nothing else. It stands
    // here, not in a loop, so that objtool sees the end of the path whether or
    // not it knows that the function above does not return.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}
