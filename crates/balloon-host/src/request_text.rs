//! Why a request brought nothing, in words for an operator.

use std::io;
use std::time::Duration;

use balloon_device::{MAX_QUEUED_REQUESTS, RequestFailure, RequestKind, SubmitError};
use control::{ControlError, WhyNot};

/// What the guest was to do.
const fn deed(kind: RequestKind) -> &'static str {
    match kind {
        RequestKind::DropCaches => "drop caches",
        RequestKind::ReportFree => "report its free pages",
        RequestKind::HoldFree => "hold free pages",
        RequestKind::ReleaseHold => "release its hold",
    }
}

/// Why a request is not made.
pub(crate) fn refused(kind: RequestKind, error: SubmitError, connected: bool) -> ControlError {
    let deed = deed(kind);
    let (why, what, hint) = match error {
        SubmitError::NoQueue if !connected => (
            WhyNot::NotPossible,
            format!("no guest is connected that could {deed}"),
            "start the guest, then ask again",
        ),
        SubmitError::NoQueue => (
            WhyNot::NotPossible,
            format!("the guest's driver cannot {deed}: it has no request queue"),
            "load aerostat_balloon in the guest",
        ),
        SubmitError::Stopped => (
            WhyNot::NotPossible,
            format!("the guest cannot {deed} now: it is paused, or its driver was unloaded"),
            "resume the guest, or load aerostat_balloon in it",
        ),
        SubmitError::TooMany => (
            WhyNot::TooMany,
            format!("{MAX_QUEUED_REQUESTS} requests wait for the guest already"),
            "wait for them, or stop the one that runs with `aerostat cancel NAME`",
        ),
        SubmitError::NoHold => (
            WhyNot::NotPossible,
            "the guest holds no free pages".into(),
            "ask for a hold first, with `aerostat free-pages NAME --hold`",
        ),
        SubmitError::HeldAlready => (
            WhyNot::NotPossible,
            "the guest holds free pages already".into(),
            "release them first, with `aerostat free-pages NAME --release`",
        ),
    };
    ControlError::Guest { why, what, hint: hint.into() }
}

/// Why a request brought nothing.
pub(crate) fn failed(
    kind: RequestKind,
    failure: RequestFailure,
    timeout: Duration,
) -> ControlError {
    let deed = deed(kind);
    let (why, what, hint) = match failure {
        RequestFailure::TimedOut { sent: true } => (
            WhyNot::TimedOut,
            format!("the guest did not {deed} within {} ms", timeout.as_millis()),
            "see whether the guest still runs; a longer time-out may help",
        ),
        RequestFailure::TimedOut { sent: false } => (
            WhyNot::TimedOut,
            format!("the guest's driver took no request to {deed} in {} ms", timeout.as_millis()),
            "it is busy with another request, or hangs; `aerostat status NAME` shows which",
        ),
        RequestFailure::Cancelled => (
            WhyNot::Stopped,
            format!("the request to {deed} was stopped"),
            "ask again if this was not meant",
        ),
        RequestFailure::QueuesStopped => (
            WhyNot::Stopped,
            format!("the guest was paused, or its driver unloaded, before it could {deed}"),
            "ask again once the driver runs",
        ),
        RequestFailure::DriverReset => (
            WhyNot::Stopped,
            format!("the guest's driver was reset before it could {deed}"),
            "ask again once the driver runs",
        ),
        RequestFailure::HungUp => (
            WhyNot::Stopped,
            format!("the guest's monitor hung up before the guest could {deed}"),
            "start the guest, then ask again",
        ),
        other => return refused_by_guest(kind, other),
    };
    ControlError::Guest { why, what, hint: hint.into() }
}

/// The same of what the guest said, or did not say well.
fn refused_by_guest(kind: RequestKind, failure: RequestFailure) -> ControlError {
    let deed = deed(kind);
    let (what, hint) = match failure {
        RequestFailure::UnknownCommand => (
            format!("the guest's driver does not know how to {deed}"),
            "load an aerostat_balloon of this version in the guest",
        ),
        RequestFailure::BadArgument => (
            format!("the guest's driver refused to {deed}: it sees no meaning in the argument"),
            "load an aerostat_balloon of this version in the guest",
        ),
        RequestFailure::Refused { errno } => (
            format!("the guest's kernel refused to {deed}: {}", errno_text(errno)),
            "look into the guest's kernel log",
        ),
        RequestFailure::HoldLost => (
            "the guest needed its free memory itself, and the hold is over".into(),
            "leave it more, with --reserve",
        ),
        RequestFailure::Busy => (
            format!("the guest's driver refused to {deed}: it has too much to do, or a hold"),
            "release the hold, or ask again later",
        ),
        RequestFailure::Fault(fault) => (
            format!("the guest's answer breaks the protocol ({fault})"),
            "the guest's driver is at fault; the fault counters tell how often",
        ),
        RequestFailure::BadRing => (
            "the guest's request queue makes no sense and was stopped".into(),
            "load the driver in the guest anew",
        ),
        other => (other.to_string(), "ask again"),
    };
    ControlError::Guest { why: WhyNot::Refused, what, hint: hint.into() }
}

/// An error number of the guest's, in words.
fn errno_text(errno: u64) -> String {
    match i32::try_from(errno) {
        Ok(errno @ 1..=4095) => io::Error::from_raw_os_error(errno).to_string(),
        _ => format!("error {errno}"),
    }
}
