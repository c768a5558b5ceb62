//! Error texts of failed requests, for the operator.

use std::io;
use std::time::Duration;

use balloon_device::{MAX_QUEUED_REQUESTS, RequestFailure, RequestKind, SubmitError};
use control::{ControlError, GuestErrorKind};

/// The requested operation, as an infinitive.
const fn action(kind: RequestKind) -> &'static str {
    match kind {
        RequestKind::DropCaches => "drop caches",
        RequestKind::ReportFree => "report its free pages",
        RequestKind::HoldFree => "hold free pages",
        RequestKind::ReleaseHold => "release its hold",
    }
}

/// Returns the error of a request that was not accepted.
pub(crate) fn refused(kind: RequestKind, error: SubmitError, connected: bool) -> ControlError {
    let action = action(kind);
    let (why, what, hint) = match error {
        SubmitError::NoQueue if !connected => (
            GuestErrorKind::NotPossible,
            format!("no guest is connected that could {action}"),
            "start the guest, then repeat the request",
        ),
        SubmitError::NoQueue => (
            GuestErrorKind::NotPossible,
            format!("the guest's driver cannot {action}: it has no request queue"),
            "load aerostat_balloon in the guest",
        ),
        SubmitError::Stopped => (
            GuestErrorKind::NotPossible,
            format!("the guest cannot {action} now: it is paused, or its driver was unloaded"),
            "resume the guest, or load aerostat_balloon in it",
        ),
        SubmitError::TooMany => (
            GuestErrorKind::TooMany,
            format!("{MAX_QUEUED_REQUESTS} requests to the guest are queued already"),
            "wait for them, or cancel the running one with `aerostat cancel NAME`",
        ),
        SubmitError::NoHold => (
            GuestErrorKind::NotPossible,
            "the guest holds no free pages".into(),
            "create a hold first, with `aerostat free-pages NAME --hold`",
        ),
        SubmitError::HeldAlready => (
            GuestErrorKind::NotPossible,
            "the guest already holds free pages".into(),
            "release them first, with `aerostat free-pages NAME --release`",
        ),
    };
    ControlError::Guest { why, what, hint: hint.into() }
}

/// Returns the error of a request that failed.
pub(crate) fn failed(
    kind: RequestKind,
    failure: RequestFailure,
    timeout: Duration,
) -> ControlError {
    let action = action(kind);
    let (why, what, hint) = match failure {
        RequestFailure::TimedOut { sent: true } => (
            GuestErrorKind::TimedOut,
            format!("the guest did not {action} within {} ms", timeout.as_millis()),
            "check that the guest runs, or use a longer timeout",
        ),
        RequestFailure::TimedOut { sent: false } => (
            GuestErrorKind::TimedOut,
            format!(
                "the guest's driver did not accept a request to {action} within {} ms",
                timeout.as_millis()
            ),
            "check with `aerostat status NAME` whether it is busy with another request or hangs",
        ),
        RequestFailure::Cancelled => (
            GuestErrorKind::Stopped,
            format!("the request to {action} was cancelled"),
            "repeat the request if this was not intended",
        ),
        RequestFailure::QueuesStopped => (
            GuestErrorKind::Stopped,
            format!("the guest was paused, or its driver unloaded, before it could {action}"),
            "repeat the request once the driver runs",
        ),
        RequestFailure::DriverReset => (
            GuestErrorKind::Stopped,
            format!("the guest's driver was reset before it could {action}"),
            "repeat the request once the driver runs",
        ),
        RequestFailure::HungUp => (
            GuestErrorKind::Stopped,
            format!("the guest's front end disconnected before the guest could {action}"),
            "start the guest, then repeat the request",
        ),
        other => return refused_by_guest(kind, other),
    };
    ControlError::Guest { why, what, hint: hint.into() }
}

/// Returns the error of a request that the guest refused or answered wrongly.
fn refused_by_guest(kind: RequestKind, failure: RequestFailure) -> ControlError {
    let action = action(kind);
    let (what, hint) = match failure {
        RequestFailure::UnknownCommand => (
            format!("the guest's driver does not support the request to {action}"),
            "load an aerostat_balloon of this version in the guest",
        ),
        RequestFailure::BadArgument => (
            format!("the guest's driver refused to {action}: it rejected the argument"),
            "load an aerostat_balloon of this version in the guest",
        ),
        RequestFailure::Refused { errno } => (
            format!("the guest's kernel refused to {action}: {}", errno_text(errno)),
            "see the guest's kernel log",
        ),
        RequestFailure::HoldLost => (
            "the guest needed the memory itself, and the hold is lost".into(),
            "leave the guest more free memory, with --reserve",
        ),
        RequestFailure::Busy => (
            format!("the guest's driver refused to {action}: it is busy, or has a hold"),
            "release the hold, or try again later",
        ),
        RequestFailure::Fault(fault) => (
            format!("the guest's answer violates the protocol ({fault})"),
            "update the guest's driver; the fault counters show how often this happens",
        ),
        RequestFailure::BadRing => (
            "the vring of the guest's request queue is invalid, and the queue was stopped".into(),
            "reload the driver in the guest",
        ),
        other => (other.to_string(), "repeat the request"),
    };
    ControlError::Guest { why: GuestErrorKind::Refused, what, hint: hint.into() }
}

/// Returns the text of a guest's error number.
fn errno_text(errno: u64) -> String {
    match i32::try_from(errno) {
        Ok(errno @ 1..=4095) => io::Error::from_raw_os_error(errno).to_string(),
        _ => format!("error {errno}"),
    }
}
