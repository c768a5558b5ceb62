//! What everything needs that runs where the KVM is, on this machine or inside of one of the lab.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::Guest;

use crate::error::{Result, host, wrong};

/// For a process to begin to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(60);

/// Between two looks whether it does.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Ends what a receiver says before where it listens.
const WAITS: &str = ": listening on ";

/// Connections between two processes need the loopback interface, and a machine that was just
/// booted does not have it yet.
pub fn raise_loopback() {
    // Where it is there already, this may be forbidden.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
}

/// This program, for another process of it where a KVM is.
pub(crate) fn this_program() -> Result<PathBuf> {
    std::env::current_exe().map_err(host("finding this program"))
}

/// Runs this program once more on this machine; `tell` hears each line that it prints. Returns its
/// exit code.
pub(crate) fn start_again(words: &[&OsStr], tell: &mut dyn FnMut(&str)) -> Result<Option<i32>> {
    let failed = host("starting this program once more");
    let mut command = Command::new(this_program()?);
    let command = command.args(words).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        tell(&line.map_err(failed)?);
    }
    Ok(child.wait().map_err(failed)?.code())
}

/// Waits until a process that is to receive a guest listens; where it does.
pub(crate) fn address_of(receiver: &Guest) -> Result<String> {
    let end = Instant::now() + LISTEN_LIMIT;
    loop {
        let log = receiver.console_log();
        if let Some((_, address)) = log.lines().find_map(|line| line.split_once(WAITS)) {
            return Ok(address.to_owned());
        }
        if Instant::now() > end {
            return Err(wrong(format!("no process waits for the guest: {log}")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
