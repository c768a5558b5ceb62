//! Guest memory that is used and not zero: the minimum that a migration must send.
//!
//! Page flags show free pages. The contents of all others are read through `/proc/kcore`.

use std::os::unix::fs::FileExt;

use crate::kcore::{open, segments};
use crate::page_flags::{BUDDY, FLAGS_BYTES};
use crate::pattern::PAGE_BYTES;

/// Pages per read: the count must not change the memory much.
const CHUNK_PAGES: u64 = 1024;

/// Counts all pages, those in no free block, and those of the latter that are not zero.
pub(crate) fn count() -> Result<String, String> {
    let flags_file = open("/proc/kpageflags")?;
    let memory = open("/proc/kcore")?;
    let failed = |error: std::io::Error| format!("cannot read memory: {error}");
    let (mut pages, mut used, mut held) = (0, 0, 0);
    let mut flags = vec![0; (CHUNK_PAGES * FLAGS_BYTES) as usize];
    let mut page = vec![0; PAGE_BYTES];
    for segment in segments(&memory).map_err(failed)? {
        for chunk in (0..segment.pages).step_by(CHUNK_PAGES as usize) {
            let count = (segment.pages - chunk).min(CHUNK_PAGES);
            let flags = flags.get_mut(..(count * FLAGS_BYTES) as usize).ok_or("too long")?;
            let at = (segment.first_page + chunk) * FLAGS_BYTES;
            flags_file.read_exact_at(flags, at).map_err(failed)?;
            let (flags, _) = flags.as_chunks::<8>();
            pages += count;
            for (index, flags) in (chunk..).zip(flags) {
                if u64::from_ne_bytes(*flags) & BUDDY != 0 {
                    continue;
                }
                used += 1;
                let at = segment.offset + index * PAGE_BYTES as u64;
                memory.read_exact_at(&mut page, at).map_err(failed)?;
                held += u64::from(page.iter().any(|byte| *byte != 0));
            }
        }
    }
    if pages == 0 {
        return Err("/proc/kcore has no memory".to_owned());
    }
    Ok(format!("pages={pages} used={used} held={held}"))
}
