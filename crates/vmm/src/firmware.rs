//! The one thing that a kernel does with a PC's firmware: start it to reset the machine.
//!
//! Linux does so on a machine of reduced hardware without EFI, where its first choice is EFI and
//! its second the firmware (`arch/x86/kernel/reboot.c`), and never asks the reset register.

use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::memory::Ram;
use crate::ports;

/// Where a processor starts, as real mode sees it: f000:fff0.
pub(crate) const START: u64 = 0xf_fff0;

/// Bytes up to the end of the first MiB.
const BYTES: usize = 16;

/// Writes the few instructions that ask for a reset.
pub(crate) fn write(memory: &Ram) -> Result<(), Error> {
    memory.write_slice(&code(), GuestAddress(START)).map_err(Error::memory("writing"))
}

/// Machine code of 16 bits.
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
