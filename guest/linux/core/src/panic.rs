//! The panic handler: calls BUG().

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
    // SAFETY: an undefined instruction traps and has no other effect. It is used
    // instead of a loop so that objtool sees the end of the path, even if it does not
    // know that the function above does not return.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}
