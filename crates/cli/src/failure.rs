//! Command failures: what happened, how to fix it, and the exit code.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use control::ControlError;

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// What happened, with its causes.
    pub what: String,
    /// How to fix it.
    pub hint: String,
    /// Exit code.
    pub exit: Exit,
}

/// Exit codes other than 0 and 2, which the argument parser returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command failed.
    Failed = 1,
    /// The guest does not exist or cannot be reached.
    Unreachable = 3,
    /// The command timed out.
    Timeout = 4,
}

impl Failure {
    /// Creates a failure of kind [`Exit::Failed`] with the causes of `error`.
    pub fn new(error: &dyn Error, hint: impl Into<String>) -> Self {
        let mut what = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            what += &format!(": {error}");
            cause = error.source();
        }
        Self { what, hint: hint.into(), exit: Exit::Failed }
    }

    /// Returns the exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let exit = match error {
            ControlError::NotFound { .. }
            | ControlError::Dead { .. }
            | ControlError::NoAnswer { .. }
            | ControlError::Broken { .. } => Exit::Unreachable,
            // The guest did not respond in time.
            ControlError::Answered { status: 504, .. } => Exit::Timeout,
            _ => Exit::Failed,
        };
        Self { exit, ..Self::new(&error, error.hint()) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}\n  hint: {}", self.what, self.hint)
    }
}
