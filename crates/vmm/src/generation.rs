//! The VM generation ID: a random number that reports to a guest that it is a copy.
//!
//! A guest restored from a snapshot has the same random pool as the saved guest and all other
//! copies. When the ID changes, the kernel mixes it into the pool ("Virtual Machine Generation ID",
//! Microsoft, 2018; Linux's `drivers/virt/vmgenid.c`). A migrated guest is the same guest, and
//! keeps its ID.
//!
//! The ID is in reserved guest memory, so it is migrated with the memory. The guest finds it
//! through ACPI, and is notified of a change by an ACPI event (`acpi`).

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::layout;
use crate::memory::Ram;

/// Bytes of an ID.
const ID_BYTES: usize = 16;

/// Writes a new random ID.
pub(crate) fn write(memory: &Ram) -> Result<(), Error> {
    let mut id = [0; ID_BYTES];
    let filled = getrandom(&mut id, GetRandomFlags::empty());
    // The kernel returns this few bytes completely.
    filled.map_err(Error::host("getrandom"))?;
    let at = GuestAddress(layout::GENERATION_ID);
    memory.write_slice(&id, at).map_err(Error::memory("writing the generation"))
}

/// Writes a new ID for a paused guest, because it is a copy. `event` notifies it when it runs.
///
/// # Errors
/// A system call fails.
pub(crate) fn renew(memory: &Ram, event: &EventFd) -> Result<(), Error> {
    write(memory)?;
    event.write(1).map_err(Error::host::<std::io::Error>("interrupting the guest"))
}
