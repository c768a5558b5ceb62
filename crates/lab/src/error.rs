//! What can go wrong in the laboratory, and what to do about it.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// A laboratory that cannot run says why.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file or a system call of this machine failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// What the system answered.
        source: std::io::Error,
    },
    /// A program or file of a Debian package is not there.
    #[error("{what} is missing: install it with `apt-get install {package}`")]
    Missing {
        /// What was looked for.
        what: String,
        /// The package that has it.
        package: String,
    },
    /// A program that builds or fetches something failed.
    #[error("`{command}` failed with {status}; the end of {}:\n{tail}", log.display())]
    Tool {
        /// The command line.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Everything it printed.
        log: PathBuf,
        /// The last lines of that.
        tail: String,
    },
    /// A program printed or a file held something that this crate cannot read.
    #[error("{what} is not as expected: {detail}")]
    Unexpected {
        /// What was read.
        what: String,
        /// What is odd about it.
        detail: String,
    },
    /// This machine cannot do it.
    #[error("this machine cannot {what}: {advice}")]
    Host {
        /// What was tried.
        what: String,
        /// What would help.
        advice: String,
    },
    /// The guest did not answer in time.
    #[error("the guest did not answer `{command}` within {limit:?}; its last lines:\n{tail}")]
    Timeout {
        /// The command, or the wait for the boot.
        command: String,
        /// How long it had.
        limit: Duration,
        /// The last lines of its console and kernel log.
        tail: String,
    },
    /// The guest ended while it was needed.
    #[error("the guest ended ({status}) during `{command}`; its last lines:\n{tail}")]
    Ended {
        /// The command, or the wait for the boot.
        command: String,
        /// How it ended.
        status: String,
        /// The last lines of its console and kernel log.
        tail: String,
    },
    /// The guest answered what it was asked later.
    #[error("the guest did not hear `{command}`")]
    NotHeard {
        /// The command.
        command: String,
    },
    /// The guest answered that it could not do it.
    #[error("the guest cannot `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// The guest's words.
        reason: String,
    },
}

/// Adds what was tried to an error of the system.
pub(crate) trait Context<T> {
    /// Names the deed, in the infinitive.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;

    /// Names the deed and the path it was tried on.
    fn context_path(self, deed: &str, path: &Path) -> Result<T>
    where
        Self: Sized,
    {
        self.context(|| format!("{deed} {}", path.display()))
    }
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| LabError::Io { what: what(), source: error.into() })
    }
}
