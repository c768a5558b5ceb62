//! How much of the guest's memory is in use and not zero: what a move of the guest cannot do
//! without.
//!
//! Which pages are free, the kernel says by their flags; what the others hold is read through
//! `/proc/kcore`, an ELF file whose segments are the kernel's own view of memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::page_flags::{BUDDY, FLAGS_BYTES};
use crate::pattern::PAGE_BYTES;

/// Pages looked at at once: looking must not change much of what it sees.
const CHUNK_PAGES: u64 = 1024;

/// Where the head of an ELF file for 64 bits says where its program headers are, and how many.
const PROGRAM_HEADERS: usize = 32;
const PROGRAM_HEADER_COUNT: usize = 56;
const HEAD_BYTES: usize = 64;

/// One program header, and what of it is needed.
const HEADER_BYTES: usize = 56;
const LOAD: u64 = 1;
const HEADER_OFFSET: usize = 8;
const HEADER_ADDRESS: usize = 16;
const HEADER_PHYSICAL: usize = 24;
const HEADER_MEMORY_BYTES: usize = 40;

/// The direct map of memory begins here without randomisation, and above it otherwise; all below is
/// no kernel's, and the kernel's own text, which is mapped once more, lies above
/// [`TEXT`] (`Documentation/arch/x86/x86_64/mm.rst`).
const TEXT: u64 = 0xffff_ffff_8000_0000;

/// Memory in a row, and where `/proc/kcore` has it.
struct Segment {
    offset: u64,
    first_page: u64,
    pages: u64,
}

/// Counts pages, those in no free block, and those of the latter that hold anything.
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

fn open(path: &str) -> Result<File, String> {
    File::open(path).map_err(|error| format!("cannot open {path}: {error}"))
}

/// The segments of the direct map.
fn segments(memory: &File) -> std::io::Result<Vec<Segment>> {
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
