//! The `aerostat` command line: parses arguments, calls the crates that do the work, and prints
//! their results.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod balloon_arg;
mod cmd;
mod disk_arg;
mod guest_arg;
mod host_arg;
mod log;
mod log_limit;
#[cfg(test)]
mod man;
mod security_arg;

use std::process::ExitCode;

use clap::Parser;
use diagnostics::{FlushAtEnd, contain};

use crate::cmd::Command;

/// Memory ballooning and live migration for Linux VMs.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    log: log::LogArgs,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  failed
  2  wrong usage
  3  the guest does not exist or cannot be reached
  4  timed out

Sizes are binary: 3GiB and 3G are the same, 1.5GiB, 512MiB, 1048576 (bytes).
Small numbers need a unit: 1024 is refused; use 1024MiB or 1024B.
Control sockets are in $AEROSTAT_RUNTIME_DIR, else $XDG_RUNTIME_DIR/aerostat,
else /run/aerostat.";

/// Exit code after a panic, as in Rust.
const PANICKED: u8 = 101;

fn main() -> ExitCode {
    let cli = Cli::parse();
    diagnostics::watch_panics();
    let _flush = FlushAtEnd;
    cli.log.start(cli.command.log_level());
    if !cli.command.restricts_itself() {
        diagnostics::start_log();
    }
    match contain(|| cli.command.run()) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            diagnostics::log_line!("{failure}");
            failure.exit_code()
        }
        Err(panicked) => {
            diagnostics::log_line!("error: {panicked}");
            ExitCode::from(PANICKED)
        }
    }
}
