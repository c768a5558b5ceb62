//! Measures the host memory that backs a guest.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use page_set::PAGE_BYTES;
use rustix::fs::fstat;
use rustix::io::retry_on_intr;

use crate::{Backing, HostMemoryError, MemoryMap, Region};

/// Unit of `st_blocks`, independent of the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Bytes of one entry of /proc/self/pagemap.
const ENTRY_BYTES: usize = 8;
/// Entries read at once (64 KiB, 32 MiB of memory).
const READ_ENTRIES: usize = 8192;
/// In memory, and swapped out (`Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Host memory behind all regions, in bytes.
///
/// For a file this is all of its memory, resident or swapped out, independent of its
/// users: a file that several regions share counts once and completely. For anonymous
/// memory it is the pages that this process has, swapped ones included. Pages that were
/// only read count too, though they are all the kernel's zero page.
///
/// # Errors
/// `fstat` or reading `/proc/self/pagemap` fails.
pub fn resident_bytes(map: &MemoryMap) -> Result<u64, HostMemoryError> {
    let mut seen = HashSet::new();
    let mut sum = 0;
    for region in map.regions() {
        sum += match region.backing() {
            Backing::Shared { file, .. } => {
                let stat = retry_on_intr(|| fstat(file)).map_err(|e| HostMemoryError::Host {
                    what: "fstat of guest memory",
                    source: e.into(),
                })?;
                let new = seen.insert((stat.st_dev, stat.st_ino));
                if new { u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES } else { 0 }
            }
            Backing::Anonymous(memory) => anonymous_bytes(region, memory.host_bytes() as u64)?,
        };
    }
    Ok(sum)
}

fn anonymous_bytes(region: &Region, host_bytes: u64) -> Result<u64, HostMemoryError> {
    let failed = |source| HostMemoryError::Host { what: "reading /proc/self/pagemap", source };
    let pagemap = File::open("/proc/self/pagemap").map_err(failed)?;
    let mut buffer = vec![0; READ_ENTRIES * ENTRY_BYTES];
    let mut offset = host_bytes / PAGE_BYTES * ENTRY_BYTES as u64;
    let mut left = region.pages().pages();
    let mut present = 0;
    while left > 0 {
        let entries = usize::try_from(left).map_or(READ_ENTRIES, |left| left.min(READ_ENTRIES));
        let bytes = buffer.get_mut(..entries * ENTRY_BYTES).unwrap_or_default();
        pagemap.read_exact_at(bytes, offset).map_err(failed)?;
        let (words, _) = bytes.as_chunks::<ENTRY_BYTES>();
        let held =
            words.iter().filter(|&&word| u64::from_ne_bytes(word) & (PRESENT | SWAPPED) != 0);
        present += held.count() as u64;
        offset += bytes.len() as u64;
        left -= entries as u64;
    }
    Ok(present * PAGE_BYTES)
}
