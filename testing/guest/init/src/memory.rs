//! Memory as files on a tmpfs.
//!
//! Page faults from user space are slow in User Mode Linux, so memory is accessed by `write` and
//! `read` with one buffer: then the kernel touches it at full speed.

use std::fs::{self, File};
use std::io::{Read, Write};

use crate::pattern::{self, PAGE_BYTES};
use crate::system::MEMORY_DIRECTORY;

/// Bytes per system call: large enough that the call costs little.
const CHUNK_BYTES: usize = 1 << 20;

/// Pages in a chunk.
const CHUNK_PAGES: u64 = (CHUNK_BYTES / PAGE_BYTES) as u64;

/// What `touch` writes: not zero, so that no zero page can stand in for it.
const TOUCH_BYTE: u8 = 0xa5;

/// Maximum number of wrong pages to print: the console is slow.
pub(crate) const NAMED_PAGES: u64 = 16;

/// Free memory in MiB, rounded down.
pub(crate) fn free_mib() -> Result<String, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|word| word.parse().ok())
        .ok_or("no MemFree in /proc/meminfo")?;
    Ok((kib / 1024).to_string())
}

/// Writes `mib` MiB of memory and frees it again.
pub(crate) fn touch(mib: u64) -> Result<String, String> {
    let path = path_of("touched")?;
    let outcome = write_chunks(&path, mib, |buffer, _| buffer.fill(TOUCH_BYTE));
    // Also after a failure: a half written file would keep the memory.
    fs::remove_file(&path).map_err(|error| format!("cannot remove {path}: {error}"))?;
    outcome?;
    Ok(format!("{mib}"))
}

/// Fills a file of `mib` MiB with a pattern that differs in each page.
pub(crate) fn fill(name: &str, mib: u64, seed: u64) -> Result<String, String> {
    write_chunks(&path_of(name)?, mib, |buffer, first_page| {
        pattern::generate(buffer, seed, first_page);
    })?;
    Ok(format!("{mib}"))
}

/// Verifies what [`fill`] wrote. Prints wrong pages and returns their number.
pub(crate) fn verify(
    name: &str,
    mib: u64,
    seed: u64,
    emit: &mut dyn FnMut(&str) -> Result<(), String>,
) -> Result<String, String> {
    let path = path_of(name)?;
    let mut file = File::open(&path).map_err(|error| format!("cannot open {path}: {error}"))?;
    let mut found = vec![0; CHUNK_BYTES];
    let mut wanted = vec![0; CHUNK_BYTES];
    let mut wrong = 0u64;
    for chunk in 0..mib {
        file.read_exact(&mut found)
            .map_err(|error| format!("cannot read MiB {chunk} of {path}: {error}"))?;
        for page in pattern::wrong_pages(&found, &mut wanted, seed, chunk * CHUNK_PAGES) {
            if wrong < NAMED_PAGES {
                emit(&page.to_string())?;
            }
            wrong += 1;
        }
    }
    match file.read(&mut found) {
        Ok(0) => Ok(wrong.to_string()),
        Ok(_) => Err(format!("{path} holds more than {mib} MiB")),
        Err(error) => Err(format!("cannot read {path}: {error}")),
    }
}

/// Deletes a file of [`fill`].
pub(crate) fn drop_file(name: &str) -> Result<String, String> {
    let path = path_of(name)?;
    fs::remove_file(&path).map_err(|error| format!("cannot remove {path}: {error}"))?;
    Ok(String::new())
}

/// Writes a file MiB by MiB. `produce` fills the buffer from the number of its first page.
fn write_chunks(
    path: &str,
    mib: u64,
    mut produce: impl FnMut(&mut [u8], u64),
) -> Result<(), String> {
    let mut file = File::create(path).map_err(|error| format!("cannot make {path}: {error}"))?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..mib {
        produce(&mut buffer, chunk * CHUNK_PAGES);
        file.write_all(&buffer)
            .map_err(|error| format!("cannot write MiB {chunk} of {path}: {error}"))?;
    }
    Ok(())
}

fn path_of(name: &str) -> Result<String, String> {
    match name.is_empty() || name.contains('/') || name.starts_with('.') {
        true => Err(format!("not a plain file name: {name}")),
        false => Ok(format!("{MEMORY_DIRECTORY}/{name}")),
    }
}
