//! Memory pressure that init survives.
//!
//! A second process allocates the memory, with the highest OOM score. It uses a memfd, which the
//! kernel writes at full speed and frees with the process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

/// First argument of the process that allocates the memory.
pub(crate) const CHILD_ARGUMENT: &str = "pressure-child";

/// OOM score of the process that the OOM killer kills first.
pub(crate) const OOM_SCORE_FIRST: &str = "1000";

/// Bytes per system call.
const CHUNK_BYTES: usize = 1 << 20;

/// MiB between two progress lines of the process.
const PROGRESS_MIB: u64 = 8;

/// Allocates up to `mib` MiB and holds them for `hold_ms`. Returns the amount and how it ended.
pub(crate) fn run(mib: u64, hold_ms: u64) -> Result<String, String> {
    let mut child = Command::new("/proc/self/exe")
        .args([CHILD_ARGUMENT, &mib.to_string(), &hold_ms.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start the allocating process: {error}"))?;
    let mut taken_mib = 0;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            taken_mib = line.parse().unwrap_or(taken_mib);
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let end = match (status.code(), status.signal()) {
        (Some(0), _) => "complete",
        (_, Some(_)) => "killed",
        _ => "refused",
    };
    Ok(format!("taken_mib={taken_mib} end={end}"))
}

/// Main function of the process.
pub(crate) fn child(arguments: &[String]) -> ExitCode {
    let number = |index: usize| arguments.get(index).and_then(|word| word.parse().ok());
    let (Some(mib), Some(hold_ms)) = (number(2), number(3)) else {
        return ExitCode::FAILURE;
    };
    match take(mib, Duration::from_millis(hold_ms)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn take(mib: u64, hold: Duration) -> std::io::Result<()> {
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_FIRST)?;
    let mut file = File::from(memfd_create("pressure", MemfdFlags::CLOEXEC)?);
    let buffer = vec![0x5a; CHUNK_BYTES];
    let mut progress = std::io::stdout();
    for taken_mib in 1..=mib {
        file.write_all(&buffer)?;
        if taken_mib % PROGRESS_MIB == 0 || taken_mib == mib {
            writeln!(progress, "{taken_mib}")?;
            progress.flush()?;
        }
    }
    std::thread::sleep(hold);
    Ok(())
}
