//! Log lines on standard error.

use std::env;
use std::io::{self, IsTerminal};

use clap::{ArgAction, Args};
use diagnostics::LogWriter;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::log_limit::LineLimit;

/// How much is logged.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// Log more: -v, -vv, -vvv
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    /// What to log, in the form of RUST_LOG, which it overrides
    #[arg(long, global = true, value_name = "FILTER", value_parser = filter)]
    log: Option<String>,
}

/// Levels from few to many lines.
const LEVELS: [&str; 4] = ["warn", "info", "debug", "trace"];

/// The place in the levels from which `-v` counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LogLevel {
    /// A command that prints its own results.
    Warn = 0,
    /// A server, whose log is all that is seen of it.
    Info = 1,
}

impl LogArgs {
    /// Starts to log: `--log`, else `RUST_LOG`, else by `-v` from `level` on.
    pub(crate) fn start(&self, level: LogLevel) {
        let place = (level as usize + usize::from(self.verbose)).min(LEVELS.len() - 1);
        let variable = env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
        let filter = match (&self.log, variable) {
            (Some(filter), _) => EnvFilter::new(filter),
            // Not `new`, which says on standard error what it does not know.
            (None, Some(filter)) => EnvFilter::try_new(filter).unwrap_or_else(|error| {
                diagnostics::say!("operator: RUST_LOG: {error}; it is not looked at");
                EnvFilter::new(LEVELS[place])
            }),
            (None, None) => EnvFilter::new(LEVELS[place]),
        };
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| LogWriter)
            // It would say on standard error that it cannot write there.
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
