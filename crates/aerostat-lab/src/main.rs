//! The `aerostat-lab` command line: shows, measures and tries Aerostat on real guests, which it
//! boots. It runs the `aerostat` beside it. Nothing of it is part of `aerostat`.

#![forbid(unsafe_code)]

mod cmd;

use std::process::ExitCode;

use clap::Parser;
use diagnostics::LogWriter;
use tracing_subscriber::filter::EnvFilter;

use crate::cmd::Command;

/// Shows, measures and tries Aerostat on real guests.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    // Progress goes the way of the log, and so does all that is said beside it.
    let _flush = diagnostics::FlushAtEnd;
    diagnostics::start_log();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter).init();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            diagnostics::say!("{failure}");
            failure.exit_code()
        }
    }
}
