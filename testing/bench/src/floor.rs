//! The lower bound of a release: one call over the same amount of the same memory.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use host_memory::{Discard, MemoryMap, Region};
use page_set::{PageRange, PageSet};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::cpu_time::CpuClock;
use crate::error::{Result, host};

/// Pages of 4 KiB in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Bytes per write when memory is touched.
const CHUNK_BYTES: usize = 1 << 20;

/// Cost of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Floor {
    /// Wall time in milliseconds.
    pub(crate) wall_ms: f64,
    /// CPU time in milliseconds: less if other threads had the CPU meanwhile.
    pub(crate) cpu_ms: f64,
}

/// Measures one call that releases `mib` MiB of a file in `directory`. The first `touched_mib` of
/// them were written through a mapping, as a guest does.
pub(crate) fn release_once(directory: &Path, mib: u64, touched_mib: u64) -> Result<Floor> {
    let file = Arc::new(unnamed_file(directory, mib << 20)?);
    let length = usize::try_from(mib << 20).unwrap_or(usize::MAX);
    let offset = FileOffset::from_arc(Arc::clone(&file), 0);
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), length, Some(offset))])
            .map_err(host("mapping memory"))?;
    let chunk = vec![0xa5; CHUNK_BYTES];
    for start in (0..touched_mib << 20).step_by(CHUNK_BYTES) {
        let written = memory.write_slice(&chunk, GuestAddress(start));
        written.map_err(host("touching memory"))?;
    }
    let all = PageRange::new(0, mib * PAGES_PER_MIB).map_err(host("making a page range"))?;
    let region = Region::shared(all, file, 0).map_err(host("describing memory"))?;
    let map = MemoryMap::new(vec![region]).map_err(host("describing memory"))?;
    let pages = PageSet::from_iter([all]);
    let (started, cpu_before) = (Instant::now(), CpuClock::own_ms());
    let report = map.discard(&pages);
    let wall_ms = started.elapsed().as_secs_f64() * 1e3;
    let cpu_ms = CpuClock::own_ms() - cpu_before;
    if report.failure_count > 0 || report.calls != 1 {
        let what = format!("{} calls, {} failed", report.calls, report.failure_count);
        return Err(host("releasing memory with one call")(what));
    }
    Ok(Floor { wall_ms, cpu_ms })
}

/// Makes a file of `bytes` without a name, so that it disappears with its last user.
fn unnamed_file(directory: &Path, bytes: u64) -> Result<File> {
    let failed = host("making a file");
    let file = tempfile::tempfile_in(directory).map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    Ok(file)
}
