//! The VM generation ID: a random number by which a guest learns that it is a copy.
//!
//! A guest that comes out of a file has the random pool of every other guest out of that file, and of
//! the one that was written. When the number changes its kernel mixes it in ("Virtual Machine
//! Generation ID", Microsoft, 2018; Linux's `drivers/virt/vmgenid.c`). A guest that is moved is the
//! same guest, and keeps its number.
//!
//! The number lies in memory that the guest does not allocate, so it goes wherever memory goes. The
//! guest finds it by its ACPI tables, and hears of a change by an interrupt of the machine's
//! (`acpi`).

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::layout;
use crate::machine::Machine;
use crate::memory::Ram;

/// Bytes of a number.
const ID_BYTES: usize = 16;

/// Gives a guest a number that no other has.
pub(crate) fn write(memory: &Ram) -> Result<(), Error> {
    let mut id = [0; ID_BYTES];
    let filled = getrandom(&mut id, GetRandomFlags::empty());
    // The kernel gives so few bytes whole.
    filled.map_err(Error::host("drawing random numbers"))?;
    let at = GuestAddress(layout::GENERATION_ID);
    memory.write_slice(&id, at).map_err(Error::memory("writing the generation"))
}

impl Machine {
    /// The guest that stands still here is a copy, which it hears as soon as it runs.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub(crate) fn is_a_copy(&self) -> Result<(), Error> {
        write(&self.memory.guest)?;
        self.event.write(1).map_err(Error::host::<std::io::Error>("interrupting the guest"))
    }
}
