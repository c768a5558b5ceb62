//! Errors of the benchmarks.

use std::io;

use control::{ControlError, Faults, Status};
use lab::LabError;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A guest cannot be built, booted or used.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The control API does not answer, or returns an error.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The back end could not be run.
    #[error("the back end: {what}")]
    Backend {
        /// The failed operation.
        what: &'static str,
        /// The error of the host.
        #[source]
        source: io::Error,
    },
    /// An operation on the host failed.
    #[error("host: {what}")]
    Host {
        /// The failed operation.
        what: &'static str,
        /// The error of the host.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The balloon did not reach its target in time.
    #[error("the balloon of {name} stayed at {actual_pages} of {target_pages} pages")]
    NotReached {
        /// Name of the guest.
        name: String,
        /// Size of the balloon, in pages.
        actual_pages: u32,
        /// Target, in pages.
        target_pages: u32,
    },
    /// A condition was not met in time.
    #[error("the balloon of {name} is not {what}: {status:?}\n{log}")]
    NotInTime {
        /// Name of the guest.
        name: String,
        /// The condition.
        what: String,
        /// The last status.
        status: Box<Status>,
        /// The back end's log.
        log: String,
    },
    /// The device counted unexpected faults.
    #[error("the device of {name} counted faults: {faults:?}")]
    Faults {
        /// Name of the guest.
        name: String,
        /// Faults by side and kind.
        faults: Faults,
    },
    /// Pages of the guest have wrong contents.
    #[error("wrong pages in {name}: {pages} of {file}: {}", named.join("; "))]
    WrongPages {
        /// Name of the guest.
        name: String,
        /// The file of the pages.
        file: String,
        /// Number of wrong pages.
        pages: u64,
        /// The first of them, with their contents.
        named: Vec<String>,
    },
    /// The guest's driver has no request queue.
    #[error("the driver of {name} has no request queue")]
    NoRequests {
        /// Name of the guest.
        name: String,
    },
    /// The VMM returned an error or an unexpected answer.
    #[error("the VMM answered {answer} to {command}")]
    Monitor {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
    /// This machine lacks something that the measurement needs.
    #[error("{what} is not available here: {why}")]
    NotHere {
        /// What is missing.
        what: &'static str,
        /// The reason.
        why: String,
    },
    /// The guest, its memory or its balloon is in a wrong state.
    #[error("{what}")]
    Wrong {
        /// The state.
        what: String,
    },
    /// The guest's answer is unexpected.
    #[error("the guest answered {answer:?} to {command:?}")]
    GuestAnswer {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
}

/// Result of a measurement.
pub type Result<T> = std::result::Result<T, BenchError>;

/// Adds the failed operation to an error of the host.
pub(crate) fn host<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> BenchError + Copy {
    move |source| BenchError::Host { what, source: source.into() }
}

/// An error for a wrong state.
pub(crate) const fn wrong(what: String) -> BenchError {
    BenchError::Wrong { what }
}
