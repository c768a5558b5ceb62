//! Chains that name pages by their descriptors, for free page hinting and reporting.
//! The address and length of a device-writable descriptor are the message. The memory
//! there is neither read nor written.

use balloon_abi::hint::COMMAND_BYTES;
use balloon_abi::page::{BALLOON_PAGE_BYTES, BALLOON_PAGE_SHIFT};
use page_set::{PageRange, PageSet};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory};

use crate::fault::Fault;
use crate::layout::MemoryLayout;
use crate::message::MAX_DESCRIPTORS;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 16;

/// The content of a chain.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    /// The command id in its readable bytes, if it has any.
    pub(crate) command: Option<u32>,
    /// The pages that its writable descriptors cover completely. All are guest memory.
    pub(crate) pages: PageSet,
}

/// Decodes a chain, all or nothing. The first value is the number of bytes read.
///
/// Ignores a page that a descriptor covers only partly: the rest may be in use.
/// Duplicates are allowed.
pub(crate) fn read<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    layout: &MemoryLayout,
) -> (usize, Result<Named, Fault>) {
    let mut named = Named::default();
    let mut command = Command::default();
    let mut outcome = Ok(());
    let mut truncated = false;
    let mut cost = 0;
    for descriptor in chain.take(MAX_DESCRIPTORS) {
        truncated = descriptor.has_next();
        cost += DESCRIPTOR_BYTES;
        if outcome.is_err() {
            continue;
        }
        let (addr, len) = (descriptor.addr(), descriptor.len());
        outcome = if descriptor.is_write_only() {
            pages_of(addr.0, len, layout).map(|range| {
                named.pages.insert(range);
            })
        } else {
            command.append(len, |bytes| memory.read_slice(bytes, addr).is_ok())
        };
    }
    let outcome = outcome.and_then(|()| {
        if truncated {
            return Err(Fault::BadDescriptor);
        }
        named.command = command.number()?;
        if named == Named::default() { Err(Fault::EmptyMessage) } else { Ok(named) }
    });
    (cost, outcome)
}

/// Returns the pages that lie completely between `addr` and `addr + len`.
fn pages_of(addr: u64, len: u32, layout: &MemoryLayout) -> Result<PageRange, Fault> {
    let end = addr.checked_add(u64::from(len)).ok_or(Fault::OutsideMemory)?;
    let first = addr.div_ceil(BALLOON_PAGE_BYTES);
    let range = PageRange::from_bounds(first, (end >> BALLOON_PAGE_SHIFT).max(first))
        .map_err(|_| Fault::OutsideMemory)?;
    if range.is_empty() || layout.covers(range) { Ok(range) } else { Err(Fault::OutsideMemory) }
}

/// The readable bytes: a command, in one or more descriptors.
#[derive(Default)]
struct Command {
    bytes: [u8; COMMAND_BYTES],
    filled: usize,
}

impl Command {
    fn append(&mut self, len: u32, read: impl FnOnce(&mut [u8]) -> bool) -> Result<(), Fault> {
        let end = self.filled.saturating_add(len as usize);
        let bytes = self.bytes.get_mut(self.filled..end).ok_or(Fault::MalformedFreePages)?;
        if !read(bytes) {
            return Err(Fault::BadDescriptor);
        }
        self.filled = end;
        Ok(())
    }

    fn number(&self) -> Result<Option<u32>, Fault> {
        match self.filled {
            0 => Ok(None),
            COMMAND_BYTES => Ok(Some(u32::from_le_bytes(self.bytes))),
            _ => Err(Fault::MalformedFreePages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn only_completely_covered_pages_are_named() {
        let layout = MemoryLayout::new([(0x10_0000, 0x10_0000), (4 * GIB, 8 * GIB)]).unwrap();
        let pages = |addr, len| pages_of(addr, len, &layout).map(|r| (r.start(), r.pages()));
        assert_eq!(pages(0x10_0000, 0x2000), Ok((0x100, 2)));
        assert_eq!(pages(0x10_0001, 0x2fff), Ok((0x101, 2)));
        assert_eq!(pages(0x10_0fff, 0x1000), Ok((0x101, 0)));
        assert_eq!(pages(0x10_0000, 0xfff), Ok((0x100, 0)));
        assert_eq!(pages(0, 0), Ok((0, 0)), "empty descriptor");
        assert_eq!(pages(u64::MAX - 0xfff, 0xfff).map(|(_, pages)| pages), Ok(0));
        assert_eq!(pages(4 * GIB, u32::MAX), Ok((0x10_0000, 0xf_ffff)));
        for (addr, len) in [
            (0, 0x1000),
            (0x1f_f000, 0x2000),
            (12 * GIB - 0x1000, 0x2000),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (1 << 52, 0x1000),
            (1 << 63, 1 << 31),
        ] {
            assert_eq!(pages(addr, len), Err(Fault::OutsideMemory), "{len:#x} at {addr:#x}");
        }
    }
}
