//! Logging to standard error.

use std::env;
use std::io::{self, IsTerminal};

use clap::{ArgAction, Args};
use diagnostics::LogWriter;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::log_limit::LineLimit;

/// Logging options.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// Log more: -v, -vv, -vvv
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    /// Log filter in the syntax of RUST_LOG, which it overrides
    #[arg(long, global = true, value_name = "FILTER", value_parser = filter)]
    log: Option<String>,
}

/// Levels in ascending verbosity.
const LEVELS: [&str; 4] = ["warn", "info", "debug", "trace"];

/// The level without `-v`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LogLevel {
    /// For commands that print their results.
    Warn = 0,
    /// For servers, whose log is their only output.
    Info = 1,
}

impl LogArgs {
    /// Starts logging with the filter of `--log`, else `RUST_LOG`, else `level` raised by `-v`.
    pub(crate) fn start(&self, level: LogLevel) {
        let place = (level as usize + usize::from(self.verbose)).min(LEVELS.len() - 1);
        let variable = env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
        let filter = match (&self.log, variable) {
            (Some(filter), _) => EnvFilter::new(filter),
            // Not `new`, which prints parse errors to standard error.
            (None, Some(filter)) => EnvFilter::try_new(filter).unwrap_or_else(|error| {
                diagnostics::log_line!("operator: RUST_LOG: {error}; ignoring it");
                EnvFilter::new(LEVELS[place])
            }),
            (None, None) => EnvFilter::new(LEVELS[place]),
        };
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| LogWriter)
            // It would report to standard error that it cannot write to standard error.
            .log_internal_errors(false)
            .with_ansi(io::stderr().is_terminal())
            .finish()
            .with(LineLimit::new())
            .init();
    }
}

fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.into()).map_err(|error| error.to_string())
}
