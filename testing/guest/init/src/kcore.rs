//! The guest's memory in `/proc/kcore`: an ELF file whose segments are the kernel's mappings.
//! Memory dump tools inside a guest read it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::pattern::PAGE_BYTES;

/// Bytes per read.
const CHUNK_BYTES: usize = 1 << 20;

/// Offsets in a 64-bit ELF header: program header offset and count.
const PROGRAM_HEADERS: usize = 32;
const PROGRAM_HEADER_COUNT: usize = 56;
const HEAD_BYTES: usize = 64;

/// Size of a program header, and offsets in it.
const HEADER_BYTES: usize = 56;
const LOAD: u64 = 1;
const HEADER_OFFSET: usize = 8;
const HEADER_ADDRESS: usize = 16;
const HEADER_PHYSICAL: usize = 24;
const HEADER_MEMORY_BYTES: usize = 40;

/// The direct map starts here without randomisation, and above it otherwise. Lower addresses are
/// not the kernel's. The kernel's text, which is mapped a second time, is above [`TEXT`]
/// (`Documentation/arch/x86/x86_64/mm.rst`).
const TEXT: u64 = 0xffff_ffff_8000_0000;

/// Contiguous memory and its offset in `/proc/kcore`.
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
}

/// Reads all memory. Returns the number of pages, and of those that are not zero.
pub(crate) fn read_all() -> Result<String, String> {
    let memory = open("/proc/kcore")?;
    let failed = |error: std::io::Error| format!("cannot read memory: {error}");
    let mut buffer = vec![0; CHUNK_BYTES];
    let (mut pages, mut filled) = (0, 0);
    for segment in segments(&memory).map_err(failed)? {
        let bytes = segment.pages * PAGE_BYTES as u64;
        for chunk in (0..bytes).step_by(CHUNK_BYTES) {
            let some = (bytes - chunk).min(CHUNK_BYTES as u64);
            let some = buffer.get_mut(..some as usize).ok_or("too long")?;
            memory.read_exact_at(some, segment.offset + chunk).map_err(failed)?;
            let is_filled = |page: &&[u8]| page.iter().any(|byte| *byte != 0);
            filled += some.chunks(PAGE_BYTES).filter(is_filled).count();
        }
        pages += segment.pages;
    }
    if pages == 0 {
        return Err("/proc/kcore has no memory".to_owned());
    }
    Ok(format!("pages={pages} filled={filled}"))
}

pub(crate) fn open(path: &str) -> Result<File, String> {
    File::open(path).map_err(|error| format!("cannot open {path}: {error}"))
}

/// The segments of the direct map.
pub(crate) fn segments(memory: &File) -> std::io::Result<Vec<Segment>> {
    let mut head = [0; HEAD_BYTES];
    memory.read_exact_at(&mut head, 0)?;
    let count = word(&head, PROGRAM_HEADER_COUNT) & 0xffff;
    let mut segments = Vec::new();
    for index in 0..count {
        let mut header = [0; HEADER_BYTES];
        let at = word(&head, PROGRAM_HEADERS) + index * HEADER_BYTES as u64;
        memory.read_exact_at(&mut header, at)?;
        let physical = word(&header, HEADER_PHYSICAL);
        let is_memory = word(&header, 0) & 0xffff_ffff == LOAD
            && physical != u64::MAX
            && word(&header, HEADER_ADDRESS) < TEXT;
        if is_memory {
            segments.push(Segment {
                offset: word(&header, HEADER_OFFSET),
                first_page: physical / PAGE_BYTES as u64,
                pages: word(&header, HEADER_MEMORY_BYTES) / PAGE_BYTES as u64,
            });
        }
    }
    Ok(segments)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}
