//! Files in the page cache that can be dropped, unlike those of a tmpfs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::sync::Mutex;

use rustix::mount::{MountFlags, mount};

use crate::pattern::{self, PAGE_BYTES};

/// Mount point of a host directory.
const HOST_DIRECTORY: &str = "/host";

/// Bytes per system call.
const CHUNK_BYTES: usize = 1 << 20;

/// Files kept open: a hostfs file loses its pages when it is closed.
static OPEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Mounts a directory of the host (User Mode Linux only).
pub(crate) fn mount_host(directory: &str) -> Result<String, String> {
    let failed = |error: &dyn std::fmt::Display| format!("cannot mount {directory}: {error}");
    fs::create_dir_all(HOST_DIRECTORY).map_err(|error| failed(&error))?;
    let data = std::ffi::CString::new(directory).map_err(|error| failed(&error))?;
    mount("none", HOST_DIRECTORY, "hostfs", MountFlags::RDONLY, Some(data.as_c_str()))
        .map_err(|error| failed(&error))?;
    Ok(String::new())
}

/// Reads the first `mib` MiB of a file or a block device into the page cache. The file remains
/// open.
pub(crate) fn read(path: &str, mib: u64) -> Result<String, String> {
    let mut file = File::open(path).map_err(|error| format!("cannot open {path}: {error}"))?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..mib {
        file.read_exact(&mut buffer)
            .map_err(|error| format!("cannot read MiB {chunk} of {path}: {error}"))?;
    }
    OPEN.lock().map_err(|error| error.to_string())?.push(file);
    Ok(mib.to_string())
}

/// Fills a block device with pages that each repeat one word, and leaves them clean in the page
/// cache. zram stores such a page as its word alone (`zram_drv.c`, `page_same_filled`), so only the
/// page cache takes memory.
pub(crate) fn fill(path: &str, mib: u64, seed: u64) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("cannot write {path}: {error}");
    let mut file = File::options().read(true).write(true).open(path).map_err(failed)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..mib {
        repeat_words(&mut buffer, seed, chunk);
        file.write_all(&buffer).map_err(failed)?;
    }
    file.sync_all().map_err(failed)?;
    OPEN.lock().map_err(|error| error.to_string())?.push(file);
    Ok(mib.to_string())
}

/// Verifies what [`fill`] wrote. Prints wrong MiB and returns their number.
pub(crate) fn verify(
    path: &str,
    mib: u64,
    seed: u64,
    emit: &mut dyn FnMut(&str) -> Result<(), String>,
) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("cannot read {path}: {error}");
    let mut file = File::open(path).map_err(failed)?;
    let (mut found, mut wanted) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut wrong = 0;
    for chunk in 0..mib {
        file.read_exact(&mut found).map_err(failed)?;
        repeat_words(&mut wanted, seed, chunk);
        if found != wanted {
            emit(&format!("MiB {chunk}"))?;
            wrong += 1;
        }
    }
    Ok(wrong.to_string())
}

fn repeat_words(buffer: &mut [u8], seed: u64, chunk: u64) {
    let first = chunk * (CHUNK_BYTES / PAGE_BYTES) as u64;
    for (page, bytes) in (first..).zip(buffer.chunks_mut(PAGE_BYTES)) {
        let word = pattern::word_of(seed, page).to_le_bytes();
        bytes.chunks_mut(word.len()).for_each(|bytes| bytes.copy_from_slice(&word[..bytes.len()]));
    }
}
