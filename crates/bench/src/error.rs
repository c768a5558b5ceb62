//! Why nothing could be measured.

use std::io;

use control::{ControlError, Faults, Status};
use lab::LabError;

/// What stood in the way of a measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The lab has no guest.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The balloon does not answer or refuses.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The back end could not be run.
    #[error("the back end: {what}")]
    Backend {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host refused something that measuring needs.
    #[error("host: {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The guest did not do what it was asked within the time that it has.
    #[error("the balloon of {name} stayed at {actual_pages} of {target_pages} pages")]
    NotReached {
        /// The guest.
        name: String,
        /// Pages it holds.
        actual_pages: u32,
        /// Pages it shall hold.
        target_pages: u32,
    },
    /// Something was not so within the time that it has.
    #[error("the balloon of {name} is not {what}: {status:?}\n{log}")]
    NotInTime {
        /// The guest.
        name: String,
        /// What was waited for.
        what: String,
        /// How it stood.
        status: Box<Status>,
        /// What the back end logged.
        log: String,
    },
    /// The device counted faults where nobody was to make any.
    #[error("the device of {name} counted faults: {faults:?}")]
    Faults {
        /// The guest.
        name: String,
        /// By whose fault and by kind.
        faults: Faults,
    },
    /// Pages of the guest do not hold what it wrote there.
    #[error("wrong pages in {name}: {pages} of {file}: {}", named.join("; "))]
    WrongPages {
        /// The guest.
        name: String,
        /// What they are part of.
        file: String,
        /// How many.
        pages: u64,
        /// The first of them, with what they hold.
        named: Vec<String>,
    },
    /// The guest's driver has no request queue.
    #[error("the driver of {name} cannot be asked")]
    NoRequests {
        /// The guest.
        name: String,
    },
    /// The monitor refuses, or its answer makes no sense.
    #[error("the monitor answered {answer} to {command}")]
    Monitor {
        /// What it was asked.
        command: String,
        /// What it said.
        answer: String,
    },
    /// What is to be measured cannot be had here.
    #[error("{what} is not to be had here: {why}")]
    NotHere {
        /// What was looked for.
        what: &'static str,
        /// Why it is not there.
        why: String,
    },
    /// The guest, its memory or its balloon is not as it has to be.
    #[error("{what}")]
    Wrong {
        /// What was found.
        what: String,
    },
    /// The guest's answer makes no sense.
    #[error("the guest answered {answer:?} to {command:?}")]
    GuestAnswer {
        /// What it was asked.
        command: String,
        /// What it said.
        answer: String,
    },
}

/// Result of a measurement.
pub type Result<T> = std::result::Result<T, BenchError>;

/// Says what this host was asked for when it refused.
pub(crate) fn host<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> BenchError + Copy {
    move |source| BenchError::Host { what, source: source.into() }
}

/// Something that is not as it has to be.
pub(crate) const fn wrong(what: String) -> BenchError {
    BenchError::Wrong { what }
}
