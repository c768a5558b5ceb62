//! Page flags from `/proc/kpageflags`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// The flag of a page in a free block (KPF_BUDDY in linux/kernel-page-flags.h).
pub(crate) const BUDDY: u64 = 1 << 10;

/// The flag of a page that only its owner may access (KPF_OFFLINE, ibid.).
const OFFLINE: u64 = 1 << 23;

/// Bytes of one page's flags.
pub(crate) const FLAGS_BYTES: u64 = 8;

/// Pages per read: the count must not change the flags much.
const CHUNK_PAGES: u64 = 4096;

/// Counts the pages of the ranges `first,count` that are in no free block.
pub(crate) fn not_free(ranges: &[&str]) -> Result<String, String> {
    let path = "/proc/kpageflags";
    let failed = |error: std::io::Error| format!("cannot read {path}: {error}");
    let file = File::open(path).map_err(failed)?;
    let mut flags = vec![0; (CHUNK_PAGES * FLAGS_BYTES) as usize];
    let (mut pages, mut used) = (0, 0);
    for range in ranges {
        let (first, count) = parse(range).ok_or_else(|| format!("not FIRST,COUNT: {range}"))?;
        for chunk in (0..count).step_by(CHUNK_PAGES as usize) {
            let some = (count - chunk).min(CHUNK_PAGES) * FLAGS_BYTES;
            let read = flags.get_mut(..some as usize).ok_or("too long")?;
            file.read_exact_at(read, (first + chunk) * FLAGS_BYTES).map_err(failed)?;
            let (read, _) = read.as_chunks::<8>();
            used += read.iter().filter(|raw| u64::from_ne_bytes(**raw) & BUDDY == 0).count();
        }
        pages += count;
    }
    Ok(format!("pages={pages} used={used}"))
}

/// Counts pages that are marked offline: those of balloons.
pub(crate) fn offline() -> Result<String, String> {
    let path = "/proc/kpageflags";
    let failed = |error: std::io::Error| format!("cannot read {path}: {error}");
    let mut file = File::open(path).map_err(failed)?;
    let mut flags = vec![0; (CHUNK_PAGES * FLAGS_BYTES) as usize];
    let mut offline = 0;
    loop {
        // A short read is the end.
        let read = file.read(&mut flags).map_err(failed)?;
        let (read, _) = flags.get(..read).ok_or("too long")?.as_chunks::<8>();
        if read.is_empty() {
            return Ok(offline.to_string());
        }
        let is_offline = |raw: &&[u8; 8]| u64::from_ne_bytes(**raw) & OFFLINE != 0;
        offline += read.iter().filter(is_offline).count();
    }
}

fn parse(range: &str) -> Option<(u64, u64)> {
    let (first, count) = range.split_once(',')?;
    Some((first.parse().ok()?, count.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_two_numbers() {
        assert_eq!(parse("12,3"), Some((12, 3)));
        assert_eq!(parse("12"), None);
        assert_eq!(parse("12,x"), None);
    }
}
