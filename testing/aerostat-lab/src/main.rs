//! The `aerostat-lab` command line: demos, benchmarks and soak tests of Aerostat with real guests.
//! It runs the `aerostat` in its directory. Nothing of it is part of `aerostat`.

#![forbid(unsafe_code)]

mod cmd;

use std::process::ExitCode;

use clap::Parser;
use diagnostics::LogWriter;
use tracing_subscriber::filter::EnvFilter;

use crate::cmd::Command;

/// Demos, benchmarks and soak tests of Aerostat with real guests.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    // Progress and errors go to standard error, like the log.
    let _flush = diagnostics::FlushAtEnd;
    diagnostics::start_log();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter).init();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            diagnostics::log_line!("{failure}");
            failure.exit_code()
        }
    }
}
