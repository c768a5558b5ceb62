//! Load on the page allocator: a meter of its latency, and a process that keeps it busy.

use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, ExitCode};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// First argument of the process that allocates all the time.
pub(crate) const CHILD_ARGUMENT: &str = "busy-child";

/// Memory of one round of the meter: some pages, from the per-CPU lists and from the zone.
const METER_BYTES: usize = 64 << 10;

/// Number of files of the busy process.
const BUSY_FILES: usize = 64;

/// Maximum bytes per write of the busy process.
const CHUNK_BYTES: usize = 1 << 20;

static BUSY: Mutex<Option<Child>> = Mutex::new(None);

/// Allocates and frees for `ms` milliseconds. Returns the longest and the mean time of a round.
pub(crate) fn meter(ms: u64) -> Result<String, String> {
    let file = memory_file()?;
    let buffer = vec![0x3c; METER_BYTES];
    let began = Instant::now();
    let (mut rounds, mut longest) = (0u32, Duration::ZERO);
    while began.elapsed() < Duration::from_millis(ms) {
        let round = Instant::now();
        (&file).write_all(&buffer).map_err(|error| format!("cannot allocate: {error}"))?;
        longest = longest.max(round.elapsed());
        ftruncate(&file, 0).map_err(|error| format!("cannot free: {error}"))?;
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).map_err(|e| e.to_string())?;
        rounds += 1;
    }
    let mean_ns = began.elapsed().as_nanos() / u128::from(rounds.max(1));
    Ok(format!("longest_us={} mean_ns={mean_ns} rounds={rounds}", longest.as_micros()))
}

/// Starts a process that allocates and frees up to `mib` MiB in pieces of all sizes.
pub(crate) fn start(mib: u64) -> Result<String, String> {
    stop()?;
    let child = Command::new("/proc/self/exe")
        .args([CHILD_ARGUMENT, &mib.to_string()])
        .spawn()
        .map_err(|error| format!("cannot start the busy process: {error}"))?;
    *BUSY.lock().map_err(|error| error.to_string())? = Some(child);
    Ok(String::new())
}

/// Ends the busy process, if any.
pub(crate) fn stop() -> Result<String, String> {
    if let Some(mut child) = BUSY.lock().map_err(|error| error.to_string())?.take() {
        child.kill().map_err(|error| error.to_string())?;
        child.wait().map_err(|error| error.to_string())?;
    }
    Ok(String::new())
}

/// Main function of the process.
pub(crate) fn child(arguments: &[String]) -> ExitCode {
    let Some(mib) = arguments.get(2).and_then(|word| word.parse().ok()) else {
        return ExitCode::FAILURE;
    };
    match keep_allocating(mib) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn keep_allocating(mib: u64) -> Result<(), String> {
    let files: Vec<File> = (0..BUSY_FILES).map(|_| memory_file()).collect::<Result<_, _>>()?;
    let most = (mib << 20) / BUSY_FILES as u64;
    let buffer = vec![0xc3; CHUNK_BYTES];
    let mut random = mib | 1;
    loop {
        // xorshift: any sequence with a long period will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let file = files.get(random as usize % BUSY_FILES).ok_or("no file")?;
        ftruncate(file, 0).map_err(|error| error.to_string())?;
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0)).map_err(|e| e.to_string())?;
        let mut left = usize::try_from((random >> 8) % most).map_err(|error| error.to_string())?;
        while left > 0 {
            let piece = buffer.get(..left.min(CHUNK_BYTES)).ok_or("too long")?;
            (&mut &*file).write_all(piece).map_err(|error| error.to_string())?;
            left -= piece.len();
        }
    }
}

pub(crate) fn memory_file() -> Result<File, String> {
    let file = memfd_create("load", MemfdFlags::CLOEXEC);
    file.map(File::from).map_err(|error| format!("cannot make a memory file: {error}"))
}
