//! The `aerostat` command line. It reads arguments, calls the rooms that do the
//! work, and prints what they say.

#![forbid(unsafe_code)]

mod balloon_arg;
mod cmd;
mod disk_arg;
mod guest_arg;
mod host_arg;
mod log;
#[cfg(test)]
mod man;
mod security_arg;

use std::process::ExitCode;

use clap::Parser;

use crate::cmd::Command;

/// Gives memory back from running Linux guests, fast.
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
  0  done
  1  failed
  2  wrong usage
  3  the guest was not found or could not be reached
  4  not done within the time-out

Sizes are binary: 3GiB and 3G are the same, 1.5GiB, 512MiB, 1048576 (bytes).
Control sockets live in $AEROSTAT_RUNTIME_DIR, else $XDG_RUNTIME_DIR/aerostat,
else /run/aerostat.";

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.log.start(cli.command.log_level());
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}
