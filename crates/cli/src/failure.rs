//! How a command fails: what was wrong, what to do, and the exit code.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use control::ControlError;

/// The end of a command that did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    /// What was wrong, with its causes.
    pub what: String,
    /// What to do about it.
    pub hint: String,
    /// What a shell is told.
    pub exit: Exit,
}

/// Exit codes but 0, and 2, which is given by the argument parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was tried and went wrong.
    Failed = 1,
    /// There is no such guest, or it cannot be reached.
    Unreachable = 3,
    /// It was not done in time.
    Timeout = 4,
}

impl Failure {
    /// A plain failure that keeps the causes of `error`.
    pub fn new(error: &dyn Error, hint: impl Into<String>) -> Self {
        let mut what = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            what += &format!(": {error}");
            cause = error.source();
        }
        Self { what, hint: hint.into(), exit: Exit::Failed }
    }

    /// For the process.
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
            // The server says so of a guest that did not answer in time.
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
