//! Block devices: copies and discards.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};

use rustix::fs::{FallocateFlags, fallocate};

/// Bytes per system call.
const CHUNK_BYTES: usize = 1 << 20;

const MIB: u64 = 1 << 20;

/// Copies the first `mib` MiB, and flushes the target.
pub(crate) fn copy(from: &str, to: &str, mib: u64) -> Result<String, String> {
    let mut source = File::open(from).map_err(|error| format!("cannot open {from}: {error}"))?;
    let mut target = writable(to)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..mib {
        source
            .read_exact(&mut buffer)
            .map_err(|error| format!("cannot read MiB {chunk} of {from}: {error}"))?;
        target
            .write_all(&buffer)
            .map_err(|error| format!("cannot write MiB {chunk} of {to}: {error}"))?;
    }
    target.sync_all().map_err(|error| format!("cannot flush {to}: {error}"))?;
    Ok(mib.to_string())
}

/// Punches a hole of `mib` MiB at MiB `start`. It then reads as zeros.
pub(crate) fn punch(device: &str, start: u64, mib: u64) -> Result<String, String> {
    let file = writable(device)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, flags, start * MIB, mib * MIB)
        .map_err(|error| format!("cannot punch a hole in {device}: {error}"))?;
    Ok(mib.to_string())
}

fn writable(path: &str) -> Result<File, String> {
    let file = OpenOptions::new().write(true).open(path);
    file.map_err(|error| format!("cannot open {path} to write: {error}"))
}
