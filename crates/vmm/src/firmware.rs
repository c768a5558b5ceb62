//! The firmware's reset vector, the only part of a PC's firmware that a kernel uses.
//!
//! On a hardware-reduced machine without EFI, Linux reboots through EFI first and the firmware
//! second (`arch/x86/kernel/reboot.c`), and never uses the ACPI reset register.

use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::memory::Ram;
use crate::ports;

/// The reset vector in real mode: f000:fff0.
pub(crate) const START: u64 = 0xf_fff0;

/// Bytes up to the end of the first MiB.
const BYTES: usize = 16;

/// Writes code that requests a reset.
pub(crate) fn write(memory: &Ram) -> Result<(), Error> {
    memory.write_slice(&code(), GuestAddress(START)).map_err(Error::memory("writing"))
}

/// 16-bit machine code.
fn code() -> [u8; BYTES] {
    let [low, high] = ports::RESET.to_le_bytes();
    let mut code = [0x90; BYTES];
    #[rustfmt::skip]
    let instructions = [
        0xb0, ports::RESET_VALUE, // mov al, RESET_VALUE
        0xba, low, high, // mov dx, RESET
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to hlt
    ];
    for (place, byte) in code.iter_mut().zip(instructions) {
        *place = byte;
    }
    code
}
