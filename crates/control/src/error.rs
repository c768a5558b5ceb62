//! Errors: what happened, whose fault it is, and how to fix it.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use crate::size::Size;

/// Why a request to the guest failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestErrorKind {
    /// The current state does not allow it: no driver, no request queue, no hold.
    NotPossible,
    /// The guest has not been asked yet.
    NotAsked,
    /// Too many requests are queued.
    TooMany,
    /// The guest did not respond in time.
    TimedOut,
    /// The request was cancelled, or the guest disconnected.
    Stopped,
    /// The guest refused, or violated the protocol.
    Refused,
}

impl GuestErrorKind {
    const fn http_status(self) -> u16 {
        match self {
            Self::NotAsked => 404,
            Self::NotPossible | Self::Stopped => 409,
            Self::Refused => 502,
            Self::TooMany => 503,
            Self::TimedOut => 504,
        }
    }
}

/// An error between a client and a balloon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    // The caller's fault, detected by the server.
    /// The target is larger than the guest's memory.
    #[error(
        "a balloon of {} does not fit into a guest of {}",
        Size(*target_bytes), Size(*max_bytes)
    )]
    TargetTooLarge {
        /// Requested target.
        target_bytes: u64,
        /// Largest valid target.
        max_bytes: u64,
    },
    /// The target is not a whole number of balloon pages.
    #[error("a balloon of {target_bytes} bytes is not a whole number of 4096-byte pages")]
    TargetUnaligned {
        /// Requested target.
        target_bytes: u64,
    },
    /// The polling interval of statistics is out of range.
    #[error("a statistics interval of {interval_ms} ms is out of range")]
    StatsInterval {
        /// Requested interval.
        interval_ms: u64,
    },
    /// The timeout is over the limit.
    #[error("timeout_ms is {timeout_ms}; it can be at most {limit_ms} ms")]
    TooLong {
        /// Requested timeout.
        timeout_ms: u64,
        /// The limit.
        limit_ms: u128,
    },
    /// The current state does not allow the request.
    #[error("{what}")]
    Refused {
        /// What happened.
        what: String,
        /// How to fix it.
        hint: String,
    },
    /// A size is invalid.
    #[error("{what}")]
    BadSize {
        /// What happened.
        what: String,
        /// How to fix it.
        hint: String,
    },
    /// A request to the guest failed.
    #[error("{what}")]
    Guest {
        /// Kind of failure.
        why: GuestErrorKind,
        /// What happened, and whose fault it is.
        what: String,
        /// How to fix it.
        hint: String,
    },
    /// The request is malformed.
    #[error("{what}")]
    BadRequest {
        /// What happened.
        what: String,
        /// How to fix it.
        hint: String,
    },
    /// The path, or its method, does not exist.
    #[error("{what}")]
    NoSuchEndpoint {
        /// Method and path.
        what: String,
        /// True when the path exists and only the method does not.
        method_only: bool,
    },
    /// The request body is over the limit.
    #[error("the request body is larger than {limit_bytes} bytes")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The request did not arrive in time.
    #[error("the request did not arrive within {limit_ms} ms")]
    RequestTooSlow {
        /// The limit.
        limit_ms: u128,
    },
    /// Too many clients wait for changes.
    #[error("{limit} clients already wait for a change")]
    TooManyWaiters {
        /// The limit.
        limit: usize,
    },

    /// The server is at a limit that other clients use up.
    #[error("{what}")]
    Busy {
        /// Which limit was reached.
        what: String,
        /// How to fix it.
        hint: String,
    },

    // The guest's fault.
    /// The guest did not respond in time.
    #[error("the guest did not answer within {limit_ms} ms")]
    GuestSilent {
        /// The timeout.
        limit_ms: u128,
    },

    // The server's fault.
    /// An operation failed on the host.
    #[error("{what}")]
    Failed {
        /// What happened.
        what: String,
        /// How to fix it.
        hint: String,
    },

    // Names and sockets.
    /// A guest name is invalid.
    #[error("{name:?} is not a valid guest name: {why}")]
    BadName {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A socket path is too long to bind.
    #[error("the socket path {} has {} bytes, the limit is {limit_bytes}", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The limit.
        limit_bytes: usize,
    },
    /// There is no usable directory for control sockets.
    #[error("there is no directory for control sockets: {why}")]
    NoRuntimeDir {
        /// Why.
        why: String,
    },
    /// Another process serves this socket.
    #[error("another process already serves {}", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The operation, as a verb.
        action: &'static str,
        /// Its object.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The server's or client's thread or event loop could not be started.
    #[error("cannot start the event loop of the control socket")]
    EventLoop {
        /// Cause.
        source: io::Error,
    },

    // Detected by the client.
    /// There is no socket.
    #[error("there is no control socket at {}", path.display())]
    NotFound {
        /// Expected path.
        path: PathBuf,
    },
    /// The socket exists, but its process has exited.
    #[error("no process serves {}: the one that did has exited", path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
    },
    /// The server did not respond in time.
    #[error("no answer from {} within {limit_ms} ms", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// The limit.
        limit_ms: u128,
    },
    /// The connection ended before the response was complete.
    #[error("the connection to {} was lost", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Cause.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The server's response is invalid.
    #[error("the server at {} sent an invalid response", path.display())]
    BadAnswer {
        /// The socket.
        path: PathBuf,
        /// Cause.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The server returned an error.
    #[error("{error}")]
    Answered {
        /// HTTP status.
        status: u16,
        /// What happened, according to the server.
        error: String,
        /// How to fix it, according to the server.
        hint: String,
    },
}

impl ControlError {
    /// Adds the operation and its object to a system error.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source: source.into() }
    }

    /// Returns how to fix the error, as one sentence without a full stop.
    pub fn hint(&self) -> String {
        match self {
            Self::TargetTooLarge { max_bytes, .. } => {
                format!(
                    "ask for less than {}; the guest needs some memory for itself",
                    Size(*max_bytes)
                )
            }
            Self::TargetUnaligned { target_bytes: bytes @ ..4096 } => {
                let mib = Size(bytes << 20);
                format!("target_bytes counts bytes, {} of them are {mib:#}", mib.0)
            }
            Self::TargetUnaligned { target_bytes } => {
                format!("ask for {} bytes", target_bytes & !4095)
            }
            Self::TooLong { limit_ms, .. } => format!("set timeout_ms to {limit_ms} or less"),
            Self::Refused { hint, .. }
            | Self::BadSize { hint, .. }
            | Self::Guest { hint, .. }
            | Self::BadRequest { hint, .. }
            | Self::Busy { hint, .. }
            | Self::Failed { hint, .. }
            | Self::Answered { hint, .. } => hint.clone(),
            Self::NoSuchEndpoint { .. } => "see /v1/openapi.json for the endpoints".into(),
            Self::StatsInterval { .. } => "choose 100 to 86400000 ms, or 0 to stop polling".into(),
            Self::GuestSilent { .. } => "check whether the guest runs, or increase wait_ms".into(),
            Self::BodyTooLarge { .. } => "send only the fields listed in /v1/openapi.json".into(),
            Self::RequestTooSlow { .. } => "send the whole request at once".into(),
            Self::TooManyWaiters { .. } => "omit wait_ms, or try again later".into(),
            Self::BadName { .. } => {
                "use up to 64 letters, digits, '.', '_' and '-', beginning with a letter or \
 digit"
                    .into()
            }
            Self::PathTooLong { .. } => {
                "choose a shorter path, or set AEROSTAT_RUNTIME_DIR to a shorter directory".into()
            }
            Self::NoRuntimeDir { .. } => {
                "set AEROSTAT_RUNTIME_DIR to the absolute path of a directory that only you can \
 write"
                    .into()
            }
            Self::SocketInUse { .. } => "stop that process, or choose another name".into(),
            Self::NotASocket { .. } => "remove it, or choose another path".into(),
            Self::Io { .. } => "check that the directory exists and that you have access".into(),
            Self::EventLoop { .. } => "raise the limits on threads and open files".into(),
            Self::NotFound { .. } => {
                "check the name and the user; `aerostat status` lists the running guests".into()
            }
            Self::Dead { path } => {
                format!("restart the guest's balloon, or remove {}", path.display())
            }
            Self::NoAnswer { .. } => {
                "check whether the server's process is stopped or overloaded".into()
            }
            Self::Broken { .. } => {
                "check whether that process still runs; if so, try again: a slow client loses its \
                connection when others need it"
                    .into()
            }
            Self::BadAnswer { .. } => {
                "use the same version of aerostat for client and server".into()
            }
        }
    }

    /// Returns the HTTP status for this error.
    pub fn http_status(&self) -> u16 {
        match self {
            Self::TargetTooLarge { .. }
            | Self::TargetUnaligned { .. }
            | Self::StatsInterval { .. }
            | Self::TooLong { .. }
            | Self::BadSize { .. } => 422,
            Self::Guest { why, .. } => why.http_status(),
            Self::BadRequest { .. } => 400,
            Self::NoSuchEndpoint { method_only: false, .. } => 404,
            Self::NoSuchEndpoint { method_only: true, .. } => 405,
            Self::RequestTooSlow { .. } => 408,
            Self::Refused { .. } => 409,
            Self::BodyTooLarge { .. } => 413,
            Self::TooManyWaiters { .. } | Self::Busy { .. } => 503,
            Self::GuestSilent { .. } => 504,
            _ => 500,
        }
    }
}
