//! Why a request to the guest failed, and whose fault it was.

use crate::answer::Answer;
use crate::fault::Fault;

/// Most requests that wait to be sent, without the running one. More are refused: their
/// operator does not wait for answers.
pub const MAX_QUEUED_REQUESTS: usize = 8;

/// Why a request is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The driver did not accept `REQUEST_VQ`, or there is no driver.
    #[error("guest: its driver has no request queue")]
    NoQueue,
    /// The driver's queues are stopped.
    #[error("guest: its queues are stopped")]
    Stopped,
    /// [`MAX_QUEUED_REQUESTS`] requests are queued already.
    #[error("operator: {MAX_QUEUED_REQUESTS} requests are queued already")]
    TooMany,
    /// There is no hold to release.
    #[error("operator: the guest holds no free pages")]
    NoHold,
    /// There is a hold already.
    #[error("operator: the guest already holds free pages")]
    HeldAlready,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFailure {
    /// The guest did not answer in time.
    #[error("guest: did not answer in time")]
    TimedOut {
        /// False if the driver provided no buffer to send it in.
        sent: bool,
    },
    /// The operator cancelled it.
    #[error("operator: cancelled the request")]
    Cancelled,
    /// The driver does not support the command.
    #[error("guest: its driver does not support this request")]
    UnknownCommand,
    /// The driver rejected the argument.
    #[error("guest: its driver rejected the argument")]
    BadArgument,
    /// The guest's kernel failed the request.
    #[error("guest: its kernel failed the request with error {errno}")]
    Refused {
        /// Linux error number, as the guest reported it.
        errno: u64,
    },
    /// The guest needed the memory before it had reported all of the hold.
    #[error("guest: needed the memory itself")]
    HoldLost,
    /// The driver's request list is full, or it has a hold already.
    #[error("guest: its driver is busy")]
    Busy,
    /// The answer violates the protocol.
    #[error("guest: the answer violates the protocol")]
    Fault(#[source] Fault),
    /// The queues stopped: the driver was unloaded, or the guest paused.
    #[error("guest: its queues stopped before it answered")]
    QueuesStopped,
    /// Another driver started, or the device was reset.
    #[error("guest: its driver was reset before it answered")]
    DriverReset,
    /// The front end closed the connection.
    #[error("front end: closed the connection before the guest answered")]
    HungUp,
    /// The vring of the request queue is invalid.
    #[error("guest: the vring of its request queue is invalid")]
    BadRing,
}

impl RequestFailure {
    /// The name in the control API and the metrics.
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

/// The outcome of a request.
pub type RequestResult = Result<Answer, RequestFailure>;
