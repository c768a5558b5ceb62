//! Helpers for programs that run on a KVM, on this machine or inside an emulated one.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::Guest;

use crate::error::{Result, host, wrong};

/// Timeout for a process to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);

/// Between two polls for it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Text before the address in a receiver's log.
const WAITS: &str = ": listening on ";

/// Brings the loopback interface up. Connections between two processes need it, and a machine that
/// just booted has it down.
pub fn raise_loopback() {
    // If it is up, this may be forbidden.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
}

/// Path of this program.
pub(crate) fn this_program() -> Result<PathBuf> {
    std::env::current_exe().map_err(host("finding this program"))
}

/// Runs this program again on this machine. Calls `each` with each line that it prints. Returns its
/// exit code.
pub(crate) fn start_again(words: &[&OsStr], each: &mut dyn FnMut(&str)) -> Result<Option<i32>> {
    let failed = host("starting this program again");
    let mut command = Command::new(this_program()?);
    let command = command.args(words).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        each(&line.map_err(failed)?);
    }
    Ok(child.wait().map_err(failed)?.code())
}

/// Waits until an `aerostat receive` listens, and returns its address.
pub(crate) fn address_of(receiver: &Guest) -> Result<String> {
    let end = Instant::now() + LISTEN_LIMIT;
    loop {
        let log = receiver.console_log();
        if let Some((_, address)) = log.lines().find_map(|line| line.split_once(WAITS)) {
            return Ok(address.to_owned());
        }
        if Instant::now() > end {
            return Err(wrong(format!("the destination does not listen: {log}")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
