//! Errors of this crate, with advice.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Result of this crate's functions.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// Why a guest cannot be built, booted or used.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file or a system call of this machine failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// The failed operation with its path, in the infinitive.
        what: String,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// A program or file of a Debian package is not installed.
    #[error("{what} is missing: install it with `apt-get install {package}`")]
    Missing {
        /// The program or file.
        what: String,
        /// The package that contains it.
        package: String,
    },
    /// A program that builds or fetches something failed.
    #[error("`{command}` failed with {status}; the end of {}:\n{tail}", log.display())]
    Tool {
        /// The command line.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// File with all of its output.
        log: PathBuf,
        /// The last lines of `log`.
        tail: String,
    },
    /// A program printed or a file held something that this crate cannot read.
    #[error("{what} is not as expected: {detail}")]
    Unexpected {
        /// The text that was read.
        what: String,
        /// How it differs.
        detail: String,
    },
    /// This machine lacks a capability.
    #[error("this machine cannot {what}: {advice}")]
    Host {
        /// The operation, in the infinitive.
        what: String,
        /// The missing condition, or what to do about it.
        advice: String,
    },
    /// The guest did not answer in time.
    #[error("the guest did not answer `{command}` within {limit:?}; its last lines:\n{tail}")]
    Timeout {
        /// The command, or the wait for the boot.
        command: String,
        /// The timeout.
        limit: Duration,
        /// The last lines of its console and kernel log.
        tail: String,
    },
    /// The guest ended during a command or its boot.
    #[error("the guest ended ({status}) during `{command}`; its last lines:\n{tail}")]
    Ended {
        /// The command, or the wait for the boot.
        command: String,
        /// Exit status of its process.
        status: String,
        /// The last lines of its console and kernel log.
        tail: String,
    },
    /// The guest answered a later command, so this one was lost.
    #[error("the guest did not receive `{command}`")]
    CommandLost {
        /// The command.
        command: String,
    },
    /// The guest reported a failure of the command.
    #[error("the guest cannot `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// The guest's text.
        reason: String,
    },
}

/// Adds the failed operation to an I/O error.
pub(crate) trait Context<T> {
    /// Adds the operation, in the infinitive.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;

    /// Adds the operation and its path.
    fn context_path(self, operation: &str, path: &Path) -> Result<T>
    where
        Self: Sized,
    {
        self.context(|| format!("{operation} {}", path.display()))
    }
}

impl<T, E: Into<std::io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| LabError::Io { what: what(), source: error.into() })
    }
}
