//! Why what the operator asked has no result, and whose fault it was.

use crate::answer::Answer;
use crate::fault::Fault;
use crate::request::MAX_QUEUED_REQUESTS;

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The driver did not accept `REQUEST_VQ`, or there is no driver.
    #[error("guest: its driver has no request queue")]
    NoQueue,
    /// The queues stand still.
    #[error("guest: its queues stand still")]
    Stopped,
    /// [`MAX_QUEUED_REQUESTS`] wait already.
    #[error("operator: {MAX_QUEUED_REQUESTS} requests wait already")]
    TooMany,
    /// There is no hold to release.
    #[error("operator: the guest holds no free pages")]
    NoHold,
    /// There is a hold already.
    #[error("operator: the guest holds free pages already")]
    HeldAlready,
}

/// Why a request has no answer that is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFailure {
    /// The guest did not answer in time.
    #[error("guest: did not answer in time")]
    TimedOut {
        /// False where the driver left no room to send it in.
        sent: bool,
    },
    /// The operator stopped it.
    #[error("operator: stopped the request")]
    Cancelled,
    /// The driver does not know the command.
    #[error("guest: its driver does not know this request")]
    UnknownCommand,
    /// The driver sees no meaning in the argument.
    #[error("guest: its driver sees no meaning in the argument")]
    BadArgument,
    /// The guest's kernel refused.
    #[error("guest: its kernel refused, error {errno}")]
    Refused {
        /// Linux's error number, by the guest's word.
        errno: u64,
    },
    /// The guest needed the memory before it had named all of the hold.
    #[error("guest: needed the memory itself")]
    HoldLost,
    /// The driver has too much to do, or has a hold already.
    #[error("guest: its driver is busy")]
    Busy,
    /// The answer broke the protocol.
    #[error("guest: the answer breaks the protocol")]
    Fault(#[source] Fault),
    /// The queues stopped: the driver was unloaded, or the guest paused.
    #[error("guest: its queues stopped before it had answered")]
    QueuesStopped,
    /// Another driver started, or the device was reset.
    #[error("guest: its driver was reset before it had answered")]
    DriverReset,
    /// The monitor closed the connection.
    #[error("front end: hung up before the guest had answered")]
    HungUp,
    /// The ring could not be followed any more.
    #[error("guest: its request queue makes no sense")]
    BadRing,
}

impl RequestFailure {
    /// The word that the control API and the metrics use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TimedOut { .. } => "timed-out",
            Self::Cancelled => "cancelled",
            Self::UnknownCommand => "unknown-command",
            Self::BadArgument => "bad-argument",
            Self::Refused { .. } => "refused",
            Self::HoldLost => "hold-lost",
            Self::Busy => "busy",
            Self::Fault(_) => "guest-fault",
            Self::QueuesStopped => "queues-stopped",
            Self::DriverReset => "driver-reset",
            Self::HungUp => "hung-up",
            Self::BadRing => "bad-ring",
        }
    }
}

/// How a request ended.
pub type RequestResult = Result<Answer, RequestFailure>;
