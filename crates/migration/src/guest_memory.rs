//! Guest memory mapped by `vm-memory`.

use page_set::{PAGE_BYTES, PageRange};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::traits::{MachineError, ReadPages, WritePages};

/// Bytes that are read and compared before they are cleared.
const ZERO_CHECK_BYTES: usize = 64 << 10;

/// Memory of a guest, for both sides. Writes that bypass the dirty log of `vm-memory` happen only
/// in guests that do not run yet.
#[derive(Clone, Debug)]
pub struct MappedMemory<B: Bitmap = ()>(pub GuestMemoryMmap<B>);

fn address(pages: PageRange) -> GuestAddress {
    // Cannot overflow: page numbers are below 2^52.
    GuestAddress(pages.start() * PAGE_BYTES)
}

impl<B: Bitmap + Send + Sync> ReadPages for MappedMemory<B> {
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError> {
        Ok(self.0.read_slice(out, address(pages))?)
    }
}

impl<B: Bitmap + Send + Sync> WritePages for MappedMemory<B> {
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.0.write_slice(bytes, address(pages))?)
    }

    /// Only reads pages that are zeros already, so that they cost the host no memory.
    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError> {
        let zeros = vec![0; ZERO_CHECK_BYTES];
        let mut found = vec![0; ZERO_CHECK_BYTES];
        let mut rest = pages;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.start() + ZERO_CHECK_BYTES as u64 / PAGE_BYTES);
            let len = usize::try_from(now.pages() * PAGE_BYTES)?;
            let (Some(zeros), Some(found)) = (zeros.get(..len), found.get_mut(..len)) else {
                break;
            };
            self.0.read_slice(found, address(now))?;
            if found != zeros {
                self.0.write_slice(zeros, address(now))?;
            }
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_written_and_cleared() {
        let ranges = [(GuestAddress(0), 64 << 12), (GuestAddress(1 << 20), 64 << 12)];
        let memory = MappedMemory::<()>(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let pages = PageRange::new(256 + 3, 40).unwrap();
        let bytes: Vec<u8> = (0..40 * 4096).map(|i| (i % 251) as u8).collect();
        memory.write_pages(pages, &bytes).unwrap();
        let mut out = vec![0; bytes.len()];
        memory.read_pages(pages, &mut out).unwrap();
        assert_eq!(out, bytes);
        memory.zero_pages(PageRange::new(256 + 4, 38).unwrap()).unwrap();
        memory.read_pages(pages, &mut out).unwrap();
        assert_eq!(out[..4096], bytes[..4096]);
        assert!(out[4096..39 * 4096].iter().all(|byte| *byte == 0));
        assert_eq!(out[39 * 4096..], bytes[39 * 4096..]);
        let outside = PageRange::new(250, 10).unwrap();
        assert!(memory.read_pages(outside, &mut out[..40960]).is_err());
    }
}
